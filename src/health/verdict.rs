//! The answers of the three probes, as pure functions of a snapshot, with the reasons in their bodies.
//!
//! *Liveness*: should the process be restarted? *Readiness*: should it get traffic? *Startup*: how far has loading come? Uses
//! no clock: the snapshot holds durations.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::observability::metrics::state_label;
use crate::types::{NodeReason, NodeState};

/// The input of the verdicts.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthSnapshot {
    pub state: NodeState,
    pub state_reason: String,
    /// The causes that degrade the node.
    pub degraded: Vec<Reason>,
    /// The node has been ready at least once.
    pub has_started: bool,
    pub loading: LoadProgress,
    /// `None` until the engine runs.
    pub engine: Option<EngineView>,
    pub probe: ProbeView,
    pub memory: MemoryView,
    pub queue: QueueView,
    pub bounds: VerdictBounds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineView {
    pub alive: bool,
    /// Time without progress while there was work; `None` if idle.
    pub stalled_for: Option<Duration>,
}

/// The current verdict of the synthetic inference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeView {
    pub has_passed: bool,
    /// Wrong numbers, no answer within the hard limit, or an error. Cleared by enough correct probes.
    pub fault: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryView {
    /// Used memory divided by total; `None` until measured.
    pub pressure: Option<f64>,
    pub above_removal_mark: bool,
    /// Why the compute device does not answer.
    pub device_lost: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QueueView {
    /// How full the admission queue is, 0 to 1.
    pub saturation: f64,
    /// Whether another ready node's queue is below its mark. Always false for a single node: if it became unready, nobody could
    /// answer 429.
    pub other_ready_peer_below_mark: bool,
}

/// The limits that apply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VerdictBounds {
    pub stall_timeout: Duration,
    pub liveness_timeout: Duration,
    pub memory_removal_mark: f64,
    pub queue_saturation_mark: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadPhase {
    /// Nothing has started yet.
    #[default]
    Starting,
    Downloading,
    LoadingWeights,
    /// The model is being tried.
    Warming,
    Done,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LoadProgress {
    pub phase: LoadPhase,
    /// Progress of this phase, 0 to 1.
    pub fraction: f64,
}

/// One reason why the node is not ready, not alive or degraded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    pub code: NodeReason,
    /// An explanation for people.
    pub message: String,
}

impl Reason {
    pub(super) fn new(code: NodeReason, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Liveness {
    pub live: bool,
    #[serde(serialize_with = "by_label")]
    pub state: NodeState,
    pub reasons: Vec<Reason>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Readiness {
    pub ready: bool,
    #[serde(serialize_with = "by_label")]
    pub state: NodeState,
    pub state_reason: String,
    /// All reasons why the node is not ready; empty if it is.
    pub reasons: Vec<Reason>,
    /// The causes that degrade the node and lower its share of the requests.
    pub degraded: Vec<Reason>,
    pub memory_pressure: Option<f64>,
    pub queue_saturation: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Startup {
    pub started: bool,
    #[serde(serialize_with = "by_label")]
    pub state: NodeState,
    #[serde(flatten)]
    pub loading: LoadProgress,
    pub reasons: Vec<Reason>,
}

fn by_label<S: Serializer>(state: &NodeState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state_label(*state))
}

/// Should the process be restarted? Only for what a restart can mend: an engine that has ended or hangs, or a failed node.
pub fn liveness(snapshot: &HealthSnapshot) -> Liveness {
    let mut reasons = Vec::new();
    if snapshot.state == NodeState::Failed {
        reasons.push(Reason::new(NodeReason::Failed, &snapshot.state_reason));
    }
    // A stopped node has ended its engine on purpose.
    if snapshot.state != NodeState::Stopped {
        reasons.extend(engine_trouble(snapshot, snapshot.bounds.liveness_timeout));
    }
    Liveness { live: reasons.is_empty(), state: snapshot.state, reasons }
}

/// Should the node get traffic?
pub fn readiness(snapshot: &HealthSnapshot) -> Readiness {
    let mut reasons = Vec::new();
    reasons.extend(state_trouble(snapshot));
    if snapshot.engine.is_none() && snapshot.state != NodeState::Starting {
        reasons.push(Reason::new(NodeReason::EngineMissing, "no engine runs"));
    }
    reasons.extend(engine_trouble(snapshot, snapshot.bounds.stall_timeout));
    if let Some(fault) = &snapshot.probe.fault {
        reasons.push(Reason::new(NodeReason::ProbeFailed, fault));
    } else if !snapshot.probe.has_passed {
        reasons.push(Reason::new(NodeReason::ProbePending, "the synthetic inference has not passed yet"));
    }
    if let Some(fault) = &snapshot.memory.device_lost {
        reasons.push(Reason::new(NodeReason::DeviceLost, fault));
    }
    reasons.extend(memory_trouble(snapshot));
    reasons.extend(queue_trouble(snapshot));
    Readiness {
        ready: reasons.is_empty(),
        state: snapshot.state,
        state_reason: snapshot.state_reason.clone(),
        reasons,
        degraded: snapshot.degraded.clone(),
        memory_pressure: snapshot.memory.pressure,
        queue_saturation: snapshot.queue.saturation,
    }
}

/// How far has loading come? Once started, the answer stays "started".
pub fn startup(snapshot: &HealthSnapshot) -> Startup {
    let mut reasons = Vec::new();
    if !snapshot.has_started {
        reasons.extend(state_trouble(snapshot));
    }
    let loading = if snapshot.has_started {
        LoadProgress { phase: LoadPhase::Done, fraction: 1.0 }
    } else {
        LoadProgress { fraction: snapshot.loading.fraction.clamp(0.0, 1.0), ..snapshot.loading }
    };
    Startup { started: snapshot.has_started, state: snapshot.state, loading, reasons }
}

fn state_trouble(snapshot: &HealthSnapshot) -> Option<Reason> {
    let code = match snapshot.state {
        NodeState::Ready | NodeState::Degraded => return None,
        NodeState::Starting => NodeReason::Starting,
        NodeState::Warming => NodeReason::Warming,
        NodeState::Draining => NodeReason::Draining,
        NodeState::Stopped => NodeReason::Stopped,
        NodeState::Failed => NodeReason::Failed,
    };
    Some(Reason::new(code, &snapshot.state_reason))
}

fn engine_trouble(snapshot: &HealthSnapshot, bound: Duration) -> Option<Reason> {
    let engine = snapshot.engine?;
    if !engine.alive {
        return Some(Reason::new(NodeReason::EngineDead, "the engine has ended"));
    }
    let stalled = engine.stalled_for.filter(|stalled| *stalled > bound)?;
    let message = format!(
        "the engine has work and has made no progress for {:.1} s (limit {:.1} s)",
        stalled.as_secs_f64(),
        bound.as_secs_f64()
    );
    Some(Reason::new(NodeReason::EngineStalled, message))
}

fn memory_trouble(snapshot: &HealthSnapshot) -> Option<Reason> {
    let pressure = snapshot.memory.pressure.filter(|_| snapshot.memory.above_removal_mark)?;
    let mark = snapshot.bounds.memory_removal_mark;
    Some(Reason::new(
        NodeReason::MemoryFull,
        format!("memory at {:.1} % (mark {:.1} %)", pressure * 100.0, mark * 100.0),
    ))
}

fn queue_trouble(snapshot: &HealthSnapshot) -> Option<Reason> {
    let QueueView { saturation, other_ready_peer_below_mark } = snapshot.queue;
    let mark = snapshot.bounds.queue_saturation_mark;
    (saturation >= mark && other_ready_peer_below_mark).then(|| {
        let message = format!("the queue is {:.0} % full (mark {:.0} %)", saturation * 100.0, mark * 100.0);
        Reason::new(NodeReason::QueueFull, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DegradedBy;

    const STALL: Duration = Duration::from_secs(10);
    const HANG: Duration = Duration::from_secs(30);

    fn healthy() -> HealthSnapshot {
        HealthSnapshot {
            state: NodeState::Ready,
            state_reason: "the probe passed".into(),
            degraded: Vec::new(),
            has_started: true,
            loading: LoadProgress { phase: LoadPhase::Warming, fraction: 1.0 },
            engine: Some(EngineView { alive: true, stalled_for: None }),
            probe: ProbeView { has_passed: true, fault: None },
            memory: MemoryView { pressure: Some(0.5), ..Default::default() },
            queue: QueueView::default(),
            bounds: VerdictBounds {
                stall_timeout: STALL,
                liveness_timeout: HANG,
                memory_removal_mark: 0.95,
                queue_saturation_mark: 0.9,
            },
        }
    }

    fn in_state(state: NodeState) -> HealthSnapshot {
        HealthSnapshot { state, state_reason: "because".into(), ..healthy() }
    }

    fn stalled(duration: Duration) -> HealthSnapshot {
        HealthSnapshot { engine: Some(EngineView { alive: true, stalled_for: Some(duration) }), ..healthy() }
    }

    fn codes(reasons: &[Reason]) -> Vec<&'static str> {
        reasons.iter().map(|reason| reason.code.code()).collect()
    }

    #[test]
    fn a_healthy_node_passes_all_three() {
        assert!(liveness(&healthy()).live);
        assert!(readiness(&healthy()).ready);
        assert!(startup(&healthy()).started);
    }

    #[test]
    fn readiness_follows_the_state_and_liveness_does_not() {
        use NodeState::{Degraded, Draining, Failed, Ready, Starting, Stopped, Warming};
        for (state, ready, live) in [
            (Starting, false, true),
            (Warming, false, true),
            (Ready, true, true),
            (Degraded, true, true),
            (Draining, false, true),
            (Stopped, false, true),
            (Failed, false, false),
        ] {
            let snapshot = in_state(state);
            assert_eq!(readiness(&snapshot).ready, ready, "{state:?}");
            assert_eq!(liveness(&snapshot).live, live, "{state:?}");
            if !ready {
                assert_eq!(codes(&readiness(&snapshot).reasons), [state_label(state)]);
                assert_eq!(readiness(&snapshot).reasons[0].message, "because");
            }
        }
    }

    #[test]
    fn a_dead_engine_is_neither_live_nor_ready_until_the_node_has_stopped_it() {
        let dead = Some(EngineView { alive: false, stalled_for: None });
        let snapshot = HealthSnapshot { engine: dead, ..healthy() };
        assert_eq!(codes(&liveness(&snapshot).reasons), ["engine_dead"]);
        assert_eq!(codes(&readiness(&snapshot).reasons), ["engine_dead"]);
        assert!(liveness(&HealthSnapshot { engine: dead, ..in_state(NodeState::Stopped) }).live);
    }

    #[test]
    fn a_hang_is_first_unready_and_then_not_live() {
        let verdicts = |duration| (readiness(&stalled(duration)).ready, liveness(&stalled(duration)).live);
        let moment = Duration::from_millis(1);
        assert_eq!(verdicts(Duration::ZERO), (true, true));
        assert_eq!(verdicts(STALL), (true, true));
        assert_eq!(verdicts(STALL + moment), (false, true));
        assert_eq!(verdicts(HANG), (false, true));
        assert_eq!(verdicts(HANG + moment), (false, false));
        let message = &liveness(&stalled(Duration::from_secs(45))).reasons[0].message;
        assert!(message.contains("45.0 s") && message.contains("30.0 s"), "{message}");
    }

    #[test]
    fn loading_is_live_without_an_engine() {
        for state in [NodeState::Starting, NodeState::Warming] {
            let snapshot = HealthSnapshot { engine: None, has_started: false, ..in_state(state) };
            assert!(liveness(&snapshot).live);
            assert!(!readiness(&snapshot).ready);
        }
        let snapshot = HealthSnapshot { engine: None, ..healthy() };
        assert_eq!(codes(&readiness(&snapshot).reasons), ["engine_missing"]);
    }

    #[test]
    fn a_degraded_node_is_ready_and_says_why_it_is_degraded() {
        let degraded = vec![Reason::new(NodeReason::Degraded(DegradedBy::Slow), "equal work takes 20 times as long")];
        let snapshot = HealthSnapshot { degraded: degraded.clone(), ..in_state(NodeState::Degraded) };
        let readiness = readiness(&snapshot);
        assert!(readiness.ready && readiness.reasons.is_empty());
        assert_eq!(readiness.degraded, degraded);
    }

    #[test]
    fn the_probe_decides_readiness_and_not_liveness() {
        let fault = ProbeView { has_passed: true, fault: Some("token 3 differs".into()) };
        let pending = ProbeView { has_passed: false, fault: None };
        for (probe, code) in [(fault, "probe_failed"), (pending, "probe_pending")] {
            let snapshot = HealthSnapshot { probe, ..healthy() };
            assert_eq!(codes(&readiness(&snapshot).reasons), [code]);
            assert!(liveness(&snapshot).live);
        }
    }

    #[test]
    fn memory_decides_readiness_at_the_removal_mark_only() {
        let above = MemoryView { pressure: Some(0.96), above_removal_mark: true, device_lost: None };
        let snapshot = HealthSnapshot { memory: above, ..healthy() };
        assert_eq!(codes(&readiness(&snapshot).reasons), ["memory"]);
        assert!(readiness(&snapshot).reasons[0].message.contains("96.0 %"));
        assert!(liveness(&snapshot).live);
        let below = MemoryView { pressure: Some(0.94), ..Default::default() };
        assert!(readiness(&HealthSnapshot { memory: below, ..healthy() }).ready);
    }

    #[test]
    fn a_lost_device_is_unready() {
        let memory = MemoryView { device_lost: Some("GPU 0 does not answer".into()), ..Default::default() };
        let snapshot = HealthSnapshot { memory, ..healthy() };
        assert_eq!(codes(&readiness(&snapshot).reasons), ["device_lost"]);
    }

    #[test]
    fn a_saturated_queue_matters_only_while_another_node_has_room() {
        for (saturation, other_ready_peer_below_mark, ready) in
            [(1.0, true, false), (0.9, true, false), (0.89, true, true), (1.0, false, true), (0.0, true, true)]
        {
            let queue = QueueView { saturation, other_ready_peer_below_mark };
            let snapshot = HealthSnapshot { queue, ..healthy() };
            assert_eq!(readiness(&snapshot).ready, ready, "{queue:?}");
            assert!(liveness(&snapshot).live);
        }
    }

    #[test]
    fn readiness_lists_every_reason() {
        let snapshot = HealthSnapshot {
            engine: Some(EngineView { alive: true, stalled_for: Some(HANG * 2) }),
            probe: ProbeView { has_passed: true, fault: Some("no answer".into()) },
            memory: MemoryView {
                pressure: Some(0.99),
                above_removal_mark: true,
                device_lost: Some("GPU 0 is gone".into()),
            },
            queue: QueueView { saturation: 1.0, other_ready_peer_below_mark: true },
            ..in_state(NodeState::Draining)
        };
        let expected = ["draining", "engine_stalled", "probe_failed", "device_lost", "memory", "saturated"];
        assert_eq!(codes(&readiness(&snapshot).reasons), expected);
    }

    #[test]
    fn startup_tells_phase_and_fraction_and_never_goes_back() {
        let loading = LoadProgress { phase: LoadPhase::LoadingWeights, fraction: 0.25 };
        let snapshot = HealthSnapshot { loading, has_started: false, engine: None, ..in_state(NodeState::Starting) };
        let body = serde_json::to_value(startup(&snapshot)).unwrap();
        assert_eq!(
            body,
            serde_json::json!({
                "started": false, "state": "starting", "phase": "loading_weights", "fraction": 0.25,
                "reasons": [{"code": "starting", "message": "because"}],
            })
        );
        assert!(startup(&in_state(NodeState::Draining)).started);
        let failed = HealthSnapshot { has_started: false, ..in_state(NodeState::Failed) };
        assert_eq!(codes(&startup(&failed).reasons), ["failed"]);
    }

    #[test]
    fn bodies_serialise_with_the_state_as_a_word() {
        let body = serde_json::to_value(readiness(&in_state(NodeState::Degraded))).unwrap();
        assert_eq!(body["state"], "degraded");
        assert_eq!(body["ready"], true);
        assert_eq!(serde_json::to_value(liveness(&healthy())).unwrap()["reasons"], serde_json::json!([]));
    }
}
