//! The layout of quantized weights on a device, as `kernels/cuda/quantized.cu` reads it.
//!
//! A tile holds sixteen output features. It goes over its inputs pair by pair of groups of 32; a pair has the quants in the
//! order of the matrix instruction's fragments, then the scales. With `g = lane / 4` and `t = lane % 4`, a lane has inputs
//! `4t..4t + 4` and `4t + 16..4t + 20` of features `g` (side 0) and `g + 8` (side 1). Types with blocks of 256 inputs have
//! the block's own factors behind its four pairs. A last group without a partner has one of zeros.

use crate::matrix::QuantType;
use crate::matrix::format::{Format, GROUP, Q4_0, Q4_1, Q4K, Q6K, Q8_0, q4k_scale_min};

/// Output features of a tile.
pub(super) const TILE_FEATURES: usize = 16;

/// Inputs of a pair.
pub(super) const PAIR: usize = 2 * GROUP;

/// Pairs of a block of 256 inputs.
const BLOCK_PAIRS: usize = 4;

/// Bytes of a tile with `cols` inputs.
pub(super) fn tile_bytes(ty: QuantType, cols: usize) -> usize {
    match ty {
        QuantType::Q4_0 => Q4_0::tile_bytes(cols),
        QuantType::Q4_1 => Q4_1::tile_bytes(cols),
        QuantType::Q8_0 => Q8_0::tile_bytes(cols),
        QuantType::Q4K => Q4K::tile_bytes(cols),
        QuantType::Q6K => Q6K::tile_bytes(cols),
    }
}

/// Packs up to sixteen rows of the file format, whole blocks each, into a tile of zeros.
pub(super) fn pack_tile(ty: QuantType, rows: &[&[u8]], tile: &mut [u8]) {
    match ty {
        QuantType::Q4_0 => pack::<Q4_0>(rows, tile),
        QuantType::Q4_1 => pack::<Q4_1>(rows, tile),
        QuantType::Q8_0 => pack::<Q8_0>(rows, tile),
        QuantType::Q4K => pack::<Q4K>(rows, tile),
        QuantType::Q6K => pack::<Q6K>(rows, tile),
    }
}

fn pack<F: DeviceFormat>(rows: &[&[u8]], tile: &mut [u8]) {
    assert!(rows.len() <= TILE_FEATURES, "a tile has {TILE_FEATURES} features");
    for (feature, row) in rows.iter().enumerate() {
        for (index, block) in row.chunks_exact(F::BLOCK_BYTES).enumerate() {
            for group in 0..F::GROUPS_PER_BLOCK {
                let overall = index * F::GROUPS_PER_BLOCK + group;
                let pair = &mut tile[F::pair_offset(overall / 2)..][..F::PAIR_BYTES];
                F::put_group(pair, Place { feature, group: overall % 2 }, block, group);
            }
            if F::FACTOR_BYTES > 0 {
                let factors = F::pair_offset(BLOCK_PAIRS * index) + BLOCK_PAIRS * F::PAIR_BYTES;
                F::put_factors(&mut tile[factors..][..F::FACTOR_BYTES], feature, block);
            }
        }
    }
}

/// Where a group of a row stands in a pair.
#[derive(Clone, Copy)]
struct Place {
    feature: usize,
    group: usize,
}

impl Place {
    fn side(self) -> usize {
        self.feature / 8
    }

    fn lane(self, t: usize) -> usize {
        self.feature % 8 * 4 + t
    }

    /// Of the f16 of this feature and group, in scales that stand feature by feature in records of `record` bytes.
    fn half(self, record: usize) -> usize {
        self.feature % 8 * record + self.side() * 4 + self.group * 2
    }
}

trait DeviceFormat: Format {
    const PAIR_BYTES: usize;
    /// Bytes behind the four pairs of a block; 0 for the types whose block is one group.
    const FACTOR_BYTES: usize;

    /// Writes group `group` of `block`.
    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize);

    /// Writes what the groups of `block` share.
    fn put_factors(_factors: &mut [u8], _feature: usize, _block: &[u8]) {}

    fn pair_offset(pair: usize) -> usize {
        pair * Self::PAIR_BYTES + pair / BLOCK_PAIRS * Self::FACTOR_BYTES
    }

    fn tile_bytes(cols: usize) -> usize {
        Self::pair_offset(cols.div_ceil(PAIR))
    }
}

impl DeviceFormat for Q4_0 {
    const PAIR_BYTES: usize = 512 + 64;
    const FACTOR_BYTES: usize = 0;

    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize) {
        // Two's complement: 8 is subtracted by flipping the top bit.
        put_nibbles(pair, place, Self::quads(block, group).map(|quad| quad ^ 0x0808_0808));
        put(pair, 512 + place.half(8), &block[..2]);
    }
}

impl DeviceFormat for Q4_1 {
    const PAIR_BYTES: usize = 512 + 128;
    const FACTOR_BYTES: usize = 0;

    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize) {
        put_nibbles(pair, place, Self::quads(block, group));
        put(pair, 512 + place.half(16), &block[..2]);
        put(pair, 512 + 8 + place.half(16), &block[2..4]);
    }
}

impl DeviceFormat for Q8_0 {
    const PAIR_BYTES: usize = 1024 + 64;
    const FACTOR_BYTES: usize = 0;

    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize) {
        for (quad, word) in Self::quads(block, group).into_iter().enumerate() {
            let (half, t) = (quad / 4, quad % 4);
            let at = 512 * place.group + place.lane(t) * 16 + (2 * half + place.side()) * 4;
            put(pair, at, &(word ^ 0x8080_8080).to_le_bytes());
        }
        put(pair, 1024 + place.half(8), &block[..2]);
    }
}

impl DeviceFormat for Q4K {
    const PAIR_BYTES: usize = 512 + 64;
    const FACTOR_BYTES: usize = 64;

    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize) {
        put_nibbles(pair, place, Self::quads(block, group));
        let (scale, min) = q4k_scale_min(&block[4..16], group);
        pair[512 + place.feature * 4 + place.group] = scale;
        pair[512 + place.feature * 4 + 2 + place.group] = min;
    }

    fn put_factors(factors: &mut [u8], feature: usize, block: &[u8]) {
        put(factors, feature * 4, &block[..4]);
    }
}

impl DeviceFormat for Q6K {
    const PAIR_BYTES: usize = 512 + 256 + 64;
    const FACTOR_BYTES: usize = 32;

    fn put_group(pair: &mut [u8], place: Place, block: &[u8], group: usize) {
        // Two's complement of six bits: 32 is subtracted by flipping the top bit.
        let quads = Self::quads(block, group).map(|quad| quad ^ 0x2020_2020);
        put_nibbles(pair, place, quads.map(|quad| quad & 0x0f0f_0f0f));
        for (quad, word) in quads.into_iter().enumerate() {
            let (half, t) = (quad / 4, quad % 4);
            let top = (word >> 4 & 0x0303_0303) << (2 * (2 * place.side() + half));
            for (byte, bits) in pair[512 + place.lane(t) * 8 + 4 * place.group..].iter_mut().zip(top.to_le_bytes()) {
                *byte |= bits;
            }
        }
        for half in 0..2 {
            // Signed, stored plus 128.
            pair[768 + place.feature * 4 + 2 * place.group + half] = block[192 + 2 * group + half] ^ 0x80;
        }
    }

    fn put_factors(factors: &mut [u8], feature: usize, block: &[u8]) {
        put(factors, feature * 2, &block[208..]);
    }
}

/// Writes a group's four-bit quants: those of inputs `4t…` in the low, those of `4t + 16…` in the high nibbles of a word.
fn put_nibbles(pair: &mut [u8], place: Place, quads: [u32; 8]) {
    for t in 0..4 {
        let at = place.lane(t) * 16 + (2 * place.group + place.side()) * 4;
        put(pair, at, &(quads[t] | quads[t + 4] << 4).to_le_bytes());
    }
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [QuantType; 5] = [QuantType::Q4_0, QuantType::Q4_1, QuantType::Q8_0, QuantType::Q4K, QuantType::Q6K];

    /// Packs `rows` rows of blocks whose bits are set one at a time, and counts the bits that each sets in the tile.
    fn bits_of_one_bit(ty: QuantType, blocks: usize, bit: usize) -> u32 {
        let mut row = vec![0u8; blocks * ty.block_bytes()];
        row[bit / 8] |= 1 << (bit % 8);
        let cols = blocks * ty.block_len();
        let zeros = vec![0u8; row.len()];
        let mut tile = vec![0u8; tile_bytes(ty, cols)];
        let mut background = tile.clone();
        pack_tile(ty, &[&zeros, &row], &mut tile);
        pack_tile(ty, &[&zeros, &zeros], &mut background);
        tile.iter().zip(&background).map(|(a, b)| (a ^ b).count_ones()).sum()
    }

    #[test]
    fn every_bit_of_a_block_has_one_place() {
        for ty in TYPES {
            for bit in 0..8 * 2 * ty.block_bytes() {
                assert_eq!(bits_of_one_bit(ty, 2, bit), 1, "{ty:?}, bit {bit}");
            }
        }
    }

    #[test]
    fn no_two_features_share_a_bit_and_none_is_lost() {
        for ty in TYPES {
            let blocks = 512 / ty.block_len();
            let mut union = vec![0u8; tile_bytes(ty, 512)];
            let zeros = vec![0u8; blocks * ty.block_bytes()];
            let mut background = union.clone();
            pack_tile(ty, &[&zeros[..]; TILE_FEATURES], &mut background);
            let mut written = 0;
            for feature in 0..TILE_FEATURES {
                let ones = vec![0xffu8; zeros.len()];
                let mut rows = [&zeros[..]; TILE_FEATURES];
                rows[feature] = &ones;
                let mut tile = vec![0u8; union.len()];
                pack_tile(ty, &rows, &mut tile);
                for ((union, tile), background) in union.iter_mut().zip(&tile).zip(&background) {
                    let change = tile ^ background;
                    assert_eq!(*union & change, 0, "{ty:?}: two features share a bit");
                    *union |= change;
                    written += change.count_ones() as usize;
                }
            }
            assert_eq!(written, TILE_FEATURES * zeros.len() * 8, "{ty:?}: all bits of the rows are kept");
        }
    }
}
