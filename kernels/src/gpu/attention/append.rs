//! Stores the projections of new tokens in the cache: optional norm of each head (Qwen3), then rotation. The kernel is in
//! `kernels/cuda/rope.cu`.

use crate::gpu::{Activations, Address, Device, DeviceBuffer, DeviceError, Element, Launch, View};
use crate::rows::RopeTable;

use super::{GpuKvCache, GpuKvType};

const WARPS: usize = 8;

/// [`RopeTable`] in device memory.
pub struct GpuRopeTable {
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
    positions: usize,
    head_dim: usize,
}

impl GpuRopeTable {
    pub fn new(device: &Device, table: &RopeTable) -> Result<Self, DeviceError> {
        Ok(Self {
            cos: DeviceBuffer::from_slice(device, table.cos())?,
            sin: DeviceBuffer::from_slice(device, table.sin())?,
            positions: table.positions(),
            head_dim: table.head_dim(),
        })
    }

    pub fn bytes(&self) -> usize {
        self.cos.bytes() + self.sin.bytes()
    }
}

/// RMSNorm of each query and key head before rotation.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm {
    /// `[head_dim]`.
    pub query: View<f32>,
    /// `[head_dim]`.
    pub key: View<f32>,
    pub epsilon: f32,
}

/// As `RopeAppendParams` in rope.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct RopeAppendParams {
    qkv: Address,
    query_weight: Address,
    key_weight: Address,
    cos: Address,
    sin: Address,
    positions: Address,
    slots: Address,
    queries: Address,
    keys: Address,
    values: Address,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    num_positions: u32,
    num_slots: u32,
    element: u32,
    epsilon: f32,
}

/// Rotates the queries and keys of `qkv`, `[rows, (num_heads + 2 num_kv_heads) * head_dim]`, writes the queries, not scaled,
/// to `queries`, `[rows, num_heads * head_dim]` of f16 or bf16, and keys and values to the cache.
///
/// Row `r` has position `positions[r]` and slot `slots[r]`, `block * block_size + offset`; the host gives distinct slots. For a
/// row whose slot is [`NO_SLOT`](super::NO_SLOT), or beyond the cache, nothing is written. A position beyond the table gives
/// NaN.
///
/// # Panics
/// When a shape or type does not fit.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn rope_append(
    device: &Device,
    cache: &mut GpuKvCache,
    layer: usize,
    rope: &GpuRopeTable,
    norm: Option<&HeadNorm>,
    positions: View<u32>,
    slots: View<u32>,
    qkv: Activations,
    queries: Activations,
) -> Result<(), DeviceError> {
    let shape = cache.shape();
    let num_heads = queries.cols / shape.head_dim;
    let heads = num_heads + 2 * shape.num_kv_heads;
    assert!(layer < shape.num_layers && rope.head_dim == shape.head_dim, "a layer of the cache, and heads of its size");
    assert!(
        queries.cols == num_heads * shape.head_dim && qkv.cols == heads * shape.head_dim,
        "{} columns are no query, key and value heads of {} beside {} of queries",
        qkv.cols,
        shape.head_dim,
        queries.cols
    );
    assert!(qkv.rows == queries.rows, "a row of queries for each of qkv");
    assert!(positions.len() >= qkv.rows && slots.len() >= qkv.rows, "a position and a slot for each row");
    if let Some(norm) = norm {
        assert!(norm.query.len() == shape.head_dim && norm.key.len() == shape.head_dim, "a weight for each dimension");
    }
    let (keys, values) = cache.layer(layer);
    let params = RopeAppendParams {
        qkv: qkv.address,
        query_weight: norm.map_or(Address::NULL, |norm| norm.query.address()),
        key_weight: norm.map_or(Address::NULL, |norm| norm.key.address()),
        cos: rope.cos.address(),
        sin: rope.sin.address(),
        positions: positions.address(),
        slots: slots.address(),
        queries: queries.address,
        keys,
        values,
        num_heads: num_heads as u32,
        num_kv_heads: shape.num_kv_heads as u32,
        head_dim: shape.head_dim as u32,
        block_size: shape.block_size as u32,
        num_positions: u32::try_from(rope.positions).expect("a table of fewer than 2^32 positions"),
        num_slots: u32::try_from(cache.num_slots()).expect("checked when the cache was made"),
        element: qkv.element as u32,
        epsilon: norm.map_or(0.0, |norm| norm.epsilon),
    };
    let name = match (queries.element, cache.ty()) {
        (Element::BF16, GpuKvType::BF16) => "rope_append_bf16_bf16",
        (Element::BF16, GpuKvType::Fp8) => "rope_append_bf16_fp8",
        (Element::F16, GpuKvType::F16) => "rope_append_f16_f16",
        (Element::F16, GpuKvType::Fp8) => "rope_append_f16_fp8",
        (element, ty) => panic!("no kernel writes {} queries and a cache of {ty:?}", element.name()),
    };
    let grid = [u32::try_from(qkv.rows).expect("a batch of fewer than 2^32 rows"), heads.div_ceil(WARPS) as u32, 1];
    let launch = Launch { overlap: true, ..Launch::new(grid, 32 * WARPS as u32) };
    // SAFETY: the operands have the shapes that the kernel expects; it checks slots and positions.
    unsafe { device.launch(name, &launch, &params) }
}
