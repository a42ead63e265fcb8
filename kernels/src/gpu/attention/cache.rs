//! The paged pool of keys and values in device memory.
//!
//! Keys and values have the same layout, `[layer][block][kv_head][position in block][head_dim]`. Elements that have not been
//! written are never read.

use crate::attention::{KvShape, STRETCH};
use crate::gpu::copy::{BlockPoolShape, copy_blocks};
use crate::gpu::{Address, Device, DeviceBuffer, DeviceError};

use super::geometry::UnsupportedAttention;

/// The slot of a row that only pads a batch: nothing is written for it.
pub const NO_SLOT: u32 = u32::MAX;

/// Largest head of a GPU cache.
const MAX_HEAD_DIM: usize = 256;
/// Heads and blocks are multiples of this: rows of a matrix instruction.
const MULTIPLE: usize = 16;

/// Number type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GpuKvType {
    F16,
    BF16,
    /// E4M3, without a scale: values beyond ±448 saturate.
    Fp8,
}

impl GpuKvType {
    pub fn bytes(self) -> usize {
        match self {
            GpuKvType::F16 | GpuKvType::BF16 => 2,
            GpuKvType::Fp8 => 1,
        }
    }

    /// Bytes of one block over all layers, keys and values.
    pub fn block_bytes(self, shape: &KvShape) -> usize {
        2 * shape.num_layers * self.layer_block_bytes(shape)
    }

    /// Bytes of the keys of one block in one layer.
    fn layer_block_bytes(self, shape: &KvShape) -> usize {
        shape.num_kv_heads * shape.block_size * shape.head_dim * self.bytes()
    }
}

/// Keys and values of all layers.
pub struct GpuKvCache {
    keys: DeviceBuffer<u8>,
    values: DeviceBuffer<u8>,
    shape: KvShape,
    ty: GpuKvType,
}

impl GpuKvCache {
    /// # Panics
    /// When the shape is not one that `check_shape` accepts.
    pub fn new(device: &Device, shape: KvShape, ty: GpuKvType) -> Result<Self, DeviceError> {
        if let Err(error) = check_shape(&shape) {
            panic!("{error}");
        }
        let bytes = shape.num_blocks * ty.block_bytes(&shape) / 2;
        Ok(Self { keys: DeviceBuffer::new(device, bytes)?, values: DeviceBuffer::new(device, bytes)?, shape, ty })
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn ty(&self) -> GpuKvType {
        self.ty
    }

    pub fn keys(&self) -> &DeviceBuffer<u8> {
        &self.keys
    }

    pub fn values(&self) -> &DeviceBuffer<u8> {
        &self.values
    }

    /// Number of positions in all blocks. Slots are below it.
    pub fn num_slots(&self) -> usize {
        self.shape.num_blocks * self.shape.block_size
    }

    /// Where the keys and the values of a layer begin.
    pub(super) fn layer(&self, layer: usize) -> (Address, Address) {
        let first = layer * self.shape.num_blocks * self.ty.layer_block_bytes(&self.shape);
        (self.keys.at(first), self.values.at(first))
    }

    /// Sets every byte. Checks use this to see that nothing unwritten is read.
    pub fn fill(&mut self, device: &Device, byte: u8) -> Result<(), DeviceError> {
        for buffer in [&self.keys, &self.values] {
            // SAFETY: the whole buffer, which is borrowed mutably.
            unsafe { device.driver().fill(buffer.address(), byte, buffer.bytes())? };
        }
        Ok(())
    }

    /// Copies block `from` to block `to`, in all layers, for each `(from, to)`.
    ///
    /// # Panics
    /// When a block is out of range, or a destination is named twice or is a source.
    pub fn copy_blocks(&mut self, device: &Device, copies: &[(usize, usize)]) -> Result<(), DeviceError> {
        let shape = BlockPoolShape {
            num_layers: self.shape.num_layers,
            num_blocks: self.shape.num_blocks,
            block_bytes: self.ty.layer_block_bytes(&self.shape),
        };
        copy_blocks(device, &mut self.keys, &mut self.values, shape, copies)
    }
}

/// Checks that the kernels support this shape.
pub(super) fn check_shape(shape: &KvShape) -> Result<(), UnsupportedAttention> {
    let (dim, size) = (shape.head_dim, shape.block_size);
    if dim == 0 || !dim.is_multiple_of(MULTIPLE) || dim > MAX_HEAD_DIM {
        return Err(UnsupportedAttention::HeadDim(dim));
    }
    let fits = size.is_multiple_of(MULTIPLE) && (STRETCH.is_multiple_of(size) || size.is_multiple_of(STRETCH));
    if size == 0 || !fits {
        return Err(UnsupportedAttention::BlockSize(size));
    }
    if shape.num_blocks * size >= u32::MAX as usize {
        return Err(UnsupportedAttention::Slots(shape.num_blocks * size));
    }
    Ok(())
}
