//! The node's state machine: `Starting → Warming → Ready ⇄ Degraded → Draining → Stopped`, and `Failed` from any state.
//!
//! `Machine` is the pure core, [`Lifecycle`] its handle. Each transition has a reason, a metric and a log line, and is sent to
//! all subscribers. A transition that is not allowed is an error and changes nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use thiserror::Error;
use tracing::{error, info, warn};

use crate::observability::Metrics;
use crate::observability::metrics::state_label;
use crate::types::{DegradedBy, NodeState, watch};

/// A state, and the reason why the node entered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePhase {
    pub state: NodeState,
    pub reason: Cow<'static, str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a node cannot go from {} to {}", state_label(*.from), state_label(*.to))]
pub struct InvalidTransition {
    pub from: NodeState,
    pub to: NodeState,
}

/// The pure core.
#[derive(Clone, Debug)]
struct Machine {
    phase: NodePhase,
    /// Current causes of degradation. Recorded also before the node is ready.
    causes: BTreeMap<DegradedBy, Cow<'static, str>>,
}

impl Machine {
    fn new() -> Self {
        let phase = NodePhase { state: NodeState::Starting, reason: "the process started".into() };
        Self { phase, causes: BTreeMap::new() }
    }

    /// Whether this transition can be requested. `Ready ⇄ Degraded` cannot: it follows from the causes.
    fn allows(from: NodeState, to: NodeState) -> bool {
        use NodeState::{Degraded, Draining, Failed, Ready, Starting, Stopped, Warming};
        match to {
            Starting | Degraded => false,
            Warming => from == Starting,
            Ready => from == Warming,
            Draining => matches!(from, Starting | Warming | Ready | Degraded),
            Stopped => matches!(from, Draining | Failed),
            Failed => !matches!(from, Stopped | Failed),
        }
    }

    /// Makes the transition, and the one to `Degraded` if it follows at once. Returns the phases that were entered.
    fn go(&mut self, to: NodeState, reason: Cow<'static, str>) -> Result<Vec<NodePhase>, InvalidTransition> {
        let from = self.phase.state;
        if !Self::allows(from, to) {
            return Err(InvalidTransition { from, to });
        }
        self.phase = NodePhase { state: to, reason };
        let mut entered = vec![self.phase.clone()];
        entered.extend(self.settle());
        Ok(entered)
    }

    fn degrade(&mut self, cause: DegradedBy, reason: Cow<'static, str>) -> Option<NodePhase> {
        self.causes.insert(cause, reason);
        self.settle()
    }

    fn recover(&mut self, cause: DegradedBy, reason: Cow<'static, str>) -> Option<NodePhase> {
        self.causes.remove(&cause);
        if self.phase.state != NodeState::Degraded || !self.causes.is_empty() {
            return None;
        }
        self.phase = NodePhase { state: NodeState::Ready, reason };
        Some(self.phase.clone())
    }

    /// Degrades a ready node that has a cause, or makes it ready again.
    fn settle(&mut self) -> Option<NodePhase> {
        let reason = self.causes.values().next().filter(|_| self.phase.state == NodeState::Ready)?.clone();
        self.phase = NodePhase { state: NodeState::Degraded, reason };
        Some(self.phase.clone())
    }
}

/// The handle to the node's state. Cheap to clone.
#[derive(Clone)]
pub struct Lifecycle {
    cell: Arc<PhaseCell>,
}

/// The machine, and the current phase for subscribers.
struct PhaseCell {
    machine: Mutex<Machine>,
    phases: watch::Sender<NodePhase>,
    has_started: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Lifecycle {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let machine = Machine::new();
        let (phases, _) = watch::channel(machine.phase.clone());
        metrics.set_node_state(machine.phase.state);
        for cause in DegradedBy::ALL {
            metrics.degraded.with([cause.code()]).set(0.0);
        }
        Self { cell: Arc::new(PhaseCell { machine: Mutex::new(machine), phases, has_started: false.into(), metrics }) }
    }

    pub fn state(&self) -> NodeState {
        self.cell.phases.borrow().state
    }

    pub fn phase(&self) -> NodePhase {
        self.cell.phases.borrow().clone()
    }

    /// All causes that degrade the node at present.
    pub fn degraded_by(&self) -> Vec<(DegradedBy, String)> {
        let machine = self.cell.machine.lock();
        machine.causes.iter().map(|(cause, reason)| (*cause, reason.to_string())).collect()
    }

    /// Whether the node has ever been ready.
    pub fn has_started(&self) -> bool {
        self.cell.has_started.load(Ordering::Acquire)
    }

    /// Receives the latest phase. Phases that follow one another quickly may be skipped.
    pub fn subscribe(&self) -> watch::Receiver<NodePhase> {
        self.cell.phases.subscribe()
    }

    /// The weights are loaded; the node now tries the model.
    pub fn warming(&self, reason: impl Into<Cow<'static, str>>) -> Result<(), InvalidTransition> {
        self.go(NodeState::Warming, reason.into())
    }

    pub fn ready(&self, reason: impl Into<Cow<'static, str>>) -> Result<(), InvalidTransition> {
        self.go(NodeState::Ready, reason.into())
    }

    pub fn drain(&self, reason: impl Into<Cow<'static, str>>) -> Result<(), InvalidTransition> {
        self.go(NodeState::Draining, reason.into())
    }

    pub fn stop(&self, reason: impl Into<Cow<'static, str>>) -> Result<(), InvalidTransition> {
        self.go(NodeState::Stopped, reason.into())
    }

    pub fn fail(&self, reason: impl Into<Cow<'static, str>>) -> Result<(), InvalidTransition> {
        self.go(NodeState::Failed, reason.into())
    }

    /// Adds a cause of degradation. It takes effect while the node is ready, or when it becomes ready.
    pub fn degrade(&self, cause: DegradedBy, reason: impl Into<Cow<'static, str>>) {
        let mut machine = self.cell.machine.lock();
        self.cell.metrics.degraded.with([cause.code()]).set(1.0);
        if let Some(phase) = machine.degrade(cause, reason.into()) {
            self.cell.publish(NodeState::Ready, phase);
        }
    }

    /// Removes a cause of degradation. The node is ready again when none is left.
    pub fn recover(&self, cause: DegradedBy, reason: impl Into<Cow<'static, str>>) {
        let mut machine = self.cell.machine.lock();
        self.cell.metrics.degraded.with([cause.code()]).set(0.0);
        if let Some(phase) = machine.recover(cause, reason.into()) {
            self.cell.publish(NodeState::Degraded, phase);
        }
    }

    fn go(&self, to: NodeState, reason: Cow<'static, str>) -> Result<(), InvalidTransition> {
        // Published while the lock is held, so that subscribers see phases in order.
        let mut machine = self.cell.machine.lock();
        let mut from = machine.phase.state;
        for phase in machine.go(to, reason)? {
            let entered = phase.state;
            self.cell.publish(from, phase);
            from = entered;
        }
        Ok(())
    }
}

impl PhaseCell {
    fn publish(&self, from: NodeState, phase: NodePhase) {
        let (from, to, reason) = (state_label(from), state_label(phase.state), phase.reason.as_ref());
        match phase.state {
            NodeState::Failed => error!(from, to, reason, "node state"),
            NodeState::Degraded => warn!(from, to, reason, "node state"),
            _ => info!(from, to, reason, "node state"),
        }
        self.has_started.fetch_or(phase.state == NodeState::Ready, Ordering::Release);
        self.metrics.set_node_state(phase.state);
        self.metrics.node_state_transitions.with([to]).inc();
        self.phases.send_replace(phase);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [NodeState; 7] = [
        NodeState::Starting,
        NodeState::Warming,
        NodeState::Ready,
        NodeState::Degraded,
        NodeState::Draining,
        NodeState::Stopped,
        NodeState::Failed,
    ];

    fn lifecycle() -> (Lifecycle, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new("m"));
        (Lifecycle::new(metrics.clone()), metrics)
    }

    #[test]
    fn the_whole_way_with_reasons_metrics_and_subscribers() {
        let (lifecycle, metrics) = lifecycle();
        let mut phases = lifecycle.subscribe();
        lifecycle.warming("weights loaded").unwrap();
        lifecycle.ready("probe passed").unwrap();
        lifecycle.degrade(DegradedBy::Memory, "memory at 91 %");
        assert!(phases.has_changed().unwrap());
        let phase = phases.borrow_and_update().clone();
        assert_eq!((phase.state, phase.reason.as_ref()), (NodeState::Degraded, "memory at 91 %"));
        lifecycle.degrade(DegradedBy::SlowProbe, "probe took 3 s");
        lifecycle.recover(DegradedBy::Memory, "memory at 70 %");
        assert_eq!(lifecycle.state(), NodeState::Degraded, "the other cause remains");
        lifecycle.recover(DegradedBy::SlowProbe, "probe took 1 s");
        assert_eq!(lifecycle.phase().reason, "probe took 1 s");
        lifecycle.drain("SIGTERM").unwrap();
        lifecycle.stop("drained").unwrap();
        assert_eq!(lifecycle.state(), NodeState::Stopped);

        let text = metrics.prometheus_text();
        for (state, count) in [("warming", 1), ("ready", 2), ("degraded", 1), ("draining", 1), ("stopped", 1)] {
            let line = format!("outrigger_node_state_transitions_total{{state=\"{state}\"}} {count}\n");
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(text.contains("outrigger_node_state{state=\"stopped\"} 1"));
    }

    #[test]
    fn each_cause_of_degradation_has_a_series() {
        let (lifecycle, metrics) = lifecycle();
        let degrading = || {
            let text = metrics.prometheus_text();
            let line = |cause: DegradedBy, value: f64| {
                format!("outrigger_degraded{{reason=\"{}\"}} {value:?}\n", cause.code())
            };
            let is_known = |cause: &DegradedBy| [0.0, 1.0].iter().any(|value| text.contains(&line(*cause, *value)));
            assert!(DegradedBy::ALL.iter().all(is_known), "{text}");
            DegradedBy::ALL.into_iter().filter(|cause| text.contains(&line(*cause, 1.0))).collect::<Vec<_>>()
        };
        assert_eq!(degrading(), []);
        lifecycle.degrade(DegradedBy::Slow, "slow");
        lifecycle.degrade(DegradedBy::Memory, "memory at 91 %");
        assert_eq!(degrading(), [DegradedBy::Slow, DegradedBy::Memory]);
        lifecycle.recover(DegradedBy::Slow, "at pace");
        assert_eq!(degrading(), [DegradedBy::Memory]);
    }

    #[test]
    fn a_cause_noted_before_readiness_degrades_on_arrival() {
        let (lifecycle, metrics) = lifecycle();
        lifecycle.degrade(DegradedBy::Memory, "memory at 92 %");
        assert_eq!(lifecycle.state(), NodeState::Starting);
        lifecycle.warming("loaded").unwrap();
        lifecycle.ready("probe passed").unwrap();
        assert_eq!(lifecycle.state(), NodeState::Degraded);
        assert!(metrics.prometheus_text().contains("outrigger_node_state_transitions_total{state=\"ready\"} 1\n"));
    }

    #[test]
    fn what_is_over_stays_over() {
        let (lifecycle, _) = lifecycle();
        lifecycle.drain("SIGTERM while loading").unwrap();
        let late = lifecycle.warming("loaded").unwrap_err();
        assert_eq!(late, InvalidTransition { from: NodeState::Draining, to: NodeState::Warming });
        assert_eq!(late.to_string(), "a node cannot go from draining to warming");
        lifecycle.fail("engine died").unwrap();
        assert!(lifecycle.fail("again").is_err());
        assert_eq!(lifecycle.phase().reason, "engine died", "the first reason is kept");
        assert!(lifecycle.ready("no").is_err());
        lifecycle.stop("SIGTERM").unwrap();
        assert!(STATES.iter().all(|&to| !Machine::allows(NodeState::Stopped, to)));
    }

    #[test]
    fn failure_is_reachable_from_every_state_but_the_last() {
        for from in STATES {
            let over = matches!(from, NodeState::Stopped | NodeState::Failed);
            assert_eq!(Machine::allows(from, NodeState::Failed), !over);
        }
    }

    proptest! {
        /// For any requests: the state follows the diagram, and a ready node is `Degraded` exactly when it has a cause.
        #[test]
        fn the_diagram_holds(asked in prop::collection::vec((0_usize..9, any::<bool>()), 1..60)) {
            let mut machine = Machine::new();
            for (choice, which) in asked {
                let before = machine.phase.state;
                let cause = if which { DegradedBy::Memory } else { DegradedBy::SlowProbe };
                match choice {
                    7 => drop(machine.degrade(cause, "cause".into())),
                    8 => drop(machine.recover(cause, "gone".into())),
                    state => drop(machine.go(STATES[state], "asked".into())),
                }
                let after = machine.phase.state;
                use NodeState::{Degraded, Ready, Warming};
                let by_causes = matches!((before, after), (Ready, Degraded) | (Degraded, Ready) | (Warming, Degraded));
                prop_assert!(before == after || by_causes || Machine::allows(before, after));
                prop_assert_eq!(after == NodeState::Ready && !machine.causes.is_empty(), false);
                prop_assert_eq!(after == NodeState::Degraded && machine.causes.is_empty(), false);
            }
        }
    }
}
