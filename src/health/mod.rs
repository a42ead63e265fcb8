//! The node's health, and the answers to probes.
//!
//! [`Health`] is the handle: tasks report to it, and the API reads verdicts from it. The pure parts are the state machine in
//! `lifecycle`, the verdicts, the probe judge, the stall watch and the memory marks. Knows no HTTP, and knows the engine only
//! as a `Backend`.

mod config;
pub mod device;
pub mod gpu_probe;
pub mod inference_probe;
pub mod lifecycle;
pub mod memory;
mod monitor;
pub mod stall_watch;
pub mod verdict;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use thiserror::Error;
use tracing::{info, warn};

use crate::observability::Metrics;
use crate::types::{Backend, DegradedBy, Failure, FailureKind, NodeReason};

pub use config::Config;
use device::TroubleJudge;
pub use device::{DeviceProbe, DeviceReading};
pub use gpu_probe::GpuProbe;
use inference_probe::ProbeJudge;
pub use inference_probe::{CalibrationError, InferenceProbe, ProbeOutcome};
pub use lifecycle::{InvalidTransition, Lifecycle, NodePhase};
pub use memory::{HostMemory, MemoryLimit, MemoryProbe, MemoryProbeError};
use memory::{MemoryLevel, MemoryPlace, MemoryReading, MemoryState};
pub use monitor::{watch_device, watch_engine, watch_memory};
use stall_watch::StallWatch;
use verdict::{EngineView, MemoryView, ProbeView, VerdictBounds};
pub use verdict::{HealthSnapshot, Liveness, LoadPhase, LoadProgress, QueueView, Readiness, Reason, Startup};

/// Why the node has failed.
#[derive(Debug, Error)]
#[error("{0}")]
struct NodeFailed(Cow<'static, str>);

/// The handle to the node's health. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    state: Arc<HealthState>,
}

struct HealthState {
    config: Config,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
    backend: OnceLock<Arc<dyn Backend>>,
    /// Somebody wants to know how fast the node is now.
    wants_probe: AtomicBool,
    observed: Mutex<Observed>,
}

/// The latest reports.
struct Observed {
    loading: LoadProgress,
    watch: StallWatch,
    judge: ProbeJudge,
    memory: BTreeMap<MemoryPlace, MemoryState>,
    device_trouble: TroubleJudge,
    /// Why the device does not answer.
    device_lost: Option<String>,
}

impl Health {
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Self {
        let observed = Observed {
            loading: LoadProgress::default(),
            watch: StallWatch::default(),
            judge: ProbeJudge::new(&config),
            memory: BTreeMap::new(),
            device_trouble: TroubleJudge::default(),
            device_lost: None,
        };
        let lifecycle = Lifecycle::new(metrics.clone());
        let (backend, wants_probe, observed) = (OnceLock::new(), AtomicBool::new(false), Mutex::new(observed));
        let state = HealthState { config, lifecycle, metrics, backend, wants_probe, observed };
        Self { state: Arc::new(state) }
    }

    pub fn config(&self) -> &Config {
        &self.state.config
    }

    pub fn lifecycle(&self) -> &Lifecycle {
        &self.state.lifecycle
    }

    /// Reports the progress of loading.
    pub fn set_loading(&self, phase: LoadPhase, fraction: f64) {
        self.state.observed.lock().loading = LoadProgress { phase, fraction };
    }

    /// Sets the engine whose status counts. Only the first call has an effect.
    pub fn attach(&self, backend: Arc<dyn Backend>) {
        if self.state.backend.set(backend).is_err() {
            warn!("a second engine was attached to the node's health; the second one is ignored");
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

    /// Whether the engine has work and has made no progress for `stall_timeout`. New requests would have to wait.
    pub fn engine_is_stalled(&self) -> bool {
        let now = tokio::time::Instant::now().into_std();
        let engine = self.state.view_engine(&mut self.state.observed.lock(), now);
        engine.and_then(|engine| engine.stalled_for).is_some_and(|stalled| stalled > self.config().stall_timeout)
    }

    pub fn snapshot(&self, queue: QueueView) -> HealthSnapshot {
        let HealthState { config, lifecycle, .. } = &*self.state;
        let mut observed = self.state.observed.lock();
        let engine = self.state.view_engine(&mut observed, tokio::time::Instant::now().into_std());
        let phase = lifecycle.phase();
        HealthSnapshot {
            state: phase.state,
            state_reason: phase.reason.into_owned(),
            degraded: lifecycle
                .degraded_by()
                .into_iter()
                .map(|(by, why)| Reason::new(NodeReason::Degraded(by), why))
                .collect(),
            has_started: lifecycle.has_started(),
            loading: observed.loading,
            engine,
            probe: observed.probe_view(),
            memory: observed.memory_view(),
            queue,
            bounds: VerdictBounds {
                stall_timeout: config.stall_timeout,
                liveness_timeout: config.liveness_timeout,
                memory_removal_mark: config.memory_removal_mark,
                queue_saturation_mark: config.queue_saturation_mark,
            },
        }
    }

    /// The error for this node's streams once the node has failed.
    pub fn engine_failure(&self) -> Failure {
        let is_wrong = self.state.observed.lock().judge.failure().is_some();
        let failure = match is_wrong {
            true => Failure::new(
                FailureKind::NumericsSuspect,
                "The replica was found to compute wrong numbers: the response so far may be wrong. Send the request again.",
            ),
            false => Failure::new(FailureKind::EngineFailed, "The engine has failed."),
        };
        failure.with_source(NodeFailed(self.lifecycle().phase().reason))
    }

    /// While somebody wants to know how fast the node is, the synthetic inference comes every second.
    pub fn want_probe(&self, is_wanted: bool) {
        self.state.wants_probe.store(is_wanted, Ordering::Relaxed);
    }

    fn wants_probe(&self) -> bool {
        self.state.wants_probe.load(Ordering::Relaxed)
    }

    fn is_in_doubt(&self) -> bool {
        self.state.observed.lock().judge.is_in_doubt()
    }

    fn probe_view(&self) -> ProbeView {
        self.state.observed.lock().probe_view()
    }

    fn probe_finished(&self, outcome: &ProbeOutcome) {
        let HealthState { lifecycle, metrics, observed, .. } = &*self.state;
        let mut observed = observed.lock();
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
            // This has no effect if the node has already failed or stopped.
            let _ = lifecycle.fail(reason);
        }
        match observed.judge.slow() {
            Some(reason) => lifecycle.degrade(DegradedBy::SlowProbe, reason.to_string()),
            None => lifecycle.recover(DegradedBy::SlowProbe, "the synthetic inference is fast again"),
        }
    }

    /// Fails the node if its engine has ended, or has hung for too long.
    fn judge_engine(&self) {
        let liveness = self.liveness();
        let engine_reason = liveness.reasons.iter().find(|reason| reason.code.is_of_engine());
        if let Some(reason) = engine_reason {
            // This has no effect if the node has already failed or stopped.
            let _ = self.state.lifecycle.fail(reason.message.clone());
        }
    }

    /// Processes a reading, or a failure to read. `block_bytes`: size of one KV block, if the pool is fully reserved.
    fn observe_memory(
        &self,
        place: MemoryPlace,
        source: &'static str,
        reading: Result<MemoryReading, &MemoryProbeError>,
        block_bytes: u64,
    ) {
        let HealthState { config, lifecycle, metrics, backend, observed, .. } = &*self.state;
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
        let marks = config.memory_marks();
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

impl HealthState {
    fn view_engine(&self, observed: &mut Observed, now: Instant) -> Option<EngineView> {
        let status = self.backend.get()?.status();
        let stalled_for = observed.watch.observe(status.outstanding, status.progress, now);
        Some(EngineView { alive: status.alive, stalled_for })
    }
}

impl Observed {
    fn probe_view(&self) -> ProbeView {
        ProbeView { has_passed: self.judge.has_passed(), fault: self.judge.fault().map(str::to_string) }
    }

    /// The memory with the higher pressure.
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
