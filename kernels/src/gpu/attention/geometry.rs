//! How the attention kernels are launched on a device. Depends only on its properties and the shapes.

use crate::attention::{KvShape, STRETCH};
use crate::gpu::Properties;

use super::{GpuKvType, QueryShape, cache::check_shape};

/// Rows of a matrix instruction, and of a tile of the kernel for few rows.
pub(super) const TILE_ROWS: usize = 16;
const SPLIT_WARPS: usize = 4;
/// Blocks of the kernel for few rows per multiprocessor, if memory allows it.
const SPLIT_OCCUPANCY: usize = 2;
const MAX_SPLIT_STAGES: usize = 4;
/// Bytes of shared memory that the system reserves per block.
const RESERVED_BYTES: usize = 1024;
/// Warps and stages of the kernel for tiles, in order of preference.
const TILE_CHOICES: [(u32, u32); 5] = [(4, 2), (4, 1), (2, 2), (2, 1), (1, 1)];
/// Largest head whose queries that kernel keeps in registers.
const MAX_REGISTER_DIM: usize = 128;
/// Activations have 16 bits.
const ACTIVATION_BYTES: usize = 2;

/// Attention that the device kernels do not support.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsupportedAttention {
    #[error("heads of {0} dimensions: the GPU's attention takes multiples of 16 up to 256")]
    HeadDim(usize),
    #[error("block_size {0}: the GPU's attention takes 16, 32 or a multiple of 64")]
    BlockSize(usize),
    #[error("{0} positions in the cache: slots are numbered in 32 bits")]
    Slots(usize),
    #[error("{num_heads} query heads cannot share {num_kv_heads} key and value heads")]
    Heads { num_heads: usize, num_kv_heads: usize },
    #[error("{needed} bytes of shared memory a block, of which the device has {available}")]
    SharedMemory { needed: usize, available: usize },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// The head size that the kernels are made for.
    pub padded_dim: usize,
    kv_bytes: usize,
    /// The fixed grid of the kernel for few rows.
    pub split_blocks: u32,
    pub split_stages: u32,
    pub tile_warps: u32,
    pub tile_stages: u32,
}

impl Geometry {
    pub fn new(
        properties: &Properties,
        kv: &KvShape,
        ty: GpuKvType,
        shape: &QueryShape,
    ) -> Result<Self, UnsupportedAttention> {
        check_shape(kv)?;
        if kv.num_kv_heads == 0 || shape.num_heads == 0 || !shape.num_heads.is_multiple_of(kv.num_kv_heads) {
            let (num_heads, num_kv_heads) = (shape.num_heads, kv.num_kv_heads);
            return Err(UnsupportedAttention::Heads { num_heads, num_kv_heads });
        }
        let mut geometry = Self {
            padded_dim: kv.head_dim.next_power_of_two().max(64),
            kv_bytes: ty.bytes(),
            split_blocks: 0,
            split_stages: 0,
            tile_warps: 0,
            tile_stages: 0,
        };
        geometry.choose_split(properties)?;
        geometry.choose_tile(properties)?;
        Ok(geometry)
    }

    /// Chooses the most blocks per multiprocessor, then the deepest pipeline. A single stage is only used if nothing else fits.
    fn choose_split(&mut self, properties: &Properties) -> Result<(), UnsupportedAttention> {
        let available = properties.shared_memory_per_block;
        let choices = (1..=SPLIT_OCCUPANCY)
            .rev()
            .flat_map(|blocks| (2..=MAX_SPLIT_STAGES).rev().map(move |stages| (blocks, stages)))
            .chain([(1, 1)]);
        for (blocks, stages) in choices {
            self.split_stages = stages as u32;
            self.split_blocks = properties.multiprocessors * blocks as u32;
            if self.split_shared_bytes() + RESERVED_BYTES <= (available + RESERVED_BYTES) / blocks {
                return Ok(());
            }
        }
        Err(UnsupportedAttention::SharedMemory { needed: self.split_shared_bytes(), available })
    }

    fn choose_tile(&mut self, properties: &Properties) -> Result<(), UnsupportedAttention> {
        let available = properties.shared_memory_per_block;
        for (warps, stages) in TILE_CHOICES {
            (self.tile_warps, self.tile_stages) = (warps, stages);
            if self.tile_shared_bytes() <= available {
                return Ok(());
            }
        }
        Err(UnsupportedAttention::SharedMemory { needed: self.tile_shared_bytes(), available })
    }

    /// Bytes of a stretch of keys, and of its values.
    fn stretch_bytes(&self) -> usize {
        STRETCH * self.padded_dim * self.kv_bytes
    }

    /// As `SplitShared` in attention_split.cu lays it out: stages of keys, values and queries; weights; maxima; a flag.
    pub fn split_shared_bytes(&self) -> usize {
        let queries = TILE_ROWS * self.padded_dim * ACTIVATION_BYTES;
        let weights = TILE_ROWS * STRETCH * ACTIVATION_BYTES;
        let maxima = SPLIT_WARPS * TILE_ROWS * size_of::<f32>();
        self.split_stages as usize * (2 * self.stretch_bytes() + queries) + weights + maxima + 16
    }

    /// As `TileShared` in attention_tile.cu lays it out: stages of keys and values; each warp's total and queries.
    pub fn tile_shared_bytes(&self) -> usize {
        let total = TILE_ROWS * self.padded_dim * size_of::<f32>();
        let queries = TILE_ROWS * self.padded_dim * ACTIVATION_BYTES;
        let warp = total + if self.padded_dim > MAX_REGISTER_DIM { queries } else { 0 };
        self.tile_stages as usize * 2 * self.stretch_bytes() + self.tile_warps as usize * warp
    }

    pub fn tile_rows(&self) -> usize {
        self.tile_warps as usize * TILE_ROWS
    }
}
