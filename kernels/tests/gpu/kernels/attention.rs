//! Measures attention over the paged cache: decoding at several context lengths, and whole prompts.

use outrigger_kernels::attention::KvShape;
use outrigger_kernels::gpu::attention::{
    AttentionEntry, AttentionLimits, AttentionOperands, AttentionPlan, AttentionWorkspace, GpuKvCache, GpuKvType,
    QueryShape,
};
use outrigger_kernels::gpu::{Activations, DeviceBuffer, DeviceError, Element};

use super::Bench;

const BLOCK_SIZE: usize = 16;

/// New tokens of each of so many sequences, behind so many that are in the cache.
#[derive(Clone, Copy)]
pub struct Batch {
    pub sequences: usize,
    pub cached: usize,
    pub new: usize,
}

pub fn measure(bench: &mut Bench<'_>) -> Result<(), DeviceError> {
    for &batch in bench.shapes.attention {
        for (ty, name) in [(GpuKvType::BF16, "bf16"), (GpuKvType::Fp8, "fp8")] {
            let phase = if batch.new == 1 { "decode" } else { "prefill" };
            let kernel = format!("attention, {phase}, {name} cache");
            if bench.wants(&kernel) {
                attend(bench, &kernel, ty, batch)?;
            }
        }
    }
    Ok(())
}

fn attend(bench: &mut Bench<'_>, kernel: &str, ty: GpuKvType, batch: Batch) -> Result<(), DeviceError> {
    let (device, (heads, kv_heads, head_dim)) = (bench.device, bench.shapes.heads);
    let context = batch.cached + batch.new;
    let blocks_each = context.div_ceil(BLOCK_SIZE);
    let num_blocks = batch.sequences * blocks_each;
    let kv = KvShape { num_layers: 1, num_blocks, block_size: BLOCK_SIZE, num_kv_heads: kv_heads, head_dim };
    let query =
        QueryShape { num_heads: heads, sliding_window: None, soft_cap: None, scale: 1.0 / (head_dim as f32).sqrt() };
    let rows = batch.sequences * batch.new;
    let limits = AttentionLimits { max_rows: rows, max_entries: batch.sequences };
    let mut plan = AttentionPlan::new(device, kv, ty, query, limits).expect("a shape that every device supports");
    let mut cache = GpuKvCache::new(device, kv, ty)?;
    // Small numbers: what is measured is how they are fetched.
    cache.fill(device, 0x3c)?;
    // Sequences that have grown side by side: neighbours in one are not neighbours in memory.
    let block_of = |index: usize| index % blocks_each * batch.sequences + index / blocks_each;
    let tables: Vec<u32> = (0..num_blocks).map(|index| block_of(index) as u32).collect();
    let entries: Vec<AttentionEntry> = (0..batch.sequences)
        .map(|index| AttentionEntry {
            first_row: (index * batch.new) as u32,
            num_tokens: batch.new as u32,
            start: batch.cached as u32,
            table_offset: (index * blocks_each) as u32,
        })
        .collect();
    plan.plan(&entries, &tables);
    let (words, tables) = (DeviceBuffer::from_slice(device, plan.words())?, DeviceBuffer::from_slice(device, &tables)?);
    let width = heads * head_dim;
    let (queries, out) = (bench.noise.bf16(device, rows * width)?, DeviceBuffer::<u8>::new(device, rows * width * 2)?);
    let mut workspace = AttentionWorkspace::new(device, head_dim)?;
    let operands = AttentionOperands {
        cache: &cache,
        layer: 0,
        block_tables: tables.view(),
        plan: words.view(),
        queries: Activations::new(&queries, Element::BF16, rows, width),
        out: Activations::new(&out, Element::BF16, rows, width),
    };
    let bytes = batch.sequences * context * kv_heads * head_dim * 2 * ty.bytes() + 2 * rows * width * 2;
    // Each new token multiplies with all before it, for its scores and for the sum of values.
    let seen = batch.new as f64 * (batch.cached as f64 + (batch.new + 1) as f64 / 2.0);
    let flops = 4.0 * batch.sequences as f64 * seen * width as f64;
    let shape = format!("{} × {} new at {context}", batch.sequences, batch.new);
    bench.time(kernel, shape, (bytes as f64, flops), 1, |_| plan.run(device, &mut workspace, &operands))
}
