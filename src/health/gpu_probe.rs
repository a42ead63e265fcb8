//! The memory of one NVIDIA GPU, asked from the driver through NVML. The library is opened at run time; without it, or
//! without the device, there is no probe.

use nvml_wrapper::Nvml;
use thiserror::Error;

use super::memory::{MemoryProbe, MemoryProbeError, MemoryReading};

/// A GPU that answered once.
pub struct GpuProbe {
    nvml: Nvml,
    index: u32,
}

/// Why there is no probe.
#[derive(Debug, Error)]
pub enum GpuProbeError {
    #[error("the driver's management library cannot be used: {0}")]
    Library(nvml_wrapper::error::NvmlError),
    #[error("GPU {index} is not visible: {message}")]
    Device { index: u32, message: String },
}

impl GpuProbe {
    /// `index` counts as the driver does, whatever `CUDA_VISIBLE_DEVICES` says.
    pub fn open(index: u32) -> Result<Self, GpuProbeError> {
        let nvml = Nvml::init().map_err(GpuProbeError::Library)?;
        let mut probe = Self { nvml, index };
        match probe.read() {
            Ok(_) => Ok(probe),
            Err(error) => Err(GpuProbeError::Device { index, message: error.to_string() }),
        }
    }
}

impl MemoryProbe for GpuProbe {
    fn source(&self) -> &'static str {
        "gpu"
    }

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError> {
        let memory = self.nvml.device_by_index(self.index).and_then(|device| device.memory_info());
        match memory {
            Ok(memory) => Ok(MemoryReading { used_bytes: memory.used, total_bytes: memory.total }),
            Err(error) => Err(MemoryProbeError::Device { index: self.index, message: error.to_string() }),
        }
    }

    fn is_compute_device(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs with and without a device: without one the error must say why, with one the reading must make sense.
    #[test]
    fn a_missing_driver_is_an_error_and_a_present_one_answers() {
        match GpuProbe::open(0) {
            Ok(mut probe) => {
                let reading = probe.read().unwrap();
                assert!(reading.total_bytes > 1 << 30 && reading.used_bytes <= reading.total_bytes, "{reading:?}");
            }
            Err(error) => assert!(!error.to_string().is_empty(), "{error:?}"),
        }
        assert!(GpuProbe::open(9999).is_err());
    }
}
