//! What the node knows of its own health, and what it answers when asked.
//!
//! [`Health`] is the handle: tasks report to it, the API reads verdicts from it. The pure parts are the state machine in
//! `lifecycle`, the verdicts, the judge of probes, the watch over the engine and the memory marks. Knows no HTTP, and the
//! engine only as a `Backend`.

pub mod device;
pub mod engine_watch;
pub mod gpu_probe;
pub mod inference_probe;
pub mod lifecycle;
pub mod memory;
mod monitor;
pub mod verdict;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Deserialize;
use thiserror::Error;
use tracing::{info, warn};

use crate::observability::Metrics;
use crate::types::{Backend, Failure, FailureKind};

use device::TroubleJudge;
pub use device::{DeviceProbe, DeviceReading};
use engine_watch::EngineWatch;
pub use gpu_probe::GpuProbe;
use inference_probe::ProbeJudge;
pub use inference_probe::{CalibrationError, InferenceProbe, ProbeOutcome};
pub use lifecycle::{DegradedBy, InvalidTransition, Lifecycle, NodePhase};
pub use memory::{HostMemory, MemoryProbe};
use memory::{MemoryLevel, MemoryMarks, MemoryPlace, MemoryProbeError, MemoryReading, MemoryState};
pub use monitor::{watch_device, watch_engine, watch_memory};
use verdict::{Bounds, EngineView, MemoryView, ProbeView};
pub use verdict::{HealthSnapshot, Liveness, LoadPhase, LoadProgress, QueueView, Readiness, Reason, Startup};

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// From the end of one synthetic inference to the next.
    pub probe_interval: Duration,
    /// A slower synthetic inference degrades the node.
    pub probe_soft_limit: Duration,
    /// Without an answer for this long the node is unready.
    pub probe_hard_limit: Duration,
    /// Tokens of a synthetic inference.
    pub probe_max_tokens: u32,
    /// Good synthetic inferences in a row that lift a bad verdict.
    pub probe_recovery: u32,
    /// Synthetic inferences with wrong numbers, and no right one between them, that make it failed: restart it; 0 is never.
    pub probe_failure_threshold: u32,
    /// An engine with work and without progress for this long makes the node unready.
    pub stall_timeout: Duration,
    /// And for this long makes it failed: restart it.
    pub liveness_timeout: Duration,
    /// From one reading of the memory to the next.
    pub memory_interval: Duration,
    /// Fraction of memory in use from which it is logged.
    pub memory_warn_mark: f64,
    /// From which the node asks for less traffic (`Degraded`).
    pub memory_shrink_mark: f64,
    /// From which it asks for none (unready).
    pub memory_removal_mark: f64,
    /// Fullness of the queue from which a node is unready, while another ready node is below it.
    pub queue_saturation_mark: f64,
}

impl Default for Config {
    /// A probe of 4 tokens every 10 s, slow beyond 5 s, lost beyond 30 s, 2 good ones to recover, failed after 2 wrong
    /// ones; stall 10 s, liveness 30 s; memory every 5 s with marks at 80, 90 and 95 %; a queue is saturated at 90 %.
    fn default() -> Self {
        Self {
            probe_interval: Duration::from_secs(10),
            probe_soft_limit: Duration::from_secs(5),
            probe_hard_limit: Duration::from_secs(30),
            probe_max_tokens: 4,
            probe_recovery: 2,
            probe_failure_threshold: 2,
            stall_timeout: Duration::from_secs(10),
            liveness_timeout: Duration::from_secs(30),
            memory_interval: Duration::from_secs(5),
            memory_warn_mark: 0.8,
            memory_shrink_mark: 0.9,
            memory_removal_mark: 0.95,
            queue_saturation_mark: 0.9,
        }
    }
}

impl Config {
    /// Adds a line for each problem, with the key's name.
    pub fn validate(&self, errors: &mut Vec<String>) {
        const MAX_TIME: Duration = Duration::from_secs(60 * 60);
        for (key, value) in [
            ("probe_interval", self.probe_interval),
            ("probe_soft_limit", self.probe_soft_limit),
            ("probe_hard_limit", self.probe_hard_limit),
            ("stall_timeout", self.stall_timeout),
            ("liveness_timeout", self.liveness_timeout),
            ("memory_interval", self.memory_interval),
        ] {
            if value.is_zero() || value > MAX_TIME {
                errors.push(format!("{key} must be above 0 and at most 1h"));
            }
        }
        if self.probe_soft_limit > self.probe_hard_limit {
            errors.push("probe_soft_limit must be at most probe_hard_limit".into());
        }
        if self.stall_timeout > self.liveness_timeout {
            errors.push("stall_timeout must be at most liveness_timeout".into());
        }
        if !(1..=64).contains(&self.probe_max_tokens) {
            errors.push("probe_max_tokens must be 1 to 64".into());
        }
        if !(1..=100).contains(&self.probe_recovery) {
            errors.push("probe_recovery must be 1 to 100".into());
        }
        if self.probe_failure_threshold > 10_000 {
            errors.push("probe_failure_threshold must be at most 10000".into());
        }
        let marks = [0.0, self.memory_warn_mark, self.memory_shrink_mark, self.memory_removal_mark, 1.0];
        if !marks.is_sorted() {
            errors.push("memory_warn_mark, memory_shrink_mark and memory_removal_mark must ascend from 0 to 1".into());
        }
        if !(0.0..=1.0).contains(&self.queue_saturation_mark) {
            errors.push("queue_saturation_mark must be 0 to 1".into());
        }
    }
}

/// Why the node has failed.
#[derive(Debug, Error)]
#[error("{0}")]
struct NodeFailed(Cow<'static, str>);

/// Handle to the node's health. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    backend: OnceLock<Arc<dyn Backend>>,
    observed: Mutex<Observed>,
}

/// What was reported last.
struct Observed {
    loading: LoadProgress,
    watch: EngineWatch,
    judge: ProbeJudge,
    /// A synthetic inference is under way: the engine has work, whatever it says.
    is_probing: bool,
    memory: BTreeMap<MemoryPlace, MemoryState>,
    device_trouble: TroubleJudge,
    /// Why the device does not answer.
    device_lost: Option<String>,
}

impl Health {
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Self {
        let observed = Observed {
            loading: LoadProgress::default(),
            watch: EngineWatch::default(),
            judge: ProbeJudge::new(&config),
            is_probing: false,
            memory: BTreeMap::new(),
            device_trouble: TroubleJudge::default(),
            device_lost: None,
        };
        let lifecycle = Lifecycle::new(metrics.clone());
        let shared = Shared { config, lifecycle, metrics, backend: OnceLock::new(), observed: Mutex::new(observed) };
        Self { shared: Arc::new(shared) }
    }

    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    pub fn lifecycle(&self) -> &Lifecycle {
        &self.shared.lifecycle
    }

    /// Says how far loading has come.
    pub fn set_loading(&self, phase: LoadPhase, fraction: f64) {
        self.shared.observed.lock().loading = LoadProgress { phase, fraction };
    }

    /// Gives the engine whose status counts from now on. Only the first one is taken.
    pub fn attach(&self, backend: Arc<dyn Backend>) {
        if self.shared.backend.set(backend).is_err() {
            warn!("a second engine was attached to the node's health; the first one counts");
        }
    }

    pub fn liveness(&self) -> Liveness {
        verdict::liveness(&self.snapshot(QueueView::default()))
    }

    pub fn readiness(&self, queue: QueueView) -> Readiness {
        verdict::readiness(&self.snapshot(queue))
    }

    pub fn startup(&self) -> Startup {
        verdict::startup(&self.snapshot(QueueView::default()))
    }

    pub fn snapshot(&self, queue: QueueView) -> HealthSnapshot {
        let Shared { config, lifecycle, .. } = &*self.shared;
        let mut observed = self.shared.observed.lock();
        let engine = self.shared.view_engine(&mut observed, tokio::time::Instant::now().into_std());
        let phase = lifecycle.phase();
        HealthSnapshot {
            state: phase.state,
            state_reason: phase.reason.into_owned(),
            has_started: lifecycle.has_started(),
            loading: observed.loading,
            engine,
            probe: observed.probe_view(),
            memory: observed.memory_view(),
            queue,
            bounds: Bounds {
                stall_timeout: config.stall_timeout,
                liveness_timeout: config.liveness_timeout,
                memory_removal_mark: config.memory_removal_mark,
                queue_saturation_mark: config.queue_saturation_mark,
            },
        }
    }

    /// What streams of this node's engine end with, once the node has failed.
    pub fn engine_failure(&self) -> Failure {
        let is_wrong = self.shared.observed.lock().judge.failure().is_some();
        let failure = match is_wrong {
            true => Failure::new(
                FailureKind::NumericsSuspect,
                "The replica was found to compute wrong numbers: what it has answered so far may be wrong. Send the request again.",
            ),
            false => Failure::new(FailureKind::EngineFailed, "The engine has failed."),
        };
        failure.with_source(NodeFailed(self.lifecycle().phase().reason))
    }

    fn is_in_doubt(&self) -> bool {
        self.shared.observed.lock().judge.is_in_doubt()
    }

    fn probe_view(&self) -> ProbeView {
        self.shared.observed.lock().probe_view()
    }

    fn probe_started(&self) {
        self.shared.observed.lock().is_probing = true;
    }

    fn probe_abandoned(&self) {
        self.shared.observed.lock().is_probing = false;
    }

    fn probe_finished(&self, outcome: &ProbeOutcome) {
        let Shared { lifecycle, metrics, observed, .. } = &*self.shared;
        let mut observed = observed.lock();
        observed.is_probing = false;
        let fault_before = observed.judge.fault().is_some();
        let label = observed.judge.observe(outcome);
        metrics.probe_results.with([label]).inc();
        if let ProbeOutcome::Right { elapsed } = outcome {
            metrics.probe_duration.observe(elapsed.as_secs_f64());
        }
        if fault_before && observed.judge.fault().is_none() {
            info!("the synthetic inference is right again");
        }
        if let Some(reason) = observed.judge.failure() {
            // Refused when the node has failed or stopped already.
            let _ = lifecycle.fail(reason);
        }
        match observed.judge.slow() {
            Some(reason) => lifecycle.degrade(DegradedBy::SlowProbe, reason.to_string()),
            None => lifecycle.recover(DegradedBy::SlowProbe, "the synthetic inference is fast again"),
        }
    }

    /// Fails the node when its engine is dead, or hangs beyond the bound.
    fn judge_engine(&self) {
        let liveness = self.liveness();
        let engine_reason = liveness.reasons.iter().find(|reason| reason.code.starts_with("engine_"));
        if let Some(reason) = engine_reason {
            // Refused when the node has failed or stopped already.
            let _ = self.shared.lifecycle.fail(reason.message.clone());
        }
    }

    /// Takes a reading, or the lack of one. `block_bytes`: size of one KV block of a pool that is reserved in full.
    fn observe_memory(
        &self,
        place: MemoryPlace,
        source: &'static str,
        reading: Result<MemoryReading, &MemoryProbeError>,
        block_bytes: u64,
    ) {
        let Shared { config, lifecycle, metrics, backend, observed } = &*self.shared;
        let free_blocks = backend.get().map_or(0, |backend| {
            let status = backend.status();
            status.kv_blocks_total.saturating_sub(status.kv_blocks_used)
        });
        let mut observed = observed.lock();
        if place == MemoryPlace::Device {
            observed.device_lost = None;
        }
        let state = observed.memory.entry(place).or_default();
        let reading = match reading {
            Ok(reading) => reading,
            Err(error) => return state.unreadable(error),
        };
        let pressure = reading.pressure(u64::from(free_blocks).saturating_mul(block_bytes));
        metrics.memory_pressure.with([source]).set(pressure);
        let marks = MemoryMarks {
            warn: config.memory_warn_mark,
            shrink: config.memory_shrink_mark,
            remove: config.memory_removal_mark,
        };
        let level = marks.level(state.level, pressure);
        if level != state.level {
            if level > MemoryLevel::Normal {
                warn!(source, pressure, ?level, "memory")
            } else {
                info!(source, pressure, "memory")
            }
        }
        *state = MemoryState { pressure: Some(pressure), level, is_unreadable: false };
        let (cause, whose) = match place {
            MemoryPlace::Host => (DegradedBy::Memory, "memory"),
            MemoryPlace::Device => (DegradedBy::DeviceMemory, "device memory"),
        };
        let text = format!("{whose} at {:.1} %", pressure * 100.0);
        if level >= MemoryLevel::Shrink {
            lifecycle.degrade(cause, text);
        } else {
            lifecycle.recover(cause, text);
        }
    }
}

impl Shared {
    fn view_engine(&self, observed: &mut Observed, now: Instant) -> Option<EngineView> {
        let status = self.backend.get()?.status();
        let has_work = observed.is_probing || status.running > 0 || status.waiting > 0;
        Some(EngineView { alive: status.alive, stalled_for: observed.watch.observe(has_work, status.heartbeat, now) })
    }
}

impl Observed {
    fn probe_view(&self) -> ProbeView {
        ProbeView { has_passed: self.judge.has_passed(), fault: self.judge.fault().map(str::to_string) }
    }

    /// The tighter memory counts.
    fn memory_view(&self) -> MemoryView {
        MemoryView {
            pressure: self.memory.values().filter_map(|state| state.pressure).reduce(f64::max),
            above_removal_mark: self.memory.values().any(|state| state.level == MemoryLevel::Remove),
            device_lost: self.device_lost.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
