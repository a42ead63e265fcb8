//! Measures sampling: greedy, and with every kind of truncation.

use outrigger_kernels::gpu::DeviceError;
use outrigger_kernels::gpu::sample::{DeviceRow, DeviceSampler};
use outrigger_kernels::sample::{RowParams, Truncation};

use super::Bench;

pub fn measure(bench: &mut Bench<'_>) -> Result<(), DeviceError> {
    let cut = Truncation { top_k: 50, min_p: 0.0, top_p: 0.9 };
    let nucleus = Truncation { top_p: 0.9, ..Truncation::OFF };
    let row = |temperature, truncation| RowParams { temperature, truncation, bits: 1 << 63, ..RowParams::GREEDY };
    let kinds = [
        ("sampling, greedy", RowParams::GREEDY),
        ("sampling, temperature", row(0.8, Truncation::OFF)),
        ("sampling, top-p", row(0.8, nucleus)),
        ("sampling, top-k and top-p", row(0.8, cut)),
    ];
    for &rows in bench.shapes.sampled_rows {
        for (kernel, params) in kinds {
            if bench.wants(kernel) {
                sample(bench, kernel, rows, params)?;
            }
        }
    }
    Ok(())
}

fn sample(bench: &mut Bench<'_>, kernel: &str, rows: usize, params: RowParams<'_>) -> Result<(), DeviceError> {
    let (device, vocab) = (bench.device, bench.shapes.vocab);
    let bytes = rows * vocab * 4;
    let rotations = bench.rotations(bytes);
    let logits = bench.noise.f32(device, rotations * rows * vocab)?;
    let mut sampler = DeviceSampler::new(device, vocab, rows, 0)?;
    let staged = sampler.stage(&vec![DeviceRow { params, pending: None }; rows])?;
    let passes = staged.passes();
    bench.time(kernel, format!("{rows} × {vocab}"), (bytes as f64, 0.0), rotations, |i| {
        sampler.launch(logits.slice(i * rows * vocab, rows * vocab), rows, passes)
    })
}
