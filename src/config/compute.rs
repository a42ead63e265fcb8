//! How the model is computed, as the keys say it; becomes the runner's own settings.

use std::thread;

use crate::engine::model::decoder::DType;
use crate::engine::model_runner::{KvCacheDType, RunnerConfig};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Default: `auto`, the types that the file has.
    pub dtype: DType,
    /// Default: `auto`, which follows `dtype`.
    pub kv_cache_dtype: KvCacheDType,
    /// Default: 1 GiB. Pages that were never used cost nothing.
    pub kv_cache_memory: u64,
    /// Default: 16, as in vLLM.
    pub block_size: usize,
    /// Default: none, which stands for as many as the process may use.
    pub threads: Option<usize>,
}

impl Default for Compute {
    fn default() -> Self {
        Self {
            dtype: DType::Auto,
            kv_cache_dtype: KvCacheDType::Auto,
            kv_cache_memory: 1 << 30,
            block_size: 16,
            threads: None,
        }
    }
}

const MAX_THREADS: usize = 1024;

impl Compute {
    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.kv_cache_memory == 0 {
            problems.push("kv_cache_memory must be greater than 0".into());
        }
        let is_block_size =
            matches!(self.block_size, 16 | 32) || (self.block_size > 0 && self.block_size.is_multiple_of(64));
        if !is_block_size || self.block_size > 4096 {
            problems.push("block_size must be 16, 32 or a multiple of 64, up to 4096".into());
        }
        if self.threads.is_some_and(|threads| !(1..=MAX_THREADS).contains(&threads)) {
            problems.push(format!("threads must be 1 to {MAX_THREADS}"));
        }
    }

    pub fn runner(&self, max_model_len: Option<usize>) -> RunnerConfig {
        // Respects affinity masks and the quota of a control group.
        let available = || thread::available_parallelism().map_or(1, usize::from);
        RunnerConfig {
            dtype: self.dtype,
            kv_cache_dtype: self.kv_cache_dtype,
            kv_cache_memory: self.kv_cache_memory,
            block_size: self.block_size,
            max_model_len,
            threads: self.threads.unwrap_or_else(available),
        }
    }
}
