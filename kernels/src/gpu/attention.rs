//! Paged attention on a GPU, with the same arithmetic for prefill and decode. The kernels are in `kernels/cuda/attention_*.cu`.
//!
//! Scores are computed over stretches of 64 absolute positions, stretches are combined into splits of 256 starting from a fresh
//! state, and splits are merged in ascending order (`kernels/cuda/attention.cuh`). Two kernels implement this: one handles few
//! rows over many positions and can give each split to another block, the other handles tiles of many rows. The
//! [`AttentionPlan`] chooses which kernel computes a row, and with which neighbours; the choice does not affect the result.

mod append;
mod cache;
mod geometry;
mod plan;

pub use append::{GpuRopeTable, HeadNorm, rope_append};
pub use cache::{GpuKvCache, GpuKvType, NO_SLOT};
pub use geometry::UnsupportedAttention;
pub use plan::{AttentionEntry, AttentionLimits, AttentionPlan};

use super::{Activations, Address, Device, DeviceBuffer, DeviceError, Element, Launch, View};
use geometry::Geometry;

/// Threads per block of the kernel for few rows.
const SPLIT_THREADS: u32 = 128;
/// Maximum size of partial results, in bytes. Rows for which there is no space are not split.
const PARTIAL_BYTES: usize = 32 << 20;
/// Maximum number of splits that are separate items.
const MAX_SPLITS: usize = 8192;
/// Floats of a partial before its values: maximum, sum, and padding to 16 bytes.
const PARTIAL_HEADER: usize = 4;

/// The properties of a layer's queries. Layers that differ in them (usually in their windows) have separate plans.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryShape {
    pub num_heads: usize,
    /// A position sees itself and the `window - 1` positions before it.
    pub sliding_window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Factor of a score before the cap; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// Memory in which splits store partial results for the block that merges them. One serves all layers and plans of a device.
pub struct AttentionWorkspace {
    /// Rows of four floats and `head_dim` values.
    partials: DeviceBuffer<f32>,
    /// How many splits of a tile are finished; zero between launches.
    counters: DeviceBuffer<u32>,
}

impl AttentionWorkspace {
    pub fn new(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let floats = partial_rows(head_dim) * (head_dim + PARTIAL_HEADER);
        Ok(Self { partials: DeviceBuffer::new(device, floats)?, counters: DeviceBuffer::zeroed(device, MAX_SPLITS)? })
    }

    pub fn bytes(&self) -> usize {
        self.partials.bytes() + self.counters.bytes()
    }
}

/// Number of rows for which the workspace has space.
fn partial_rows(head_dim: usize) -> usize {
    PARTIAL_BYTES / ((head_dim + PARTIAL_HEADER) * size_of::<f32>())
}

/// Operands of one layer's attention.
pub struct AttentionOperands<'a> {
    pub cache: &'a GpuKvCache,
    pub layer: usize,
    /// The block tables of all entries, as when the batch was planned.
    pub block_tables: View<u32>,
    /// [`AttentionPlan::words`], aligned to 16 bytes.
    pub plan: View<u32>,
    /// `[rows, num_heads * head_dim]`, rotated, not scaled.
    pub queries: Activations,
    /// Same shape and type as the queries. Rows that belong to no entry are not written.
    pub out: Activations,
}

/// As `AttentionParams` in attention.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionParams {
    queries: Address,
    out: Address,
    keys: Address,
    values: Address,
    block_tables: Address,
    plan: Address,
    partials: Address,
    counters: Address,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    group: u32,
    block_shift: u32,
    window: u32,
    first_item: u32,
    stages: u32,
    scale: f32,
    cap: f32,
    cap_scale: f32,
}

impl AttentionPlan {
    /// Attention of one layer over the planned batch. The keys and values are already in the cache.
    ///
    /// The launch for few rows depends only on the device and the shapes, so it can be recorded and replayed with other plans
    /// at the same address; it is made even if the plan has no work for it. A plan with [`num_tiles`](Self::num_tiles) above
    /// zero needs a second launch, which depends on that number.
    ///
    /// # Panics
    /// When a shape or type does not fit, or the operands are smaller than planned.
    pub fn run(
        &self,
        device: &Device,
        workspace: &mut AttentionWorkspace,
        operands: &AttentionOperands<'_>,
    ) -> Result<(), DeviceError> {
        self.check(operands);
        let geometry = self.geometry();
        let cache = operands.cache;
        let kv_heads = cache.shape().num_kv_heads;
        let split = self.params(workspace, operands, geometry);
        let (split_name, tile_name) = kernel_names(operands.queries.element, cache.ty(), geometry.padded_dim);
        let launch = Launch { overlap: true, ..Launch::new([geometry.split_blocks, 1, 1], SPLIT_THREADS) };
        // SAFETY: the operands have been checked against what was planned, and the plan against the pool and the batch.
        unsafe { device.launch(split_name, &launch.with_shared(geometry.split_shared_bytes()), &split)? };
        if self.num_tiles() == 0 {
            return Ok(());
        }
        let tile = AttentionParams { first_item: self.first_tile(), stages: geometry.tile_stages, ..split };
        let launch = Launch::new([self.num_tiles(), kv_heads as u32, 1], geometry.tile_warps * 32);
        let launch = Launch { overlap: true, ..launch.with_shared(geometry.tile_shared_bytes()) };
        // SAFETY: as above.
        unsafe { device.launch(tile_name, &launch, &tile) }
    }

    fn check(&self, operands: &AttentionOperands<'_>) {
        let (cache, queries, out) = (operands.cache, operands.queries, operands.out);
        assert!(cache.shape() == self.kv_shape() && cache.ty() == self.kv_type(), "the cache that was planned for");
        assert!(operands.layer < cache.shape().num_layers, "a layer of the cache");
        assert!(queries.element == out.element, "queries and output are of one type");
        let cols = self.shape().num_heads * cache.shape().head_dim;
        assert!(queries.cols == cols && out.cols == cols, "rows are [num_heads * head_dim]");
        assert!(queries.rows.min(out.rows) >= self.num_rows(), "rows for all that was planned");
        assert!(operands.plan.len() >= self.words().len(), "the plan has been uploaded whole");
        assert!(operands.plan.address().0.is_multiple_of(16), "the plan is at a multiple of 16 bytes");
        assert!(operands.block_tables.len() >= self.table_len(), "the block tables have been uploaded whole");
    }

    fn params(
        &self,
        workspace: &AttentionWorkspace,
        operands: &AttentionOperands<'_>,
        geometry: &Geometry,
    ) -> AttentionParams {
        let (cache, shape) = (operands.cache, self.shape());
        let kv = cache.shape();
        assert!(
            workspace.partials.len() >= partial_rows(kv.head_dim) * (kv.head_dim + PARTIAL_HEADER),
            "the workspace is for heads of this size"
        );
        let (keys, values) = cache.layer(operands.layer);
        let log2_e = std::f32::consts::LOG2_E;
        AttentionParams {
            queries: operands.queries.address,
            out: operands.out.address,
            keys,
            values,
            block_tables: operands.block_tables.address(),
            plan: operands.plan.address(),
            partials: workspace.partials.address(),
            counters: workspace.counters.address(),
            num_heads: shape.num_heads as u32,
            num_kv_heads: kv.num_kv_heads as u32,
            head_dim: kv.head_dim as u32,
            block_size: kv.block_size as u32,
            group: (shape.num_heads / kv.num_kv_heads) as u32,
            block_shift: if kv.block_size.is_power_of_two() { kv.block_size.trailing_zeros() } else { u32::BITS },
            window: shape.sliding_window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
            first_item: self.first_item(),
            stages: geometry.split_stages,
            scale: shape.scale * log2_e,
            cap: shape.soft_cap.map_or(0.0, |cap| cap * log2_e),
            cap_scale: shape.soft_cap.map_or(0.0, |cap| shape.scale / cap * 2.0 * log2_e),
        }
    }
}

/// The kernels for few rows and for tiles.
fn kernel_names(queries: Element, ty: GpuKvType, padded_dim: usize) -> (&'static str, &'static str) {
    match (queries, ty, padded_dim) {
        (Element::BF16, GpuKvType::BF16, 64) => ("attention_split_bf16_bf16_64", "attention_tile_bf16_bf16_64"),
        (Element::BF16, GpuKvType::BF16, 128) => ("attention_split_bf16_bf16_128", "attention_tile_bf16_bf16_128"),
        (Element::BF16, GpuKvType::BF16, 256) => ("attention_split_bf16_bf16_256", "attention_tile_bf16_bf16_256"),
        (Element::BF16, GpuKvType::Fp8, 64) => ("attention_split_bf16_fp8_64", "attention_tile_bf16_fp8_64"),
        (Element::BF16, GpuKvType::Fp8, 128) => ("attention_split_bf16_fp8_128", "attention_tile_bf16_fp8_128"),
        (Element::BF16, GpuKvType::Fp8, 256) => ("attention_split_bf16_fp8_256", "attention_tile_bf16_fp8_256"),
        (Element::F16, GpuKvType::F16, 64) => ("attention_split_f16_f16_64", "attention_tile_f16_f16_64"),
        (Element::F16, GpuKvType::F16, 128) => ("attention_split_f16_f16_128", "attention_tile_f16_f16_128"),
        (Element::F16, GpuKvType::F16, 256) => ("attention_split_f16_f16_256", "attention_tile_f16_f16_256"),
        (Element::F16, GpuKvType::Fp8, 64) => ("attention_split_f16_fp8_64", "attention_tile_f16_fp8_64"),
        (Element::F16, GpuKvType::Fp8, 128) => ("attention_split_f16_fp8_128", "attention_tile_f16_fp8_128"),
        (Element::F16, GpuKvType::Fp8, 256) => ("attention_split_f16_fp8_256", "attention_tile_f16_fp8_256"),
        (queries, ty, dim) => {
            panic!("no kernel takes {} queries, a cache of {ty:?} and heads of {dim}", queries.name())
        }
    }
}
