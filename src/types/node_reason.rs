//! Why a node is not ready, or gets less than its share: a closed set of reasons. Each has a code, which is what `/readyz`, the
//! metric `outrigger_degraded` and gossip carry.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// Why a node is not ready, not alive or degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeReason {
    Starting,
    Warming,
    Draining,
    Stopped,
    Failed,
    EngineMissing,
    EngineDead,
    EngineStalled,
    ProbePending,
    ProbeFailed,
    DeviceLost,
    /// Memory is above `memory_removal_mark`.
    MemoryFull,
    /// The queue is above `queue_saturation_mark`, and another node's is not.
    QueueFull,
    /// It is ready, and works less well than it should.
    Degraded(DegradedBy),
}

/// Why a node is degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DegradedBy {
    /// Equal work takes the node several times as long as other replicas.
    Slow,
    /// The synthetic inference is slower than the soft limit.
    SlowProbe,
    /// Memory is above `memory_shrink_mark`.
    Memory,
    /// Device memory is above `memory_shrink_mark`.
    DeviceMemory,
    /// The device is throttled, or close to its temperature limit.
    Device,
}

impl DegradedBy {
    pub const ALL: [DegradedBy; 5] =
        [DegradedBy::Slow, DegradedBy::SlowProbe, DegradedBy::Memory, DegradedBy::DeviceMemory, DegradedBy::Device];

    pub const fn code(self) -> &'static str {
        match self {
            DegradedBy::Slow => "slow",
            DegradedBy::SlowProbe => "slow_probe",
            DegradedBy::Memory => "memory_high",
            DegradedBy::DeviceMemory => "device_memory_high",
            DegradedBy::Device => "device_throttled",
        }
    }
}

impl NodeReason {
    /// All but the causes of degradation.
    pub const UNREADY: [NodeReason; 13] = [
        NodeReason::Starting,
        NodeReason::Warming,
        NodeReason::Draining,
        NodeReason::Stopped,
        NodeReason::Failed,
        NodeReason::EngineMissing,
        NodeReason::EngineDead,
        NodeReason::EngineStalled,
        NodeReason::ProbePending,
        NodeReason::ProbeFailed,
        NodeReason::DeviceLost,
        NodeReason::MemoryFull,
        NodeReason::QueueFull,
    ];

    /// For programs, and the same in every version.
    pub const fn code(self) -> &'static str {
        match self {
            NodeReason::Starting => "starting",
            NodeReason::Warming => "warming",
            NodeReason::Draining => "draining",
            NodeReason::Stopped => "stopped",
            NodeReason::Failed => "failed",
            NodeReason::EngineMissing => "engine_missing",
            NodeReason::EngineDead => "engine_dead",
            NodeReason::EngineStalled => "engine_stalled",
            NodeReason::ProbePending => "probe_pending",
            NodeReason::ProbeFailed => "probe_failed",
            NodeReason::DeviceLost => "device_lost",
            NodeReason::MemoryFull => "memory",
            NodeReason::QueueFull => "saturated",
            NodeReason::Degraded(cause) => cause.code(),
        }
    }

    fn with_code(code: &str) -> Option<Self> {
        let causes = DegradedBy::ALL.into_iter().map(NodeReason::Degraded);
        Self::UNREADY.into_iter().chain(causes).find(|reason| reason.code() == code)
    }

    /// Whether the engine has ended or hangs, which a restart mends.
    pub const fn is_of_engine(self) -> bool {
        match self {
            NodeReason::EngineMissing | NodeReason::EngineDead | NodeReason::EngineStalled => true,
            NodeReason::Starting
            | NodeReason::Warming
            | NodeReason::Draining
            | NodeReason::Stopped
            | NodeReason::Failed
            | NodeReason::ProbePending
            | NodeReason::ProbeFailed
            | NodeReason::DeviceLost
            | NodeReason::MemoryFull
            | NodeReason::QueueFull
            | NodeReason::Degraded(_) => false,
        }
    }
}

impl Serialize for NodeReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

/// A reason in a node's report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ReportedReason {
    Known(NodeReason),
    /// The code of a later version's reason. It counts as a reason to be unready.
    Unknown(String),
}

impl ReportedReason {
    pub fn code(&self) -> &str {
        match self {
            ReportedReason::Known(reason) => reason.code(),
            ReportedReason::Unknown(code) => code,
        }
    }
}

impl From<NodeReason> for ReportedReason {
    fn from(reason: NodeReason) -> Self {
        ReportedReason::Known(reason)
    }
}

impl From<String> for ReportedReason {
    fn from(code: String) -> Self {
        NodeReason::with_code(&code).map_or(ReportedReason::Unknown(code), ReportedReason::Known)
    }
}

impl From<ReportedReason> for String {
    fn from(reason: ReportedReason) -> Self {
        match reason {
            ReportedReason::Known(reason) => reason.code().to_owned(),
            ReportedReason::Unknown(code) => code,
        }
    }
}

impl fmt::Display for ReportedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_is_known_by_a_code_of_its_own() {
        let reasons: Vec<_> =
            NodeReason::UNREADY.into_iter().chain(DegradedBy::ALL.map(NodeReason::Degraded)).collect();
        let codes: BTreeSet<&str> = reasons.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), reasons.len());
        for reason in reasons {
            let reported = ReportedReason::from(reason);
            let json = serde_json::to_value(&reported).expect("a word");
            assert_eq!(json, reason.code());
            assert_eq!(serde_json::from_value::<ReportedReason>(json).expect("a code"), reported);
        }
    }

    #[test]
    fn the_code_of_a_later_version_is_kept() {
        let later = ReportedReason::from("of_tomorrow".to_owned());
        assert_eq!(later, ReportedReason::Unknown("of_tomorrow".to_owned()));
        assert_eq!((later.code(), String::from(later.clone())), ("of_tomorrow", "of_tomorrow".to_owned()));
    }
}
