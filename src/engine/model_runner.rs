//! Runs batches of the engine through the decoder, over a KV pool of fixed size on this machine's processors.

mod device;
mod gpu;

use std::sync::Arc;

use outrigger_kernels::Pool;
use outrigger_kernels::attention::{AttentionEntry, KvCache, KvShape, KvType, Slot};
use outrigger_kernels::gpu::DeviceError;
use outrigger_kernels::gpu::attention::UnsupportedAttention;
use sha2::{Digest, Sha256};

use super::batch::{LogitsEntry, LogitsRunner, PagedModel, RunnerError};
use super::model::decoder::{DType, Decoder, DecoderError, Pass};
use super::model::gpu_weights::{GpuLoadError, Quantization};
use super::model::{ModelConfig, TensorSource};
use crate::types::{Fingerprint, TokenId};

pub use device::{ComputeDevice, DeviceChoice};
pub use gpu::GpuModelRunner;

/// Number type of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCacheDType {
    /// float32 and bfloat16 where `dtype` is, else float16.
    #[default]
    Auto,
    Float32,
    Float16,
    BFloat16,
    /// Eight bits (E4M3), on a GPU.
    Fp8,
}

impl KvCacheDType {
    pub fn name(self) -> &'static str {
        match self {
            KvCacheDType::Auto => "auto",
            KvCacheDType::Float32 => "float32",
            KvCacheDType::Float16 => "float16",
            KvCacheDType::BFloat16 => "bfloat16",
            KvCacheDType::Fp8 => "fp8",
        }
    }

    fn on_cpu(self, dtype: DType) -> Result<KvType, RunnerLoadError> {
        match (self, dtype) {
            (KvCacheDType::Float32, _) | (KvCacheDType::Auto, DType::Float32) => Ok(KvType::F32),
            (KvCacheDType::BFloat16, _) | (KvCacheDType::Auto, DType::BFloat16) => Ok(KvType::BF16),
            (KvCacheDType::Float16, _) | (KvCacheDType::Auto, DType::Auto | DType::Float16) => Ok(KvType::F16),
            (KvCacheDType::Fp8, _) => Err(RunnerLoadError::KvCacheDType {
                asked: "fp8",
                device: "cpu",
                known: "float32, float16 and bfloat16",
            }),
        }
    }
}

/// How a model is run.
#[derive(Clone, Debug)]
pub struct RunnerConfig {
    pub dtype: DType,
    /// Of dense weights, on a GPU.
    pub quantization: Quantization,
    pub kv_cache_dtype: KvCacheDType,
    /// Bytes of the KV pool, rounded down to whole blocks. By default 1 GiB, or on a GPU what
    /// `gpu_memory_utilization` leaves beside the weights.
    pub kv_cache_memory: Option<u64>,
    /// Fraction of a GPU's memory that may be in use.
    pub gpu_memory_utilization: f64,
    /// Positions a block: 16, 32, or a multiple of 64.
    pub block_size: usize,
    /// Longest sequence, at most the model's own limit. By default that limit, or what the KV pool holds if that is less.
    pub max_model_len: Option<usize>,
    /// Sequences and tokens of a step at most, for which a GPU's memory is set aside.
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// Threads that compute, the engine's own included.
    pub threads: usize,
}

/// The KV pool on processors where nothing is said.
pub const CPU_KV_CACHE_MEMORY: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum RunnerLoadError {
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    #[error(transparent)]
    Gpu(#[from] GpuLoadError),
    #[error(transparent)]
    Attention(#[from] UnsupportedAttention),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("kv_cache_dtype {asked} is not for device {device}, which keeps {known}")]
    KvCacheDType { asked: &'static str, device: &'static str, known: &'static str },
    #[error(
        "after the weights and the activations of {tokens} tokens (max_num_batched_tokens), gpu_memory_utilization {utilization} \
         leaves {left} bytes for the KV pool, and {needed} are needed: raise it, free the device, or lower max_model_len or \
         max_num_batched_tokens"
    )]
    GpuMemory { left: u64, needed: u64, utilization: f64, tokens: usize },
    #[error("{name} is {value}; on a GPU it may be {most} at most")]
    GpuLimit { name: &'static str, value: usize, most: usize },
    #[error("quantization fp8 is for device cuda; processors take weights that are quantized in the file")]
    Quantization,
    #[error("block_size is {0}; 16, 32 or a multiple of 64 is needed")]
    BlockSize(usize),
    #[error("max_model_len is {asked}, more than the {limit} positions of the model")]
    MaxModelLen { asked: usize, limit: usize },
    #[error(
        "kv_cache_memory of {memory} bytes holds {positions} positions, fewer than max_model_len {max_model_len}; \
         give at least {needed} bytes or lower max_model_len"
    )]
    KvCacheMemory { memory: u64, positions: usize, max_model_len: usize, needed: u64 },
}

/// The decoder and its KV pool on this machine's processors.
pub struct CpuModelRunner {
    decoder: Decoder,
    cache: KvCache,
    max_model_len: usize,
    fingerprint: Fingerprint,
    logits: Vec<f32>,
    tokens: Vec<TokenId>,
    slots: Vec<Slot>,
    output_rows: Vec<usize>,
}

impl CpuModelRunner {
    /// Packs the weights of an opened model. `progress` is told the fraction done.
    pub fn load(
        model: ModelConfig,
        tensors: &dyn TensorSource,
        config: &RunnerConfig,
        progress: &dyn Fn(f32),
    ) -> Result<Self, RunnerLoadError> {
        config.check(&model)?;
        if config.quantization != Quantization::None {
            return Err(RunnerLoadError::Quantization);
        }
        let kv_type = config.kv_cache_dtype.on_cpu(config.dtype)?;
        let block_bytes = config.kv_shape(&model, 1).block_bytes(kv_type) as u64;
        let num_blocks = config.num_blocks(config.kv_cache_memory.unwrap_or(CPU_KV_CACHE_MEMORY), block_bytes)?;
        let shape = config.kv_shape(&model, num_blocks);
        let most = model.max_position_embeddings.min(num_blocks * config.block_size);
        let max_model_len = config.max_model_len.unwrap_or(most);
        let total = tensors.total_bytes().max(1);
        let pool = Arc::new(Pool::new(config.threads));
        let report = |bytes: u64| progress((bytes as f64 / total as f64).min(1.0) as f32);
        let decoder = Decoder::load(model, tensors, config.dtype, max_model_len, pool, &report)?;
        let mut digest = Sha256::new();
        digest.update(decoder.numerics_digest(config.dtype));
        digest.update([kv_type as u8]);
        Ok(Self {
            decoder,
            cache: KvCache::new(shape, kv_type),
            max_model_len,
            fingerprint: to_fingerprint(digest),
            logits: Vec::new(),
            tokens: Vec::new(),
            slots: Vec::new(),
            output_rows: Vec::new(),
        })
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.clone()
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }
}

impl RunnerConfig {
    /// What holds on every device.
    fn check(&self, model: &ModelConfig) -> Result<(), RunnerLoadError> {
        let size = self.block_size;
        if size == 0 || !(64 % size == 0 && size >= 16 || size.is_multiple_of(64)) {
            return Err(RunnerLoadError::BlockSize(size));
        }
        let limit = model.max_position_embeddings;
        match self.max_model_len.filter(|asked| *asked > limit) {
            Some(asked) => Err(RunnerLoadError::MaxModelLen { asked, limit }),
            None => Ok(()),
        }
    }

    fn kv_shape(&self, model: &ModelConfig, num_blocks: usize) -> KvShape {
        KvShape {
            num_layers: model.num_hidden_layers,
            num_blocks,
            block_size: self.block_size,
            num_kv_heads: model.num_key_value_heads,
            head_dim: model.head_dim,
        }
    }

    /// Blocks of so many bytes that `memory` holds: enough for the longest sequence that was asked for, or else for one block.
    fn num_blocks(&self, memory: u64, block_bytes: u64) -> Result<usize, RunnerLoadError> {
        let num_blocks = usize::try_from(memory / block_bytes).unwrap_or(usize::MAX).min(u32::MAX as usize);
        let max_model_len = self.max_model_len.unwrap_or(self.block_size);
        let needed = max_model_len.div_ceil(self.block_size);
        if num_blocks < needed {
            return Err(RunnerLoadError::KvCacheMemory {
                memory,
                positions: num_blocks * self.block_size,
                max_model_len,
                needed: needed as u64 * block_bytes,
            });
        }
        Ok(num_blocks)
    }
}

fn to_fingerprint(digest: Sha256) -> Fingerprint {
    let hex = digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>();
    Fingerprint::new(hex)
}

impl LogitsRunner for CpuModelRunner {
    fn forward(&mut self, batch: &[LogitsEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        self.tokens.clear();
        self.slots.clear();
        self.output_rows.clear();
        let block_size = self.cache.shape().block_size;
        let mut entries = Vec::with_capacity(batch.len());
        for entry in batch {
            let first_row = self.tokens.len();
            self.tokens.extend_from_slice(entry.tokens);
            self.slots.extend((entry.start..entry.start + entry.tokens.len()).map(|position| Slot {
                position,
                index: entry.block_table[position / block_size] as usize * block_size + position % block_size,
            }));
            self.output_rows.extend(self.tokens.len() - entry.num_logits..self.tokens.len());
            entries.push(AttentionEntry {
                first_row,
                num_tokens: entry.tokens.len(),
                start: entry.start,
                block_table: entry.block_table,
            });
        }
        let pass = Pass { tokens: &self.tokens, slots: &self.slots, entries: &entries, output_rows: &self.output_rows };
        self.decoder.forward(&pass, &mut self.cache, &mut self.logits, progress);
        Ok(())
    }

    fn logits_mut(&mut self, row: usize) -> &mut [f32] {
        let vocab_size = self.decoder.config().vocab_size;
        &mut self.logits[row * vocab_size..][..vocab_size]
    }
}

impl PagedModel for CpuModelRunner {
    fn copy_block(&mut self, from: u32, to: u32) {
        self.cache.copy_block(from as usize, to as usize);
    }

    fn block_size(&self) -> usize {
        self.cache.shape().block_size
    }

    fn num_blocks(&self) -> u32 {
        self.cache.shape().num_blocks as u32
    }

    fn block_bytes(&self) -> usize {
        self.cache.shape().block_bytes(self.cache.ty())
    }

    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn corrupt(&mut self) {
        self.decoder.corrupt();
    }

    fn spoil(&mut self) {
        self.decoder.spoil();
    }
}
