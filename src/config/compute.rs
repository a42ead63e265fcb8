//! How the model is computed, as the keys say it; becomes the runner's own settings.

use std::thread;

use crate::engine;
use crate::engine::model::decoder::DType;
use crate::engine::model::gpu_weights::Quantization;
use crate::engine::model_runner::{DeviceChoice, KvCacheDType, RunnerConfig};

#[derive(Clone, Debug, PartialEq)]
pub struct ComputeConfig {
    /// Default: `auto`, a GPU where there is one.
    pub device: DeviceChoice,
    /// Default: 0.9. Of the GPU's memory, what this process may use.
    pub gpu_memory_utilization: f64,
    /// Default: none, which stands for 64, or 256 on a GPU.
    pub max_num_seqs: Option<usize>,
    /// Default: none, which stands for 512, or 8192 on a GPU.
    pub max_num_batched_tokens: Option<usize>,
    /// Default: `auto`, the types that the file has.
    pub dtype: DType,
    /// Default: none.
    pub quantization: Quantization,
    /// Default: `auto`, which follows `dtype`.
    pub kv_cache_dtype: KvCacheDType,
    /// Default: none, which stands for 1 GiB, or on a GPU what `gpu_memory_utilization` leaves beside the weights.
    pub kv_cache_memory: Option<u64>,
    /// Default: 16, as in vLLM.
    pub block_size: usize,
    /// Default: none, which stands for as many as the process may use.
    pub threads: Option<usize>,
}

impl Default for ComputeConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            gpu_memory_utilization: 0.9,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            dtype: DType::Auto,
            quantization: Quantization::None,
            kv_cache_dtype: KvCacheDType::Auto,
            kv_cache_memory: None,
            block_size: 16,
            threads: None,
        }
    }
}

const MAX_THREADS: usize = 1024;

/// What a step may hold where nothing is said: sequences, and tokens. A GPU reads its weights once a step however many
/// rows share it, so that it wants more of both.
const CPU_STEP: (usize, usize) = (64, 512);
const GPU_STEP: (usize, usize) = (256, 8192);

impl ComputeConfig {
    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.kv_cache_memory == Some(0) {
            problems.push("kv_cache_memory must be greater than 0".into());
        }
        let is_block_size =
            matches!(self.block_size, 16 | 32) || (self.block_size > 0 && self.block_size.is_multiple_of(64));
        if !is_block_size || self.block_size > 4096 {
            problems.push("block_size must be 16, 32 or a multiple of 64, up to 4096".into());
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            problems.push("gpu_memory_utilization must be greater than 0 and at most 1".into());
        }
        if self.threads.is_some_and(|threads| !(1..=MAX_THREADS).contains(&threads)) {
            problems.push(format!("threads must be 1 to {MAX_THREADS}"));
        }
    }

    /// The kinds of device that `device` may turn out to be: whether it is a GPU.
    pub(super) fn possible_devices(&self) -> &'static [bool] {
        match self.device {
            DeviceChoice::Auto => &[false, true],
            DeviceChoice::Cpu => &[false],
            DeviceChoice::Cuda(_) | DeviceChoice::Emulator => &[true],
        }
    }

    /// Sequences and tokens of a step at most.
    pub(super) fn step_limits(&self, on_gpu: bool) -> (usize, usize) {
        let (max_num_seqs, max_num_batched_tokens) = if on_gpu { GPU_STEP } else { CPU_STEP };
        (self.max_num_seqs.unwrap_or(max_num_seqs), self.max_num_batched_tokens.unwrap_or(max_num_batched_tokens))
    }

    pub fn runner(&self, engine: &engine::Config) -> RunnerConfig {
        // Respects affinity masks and the quota of a control group.
        let available = || thread::available_parallelism().map_or(1, usize::from);
        RunnerConfig {
            dtype: self.dtype,
            quantization: self.quantization,
            kv_cache_dtype: self.kv_cache_dtype,
            kv_cache_memory: self.kv_cache_memory,
            gpu_memory_utilization: self.gpu_memory_utilization,
            block_size: self.block_size,
            max_model_len: engine.max_model_len,
            max_num_seqs: engine.max_num_seqs,
            max_num_batched_tokens: engine.max_num_batched_tokens,
            threads: self.threads.unwrap_or_else(available),
        }
    }
}
