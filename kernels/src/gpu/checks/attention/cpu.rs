//! The CPU's attention over the same projections.

use super::harness::Model;
use super::{GpuKvType, KvShape};
use crate::attention::{Attention, AttentionEntry, KvCache, KvType, QueryShape, Slot};
use crate::{Level, Pool};

/// Output rows `[tokens, num_heads * head_dim]` of a sequence that is fed at once.
pub fn attend(qkv: &[f32], model: &Model, block_size: usize) -> Vec<f32> {
    let tokens = qkv.len() / model.width();
    let num_blocks = tokens.div_ceil(block_size);
    let (num_kv_heads, head_dim) = (model.num_kv_heads, model.head_dim);
    let ty = match model.ty {
        GpuKvType::BF16 => KvType::BF16,
        GpuKvType::F16 => KvType::F16,
        GpuKvType::Fp8 => panic!("the CPU has no cache of fp8"),
    };
    let mut cache = KvCache::new(KvShape { num_layers: 1, num_blocks, block_size, num_kv_heads, head_dim }, ty);
    let pool = Pool::new(1);
    let slots: Vec<Slot> = (0..tokens).map(|position| Slot { position, index: position }).collect();
    let mut queries = vec![0.0; tokens * model.num_heads * head_dim];
    cache.append(&pool, 0, &model.rope(), model.scale(), &slots, qkv, &mut queries);
    let block_table: Vec<u32> = (0..num_blocks as u32).collect();
    let entries = [AttentionEntry { first_row: 0, num_tokens: tokens, start: 0, block_table: &block_table }];
    let shape = QueryShape { num_heads: model.num_heads, sliding_window: model.window };
    let mut attention = Attention::default();
    attention.plan(1, &cache, shape, &entries);
    let mut out = vec![0.0; tokens * model.num_heads * head_dim];
    attention.run(&pool, Level::detect(), &cache, 0, shape, &entries, &queries, &mut out);
    out
}
