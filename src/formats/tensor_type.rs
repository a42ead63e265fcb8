//! The element types of stored tensors. The quantized ones are ggml's block layouts, row by row.

use std::fmt;

/// How the elements of a tensor are stored. A row is a whole number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl TensorType {
    pub const ALL: [TensorType; 13] = [
        TensorType::F32,
        TensorType::F16,
        TensorType::BF16,
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q8_0,
        TensorType::Q2K,
        TensorType::Q3K,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
    ];

    /// The type with this ggml number, or `None` if it is not supported.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => TensorType::F32,
            1 => TensorType::F16,
            2 => TensorType::Q4_0,
            3 => TensorType::Q4_1,
            6 => TensorType::Q5_0,
            7 => TensorType::Q5_1,
            8 => TensorType::Q8_0,
            10 => TensorType::Q2K,
            11 => TensorType::Q3K,
            12 => TensorType::Q4K,
            13 => TensorType::Q5K,
            14 => TensorType::Q6K,
            30 => TensorType::BF16,
            _ => return None,
        })
    }

    /// Elements in one block.
    pub fn block_len(self) -> usize {
        match self {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => 1,
            TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q5_0 | TensorType::Q5_1 | TensorType::Q8_0 => 32,
            TensorType::Q2K | TensorType::Q3K | TensorType::Q4K | TensorType::Q5K | TensorType::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            TensorType::F32 => 4,
            TensorType::F16 | TensorType::BF16 => 2,
            TensorType::Q4_0 => 2 + 16,
            TensorType::Q4_1 => 2 + 2 + 16,
            TensorType::Q5_0 => 2 + 4 + 16,
            TensorType::Q5_1 => 2 + 2 + 4 + 16,
            TensorType::Q8_0 => 2 + 32,
            TensorType::Q2K => 16 + 64 + 2 + 2,
            TensorType::Q3K => 32 + 64 + 12 + 2,
            TensorType::Q4K => 2 + 2 + 12 + 128,
            TensorType::Q5K => 2 + 2 + 12 + 32 + 128,
            TensorType::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of a row of `len` elements; `None` when it is not a whole number of blocks, or overflows.
    pub fn row_bytes(self, len: usize) -> Option<usize> {
        len.is_multiple_of(self.block_len()).then_some(())?;
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// The name as model files and their authors spell it.
    pub fn name(self) -> &'static str {
        match self {
            TensorType::F32 => "F32",
            TensorType::F16 => "F16",
            TensorType::BF16 => "BF16",
            TensorType::Q4_0 => "Q4_0",
            TensorType::Q4_1 => "Q4_1",
            TensorType::Q5_0 => "Q5_0",
            TensorType::Q5_1 => "Q5_1",
            TensorType::Q8_0 => "Q8_0",
            TensorType::Q2K => "Q2_K",
            TensorType::Q3K => "Q3_K",
            TensorType::Q4K => "Q4_K",
            TensorType::Q5K => "Q5_K",
            TensorType::Q6K => "Q6_K",
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;

    #[test]
    fn block_layouts_have_the_sizes_candle_knows() {
        for ty in TensorType::ALL {
            let candle = match ty {
                TensorType::F32 => GgmlDType::F32,
                TensorType::F16 => GgmlDType::F16,
                TensorType::BF16 => GgmlDType::BF16,
                TensorType::Q4_0 => GgmlDType::Q4_0,
                TensorType::Q4_1 => GgmlDType::Q4_1,
                TensorType::Q5_0 => GgmlDType::Q5_0,
                TensorType::Q5_1 => GgmlDType::Q5_1,
                TensorType::Q8_0 => GgmlDType::Q8_0,
                TensorType::Q2K => GgmlDType::Q2K,
                TensorType::Q3K => GgmlDType::Q3K,
                TensorType::Q4K => GgmlDType::Q4K,
                TensorType::Q5K => GgmlDType::Q5K,
                TensorType::Q6K => GgmlDType::Q6K,
            };
            assert_eq!(ty.block_len(), candle.block_size(), "{ty}");
            assert_eq!(ty.block_bytes(), candle.type_size(), "{ty}");
        }
    }

    #[test]
    fn a_row_is_whole_blocks() {
        assert_eq!(TensorType::Q4_1.row_bytes(576), Some(18 * 20));
        assert_eq!(TensorType::Q4K.row_bytes(576), None);
        assert_eq!(TensorType::F32.row_bytes(usize::MAX), None);
    }
}
