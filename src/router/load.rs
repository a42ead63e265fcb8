//! This node's load report: its state, its load and its speed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failover::now;
use super::handle::Router;
use super::pace::progress::FirstTokens;
use super::peers::Peers;
use super::source::Replica;
use super::this_node::ThisNode;
use crate::cluster::{LoadReport, PaceReport, Peer};
use crate::health::QueueView;
use crate::types::Pace;

/// Weight of the newest measurement in the average time to the first token.
const NEWEST: f64 = 0.1;
/// Without a new first token, the average halves in this time, since an idle node is not as slow as a busy one was.
const HALF_LIFE: Duration = Duration::from_secs(5);
/// The time between tokens is what steps take now. If the node has been idle for longer than this, it is the time per unit of
/// work.
const STEPS_COUNT: Duration = Duration::from_secs(3);

/// The numbers of a load report that say how busy a replica is, and how fast it would replay a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ReplicaLoad {
    pub(super) running: u32,
    pub(super) waiting: u32,
    pub(super) seats: u32,
    pub(super) drain_tokens_per_second: f32,
}

impl ReplicaLoad {
    fn of(report: &LoadReport) -> Self {
        let LoadReport { running, waiting, seats, drain_tokens_per_second, .. } = *report;
        Self { running, waiting, seats, drain_tokens_per_second }
    }
}

/// The average time to the first token, in units of work, so that it follows changes of the node's pace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FirstTokenAverage {
    units: f64,
    aged_at: Option<Instant>,
}

impl FirstTokenAverage {
    /// Adds the latest first tokens; `unit`: seconds per unit of work.
    fn note(&mut self, first: FirstTokens, unit: f64, now: Instant) {
        let idle = self.aged_at.replace(now).map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        if first.count > 0 {
            let mean = first.time.as_secs_f64() / first.count as f64 / unit;
            let weight = 1.0 - (1.0 - NEWEST).powi(i32::try_from(first.count).unwrap_or(i32::MAX));
            self.units = if self.units == 0.0 { mean } else { self.units + weight * (mean - self.units) };
        } else if self.units > 1.0 {
            let aged = self.units * libm::exp2(-idle.as_secs_f64() / HALF_LIFE.as_secs_f64());
            self.units = aged.max(1.0);
        }
    }

    fn seconds(self, unit: f64) -> f64 {
        self.units * unit
    }
}

impl Router {
    /// Assesses this node anew and returns its report.
    pub fn refresh(&self) -> LoadReport {
        let report = self.node.assess(self.queue());
        *self.node.report.lock() = report.clone();
        self.peers.compare_paces(&self.node, &report);
        self.streams.expire_journals();
        report
    }

    /// This node's current report.
    pub fn report(&self) -> LoadReport {
        self.node.report_now()
    }

    /// The state of the queue, for the readiness verdict.
    pub fn queue(&self) -> QueueView {
        let mark = self.node.health.config().queue_saturation_mark as f32;
        let is_below = |peer: &Arc<Peer>| peer.report.ready && peer.report.queue_saturation < mark;
        QueueView {
            saturation: self.node.admission.status().saturation,
            other_ready_peer_below_mark: self.peers.view.borrow().peers.values().any(is_below),
        }
    }
}

impl Peers {
    /// The replica's load, if known. Copies no report: when a replica becomes slow, each of its streams asks for every sibling.
    pub(super) fn load_of(&self, node: &ThisNode, replica: &Replica) -> Option<ReplicaLoad> {
        match replica {
            Replica::Here => Some(ReplicaLoad::of(&node.with_load(LoadReport::default()))),
            Replica::At(node) => self.view.borrow().peers.get(node).map(|peer| ReplicaLoad::of(&peer.report)),
        }
    }
}

impl ThisNode {
    /// The last assessment, with current values for what changes with each request.
    pub(super) fn report_now(&self) -> LoadReport {
        let report = self.report.lock().clone();
        let state = self.health.lifecycle().state();
        // The state may have changed since the assessment.
        let ready = if report.state == state { report.ready } else { self.may_serve() };
        self.with_load(LoadReport { state, ready, ..report })
    }

    fn with_load(&self, report: LoadReport) -> LoadReport {
        let Some(local) = self.local() else { return report };
        let (status, door) = (local.engine.status(), self.admission.status());
        let total = status.kv_blocks_total.max(1) as f32;
        LoadReport {
            running: status.running,
            waiting: status.waiting.max(door.queued_requests),
            waiting_tokens: status.waiting_tokens.max(door.queued_tokens),
            seats: local.seats,
            queue_saturation: door.saturation as f32,
            kv_usage: status.kv_blocks_used as f32 / total,
            drain_tokens_per_second: status.drain_tokens_per_second as f32,
            free_token_budget: self.admission.free_token_budget(),
            ..report
        }
    }

    fn assess(&self, queue: QueueView) -> LoadReport {
        let readiness = self.health.readiness(queue);
        let measured = self.local().and_then(|local| local.engine.pace());
        let pace = self.pace.with_standstills(measured, now());
        // An engine without a measured pace counts in seconds.
        let unit = pace.map_or(1.0, |pace| pace.unit_seconds);
        let first_token = {
            let mut average = self.pace.first_tokens.lock();
            average.note(self.pace.streams.take_first_tokens(), unit, now());
            average.seconds(unit)
        };
        let reasons = readiness.reasons.iter().chain(&readiness.degraded);
        let pressure = readiness.memory_pressure.unwrap_or(0.0);
        self.with_load(LoadReport {
            state: self.health.lifecycle().state(),
            ready: readiness.ready && !self.leaves(),
            reasons: reasons.map(|reason| reason.code.into()).collect(),
            memory_pressure: pressure as f32,
            memory_share: Some(self.health.config().memory_share(pressure) as f32),
            time_to_first_token: first_token as f32,
            inter_token_latency: pace.map_or(0.0, token_seconds) as f32,
            pace: pace
                .map(|pace| PaceReport { unit_seconds: pace.unit_seconds as f32, age_seconds: pace.age.as_secs_f32() }),
            hot_prefixes: self.hot_prefixes.lock().digest(),
            ..LoadReport::default()
        })
    }
}

fn token_seconds(pace: Pace) -> f64 {
    if pace.age < STEPS_COUNT { pace.step_seconds } else { pace.unit_seconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: f64 = 0.01;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_time_to_the_first_token_follows_the_pace_and_is_forgotten_by_an_idle_node() {
        let (mut average, start) = (FirstTokenAverage::default(), Instant::now());
        let none = FirstTokens::default();
        average.note(none, UNIT, start);
        assert_eq!(average.seconds(UNIT), 0.0, "nothing was measured");
        average.note(FirstTokens { count: 4, time: seconds(40) }, UNIT, start);
        assert!((average.seconds(UNIT) - 10.0).abs() < 1e-9);
        assert!((average.seconds(UNIT / 10.0) - 1.0).abs() < 1e-9, "ten times as fast, ten times as soon");
        average.note(FirstTokens { count: 1, time: seconds(20) }, UNIT, start + seconds(1));
        assert!((average.seconds(UNIT) - 11.0).abs() < 1e-9);
        average.note(none, UNIT, start + seconds(6));
        assert!((average.seconds(UNIT) - 5.5).abs() < 1e-9);
        average.note(none, UNIT, start + seconds(600));
        assert!((average.seconds(UNIT) - UNIT).abs() < 1e-9, "no less than a step");
    }
}
