//! Measures dense products: the projections of a layer, and the head. With `--only "dense tiles"` measures every tile, to find
//! the figures that rank them.

use outrigger_kernels::gpu::gemm::{DenseMatrix, DenseType, Gemm, MatrixError, Tile};
use outrigger_kernels::gpu::rows::Fp8Rows;
use outrigger_kernels::gpu::{Activations, DeviceBuffer, DeviceError, Element, Output};

use super::Bench;

/// How often a forward pass of Llama-3.1-8B does each product: in each of its layers, and once.
pub const PER_PASS: &[(&str, f64)] = &[
    ("dense product, bf16, qkv", 32.0),
    ("dense product, bf16, o", 32.0),
    ("dense product, bf16, gate and up", 32.0),
    ("dense product, bf16, down", 32.0),
    ("dense product, bf16, head", 1.0),
];

/// Weights `[n, k]`, and what becomes of the sums.
#[derive(Clone, Copy)]
struct Projection {
    name: &'static str,
    n: usize,
    k: usize,
    out: Element,
    adds: bool,
}

pub fn measure(bench: &mut Bench<'_>) -> Result<(), DeviceError> {
    let by_tile = bench.only.contains("dense tiles");
    let gemm = Gemm::new(bench.device);
    for projection in projections(bench) {
        for (ty, name) in [(DenseType::BF16, "bf16"), (DenseType::Fp8, "fp8")] {
            let kernel = format!("dense product, {name}, {}", projection.name);
            if (bench.wants(&kernel) || by_tile) && gemm.arithmetic().supports(bench.device, ty) {
                Measurement { gemm: &gemm, projection, ty, kernel, by_tile }.run(bench)?;
            }
        }
    }
    Ok(())
}

fn projections(bench: &Bench<'_>) -> Vec<Projection> {
    let (hidden, intermediate, vocab) = (bench.shapes.hidden, bench.shapes.intermediate, bench.shapes.vocab);
    let stored = |name, n| Projection { name, n, k: hidden, out: Element::BF16, adds: false };
    let added = |name, k| Projection { name, n: hidden, k, out: Element::F32, adds: true };
    vec![
        stored("qkv", hidden * 3 / 2),
        added("o", hidden),
        stored("gate and up", 2 * intermediate),
        added("down", intermediate),
        Projection { out: Element::F32, ..stored("head", vocab) },
    ]
}

struct Measurement<'a> {
    gemm: &'a Gemm,
    projection: Projection,
    ty: DenseType,
    kernel: String,
    by_tile: bool,
}

impl Measurement<'_> {
    fn run(&self, bench: &mut Bench<'_>) -> Result<(), DeviceError> {
        let rotations = bench.rotations(self.projection.n * self.projection.k * self.ty.bytes());
        let matrices: Result<Vec<DenseMatrix>, DeviceError> = (0..rotations).map(|_| self.matrix(bench)).collect();
        let matrices = matrices?;
        for &rows in bench.shapes.rows {
            if self.by_tile {
                for tile in self.gemm.tiles().iter().filter(|tile| tile.tokens < 4 * rows.next_power_of_two().max(8)) {
                    self.time(bench, &matrices, rows, Some(tile))?;
                }
            } else {
                self.time(bench, &matrices, rows, None)?;
            }
        }
        Ok(())
    }

    fn matrix(&self, bench: &Bench<'_>) -> Result<DenseMatrix, DeviceError> {
        let Projection { n, k, .. } = self.projection;
        let mut matrix = match DenseMatrix::new(bench.device, self.ty, n, k) {
            Ok(matrix) => matrix,
            Err(MatrixError::Device(error)) => return Err(error),
            Err(error) => panic!("{}: {error}", self.kernel),
        };
        let together = (1 << 20) / k;
        let content = bench.noise.on_host(together * k * self.ty.bytes());
        for first in (0..n).step_by(together) {
            matrix.upload_rows(first, &content[..together.min(n - first) * k * self.ty.bytes()])?;
        }
        if self.ty == DenseType::Fp8 {
            matrix.upload_scales(0, &vec![1.0; n])?;
        }
        Ok(matrix)
    }

    fn time(
        &self,
        bench: &mut Bench<'_>,
        matrices: &[DenseMatrix],
        rows: usize,
        tile: Option<&Tile>,
    ) -> Result<(), DeviceError> {
        let Projection { n, k, out: element, adds, .. } = self.projection;
        let x = bench.noise.bf16(bench.device, rows * k)?;
        let scales = bench.noise.f32(bench.device, rows)?;
        let out = DeviceBuffer::<u8>::zeroed(bench.device, rows * n * element.bytes())?;
        let out_rows = Activations::new(&out, element, rows, n);
        let target = if adds { Output::add(out_rows) } else { Output::store(out_rows, 0, n) };
        let moved = matrices[0].bytes() + rows * k * self.ty.bytes() + (1 + usize::from(adds)) * out.bytes();
        let flops = 2.0 * (rows * n * k) as f64;
        let by = tile.map_or(String::new(), |tile| format!(" by {}x{}", tile.features, tile.tokens));
        let shape = format!("{rows} × {k} × {n}{by}");
        bench.time(&self.kernel, shape, (moved as f64, flops), matrices.len(), |i| {
            if self.ty == DenseType::Fp8 {
                let x = Fp8Rows::new(x.view(), scales.view(), rows, k);
                return match tile {
                    None => self.gemm.multiply_fp8(&matrices[i], x, target),
                    Some(tile) => self.gemm.multiply_fp8_tiled(&matrices[i], x, target, tile),
                };
            }
            let x = Activations::new(&x, Element::BF16, rows, k);
            match tile {
                None => self.gemm.multiply(&matrices[i], x, target),
                Some(tile) => self.gemm.multiply_tiled(&matrices[i], x, target, tile),
            }
        })
    }
}
