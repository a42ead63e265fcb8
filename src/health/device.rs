//! The compute device as its driver reports it: the trait that a driver implements, and what its readings mean for the node.
//! Knows no particular driver.
//!
//! Three outcomes. A *lost* device, an uncorrectable memory error or a fatal XID fails the node, even if the device still
//! computes: its numbers cannot be trusted, and a restart begins with fresh memory. A device that is *throttled* or close to
//! its temperature limit degrades the node. A device that does not answer makes the node unready until it does.

use thiserror::Error;
use tracing::{error, info, warn};

use super::Health;
use super::memory::{MemoryPlace, MemoryReading};
use crate::types::DegradedBy;

/// Value of the label `device` in metrics. A node computes on one device.
const GPU: &str = "gpu";

/// A device this many degrees below its limit counts as nearly too hot.
const TEMPERATURE_MARGIN: u32 = 3;

/// Readings in a row that must agree before the node is degraded or recovers. Drivers report a brief slowdown at every change
/// of clocks.
const CONFIRMATIONS: u32 = 2;

pub trait DeviceProbe: Send {
    /// Reads the device. Blocks, usually for microseconds.
    fn read(&mut self) -> Result<DeviceReading, DeviceProbeError>;
}

/// One reading. Fields that this device or driver does not report are `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceReading {
    pub memory: MemoryReading,
    pub celsius: Option<u32>,
    pub limits: TemperatureLimits,
    /// Fraction of the last moments in which the device was computing, 0 to 1.
    pub utilization: Option<f64>,
    pub watts: Option<f64>,
    pub throttles: Vec<Throttle>,
    /// Faults since the previous reading.
    pub faults: Vec<DeviceFault>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TemperatureLimits {
    /// The hardware slows down at this temperature.
    pub slowdown: Option<u32>,
    /// The hardware switches itself off at this temperature.
    pub shutdown: Option<u32>,
}

/// Why the clocks are lower than they should be. A power cap in software is not among them: it is the normal way to keep a busy
/// device within its rating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttle {
    HardwareSlowdown,
    HardwareThermal,
    SoftwareThermal,
    PowerBrake,
}

impl Throttle {
    pub const ALL: [Self; 4] = [Self::HardwareSlowdown, Self::HardwareThermal, Self::SoftwareThermal, Self::PowerBrake];

    fn label(self) -> &'static str {
        match self {
            Self::HardwareSlowdown => "hw_slowdown",
            Self::HardwareThermal => "hw_thermal",
            Self::SoftwareThermal => "sw_thermal",
            Self::PowerBrake => "power_brake",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::HardwareSlowdown => "slowed down by its hardware",
            Self::HardwareThermal => "slowed down by its hardware for its temperature",
            Self::SoftwareThermal => "slowed down by its driver for its temperature",
            Self::PowerBrake => "slowed down by the power supply's brake",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFault {
    /// An error report of the driver, with its number if the driver gives one.
    Xid(Option<u64>),
    /// The device read memory that it could not correct.
    UncorrectableMemory,
}

/// The consequence of an XID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum XidClass {
    /// The program that caused the error must be restarted, and sees the error in its own calls. The report does not say which
    /// program it was: if it was this one, the next step fails; if not, nothing is wrong here.
    Application,
    /// The device continues as before; worth a log line.
    Notice,
    /// The device must be reset, or its results cannot be trusted.
    Fatal,
}

impl XidClass {
    /// Classifies an XID by the immediate action that NVIDIA's catalogue recommends. XIDs that the catalogue does not list are
    /// fatal.
    fn of(xid: Option<u64>) -> Self {
        match xid {
            // Invalid command streams, illegal accesses, stopped or timed-out channels, and their clean-up.
            Some(8 | 11 | 13 | 31 | 32 | 43 | 45 | 68 | 69 | 109) => Self::Application,
            // A row of memory will be replaced at the next reset; many correctable errors; corrected link errors; a recommended
            // recovery action, which follows the error that requires it.
            Some(63 | 92 | 121 | 154) => Self::Notice,
            _ => Self::Fatal,
        }
    }
}

impl DeviceFault {
    fn label(self) -> &'static str {
        match self {
            Self::UncorrectableMemory => "uncorrectable_memory",
            Self::Xid(xid) => match XidClass::of(xid) {
                XidClass::Application => "xid_application",
                XidClass::Notice => "xid_notice",
                XidClass::Fatal => "xid_fatal",
            },
        }
    }

    /// The reason why this fault fails the node, or `None` if it does not.
    fn fatal_reason(self) -> Option<String> {
        match self {
            Self::UncorrectableMemory => Some("the device read memory that it could not correct".to_owned()),
            Self::Xid(xid) if XidClass::of(xid) != XidClass::Fatal => None,
            Self::Xid(Some(xid)) => Some(format!("the device's driver reports XID {xid}")),
            Self::Xid(None) => Some("the device's driver reports an XID without a number".to_owned()),
        }
    }
}

#[derive(Debug, Error)]
pub enum DeviceProbeError {
    /// The device fell off the bus or must be reset. It may be found again after a restart of the node.
    #[error("the device is lost: {0}")]
    Lost(String),
    /// The next reading may succeed.
    #[error("the device does not answer: {0}")]
    Silent(String),
}

impl DeviceReading {
    /// Describes why the device is slower than it should be.
    fn trouble(&self) -> Option<String> {
        let mut parts: Vec<String> = self.throttles.iter().map(|throttle| throttle.words().to_owned()).collect();
        parts.extend(self.heat());
        (!parts.is_empty()).then(|| format!("the device is {}", parts.join(", ")))
    }

    fn heat(&self) -> Option<String> {
        let celsius = self.celsius?;
        let TemperatureLimits { slowdown, shutdown } = self.limits;
        let limit = [slowdown, shutdown].into_iter().flatten().min()?;
        (celsius + TEMPERATURE_MARGIN >= limit).then(|| format!("at {celsius} °C (limit {limit} °C)"))
    }
}

/// Decides whether the device is in trouble, from consecutive readings. Pure.
#[derive(Debug, Default)]
pub(super) struct TroubleJudge {
    in_trouble: bool,
    /// Consecutive readings that disagree with the current decision.
    contrary: u32,
}

impl TroubleJudge {
    fn observe(&mut self, in_trouble: bool) -> bool {
        self.contrary = if in_trouble == self.in_trouble { 0 } else { self.contrary + 1 };
        if self.contrary >= CONFIRMATIONS {
            self.in_trouble = in_trouble;
            self.contrary = 0;
        }
        self.in_trouble
    }
}

impl Health {
    /// Processes a reading of the device, or a failure to read it. `block_bytes`: size of one KV block in device memory.
    pub(super) fn observe_device(&self, reading: Result<&DeviceReading, &DeviceProbeError>, block_bytes: u64) {
        let reading = match reading {
            Ok(reading) => reading,
            Err(error) => return self.device_is_silent(error),
        };
        self.observe_memory(MemoryPlace::Device, GPU, Ok(reading.memory), block_bytes);
        self.show_device(reading);
        for fault in &reading.faults {
            self.observe_fault(*fault);
        }
        let trouble = reading.trouble();
        let is_troubled = self.state.observed.lock().device_trouble.observe(trouble.is_some());
        let lifecycle = self.lifecycle();
        match (is_troubled, trouble) {
            (true, Some(trouble)) => lifecycle.degrade(DegradedBy::Device, trouble),
            // Logged only when readings start or stop failing.
            (true, None) => {}
            (false, _) => lifecycle.recover(DegradedBy::Device, "the device runs at full speed"),
        }
    }

    fn device_is_silent(&self, error: &DeviceProbeError) {
        let is_news = {
            let mut observed = self.state.observed.lock();
            observed.memory.remove(&MemoryPlace::Device);
            observed.device_lost.replace(error.to_string()).is_none()
        };
        if is_news {
            warn!(%error, "cannot read the device's state");
        }
        if matches!(error, DeviceProbeError::Lost(_)) {
            if is_news {
                self.state.metrics.device_errors.with(["lost"]).inc();
            }
            // This has no effect if the node has already failed or stopped.
            let _ = self.lifecycle().fail(error.to_string());
        }
    }

    fn observe_fault(&self, fault: DeviceFault) {
        self.state.metrics.device_errors.with([fault.label()]).inc();
        match fault.fatal_reason() {
            Some(reason) => {
                error!(?fault, "device fault");
                // This has no effect if the node has already failed or stopped.
                let _ = self.lifecycle().fail(reason);
            }
            None => info!(?fault, "device fault that does not concern this node"),
        }
    }

    fn show_device(&self, reading: &DeviceReading) {
        let metrics = &self.state.metrics;
        metrics.device_memory_used.with([GPU]).set(reading.memory.used_bytes as f64);
        metrics.device_memory.with([GPU]).set(reading.memory.total_bytes as f64);
        if let Some(celsius) = reading.celsius {
            metrics.device_temperature.with([GPU]).set(f64::from(celsius));
        }
        if let Some(utilization) = reading.utilization {
            metrics.device_utilization.with([GPU]).set(utilization);
        }
        if let Some(watts) = reading.watts {
            metrics.device_power.with([GPU]).set(watts);
        }
        for throttle in Throttle::ALL {
            let holds = reading.throttles.contains(&throttle);
            metrics.device_throttled.with([throttle.label()]).set(f64::from(u8::from(holds)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_in_trouble_says_why() {
        let limits = TemperatureLimits { slowdown: Some(87), shutdown: Some(92) };
        let cool = DeviceReading { celsius: Some(83), limits, ..Default::default() };
        assert_eq!(cool.trouble(), None);
        let hot = DeviceReading { celsius: Some(84), ..cool.clone() };
        assert_eq!(hot.trouble().as_deref(), Some("the device is at 84 °C (limit 87 °C)"));
        let unlimited = DeviceReading { limits: TemperatureLimits::default(), ..hot.clone() };
        assert_eq!(unlimited.trouble(), None, "where no limit is told, the device knows best");
        let braked = DeviceReading { throttles: vec![Throttle::PowerBrake], ..hot };
        assert_eq!(
            braked.trouble().as_deref(),
            Some("the device is slowed down by the power supply's brake, at 84 °C (limit 87 °C)")
        );
    }

    #[test]
    fn trouble_must_last_and_so_must_its_end() {
        let mut judge = TroubleJudge::default();
        let verdicts = [true, false, true, true, false, true, false, false, false].map(|bad| judge.observe(bad));
        assert_eq!(verdicts, [false, false, false, true, true, true, true, false, false]);
    }

    #[test]
    fn what_an_application_may_cause_fails_no_node_and_what_is_unknown_does() {
        for xid in [13, 31, 43, 45, 68, 109, 63, 92, 154] {
            assert_eq!(DeviceFault::Xid(Some(xid)).fatal_reason(), None, "{xid}");
        }
        for xid in [48, 62, 64, 74, 79, 94, 95, 119, 120, 140, 4711] {
            let reason = DeviceFault::Xid(Some(xid)).fatal_reason().expect("fatal");
            assert!(reason.contains(&format!("XID {xid}")), "{reason}");
        }
        assert!(DeviceFault::Xid(None).fatal_reason().is_some());
        assert!(DeviceFault::UncorrectableMemory.fatal_reason().is_some());
    }
}
