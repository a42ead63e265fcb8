//! Stored weights as the decoder asks for them: by Hugging Face's names, in Hugging Face's row order, in the type that
//! the file has.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use outrigger_kernels::matrix::{DenseType, QuantType};

use super::load::LoadError;
pub use crate::formats::TensorType;

/// One stored tensor. Its data are `shape`'s rows, one after another, each a whole number of blocks of `ty`.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    pub ty: TensorType,
    /// `[out, in]` for a projection, `[len]` for a norm or bias.
    pub shape: Vec<usize>,
    pub data: Cow<'a, [u8]>,
}

/// Where tensors come from. Asking for one reads (and pages in) that one only.
pub trait TensorSource: Send + Sync {
    fn tensor(&self, name: &str) -> Result<RawTensor<'_>, LoadError>;

    /// The shape of a tensor, `None` where there is no such tensor.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// The type in which the file has a tensor, `None` where there is no such tensor.
    fn stored_type(&self, name: &str) -> Option<TensorType>;

    /// Asks for a tensor to be read from the disk meanwhile; gives its bytes, 0 for what is not on a disk.
    fn read_ahead(&self, name: &str) -> usize;

    fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// Bytes of all tensors as stored, to report progress against.
    fn total_bytes(&self) -> u64;
}

impl RawTensor<'_> {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values as f32: exact for the dense types, and the block formula's own value for the quantized ones.
    pub fn dequantize(&self) -> Result<Vec<f32>, LoadError> {
        match self.ty {
            TensorType::F32 => Ok(self.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
            TensorType::F16 => {
                Ok(self.data.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect())
            }
            TensorType::BF16 => {
                Ok(self.data.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect())
            }
            TensorType::Q4_0 => self.dequantize_with_candle(GgmlDType::Q4_0),
            TensorType::Q4_1 => self.dequantize_with_candle(GgmlDType::Q4_1),
            TensorType::Q5_0 => self.dequantize_with_candle(GgmlDType::Q5_0),
            TensorType::Q5_1 => self.dequantize_with_candle(GgmlDType::Q5_1),
            TensorType::Q8_0 => self.dequantize_with_candle(GgmlDType::Q8_0),
            TensorType::Q2K => self.dequantize_with_candle(GgmlDType::Q2K),
            TensorType::Q3K => self.dequantize_with_candle(GgmlDType::Q3K),
            TensorType::Q4K => self.dequantize_with_candle(GgmlDType::Q4K),
            TensorType::Q5K => self.dequantize_with_candle(GgmlDType::Q5K),
            TensorType::Q6K => self.dequantize_with_candle(GgmlDType::Q6K),
        }
    }

    /// The values as `ty`, little-endian: as stored where that is their type, else rounded to nearest.
    pub fn dense_bytes(&self, ty: DenseType) -> Result<Cow<'_, [u8]>, LoadError> {
        match (self.ty, ty) {
            (TensorType::F32, DenseType::F32)
            | (TensorType::F16, DenseType::F16)
            | (TensorType::BF16, DenseType::BF16) => return Ok(Cow::Borrowed(&self.data)),
            _ => {}
        }
        let values = self.dequantize()?;
        Ok(match ty {
            DenseType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DenseType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            DenseType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        })
    }

    fn dequantize_with_candle(&self, ty: GgmlDType) -> Result<Vec<f32>, LoadError> {
        let storage = QStorage::from_data(Cow::Borrowed(&aligned(&self.data)), &Device::Cpu, ty)?;
        let tensor = QTensor::new(storage, self.shape.as_slice())?;
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }
}

/// The type in which the kernels multiply stored blocks as they are; `None` for dense types, and for blocks that they lack.
pub(super) fn packed_type(stored: TensorType) -> Option<QuantType> {
    match stored {
        TensorType::Q4_0 => Some(QuantType::Q4_0),
        TensorType::Q4_1 => Some(QuantType::Q4_1),
        TensorType::Q8_0 => Some(QuantType::Q8_0),
        TensorType::Q4K => Some(QuantType::Q4K),
        TensorType::Q6K => Some(QuantType::Q6K),
        TensorType::F32 | TensorType::F16 | TensorType::BF16 => None,
        TensorType::Q5_0 | TensorType::Q5_1 | TensorType::Q2K | TensorType::Q3K | TensorType::Q5K => None,
    }
}

/// candle reads blocks in place and insists on the alignment of their largest field. Maps have it; a slice out of the
/// middle of something may not, and is copied to where the allocator aligns it.
fn aligned(data: &[u8]) -> Cow<'_, [u8]> {
    match data.as_ptr().align_offset(align_of::<u32>()) {
        0 => Cow::Borrowed(data),
        _ => Cow::Owned(data.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formulas of the simplest blocks, written out; those of all types are compared with golden logits elsewhere.
    #[test]
    fn blocks_mean_what_their_formulas_say() {
        let (scale, minimum) = (f16::from_f32(0.5), f16::from_f32(-2.0));
        let nibbles: Vec<u8> = (0..16).map(|i| i | ((15 - i) << 4)).collect();
        let low_then_high = |value: &dyn Fn(f32) -> f32| -> Vec<f32> {
            let (low, high) = ((0..16).map(|i| i as f32), (0..16).map(|i| (15 - i) as f32));
            low.chain(high).map(value).collect()
        };
        let q4_1 = [&scale.to_le_bytes()[..], &minimum.to_le_bytes(), &nibbles].concat();
        assert_eq!(dequantize(TensorType::Q4_1, &q4_1), low_then_high(&|quant| 0.5 * quant - 2.0));
        let q4_0 = [&scale.to_le_bytes()[..], &nibbles].concat();
        assert_eq!(dequantize(TensorType::Q4_0, &q4_0), low_then_high(&|quant| 0.5 * (quant - 8.0)));
        let quants: Vec<u8> = (-16i8..16).map(|quant| quant as u8).collect();
        let q8_0 = [&scale.to_le_bytes()[..], &quants].concat();
        assert_eq!(dequantize(TensorType::Q8_0, &q8_0), (-16..16).map(|quant| 0.5 * quant as f32).collect::<Vec<_>>());
    }

    #[test]
    fn data_of_any_alignment_are_read() {
        for ty in TensorType::ALL {
            let bytes: Vec<u8> = (0..ty.block_bytes() + 8).map(|i| (i * 37 % 120) as u8).collect();
            let aligned = dequantize(ty, &bytes[..ty.block_bytes()]);
            assert_eq!(aligned.len(), ty.block_len());
            for offset in 1..8 {
                let mut shifted = bytes.clone();
                shifted.copy_within(..ty.block_bytes(), offset);
                assert_eq!(dequantize(ty, &shifted[offset..offset + ty.block_bytes()]), aligned, "{ty} at {offset}");
            }
        }
    }

    fn dequantize(ty: TensorType, data: &[u8]) -> Vec<f32> {
        RawTensor { ty, shape: vec![1, ty.block_len()], data: Cow::Borrowed(data) }.dequantize().unwrap()
    }
}
