//! Copies blocks of the KV cache, for sequences that diverge after a shared beginning.

use super::{Address, Device, DeviceBuffer, DeviceError, Launch};

const THREADS: usize = 256;
/// Copies per launch; more need several launches.
const MAX_COPIES: usize = 64;
/// Bytes that each thread copies.
const WORD: usize = 16;

/// As `CopyBlocksParams` in copy.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct CopyBlocksParams {
    keys: Address,
    values: Address,
    num_blocks: u64,
    block_bytes: u64,
    copies: [[u32; 2]; MAX_COPIES],
}

/// The shape of keys or values of all layers: `[num_layers][num_blocks][block_bytes]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPoolShape {
    pub num_layers: usize,
    pub num_blocks: usize,
    /// A multiple of 16.
    pub block_bytes: usize,
}

impl BlockPoolShape {
    pub fn bytes(&self) -> usize {
        self.num_layers * self.num_blocks * self.block_bytes
    }
}

/// Copies block `from` to block `to` in every layer, for each `(from, to)`.
///
/// # Panics
/// When a buffer does not have the shape, a block is out of range, or a destination is named twice or is a source.
pub fn copy_blocks(
    device: &Device,
    keys: &mut DeviceBuffer<u8>,
    values: &mut DeviceBuffer<u8>,
    shape: BlockPoolShape,
    copies: &[(usize, usize)],
) -> Result<(), DeviceError> {
    assert!(shape.block_bytes.is_multiple_of(WORD), "a block is a multiple of {WORD} bytes");
    assert!(keys.len() == shape.bytes() && values.len() == shape.bytes(), "the pool has the shape that is given");
    assert!(u16::try_from(shape.num_layers).is_ok(), "a model has at most 65535 layers");
    check_copies(shape.num_blocks, copies);
    for part in copies.chunks(MAX_COPIES) {
        let mut params = CopyBlocksParams {
            keys: keys.address(),
            values: values.address(),
            num_blocks: shape.num_blocks as u64,
            block_bytes: shape.block_bytes as u64,
            copies: [[0; 2]; MAX_COPIES],
        };
        for (place, (from, to)) in params.copies.iter_mut().zip(part) {
            *place = [*from as u32, *to as u32];
        }
        let words = shape.block_bytes / WORD;
        let grid = [words.div_ceil(THREADS) as u32, part.len() as u32, shape.num_layers as u32];
        let launch = Launch { overlap: true, ..Launch::new(grid, THREADS as u32) };
        // SAFETY: the struct mirrors the kernel's; every block named lies in both buffers.
        unsafe { device.launch("copy_blocks", &launch, &params)? };
    }
    Ok(())
}

fn check_copies(num_blocks: usize, copies: &[(usize, usize)]) {
    assert!(u32::try_from(num_blocks).is_ok(), "blocks are numbered in 32 bits");
    let mut written: Vec<usize> = copies.iter().map(|(_, to)| *to).collect();
    written.sort_unstable();
    assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "a block is written once");
    for (from, to) in copies {
        assert!(*from < num_blocks && *to < num_blocks, "a copy within the pool's {num_blocks} blocks");
        assert!(written.binary_search(from).is_err(), "block {from} is read and written");
    }
}
