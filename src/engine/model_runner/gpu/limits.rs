//! How large things are on a GPU: the largest step that is planned for, the pool that takes what is left, and what is refused
//! before gigabytes are read.

use outrigger_kernels::gpu::attention::GpuKvType;
use outrigger_kernels::gpu::{Device, DeviceError, Element};

use super::super::{KvCacheDType, RunnerConfig, RunnerLoadError};
use super::graphs::Graphs;
use super::rows::RowLimits;
use crate::engine::model::ModelConfig;
use crate::engine::model::gpu_decoder::Caps;
use crate::engine::model::gpu_weights::Precision;
use crate::engine::sampler::MAX_VOCAB_SIZE;

/// Device memory that is left alone beside weights, activations and the pool: for graphs and what the driver takes later.
const HEADROOM: u64 = 256 << 20;

/// Rows of logits and of tokens that a step may have: what grids and page-locked memory are made for.
const MAX_SEQS: usize = 1 << 14;
const MAX_ROWS: usize = 1 << 20;

/// Rows of logits of a step by which prompts are scored. Enough to keep the device busy, little beside the weights.
pub(super) const MAX_SCORED_TOKENS: usize = 256;

/// The synthetic inference has a row beside those of the sequences.
pub(super) fn max_entries(config: &RunnerConfig) -> usize {
    config.max_num_seqs + 1
}

pub(super) fn caps(config: &RunnerConfig, model: &ModelConfig) -> Caps {
    let output_rows = Graphs::padded(max_entries(config)) + MAX_SCORED_TOKENS;
    Caps {
        output_rows,
        rows: config.max_num_batched_tokens.max(output_rows),
        positions: config.max_model_len.unwrap_or(model.max_position_embeddings),
    }
}

pub(super) fn row_limits(config: &RunnerConfig, caps: Caps) -> RowLimits {
    RowLimits {
        rows: caps.rows,
        entries: max_entries(config),
        block_size: config.block_size,
        blocks: caps.positions.div_ceil(config.block_size),
    }
}

/// What the device's sampler can take, asked before gigabytes are read.
pub(super) fn check_limits(config: &RunnerConfig, model: &ModelConfig) -> Result<(), RunnerLoadError> {
    let limits = [
        ("vocab_size", model.vocab_size, MAX_VOCAB_SIZE),
        ("max_num_seqs", config.max_num_seqs, MAX_SEQS),
        ("max_num_batched_tokens", config.max_num_batched_tokens, MAX_ROWS),
    ];
    match limits.into_iter().find(|(_, value, most)| value > most) {
        Some((name, value, most)) => Err(RunnerLoadError::GpuLimit { name, value, most }),
        None => Ok(()),
    }
}

/// Blocks of the KV pool.
pub(super) fn num_blocks(device: &Device, config: &RunnerConfig, block_bytes: u64) -> Result<usize, RunnerLoadError> {
    let pool = pool_bytes(device, config)?;
    config.num_blocks(pool, block_bytes).map_err(|error| match (config.kv_cache_memory, error) {
        (None, RunnerLoadError::KvCacheMemory { memory, needed, .. }) => RunnerLoadError::GpuMemory {
            left: memory,
            needed,
            utilization: config.gpu_memory_utilization,
            tokens: config.max_num_batched_tokens,
        },
        (_, error) => error,
    })
}

/// What of the device's memory the pool may take: what `gpu_memory_utilization` leaves beside all that is there already, of
/// this process and of others.
fn pool_bytes(device: &Device, config: &RunnerConfig) -> Result<u64, DeviceError> {
    if let Some(bytes) = config.kv_cache_memory {
        return Ok(bytes);
    }
    device.synchronize()?;
    let memory = device.driver().memory()?;
    let usable = (memory.total as f64 * config.gpu_memory_utilization) as u64;
    Ok(usable.saturating_sub(memory.total - memory.free).saturating_sub(HEADROOM))
}

pub(super) fn kv_type(asked: KvCacheDType, precision: Precision) -> Result<GpuKvType, RunnerLoadError> {
    match (asked, precision.attention) {
        (KvCacheDType::Fp8, _) => Ok(GpuKvType::Fp8),
        (KvCacheDType::Auto | KvCacheDType::BFloat16, Element::BF16) => Ok(GpuKvType::BF16),
        (KvCacheDType::Auto | KvCacheDType::Float16, Element::F16) => Ok(GpuKvType::F16),
        (asked, element) => Err(RunnerLoadError::KvCacheDType {
            asked: asked.name(),
            device: "cuda",
            known: if element == Element::BF16 {
                "bfloat16 and fp8 beside these weights"
            } else {
                "float16 and fp8 beside these weights"
            },
        }),
    }
}
