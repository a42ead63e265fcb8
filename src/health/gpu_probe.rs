//! Monitors one NVIDIA GPU through the driver's management library (NVML). The library is loaded at run time; without it, or
//! without the device, there is no probe.
//!
//! Errors are detected in two ways: by events (XIDs and uncorrectable memory errors), if the driver provides them, and by the
//! driver's count of uncorrectable memory errors.

use std::sync::OnceLock;

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor, TemperatureThreshold};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, EventSet, Nvml};
use thiserror::Error;
use tracing::info;

use super::device::{DeviceFault, DeviceProbe, DeviceProbeError, DeviceReading, TemperatureLimits, Throttle};
use super::memory::MemoryReading;

/// Events processed per reading; the others follow at the next one.
const MAX_EVENTS: usize = 32;

/// A GPU that has answered at least once.
pub struct GpuProbe {
    device: Device<'static>,
    /// `None` if the driver provides no events for this device.
    events: Option<EventSet<'static>>,
    limits: TemperatureLimits,
    /// The driver's count of uncorrectable memory errors at the last reading.
    uncorrectable: Option<u64>,
}

/// Why there is no probe.
#[derive(Debug, Error)]
pub enum GpuProbeError {
    #[error("the driver's management library cannot be used: {0}")]
    Library(String),
    #[error("the GPU at {pci_bus_id} is not visible: {message}")]
    Device { pci_bus_id: String, message: String },
}

impl GpuProbe {
    /// Opens the GPU with this PCI bus id. NVML's device numbers differ from CUDA's if some devices are hidden, so the id is
    /// used.
    pub fn open(pci_bus_id: &str) -> Result<Self, GpuProbeError> {
        let library = library()?;
        let invisible =
            |error: NvmlError| GpuProbeError::Device { pci_bus_id: pci_bus_id.to_owned(), message: error.to_string() };
        let device = library.device_by_pci_bus_id(pci_bus_id).map_err(invisible)?;
        let limit = |threshold| device.temperature_threshold(threshold).ok();
        let limits = TemperatureLimits {
            slowdown: limit(TemperatureThreshold::Slowdown),
            shutdown: limit(TemperatureThreshold::Shutdown),
        };
        let events = listen(library, &device);
        let uncorrectable = count_uncorrectable(&device);
        let mut probe = Self { device, events, limits, uncorrectable };
        match probe.read() {
            Ok(_) => Ok(probe),
            Err(error) => Err(GpuProbeError::Device { pci_bus_id: pci_bus_id.to_owned(), message: error.to_string() }),
        }
    }

    fn throttles(&self) -> Vec<Throttle> {
        // A driver that cannot report this counts as not throttled.
        let reasons = self.device.current_throttle_reasons().unwrap_or(ThrottleReasons::NONE);
        let flag = |throttle| match throttle {
            Throttle::HardwareSlowdown => ThrottleReasons::HW_SLOWDOWN,
            Throttle::HardwareThermal => ThrottleReasons::HW_THERMAL_SLOWDOWN,
            Throttle::SoftwareThermal => ThrottleReasons::SW_THERMAL_SLOWDOWN,
            Throttle::PowerBrake => ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN,
        };
        Throttle::ALL.into_iter().filter(|&throttle| reasons.contains(flag(throttle))).collect()
    }

    fn faults(&mut self) -> Result<Vec<DeviceFault>, DeviceProbeError> {
        let mut faults = Vec::new();
        if let Some(events) = &self.events {
            for _ in 0..MAX_EVENTS {
                match events.wait(0) {
                    Ok(event) => faults.extend(fault_of(event.event_type, event.event_data)),
                    Err(NvmlError::Timeout) => break,
                    Err(error) => return Err(probe_error(&error)),
                }
            }
        }
        let counted = count_uncorrectable(&self.device);
        if counted > self.uncorrectable && self.uncorrectable.is_some() {
            faults.push(DeviceFault::UncorrectableMemory);
        }
        self.uncorrectable = counted.or(self.uncorrectable);
        Ok(faults)
    }
}

impl DeviceProbe for GpuProbe {
    fn read(&mut self) -> Result<DeviceReading, DeviceProbeError> {
        // Faults first: a device that is about to be lost may still report why.
        let faults = self.faults()?;
        let memory = self.device.memory_info().map_err(|error| probe_error(&error))?;
        Ok(DeviceReading {
            // Memory that the driver reserves for itself counts as used.
            memory: MemoryReading { used_bytes: memory.total.saturating_sub(memory.free), total_bytes: memory.total },
            celsius: self.device.temperature(TemperatureSensor::Gpu).ok(),
            limits: self.limits,
            utilization: self.device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            watts: self.device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            throttles: self.throttles(),
            faults,
        })
    }
}

/// The library stays open, since device handles refer to it.
fn library() -> Result<&'static Nvml, GpuProbeError> {
    static LIBRARY: OnceLock<Result<Nvml, String>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| Nvml::init().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|message| GpuProbeError::Library(message.clone()))
}

fn listen(library: &'static Nvml, device: &Device<'static>) -> Option<EventSet<'static>> {
    let wanted = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
    let given = device.supported_event_types().unwrap_or(EventTypes::empty()) & wanted;
    if given.is_empty() {
        info!("the driver reports no error events for this GPU; errors show only in steps and counters");
        return None;
    }
    let registered = library.create_event_set().map(|set| device.register_events(given, set));
    match registered {
        Ok(Ok(events)) => Some(events),
        Ok(Err(error)) => {
            info!(%error, "cannot subscribe to this GPU's error events; errors show only in steps and counters");
            None
        }
        Err(error) => {
            info!(%error, "cannot subscribe to this GPU's error events; errors show only in steps and counters");
            None
        }
    }
}

/// `None` if the memory has no error correction or it is disabled.
fn count_uncorrectable(device: &Device<'_>) -> Option<u64> {
    device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok()
}

fn fault_of(event: EventTypes, xid: Option<XidError>) -> Option<DeviceFault> {
    if event.contains(EventTypes::DOUBLE_BIT_ECC_ERROR) {
        return Some(DeviceFault::UncorrectableMemory);
    }
    match xid? {
        XidError::Value(number) => Some(DeviceFault::Xid(Some(number))),
        XidError::Unknown => Some(DeviceFault::Xid(None)),
    }
}

fn probe_error(error: &NvmlError) -> DeviceProbeError {
    match error {
        NvmlError::GpuLost | NvmlError::ResetRequired => DeviceProbeError::Lost(error.to_string()),
        _ => DeviceProbeError::Silent(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Must pass on machines with and without a driver.
    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_why() {
        let error = GpuProbe::open("ffff:ff:1f.0").err().expect("no such device");
        assert!(error.to_string().len() > 20, "{error}");
    }

    #[test]
    fn errors_and_events_keep_their_meaning() {
        assert!(matches!(probe_error(&NvmlError::GpuLost), DeviceProbeError::Lost(_)));
        assert!(matches!(probe_error(&NvmlError::ResetRequired), DeviceProbeError::Lost(_)));
        assert!(matches!(probe_error(&NvmlError::Unknown), DeviceProbeError::Silent(_)));
        let xid = |xid| fault_of(EventTypes::CRITICAL_XID_ERROR, Some(xid));
        assert_eq!(xid(XidError::Value(79)), Some(DeviceFault::Xid(Some(79))));
        assert_eq!(xid(XidError::Unknown), Some(DeviceFault::Xid(None)));
        assert_eq!(fault_of(EventTypes::DOUBLE_BIT_ECC_ERROR, None), Some(DeviceFault::UncorrectableMemory));
        assert_eq!(fault_of(EventTypes::CLOCK_CHANGE, None), None);
    }
}
