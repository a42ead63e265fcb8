//! Runners for the fixtures and the real model.

use std::path::Path;

use outrigger::config::ComputeConfig;
use outrigger::engine::model::decoder::DType;
use outrigger::engine::model::{LoadFormat, ModelFiles};
use outrigger::engine::model_runner::{CpuModelRunner, RunnerConfig};
use outrigger::engine::{self, LogitsRunner};

use crate::{fixtures, real_model};

/// The arithmetic of a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// As `--dtype float32`: weights, activations and KV cache.
    Float32,
    /// The server's default.
    Default,
}

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub numbers: Numbers,
    pub block_size: usize,
    pub threads: usize,
}

impl Setup {
    pub fn new(numbers: Numbers) -> Self {
        Self { numbers, block_size: 16, threads: 2 }
    }
}

/// A runner for a fixture, with room for at least ten sequences.
pub fn fixture_runner(name: &str, setup: Setup) -> Box<dyn LogitsRunner> {
    load(&fixtures::path(name), setup, 16 << 20)
}

/// A runner for SmolLM2, with room for all golden cases at once.
pub fn smollm2_runner(setup: Setup) -> Box<dyn LogitsRunner> {
    load(real_model::path(), setup, 256 << 20)
}

fn load(path: &Path, setup: Setup, kv_cache_memory: u64) -> Box<dyn LogitsRunner> {
    let files = ModelFiles::open(path, LoadFormat::Auto).unwrap();
    let config = RunnerConfig {
        dtype: match setup.numbers {
            Numbers::Float32 => DType::Float32,
            Numbers::Default => DType::Auto,
        },
        kv_cache_memory: Some(kv_cache_memory),
        block_size: setup.block_size,
        max_model_len: Some(files.config.max_position_embeddings.min(2048)),
        threads: setup.threads,
        ..ComputeConfig::default().runner(&engine::Config::default())
    };
    let runner = CpuModelRunner::load(files.config, files.tensors.as_ref(), &config, &|_| ());
    Box::new(runner.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}
