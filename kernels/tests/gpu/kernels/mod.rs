//! Measures how close each kernel comes to the device's limits, with the shapes of Llama-3.1-8B.

mod attention;
mod gemm;
mod quantized;
mod rows;
mod sample;

use outrigger_kernels::gpu::{Device, DeviceError, measure};

use crate::arguments::Arguments;
use crate::noise::Noise;
use crate::table::{self, Ceilings, Row};
use attention::Batch;

/// The shapes to measure at.
#[derive(Clone, Copy)]
pub struct Shapes {
    pub hidden: usize,
    pub intermediate: usize,
    pub vocab: usize,
    /// A multiple of 256, as the K-quants need.
    pub quantized_cols: usize,
    /// Query heads, KV heads, and elements of a head.
    pub heads: (usize, usize, usize),
    pub attention: &'static [Batch],
    pub sampled_rows: &'static [usize],
    /// Rows of a decode step, and of a prefill chunk.
    pub rows: &'static [usize],
    /// Buffers rotate over this many bytes, more than the cache holds.
    pub rotated_bytes: usize,
    pub copied_bytes: usize,
}

const fn batch(sequences: usize, cached: usize, new: usize) -> Batch {
    Batch { sequences, cached, new }
}

const LLAMA_8B: Shapes = Shapes {
    hidden: 4096,
    intermediate: 14336,
    vocab: 128_256,
    quantized_cols: 4096,
    heads: (32, 8, 128),
    attention: &[batch(1, 8191, 1), batch(32, 8191, 1), batch(256, 639, 1), batch(8, 0, 2048), batch(1, 14336, 2048)],
    sampled_rows: &[1, 256],
    rows: &[1, 8, 64, 256, 2048],
    rotated_bytes: 256 << 20,
    copied_bytes: 1 << 30,
};

/// For the rehearsal on the emulator.
const TINY: Shapes = Shapes {
    hidden: 64,
    intermediate: 128,
    vocab: 300,
    quantized_cols: 256,
    heads: (4, 2, 64),
    attention: &[batch(2, 70, 1), batch(1, 0, 40)],
    sampled_rows: &[2],
    rows: &[1, 3],
    rotated_bytes: 64 << 10,
    copied_bytes: 64 << 10,
};

/// What the families' measurements share.
pub struct Bench<'a> {
    pub device: &'a Device,
    pub shapes: Shapes,
    pub noise: Noise,
    only: &'a str,
    rows: Vec<Row>,
    problems: Vec<String>,
}

impl Bench<'_> {
    /// How many sets of buffers of this size to rotate among.
    pub fn rotations(&self, bytes: usize) -> usize {
        self.shapes.rotated_bytes.div_ceil(bytes.max(1)).clamp(1, 64)
    }

    pub fn wants(&self, kernel: &str) -> bool {
        kernel.contains(self.only)
    }

    pub fn time(
        &mut self,
        kernel: &str,
        shape: String,
        (bytes, flops): (f64, f64),
        rotations: usize,
        work: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let seconds = measure::seconds(self.device, rotations, work)?;
        self.rows.push(Row { kernel: kernel.to_owned(), shape, seconds, bytes, flops });
        Ok(())
    }
}

type Family = fn(&mut Bench<'_>) -> Result<(), DeviceError>;

/// Each measures the kernels of one file.
const FAMILIES: &[(&str, Family)] = &[
    ("gemm", gemm::measure),
    ("attention", attention::measure),
    ("rows", rows::measure),
    ("sample", sample::measure),
    ("quantized", quantized::measure),
];

pub fn run(device: &Device, is_real: bool, arguments: &Arguments) -> bool {
    let shapes = if is_real { LLAMA_8B } else { TINY };
    let noise = Noise::new(0x5eed);
    let mut bench = Bench { device, shapes, noise, only: &arguments.only, rows: Vec::new(), problems: Vec::new() };
    for (family, measure) in FAMILIES {
        if let Err(error) = measure(&mut bench) {
            bench.problems.push(format!("{family}: {error}"));
        }
    }
    let ceilings = measure::copy_bandwidth(device, shapes.copied_bytes)
        .map_err(|error| error.to_string())
        .and_then(|copy| Ceilings::new(copy, arguments.ceilings.as_deref()));
    match ceilings {
        Ok(ceilings) => {
            let tables = table::markdown(&bench.rows, &ceilings)
                + &table::cost_of_invariance(&bench.rows, &ceilings, gemm::PER_PASS);
            publish(&tables, arguments, &mut bench.problems);
        }
        Err(problem) => bench.problems.push(problem),
    }
    if !is_real {
        println!("kernels: a rehearsal on the emulator; its times mean nothing");
    }
    for problem in &bench.problems {
        println!("FAILED kernels: {problem}");
    }
    bench.problems.is_empty()
}

fn publish(markdown: &str, arguments: &Arguments, problems: &mut Vec<String>) {
    println!("{markdown}");
    if let Some(path) = &arguments.markdown
        && let Err(error) = std::fs::write(path, markdown)
    {
        problems.push(format!("{}: {error}", path.display()));
    }
}
