//! Random content for measurements: zeros draw less power, and so run faster than real data.

use half::bf16;
use outrigger_kernels::gpu::checks::Random;
use outrigger_kernels::gpu::{Device, DeviceBuffer, DeviceError};

/// Values that are made once and laid out again and again.
const PERIOD: usize = 1 << 20;

pub struct Noise {
    f32: Vec<f32>,
    bf16_bytes: Vec<u8>,
}

impl Noise {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let f32: Vec<f32> = (0..PERIOD).map(|_| random.normal()).collect();
        // As weights and activations are: a few hundredths.
        let bf16_bytes = f32.iter().flat_map(|value| bf16::from_f32(value * 0.05).to_le_bytes()).collect();
        Self { f32, bf16_bytes }
    }

    pub fn f32(&self, device: &Device, len: usize) -> Result<DeviceBuffer<f32>, DeviceError> {
        let mut buffer = DeviceBuffer::new(device, len)?;
        for first in (0..len).step_by(PERIOD) {
            buffer.upload(first, &self.f32[..PERIOD.min(len - first)])?;
        }
        Ok(buffer)
    }

    /// `len` values, two bytes each.
    pub fn bf16(&self, device: &Device, len: usize) -> Result<DeviceBuffer<u8>, DeviceError> {
        repeat(device, &self.bf16_bytes, 2 * len)
    }

    /// Values of sixteen bits on the host. As blocks of quantized weights some have odd scales, which costs no time.
    pub fn on_host(&self, bytes: usize) -> Vec<u8> {
        self.bf16_bytes.iter().copied().cycle().take(bytes).collect()
    }
}

fn repeat(device: &Device, content: &[u8], bytes: usize) -> Result<DeviceBuffer<u8>, DeviceError> {
    let mut buffer = DeviceBuffer::new(device, bytes)?;
    for first in (0..bytes).step_by(content.len()) {
        buffer.upload(first, &content[..content.len().min(bytes - first)])?;
    }
    Ok(buffer)
}
