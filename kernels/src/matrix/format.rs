//! Packed layouts of quantized weights.
//!
//! A panel holds sixteen output features (lanes). For every group of 32 inputs it stores the quants, then sixteen scales,
//! then sixteen minimums where the type has them. Quants stand in *quads*: four consecutive inputs of lane 0, of lane 1, …,
//! 64 bytes in all, which is what the integer dot product takes. Four-bit types keep quad 2t in the low and quad 2t+1 in
//! the high nibbles of 64-byte block t. Quants are unsigned; `ZERO` is what to subtract.

use half::f16;

/// Inputs per group.
pub const GROUP: usize = 32;
pub const LANES: usize = crate::simd::LANES;

/// A weight type that has a packed layout and an integer kernel. Names and block layouts are those of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q6K,
}

impl QuantType {
    /// Inputs in one block of the file format.
    pub fn block_len(self) -> usize {
        match self {
            QuantType::Q4_0 | QuantType::Q4_1 | QuantType::Q8_0 => 32,
            QuantType::Q4K | QuantType::Q6K => 256,
        }
    }

    /// Bytes of one block of the file format.
    pub fn block_bytes(self) -> usize {
        match self {
            QuantType::Q4_0 => 18,
            QuantType::Q4_1 => 20,
            QuantType::Q8_0 => 34,
            QuantType::Q4K => 144,
            QuantType::Q6K => 210,
        }
    }
}

/// The layout and arithmetic of one packed type.
pub(crate) trait Format: 'static {
    /// Whether two quants share a byte.
    const NIBBLES: bool;
    /// Whether scales and minimums are f32 (else f16).
    const WIDE_SCALES: bool;
    const HAS_MIN: bool;
    /// Whether each half of a group (16 inputs) has its own scale.
    const HALVES: bool;
    const ZERO: i32;
    /// Whether quants are below 128.
    const SEVEN_BITS: bool;

    const QUANT_BYTES: usize = if Self::NIBBLES { GROUP * LANES / 2 } else { GROUP * LANES };
    const SCALE_BYTES: usize = LANES * if Self::WIDE_SCALES { 4 } else { 2 };
    const MIN_OFFSET: usize = Self::QUANT_BYTES + Self::SCALE_BYTES * if Self::HALVES { 2 } else { 1 };
    const GROUP_BYTES: usize = Self::MIN_OFFSET + if Self::HAS_MIN { Self::SCALE_BYTES } else { 0 };
    const BLOCK_BYTES: usize;
    const GROUPS_PER_BLOCK: usize;

    /// The quads of one group of a block, one unsigned quant per byte.
    fn quads(block: &[u8], group: usize) -> [u32; GROUP / 4];

    /// Writes one block of one row into `lane` of its groups. `groups` starts at the block's first group.
    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]);
}

pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
pub(crate) struct Q8_0;
pub(crate) struct Q4K;
pub(crate) struct Q6K;

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]])
}

fn half_at(bytes: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([bytes[offset], bytes[offset + 1]]).to_f32()
}

/// `quads[q]` is the lane's quad q, a quant a byte, each below 16.
fn put_nibbles(group: &mut [u8], lane: usize, quads: [u32; 8]) {
    for (block, pair) in quads.as_chunks::<2>().0.iter().enumerate() {
        let at = block * 64 + lane * 4;
        group[at..at + 4].copy_from_slice(&(pair[0] | pair[1] << 4).to_le_bytes());
    }
}

fn put_bytes(group: &mut [u8], lane: usize, quads: [u32; 8]) {
    for (quad, word) in quads.into_iter().enumerate() {
        let at = quad * 64 + lane * 4;
        group[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

fn put_f32(group: &mut [u8], offset: usize, lane: usize, value: f32) {
    let at = offset + lane * 4;
    group[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_f16(group: &mut [u8], offset: usize, lane: usize, bits: &[u8]) {
    let at = offset + lane * 2;
    group[at..at + 2].copy_from_slice(bits);
}

const LOW: u32 = 0x0f0f_0f0f;

/// The eight quads of a 32-element block whose byte i holds elements i (low) and i + 16 (high).
fn split_halves(qs: &[u8]) -> [u32; 8] {
    std::array::from_fn(|quad| {
        let word = word(qs, quad % 4);
        if quad < 4 { word & LOW } else { (word >> 4) & LOW }
    })
}

impl Format for Q4_0 {
    const NIBBLES: bool = true;
    const WIDE_SCALES: bool = false;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;
    const ZERO: i32 = 8;
    const SEVEN_BITS: bool = true;
    const BLOCK_BYTES: usize = 18;
    const GROUPS_PER_BLOCK: usize = 1;

    fn quads(block: &[u8], _group: usize) -> [u32; 8] {
        split_halves(&block[2..])
    }

    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]) {
        put_f16(groups, Self::QUANT_BYTES, lane, &block[..2]);
        put_nibbles(groups, lane, Self::quads(block, 0));
    }
}

impl Format for Q4_1 {
    const NIBBLES: bool = true;
    const WIDE_SCALES: bool = false;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;
    const ZERO: i32 = 0;
    const SEVEN_BITS: bool = true;
    const BLOCK_BYTES: usize = 20;
    const GROUPS_PER_BLOCK: usize = 1;

    fn quads(block: &[u8], _group: usize) -> [u32; 8] {
        split_halves(&block[4..])
    }

    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]) {
        put_f16(groups, Self::QUANT_BYTES, lane, &block[..2]);
        put_f16(groups, Self::MIN_OFFSET, lane, &block[2..4]);
        put_nibbles(groups, lane, Self::quads(block, 0));
    }
}

impl Format for Q8_0 {
    const NIBBLES: bool = false;
    const WIDE_SCALES: bool = false;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;
    const ZERO: i32 = 128;
    const SEVEN_BITS: bool = false;
    const BLOCK_BYTES: usize = 34;
    const GROUPS_PER_BLOCK: usize = 1;

    fn quads(block: &[u8], _group: usize) -> [u32; 8] {
        std::array::from_fn(|quad| word(&block[2..], quad) ^ 0x8080_8080)
    }

    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]) {
        put_f16(groups, Self::QUANT_BYTES, lane, &block[..2]);
        put_bytes(groups, lane, Self::quads(block, 0));
    }
}

impl Format for Q4K {
    const NIBBLES: bool = true;
    const WIDE_SCALES: bool = true;
    const HAS_MIN: bool = true;
    const HALVES: bool = false;
    const ZERO: i32 = 0;
    const SEVEN_BITS: bool = true;
    const BLOCK_BYTES: usize = 144;
    const GROUPS_PER_BLOCK: usize = 8;

    fn quads(block: &[u8], group: usize) -> [u32; 8] {
        let bytes = &block[16 + 32 * (group / 2)..];
        std::array::from_fn(|quad| (word(bytes, quad) >> (4 * (group % 2))) & LOW)
    }

    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        let scales = &block[4..16];
        for (g, group) in groups.chunks_exact_mut(Self::GROUP_BYTES).take(8).enumerate() {
            let (scale, min) = q4k_scale_min(scales, g);
            // Both products are exact: 11 by 6 bits.
            put_f32(group, Self::QUANT_BYTES, lane, d * f32::from(scale));
            put_f32(group, Self::MIN_OFFSET, lane, -(dmin * f32::from(min)));
            put_nibbles(group, lane, Self::quads(block, g));
        }
    }
}

/// The six-bit scale and minimum of sub-block `g`, from their twelve packed bytes.
pub(crate) fn q4k_scale_min(packed: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        (packed[g + 4] & 15 | (packed[g - 4] >> 6) << 4, packed[g + 4] >> 4 | (packed[g] >> 6) << 4)
    }
}

impl Format for Q6K {
    const NIBBLES: bool = false;
    const WIDE_SCALES: bool = true;
    const HAS_MIN: bool = false;
    const HALVES: bool = true;
    const ZERO: i32 = 32;
    const SEVEN_BITS: bool = true;
    const BLOCK_BYTES: usize = 210;
    const GROUPS_PER_BLOCK: usize = 8;

    fn quads(block: &[u8], group: usize) -> [u32; 8] {
        // Within each half of 128, groups 0 and 1 are in the low nibbles of bytes 0..32 and 32..64, groups 2 and 3 in the
        // high ones; two more bits come from `high`.
        let (half, part) = (group / 4, group % 4);
        let (low, high) = (&block[64 * half + 32 * (part % 2)..], &block[128 + 32 * half..]);
        std::array::from_fn(|quad| {
            let low = (word(low, quad) >> (4 * (part / 2))) & LOW;
            let high = (word(high, quad) >> (2 * part)) & 0x0303_0303;
            low | high << 4
        })
    }

    fn pack_block(block: &[u8], lane: usize, groups: &mut [u8]) {
        let scales = &block[192..208];
        let d = half_at(block, 208);
        for (g, group) in groups.chunks_exact_mut(Self::GROUP_BYTES).take(8).enumerate() {
            put_bytes(group, lane, Self::quads(block, g));
            for side in 0..2 {
                let scale = d * f32::from(scales[2 * g + side] as i8);
                put_f32(group, Self::QUANT_BYTES + side * Self::SCALE_BYTES, lane, scale);
            }
        }
    }
}
