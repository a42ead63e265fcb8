//! Activation rows as the checks make and read them.

use half::{bf16, f16};

use crate::gpu::{Activations, Device, DeviceBuffer, DeviceError, Element};

pub(super) const ELEMENTS: [Element; 3] = [Element::F32, Element::F16, Element::BF16];

/// The number that `element` has for `x`.
pub(super) fn rounded(element: Element, x: f32) -> f32 {
    match element {
        Element::F32 => x,
        Element::F16 => f16::from_f32(x).to_f32(),
        Element::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// How far results of this type are from exact ones, relative to their norm: its rounding, and some f32 arithmetic.
pub(super) fn bound(element: Element) -> f64 {
    match element {
        Element::F32 => 2e-6,
        Element::F16 => 5e-4,
        Element::BF16 => 4e-3,
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Rows `[rows, cols]` in a buffer of their own.
pub(super) struct Rows {
    buffer: DeviceBuffer<u8>,
    element: Element,
    rows: usize,
    cols: usize,
}

impl Rows {
    /// With undefined content.
    pub fn new(device: &Device, element: Element, rows: usize, cols: usize) -> Result<Self, DeviceError> {
        let buffer = DeviceBuffer::new(device, rows * cols * element.bytes())?;
        Ok(Self { buffer, element, rows, cols })
    }

    pub fn from_f32(device: &Device, element: Element, values: &[f32], cols: usize) -> Result<Self, DeviceError> {
        let bytes: Vec<u8> = match element {
            Element::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Element::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Element::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        };
        let buffer = DeviceBuffer::from_slice(device, &bytes)?;
        Ok(Self { buffer, element, rows: values.len() / cols, cols })
    }

    pub fn view(&self) -> Activations {
        Activations::new(&self.buffer, self.element, self.rows, self.cols)
    }

    pub fn to_f32(&self) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.buffer.to_vec()?;
        let pairs = bytes.as_chunks::<2>().0.iter();
        Ok(match self.element {
            Element::F32 => bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
            Element::F16 => pairs.map(|x| f16::from_le_bytes(*x).to_f32()).collect(),
            Element::BF16 => pairs.map(|x| bf16::from_le_bytes(*x).to_f32()).collect(),
        })
    }
}
