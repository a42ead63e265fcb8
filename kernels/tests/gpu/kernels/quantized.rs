//! Measures products with GGUF-quantized weights: the gate and up projection of a layer, at full width.

use outrigger_kernels::Pool;
use outrigger_kernels::gpu::quantized::{QuantMatrix, QuantMatrixError, QuantizedRows, multiply};
use outrigger_kernels::gpu::{Activations, DeviceBuffer, DeviceError, Element, Output};
use outrigger_kernels::matrix::QuantType;

use super::Bench;

const TYPES: &[(QuantType, &str)] = &[(QuantType::Q8_0, "Q8_0"), (QuantType::Q4K, "Q4_K"), (QuantType::Q6K, "Q6_K")];

pub fn measure(bench: &mut Bench<'_>) -> Result<(), DeviceError> {
    for &(ty, name) in TYPES {
        let kernel = format!("quantized product, {name}");
        if bench.wants(&kernel) {
            products(bench, ty, &kernel)?;
        }
    }
    if bench.wants("quantize rows") {
        for &rows in bench.shapes.rows {
            quantize(bench, rows)?;
        }
    }
    Ok(())
}

fn products(bench: &mut Bench<'_>, ty: QuantType, kernel: &str) -> Result<(), DeviceError> {
    let (device, k, n) = (bench.device, bench.shapes.quantized_cols, 2 * bench.shapes.intermediate);
    let row_bytes = k / ty.block_len() * ty.block_bytes();
    let source = bench.noise.on_host(n * row_bytes);
    let rotations = bench.rotations(n * row_bytes);
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let pack = || QuantMatrix::pack(device, &pool, ty, k, &[&source]);
    let matrices: Result<Vec<QuantMatrix>, QuantMatrixError> = (0..rotations).map(|_| pack()).collect();
    let matrices = matrices.map_err(|error| match error {
        QuantMatrixError::Device(error) => error,
        QuantMatrixError::Pack(error) => panic!("{kernel}: {error}"),
    })?;
    for &rows in bench.shapes.rows {
        let hidden = bench.noise.f32(device, rows * k)?;
        let mut x = QuantizedRows::new(device, rows, k)?;
        x.quantize(device, Activations::of(hidden.view(), Element::F32, rows, k))?;
        let out = DeviceBuffer::<u8>::new(device, rows * n * 2)?;
        let out = Output::store(Activations::new(&out, Element::BF16, rows, n), 0, n);
        let bytes = matrices[0].bytes() + rows * k + rows * n * 2;
        let flops = 2.0 * (rows * n * k) as f64;
        bench.time(kernel, format!("{rows} × {k} × {n}"), (bytes as f64, flops), rotations, |i| {
            multiply(device, &matrices[i], &x, out)
        })?;
    }
    Ok(())
}

fn quantize(bench: &mut Bench<'_>, rows: usize) -> Result<(), DeviceError> {
    let (device, k) = (bench.device, bench.shapes.quantized_cols);
    let bytes = rows * k * 5;
    let rotations = bench.rotations(bytes);
    let hidden = bench.noise.f32(device, rotations * rows * k)?;
    let sets: Result<Vec<QuantizedRows>, DeviceError> =
        (0..rotations).map(|_| QuantizedRows::new(device, rows, k)).collect();
    let mut sets = sets?;
    bench.time("quantize rows, f32 to int8", format!("{rows} × {k}"), (bytes as f64, 0.0), rotations, |i| {
        sets[i].quantize(device, Activations::of(hidden.slice(i * rows * k, rows * k), Element::F32, rows, k))
    })
}
