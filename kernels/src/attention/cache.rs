//! The paged pool of keys and values.
//!
//! Keys are stored transposed within a block, `[layer][block][kv_head][dim][position]`, so that sixteen scores come from one
//! vector. Values are stored as `[layer][block][kv_head][position][dim]`. Heads are padded with zeros to a multiple of sixteen.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::STRETCH;
use super::stretch::{View, ViewData};
use crate::buffer::{Buffer, SharedOut};
use crate::pool::Pool;
use crate::rows::RopeTable;
use crate::simd::{LANES, Simd};

/// With at least this many rows, a stretch is converted to f32 once, before it is read many times.
const GATHER_ROWS: usize = 13;

/// Number type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    F32,
    F16,
    BF16,
}

impl KvType {
    pub fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::BF16 => 2,
        }
    }
}

/// Shape of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub num_layers: usize,
    pub num_blocks: usize,
    /// Positions per block, a multiple of 16.
    pub block_size: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(&self, ty: KvType) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.block_size * self.padded_dim() * ty.bytes()
    }
}

/// Keys and values of all layers.
pub struct KvCache {
    shape: KvShape,
    ty: KvType,
    keys: Buffer<u8>,
    values: Buffer<u8>,
}

/// A new token's position and place.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub position: usize,
    /// `block * block_size + offset`.
    pub index: usize,
}

impl KvCache {
    /// # Panics
    /// When `block_size` is not a positive multiple of 16, or not a divisor or multiple of 64.
    pub fn new(shape: KvShape, ty: KvType) -> Self {
        let size = shape.block_size;
        assert!(
            size > 0 && size.is_multiple_of(LANES) && (STRETCH.is_multiple_of(size) || size.is_multiple_of(STRETCH)),
            "block_size is 16, 32 or a multiple of 64, not {size}"
        );
        let bytes = shape.num_blocks * shape.block_bytes(ty) / 2;
        Self { shape, ty, keys: Buffer::zeroed(bytes), values: Buffer::zeroed(bytes) }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn ty(&self) -> KvType {
        self.ty
    }

    pub fn num_layers(&self) -> usize {
        self.shape.num_layers
    }

    pub fn num_kv_heads(&self) -> usize {
        self.shape.num_kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// Head size rounded up to a multiple of sixteen; also that of queries.
    pub fn padded_dim(&self) -> usize {
        self.shape.padded_dim()
    }

    /// Elements of one head of one block.
    fn head_len(&self) -> usize {
        self.shape.block_size * self.padded_dim()
    }

    /// First element of a head of a block.
    fn head_start(&self, layer: usize, block: usize, kv_head: usize) -> usize {
        ((layer * self.shape.num_blocks + block) * self.shape.num_kv_heads + kv_head) * self.head_len()
    }

    pub(super) fn check_table(&self, table: &[u32], positions: usize) {
        let needed = positions.div_ceil(self.shape.block_size);
        assert!(
            table.len() >= needed,
            "a block table of {} blocks covers fewer than {positions} positions",
            table.len()
        );
        assert!(
            table[..needed].iter().all(|&block| (block as usize) < self.shape.num_blocks),
            "a block table names a block beyond the pool"
        );
    }

    /// Copies one block, all layers.
    pub fn copy_block(&mut self, from: usize, to: usize) {
        assert!(from < self.shape.num_blocks && to < self.shape.num_blocks, "blocks lie within the pool");
        let bytes = self.shape.num_kv_heads * self.head_len() * self.ty.bytes();
        for layer in 0..self.shape.num_layers {
            let start = |block| (layer * self.shape.num_blocks + block) * bytes;
            self.keys.copy_within(start(from)..start(from) + bytes, start(to));
            self.values.copy_within(start(from)..start(from) + bytes, start(to));
        }
    }

    /// Rotates the queries and keys of new tokens, stores keys and values, and writes the queries, times `scale`, to
    /// `queries`, `[tokens, heads, padded_dim]`. `qkv` is `[tokens, (heads + 2 kv_heads) * head_dim]`.
    ///
    /// # Panics
    /// When a shape does not fit, or a slot or position is out of range.
    #[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
    pub fn append(
        &mut self,
        pool: &Pool,
        layer: usize,
        rope: &RopeTable,
        scale: f32,
        slots: &[Slot],
        qkv: &[f32],
        queries: &mut [f32],
    ) {
        let (dim, padded, kv_heads) = (self.shape.head_dim, self.padded_dim(), self.shape.num_kv_heads);
        let heads = queries.len() / (slots.len() * padded);
        assert_eq!(queries.len(), slots.len() * heads * padded, "queries are [tokens, heads, dim]");
        assert_eq!(qkv.len(), slots.len() * (heads + 2 * kv_heads) * dim, "qkv is [tokens, heads and kv heads, dim]");
        assert!(layer < self.shape.num_layers && rope.head_dim() == dim, "layer and head size fit");
        let block_size = self.shape.block_size;
        for slot in slots {
            assert!(slot.index < self.shape.num_blocks * block_size && slot.position < rope.positions(), "{slot:?}");
        }
        let queries = SharedOut(queries.as_mut_ptr());
        let (keys, values) = (SharedOut(self.keys.as_mut_ptr()), SharedOut(self.values.as_mut_ptr()));
        let this = &*self;
        pool.run_ranges(slots.len(), 4, &|range| {
            let mut rotated = [0.0f32; MAX_HEAD_DIM];
            for token in range {
                let slot = slots[token];
                let row = &qkv[token * (heads + 2 * kv_heads) * dim..][..(heads + 2 * kv_heads) * dim];
                let (q, kv) = row.split_at(heads * dim);
                let (k, v) = kv.split_at(kv_heads * dim);
                for (head, q) in q.chunks_exact(dim).enumerate() {
                    // SAFETY: each token's queries are written by one task.
                    let out = unsafe {
                        std::slice::from_raw_parts_mut(queries.get().add((token * heads + head) * padded), padded)
                    };
                    rope.rotate(q, slot.position, scale, &mut out[..dim]);
                    out[dim..].fill(0.0);
                }
                for head in 0..kv_heads {
                    let start = this.head_start(layer, slot.index / block_size, head);
                    let offset = slot.index % block_size;
                    rope.rotate(&k[head * dim..][..dim], slot.position, 1.0, &mut rotated[..dim]);
                    // SAFETY: slots are distinct, so each key and value is written by one task, within its block.
                    unsafe {
                        store_strided(this.ty, &rotated[..dim], keys.get(), start + offset, block_size);
                        store_strided(this.ty, &v[head * dim..][..dim], values.get(), start + offset * padded, 1);
                    }
                }
            }
        });
    }

    /// Floats that `view` may need to convert a stretch.
    pub(super) fn gather_len(&self) -> usize {
        2 * STRETCH * self.padded_dim()
    }

    /// The keys and values of one stretch of one head. Lanes beyond the block table repeat the first ones; their scores are
    /// masked.
    #[inline(always)]
    pub(super) fn view<S: Simd>(
        &self,
        layer: usize,
        kv_head: usize,
        table: &[u32],
        stretch: usize,
        rows: usize,
        gather: &mut [f32],
    ) -> ViewData {
        let (size, dim) = (self.shape.block_size, self.padded_dim());
        let starts: [(usize, usize); STRETCH / LANES] = std::array::from_fn(|part| {
            let position = stretch * STRETCH + part * LANES;
            let position = if position / size < table.len() { position } else { stretch * STRETCH };
            let start = self.head_start(layer, table[position / size] as usize, kv_head);
            (start + position % size, start + position % size * dim)
        });
        // SAFETY: `check_table` has checked the blocks, and sixteen positions lie within one block.
        unsafe {
            match self.ty {
                KvType::F32 => ViewData::F32(self.pointers(starts)),
                KvType::F16 => self.pointers::<f16>(starts).widen_if::<S>(rows >= GATHER_ROWS, dim, gather),
                KvType::BF16 => self.pointers::<bf16>(starts).widen_if::<S>(rows >= GATHER_ROWS, dim, gather),
            }
        }
    }

    unsafe fn pointers<E>(&self, starts: [(usize, usize); STRETCH / LANES]) -> View<E> {
        let (keys, values) = (self.keys.as_ptr().cast::<E>(), self.values.as_ptr().cast::<E>());
        // SAFETY: the caller's starts lie within the buffers.
        unsafe {
            View {
                keys: starts.map(|(key, _)| keys.add(key)),
                key_stride: self.shape.block_size,
                values: starts.map(|(_, value)| values.add(value)),
                dim: self.padded_dim(),
            }
        }
    }
}

/// Largest head that is supported.
pub const MAX_HEAD_DIM: usize = 512;

/// Stores `x` as `ty` at elements `start`, `start + stride`, … of `to`.
///
/// # Safety
/// The elements are in range and nobody else's.
unsafe fn store_strided(ty: KvType, x: &[f32], to: *mut u8, start: usize, stride: usize) {
    let mut bits = [0u16; MAX_HEAD_DIM];
    let bits = &mut bits[..x.len()];
    match ty {
        KvType::F32 => {
            let to = to.cast::<f32>();
            for (i, value) in x.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { *to.add(start + i * stride) = *value };
            }
            return;
        }
        KvType::F16 => half::slice::HalfBitsSliceExt::reinterpret_cast_mut::<f16>(bits).convert_from_f32_slice(x),
        KvType::BF16 => half::slice::HalfBitsSliceExt::reinterpret_cast_mut::<bf16>(bits).convert_from_f32_slice(x),
    }
    let to = to.cast::<u16>();
    for (i, value) in bits.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *to.add(start + i * stride) = *value };
    }
}
