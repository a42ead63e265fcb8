//! Benchmarks the decoder without engine and HTTP: prefill and decode at several batch sizes, on the default model or another.
//!
//! `cargo bench --bench decoder -- [MODEL] [prefill|decode]`

#![expect(clippy::print_stdout, reason = "its result")]

use std::path::PathBuf;
use std::time::Instant;

use outrigger::config::ComputeConfig;
use outrigger::engine::model::{LoadFormat, ModelFiles};
use outrigger::engine::model_runner::{CpuModelRunner, RunnerConfig};
use outrigger::engine::{self, LogitsEntry, LogitsRunner};
use outrigger::hub;

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let only = words.pop_if(|word| word == "prefill" || word == "decode").unwrap_or_default();
    let model = words.pop().unwrap_or_else(|| "smollm2-135m-instruct".to_owned());
    let home = hub::default_home(|name| std::env::var_os(name)).expect("a home for downloads");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let progress = hub::Progress::detect();
    let resolved = runtime.block_on(hub::resolve(&hub::Config::new(home), &model, true, &progress)).expect("the model");
    let (mut runner, files_name) = load(resolved.path);
    println!("{files_name}: {:.0} MB of packed weights", runner.weight_bytes() as f64 / 1e6);
    for (prompt, chunk) in [(128, 128), (1024, 512)].into_iter().filter(|_| only != "decode") {
        let seconds = best(3, || prefill(&mut runner, prompt, chunk));
        println!("prefill {prompt:>5} tokens: {:8.1} ms {:8.0} tok/s", seconds * 1e3, prompt as f64 / seconds);
    }
    for (sequences, context) in [(1, 128), (1, 1024), (8, 128), (32, 128)].into_iter().filter(|_| only != "prefill") {
        let seconds = best(3, || decode(&mut runner, sequences, context, 24)) / 24.0;
        println!(
            "decode {sequences:>2} x {context:>4}: {:8.2} ms a step {:8.1} tok/s",
            seconds * 1e3,
            sequences as f64 / seconds
        );
    }
}

fn load(path: PathBuf) -> (CpuModelRunner, String) {
    let files = ModelFiles::open(&path, LoadFormat::Auto).expect("the model opens");
    let config = RunnerConfig {
        kv_cache_memory: Some(2 << 30),
        block_size: 16,
        max_model_len: Some(4096),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        ..ComputeConfig::default().runner(&engine::Config::default())
    };
    let start = Instant::now();
    let runner = CpuModelRunner::load(files.config, files.tensors.as_ref(), &config, &|_| {}).expect("the model loads");
    println!("loaded in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    (runner, files.name)
}

fn best(runs: usize, mut run: impl FnMut() -> f64) -> f64 {
    (0..runs).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn token(position: usize, sequence: usize) -> u32 {
    (1000 + (position * 7919 + sequence * 104_729) % 40_000) as u32
}

fn prefill(runner: &mut CpuModelRunner, prompt: usize, chunk: usize) -> f64 {
    let tokens: Vec<u32> = (0..prompt).map(|position| token(position, 0)).collect();
    let table: Vec<u32> = (0..prompt.div_ceil(16) as u32).collect();
    let start = Instant::now();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let first = index * chunk;
        let num_logits = usize::from(first + part.len() == prompt);
        let entry = LogitsEntry { tokens: part, start: first, block_table: &table, num_logits };
        runner.forward(&[entry], &|| {}).expect("a step");
    }
    start.elapsed().as_secs_f64()
}

fn decode(runner: &mut CpuModelRunner, sequences: usize, context: usize, steps: usize) -> f64 {
    let blocks = (context + steps).div_ceil(16);
    let tables: Vec<Vec<u32>> =
        (0..sequences).map(|sequence| (0..blocks).map(|block| (sequence * blocks + block) as u32).collect()).collect();
    for (sequence, table) in tables.iter().enumerate() {
        let tokens: Vec<u32> = (0..context).map(|position| token(position, sequence)).collect();
        let entry = LogitsEntry { tokens: &tokens, start: 0, block_table: table, num_logits: 0 };
        runner.forward(&[entry], &|| {}).expect("a step");
    }
    let start = Instant::now();
    for step in 0..steps {
        let tokens: Vec<u32> = (0..sequences).map(|sequence| token(context + step, sequence)).collect();
        let batch: Vec<LogitsEntry<'_>> = tables
            .iter()
            .zip(tokens.chunks(1))
            .map(|(table, tokens)| LogitsEntry { tokens, start: context + step, block_table: table, num_logits: 1 })
            .collect();
        runner.forward(&batch, &|| {}).expect("a step");
    }
    start.elapsed().as_secs_f64()
}
