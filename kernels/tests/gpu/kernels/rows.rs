//! Measures row kernels: norms and gated activations.

use outrigger_kernels::gpu::rows::{gated_activation, rms_norm};
use outrigger_kernels::gpu::{Activations, DeviceBuffer, DeviceError, Element};
use outrigger_kernels::rows::Activation;

use super::Bench;

pub fn measure(bench: &mut Bench<'_>) -> Result<(), DeviceError> {
    for &rows in bench.shapes.rows {
        if bench.wants("rms_norm") {
            norm(bench, rows)?;
        }
        if bench.wants("gated_activation") {
            gated(bench, rows)?;
        }
    }
    Ok(())
}

fn norm(bench: &mut Bench<'_>, rows: usize) -> Result<(), DeviceError> {
    let (device, cols) = (bench.device, bench.shapes.hidden);
    let bytes = rows * cols * (4 + 2) + cols * 4;
    let rotations = bench.rotations(bytes);
    let weight = bench.noise.f32(device, cols)?;
    let hidden = bench.noise.f32(device, rotations * rows * cols)?;
    let out = DeviceBuffer::<u16>::new(device, rotations * rows * cols)?;
    bench.time("rms_norm, f32 to bf16", format!("{rows} × {cols}"), (bytes as f64, 0.0), rotations, |i| {
        let from = Activations::of(hidden.slice(i * rows * cols, rows * cols), Element::F32, rows, cols);
        let to = Activations::of(out.slice(i * rows * cols, rows * cols), Element::BF16, rows, cols);
        rms_norm(device, from, weight.view(), 1e-5, to)
    })
}

fn gated(bench: &mut Bench<'_>, rows: usize) -> Result<(), DeviceError> {
    let (device, width) = (bench.device, bench.shapes.intermediate);
    let bytes = rows * width * 3 * 2;
    let rotations = bench.rotations(bytes);
    let mut sets = Vec::new();
    for _ in 0..rotations {
        sets.push((bench.noise.bf16(device, rows * 2 * width)?, DeviceBuffer::<u8>::new(device, rows * width * 2)?));
    }
    bench.time("gated_activation, bf16", format!("{rows} × {width}"), (bytes as f64, 0.0), rotations, |i| {
        let (gate_up, out) = &sets[i];
        let gate_up = Activations::new(gate_up, Element::BF16, rows, 2 * width);
        gated_activation(device, Activation::Silu, gate_up, Activations::new(out, Element::BF16, rows, width))
    })
}
