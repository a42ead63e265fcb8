//! Chooses and opens the device that computes.

use std::fmt;
use std::str::FromStr;

use outrigger_kernels::gpu::{Device, DeviceError};

/// What to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, and the processors where there is none for us.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of this number; without it the process does not start.
    Cuda(u32),
    /// The kernels of the GPU on an emulator, in builds that have one: for tests.
    Emulator,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
            DeviceChoice::Emulator => f.write_str("emulator"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index =
            |text: &str| text.parse().map_err(|_| format!("must be cuda:N with a device number, got cuda:{text}"));
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            "emulator" => Ok(DeviceChoice::Emulator),
            _ => match text.strip_prefix("cuda:") {
                Some(number) => index(number).map(DeviceChoice::Cuda),
                None => Err(format!("must be auto, cpu, cuda or cuda:N, got `{text}`")),
            },
        }
    }
}

/// What computes, opened.
#[derive(Clone)]
pub struct ComputeDevice {
    /// `None` for this machine's processors.
    gpu: Option<Device>,
    /// One line for the log: what, and why.
    reason: String,
}

impl ComputeDevice {
    /// This machine's processors.
    pub fn cpu(reason: impl Into<String>) -> Self {
        Self { gpu: None, reason: reason.into() }
    }

    /// Opens the chosen device. With [`DeviceChoice::Auto`], a missing GPU is not an error, but a broken or occupied one is: a
    /// replica that computes a hundred times slower than its siblings does more harm than one that is restarted until its GPU
    /// works. Blocks.
    pub fn open(choice: DeviceChoice) -> Result<Self, DeviceError> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::cpu("cpu, as `device` says")),
            DeviceChoice::Cuda(index) => Self::with_gpu(Device::cuda(index)?, "as `device` says"),
            DeviceChoice::Emulator => Self::with_gpu(Device::emulator()?, "as `device` says"),
            DeviceChoice::Auto => match Device::cuda(0) {
                Ok(gpu) => Self::with_gpu(gpu, "the first GPU"),
                Err(error @ DeviceError::Unavailable(_)) => Ok(Self::cpu(format!("cpu, since {error}"))),
                Err(error) => Err(error),
            },
        }
    }

    fn with_gpu(gpu: Device, why: &str) -> Result<Self, DeviceError> {
        let properties = gpu.properties();
        let (major, minor) = (properties.capability / 10, properties.capability % 10);
        let memory = properties.memory_bytes >> 20;
        let reason = format!("{} (compute capability {major}.{minor}, {memory} MiB), {why}", properties.name);
        Ok(Self { gpu: Some(gpu), reason })
    }

    /// The opened GPU, if one computes.
    pub fn gpu(&self) -> Option<&Device> {
        self.gpu.as_ref()
    }

    pub fn is_gpu(&self) -> bool {
        self.gpu.is_some()
    }

    /// By which the driver's management library knows the GPU; `None` for processors and the emulator.
    pub fn pci_bus_id(&self) -> Option<String> {
        let bus_id = self.gpu.as_ref()?.properties().pci_bus_id.clone();
        (!bus_id.is_empty()).then_some(bus_id)
    }
}

impl fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spelt_as_they_are_shown() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(3)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_asked_for_is_never_replaced() {
        assert!(!ComputeDevice::open(DeviceChoice::Cpu).unwrap().is_gpu());
        // No machine has this many.
        assert!(ComputeDevice::open(DeviceChoice::Cuda(4096)).is_err());
        let chosen = ComputeDevice::open(DeviceChoice::Auto).unwrap();
        assert!(chosen.is_gpu() || chosen.to_string().starts_with("cpu, since "), "{chosen}");
    }
}
