//! Products of activation rows with GGUF-quantized weights. The kernels are in `kernels/cuda/quantized.cu`.
//!
//! The arithmetic of a group is the CPU's (see [`crate::matrix`]); the order of groups differs, so results differ from the
//! CPU's in the last bits. [`QuantizedRows`] made from f32 rows equal the CPU's exactly.

mod activations;
mod packing;

pub use activations::{HostRow, QuantizedRows, gated_activation, rms_norm};
use packing::{PAIR, TILE_FEATURES, pack_tile, tile_bytes};

use super::rows::ROW_MULTIPLE;
use super::{Activations, Address, Device, DeviceBuffer, DeviceError, Element, Launch, Output, View, Write};
use crate::matrix::{PackError, QuantType};
use crate::pool::Pool;

const THREADS: u32 = 256;
/// Host memory for packing weights before they are copied, piece by piece.
const PIECE_BYTES: usize = 32 << 20;

#[derive(Debug, thiserror::Error)]
pub enum QuantMatrixError {
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A quantized `[rows, cols]` matrix on a device; `rows` are output features.
pub struct QuantMatrix {
    ty: QuantType,
    rows: usize,
    cols: usize,
    /// Tiles of sixteen rows, see `packing`.
    tiles: DeviceBuffer<u8>,
}

impl QuantMatrix {
    /// Packs `sources`, matrices of the file format with `cols` columns each (q, k and v, say), one below the other, and
    /// copies them to the device.
    pub fn pack(
        device: &Device,
        pool: &Pool,
        ty: QuantType,
        cols: usize,
        sources: &[&[u8]],
    ) -> Result<Self, QuantMatrixError> {
        if cols == 0 || !cols.is_multiple_of(ty.block_len()) {
            return Err(PackError::Columns { ty, cols }.into());
        }
        let row_bytes = cols / ty.block_len() * ty.block_bytes();
        for source in sources {
            let actual = source.len();
            if !actual.is_multiple_of(row_bytes) {
                return Err(PackError::Length { expected: actual.next_multiple_of(row_bytes), actual }.into());
            }
        }
        let rows: Vec<&[u8]> = sources.iter().flat_map(|source| source.chunks_exact(row_bytes)).collect();
        let bytes = tile_bytes(ty, cols);
        let mut tiles = DeviceBuffer::new(device, rows.len().div_ceil(TILE_FEATURES) * bytes)?;
        let piece_tiles = (PIECE_BYTES / bytes).max(1);
        let mut packed = Vec::new();
        for (piece, rows) in rows.chunks(piece_tiles * TILE_FEATURES).enumerate() {
            packed.clear();
            packed.resize(rows.len().div_ceil(TILE_FEATURES) * bytes, 0);
            pack_tiles(pool, ty, rows, bytes, &mut packed);
            tiles.upload(piece * piece_tiles * bytes, &packed)?;
        }
        Ok(Self { ty, rows: rows.len(), cols, tiles })
    }

    pub fn ty(&self) -> QuantType {
        self.ty
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Overwrites part of the weights with small numbers, for tests of the health probes.
    pub fn corrupt(&mut self) -> Result<(), DeviceError> {
        let half = self.tiles.len() / 2;
        self.tiles.fill(0, half, 0x3c)
    }

    pub fn bytes(&self) -> usize {
        self.tiles.bytes()
    }

    fn pairs(&self) -> u32 {
        to_u32(self.cols.div_ceil(PAIR))
    }
}

fn pack_tiles(pool: &Pool, ty: QuantType, rows: &[&[u8]], bytes: usize, packed: &mut [u8]) {
    let tiles: Vec<_> =
        packed.chunks_exact_mut(bytes).zip(rows.chunks(TILE_FEATURES)).map(std::sync::Mutex::new).collect();
    pool.run(tiles.len(), &|index| {
        // Each tile belongs to one task, so this lock is never contended.
        let mut tile = tiles[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (tile, rows) = &mut *tile;
        pack_tile(ty, rows, tile);
    });
}

/// `out[r, c] (+)= Σ_k x[r, k] · w[c, k] (+ bias[c])` for all rows of `x`.
///
/// # Panics
/// When a shape does not fit.
pub fn multiply(device: &Device, weights: &QuantMatrix, x: &QuantizedRows, out: Output) -> Result<(), DeviceError> {
    let kernel = Kernel::choose(device.properties().multiprocessors, x.rows, weights.rows);
    multiply_with(device, kernel, weights, x, out)
}

/// The kernels of a product. All give the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Blocks of one tile of features and 8 rows.
    Rows8,
    Rows16,
    Rows32,
    Rows64,
    /// Blocks of 128 features and 64 rows.
    Wide,
}

impl Kernel {
    #[cfg(any(test, feature = "testing"))]
    pub(crate) const ALL: [Kernel; 5] = [Kernel::Rows8, Kernel::Rows16, Kernel::Rows32, Kernel::Rows64, Kernel::Wide];

    /// The smallest block that takes all rows; the wide one if it gives every multiprocessor a block.
    fn choose(multiprocessors: u32, rows: usize, features: usize) -> Self {
        let wide_blocks = rows.div_ceil(Kernel::Wide.rows()) * features.div_ceil(Kernel::Wide.features());
        match rows {
            0..=8 => Kernel::Rows8,
            9..=16 => Kernel::Rows16,
            17..=32 => Kernel::Rows32,
            65.. if wide_blocks >= multiprocessors as usize => Kernel::Wide,
            _ => Kernel::Rows64,
        }
    }

    fn rows(self) -> usize {
        match self {
            Kernel::Rows8 => 8,
            Kernel::Rows16 => 16,
            Kernel::Rows32 => 32,
            Kernel::Rows64 | Kernel::Wide => 64,
        }
    }

    fn features(self) -> usize {
        if self == Kernel::Wide { 128 } else { TILE_FEATURES }
    }

    fn name(self, ty: QuantType) -> &'static str {
        let names = match ty {
            QuantType::Q4_0 => {
                ["multiply_q4_0_8", "multiply_q4_0_16", "multiply_q4_0_32", "multiply_q4_0_64", "multiply_q4_0_wide"]
            }
            QuantType::Q4_1 => {
                ["multiply_q4_1_8", "multiply_q4_1_16", "multiply_q4_1_32", "multiply_q4_1_64", "multiply_q4_1_wide"]
            }
            QuantType::Q8_0 => {
                ["multiply_q8_0_8", "multiply_q8_0_16", "multiply_q8_0_32", "multiply_q8_0_64", "multiply_q8_0_wide"]
            }
            QuantType::Q4K => {
                ["multiply_q4k_8", "multiply_q4k_16", "multiply_q4k_32", "multiply_q4k_64", "multiply_q4k_wide"]
            }
            QuantType::Q6K => {
                ["multiply_q6k_8", "multiply_q6k_16", "multiply_q6k_32", "multiply_q6k_64", "multiply_q6k_wide"]
            }
        };
        names[self as usize]
    }
}

/// [`multiply`] with a chosen kernel.
pub(crate) fn multiply_with(
    device: &Device,
    kernel: Kernel,
    weights: &QuantMatrix,
    x: &QuantizedRows,
    out: Output,
) -> Result<(), DeviceError> {
    assert_eq!(x.cols, weights.cols, "rows have the matrix's columns");
    assert!(out.row_stride >= weights.rows, "an output row of {} for {} features", out.row_stride, weights.rows);
    assert!(out.write == Write::Store || out.element == Element::F32, "sums are added to f32 rows");
    let params = ProductParams {
        weights: weights.tiles.address(),
        quants: x.quants.address(),
        scales: x.scales.address(),
        sums: x.scaled_sums.address(),
        out: out.address,
        bias: out.bias,
        row_stride: out.row_stride as u64,
        rows: to_u32(x.rows),
        features: to_u32(weights.rows),
        pairs: weights.pairs(),
        element: out.element as u32,
        add: u32::from(out.write == Write::Add),
    };
    let (rows, features) = (x.rows.div_ceil(kernel.rows()), weights.rows.div_ceil(kernel.features()));
    let launch = overlapped([to_u32(features), to_u32(rows), 1]);
    // SAFETY: the operands' shapes agree, and `Output` promises room for its rows of this many features.
    unsafe { device.launch(kernel.name(weights.ty), &launch, &params) }
}

/// The rows of `table` that `tokens` name as f32, one for each row of `hidden`: the CPU's very numbers. A token beyond the
/// table gives NaN.
///
/// # Panics
/// When a shape does not fit.
pub fn embed(device: &Device, table: &QuantMatrix, tokens: View<u32>, hidden: Activations) -> Result<(), DeviceError> {
    assert!(hidden.element == Element::F32 && hidden.cols == table.cols, "an embedding gives f32 rows of the table's");
    assert!(tokens.len() >= hidden.rows, "{} tokens for {} rows", tokens.len(), hidden.rows);
    assert!(table.rows > 0 && table.cols.is_multiple_of(ROW_MULTIPLE), "a table has rows of whole vectors");
    let params = EmbedParams {
        weights: table.tiles.address(),
        tokens: tokens.address(),
        hidden: hidden.address,
        vocab: to_u32(table.rows),
        cols: to_u32(table.cols),
        pairs: table.pairs(),
    };
    let name = match table.ty {
        QuantType::Q4_0 => "embed_q4_0",
        QuantType::Q4_1 => "embed_q4_1",
        QuantType::Q8_0 => "embed_q8_0",
        QuantType::Q4K => "embed_q4k",
        QuantType::Q6K => "embed_q6k",
    };
    // SAFETY: every row of `hidden` has a token, and the kernel checks the tokens against the table.
    unsafe { device.launch(name, &overlapped([to_u32(hidden.rows), 1, 1]), &params) }
}

fn to_u32(number: usize) -> u32 {
    u32::try_from(number).expect("shapes are below 2^32")
}

fn overlapped(grid: [u32; 3]) -> Launch {
    Launch { overlap: true, ..Launch::new(grid, THREADS) }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ProductParams {
    weights: Address,
    quants: Address,
    scales: Address,
    sums: Address,
    out: Address,
    bias: Address,
    row_stride: u64,
    rows: u32,
    features: u32,
    pairs: u32,
    element: u32,
    add: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct EmbedParams {
    weights: Address,
    tokens: Address,
    hidden: Address,
    vocab: u32,
    cols: u32,
    pairs: u32,
}

#[cfg(test)]
mod tests {
    use super::Kernel;

    #[test]
    fn the_kernel_follows_the_rows() {
        let chosen = |rows| Kernel::choose(132, rows, 4096);
        assert_eq!([1, 8, 9, 17, 33, 64].map(chosen), {
            [Kernel::Rows8, Kernel::Rows8, Kernel::Rows16, Kernel::Rows32, Kernel::Rows64, Kernel::Rows64]
        });
        // 32 blocks of 128 features: five times as many fill the device.
        assert_eq!((chosen(256), chosen(257)), (Kernel::Rows64, Kernel::Wide));
        assert_eq!(Kernel::choose(132, 65, 128_256), Kernel::Wide);
    }
}
