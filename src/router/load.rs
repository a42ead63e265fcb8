//! What this node says of itself: its state, its load and how fast it is.

use std::sync::Arc;
use std::time::Duration;

use super::failover::now;
use super::shared::{Router, Shared};
use crate::cluster::{LoadReport, Peer};
use crate::health::QueueView;

/// Weight of the newest measurement in the moving averages.
const NEWEST: f32 = 0.1;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latencies {
    first_token: f32,
    inter_token: f32,
}

impl Router {
    /// Looks at this node anew, and says what there is to say of it.
    pub fn refresh(&self) -> LoadReport {
        let report = self.shared.assess();
        *self.shared.own_report.lock() = report.clone();
        let mut journals = self.shared.journals.lock();
        journals.expire(now());
        self.shared.metrics.journals_held.set(journals.len() as i64);
        self.shared.metrics.journal_bytes.set(i64::try_from(journals.bytes()).unwrap_or(i64::MAX));
        report
    }

    /// What this node says of itself, as it is now.
    pub fn report(&self) -> LoadReport {
        self.shared.own_report_now()
    }

    /// The queue as the readiness verdict looks at it.
    pub fn queue(&self) -> QueueView {
        self.shared.queue()
    }
}

impl Shared {
    pub(super) fn note_latency(&self, first: Duration, between: Option<Duration>) {
        let mut latencies = self.latencies.lock();
        let Latencies { first_token, inter_token } = &mut *latencies;
        average(first_token, first);
        between.into_iter().for_each(|between| average(inter_token, between));
    }

    pub(super) fn queue(&self) -> QueueView {
        let mark = self.health.config().queue_saturation_mark as f32;
        let is_below = |peer: &Arc<Peer>| peer.report.ready && peer.report.queue_saturation < mark;
        QueueView {
            saturation: self.admission.status().saturation,
            other_ready_peer_below_mark: self.view.borrow().peers.values().any(is_below),
        }
    }

    /// The last assessment, with what changes from request to request as it is now.
    pub(super) fn own_report_now(&self) -> LoadReport {
        let report = self.own_report.lock().clone();
        let state = self.health.lifecycle().state();
        // The assessment may be a moment older than the state.
        let ready = if report.state == state { report.ready } else { self.may_serve_here() };
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

    fn assess(&self) -> LoadReport {
        let readiness = self.health.readiness(self.queue());
        let Latencies { first_token, inter_token } = *self.latencies.lock();
        self.with_load(LoadReport {
            state: self.health.lifecycle().state(),
            ready: readiness.ready && !self.leaves(),
            reasons: readiness.reasons.iter().map(|reason| reason.code.to_string()).collect(),
            memory_pressure: readiness.memory_pressure.unwrap_or(0.0) as f32,
            time_to_first_token: first_token,
            inter_token_latency: inter_token,
            hot_prefixes: self.hot_prefixes.lock().digest(),
            ..LoadReport::default()
        })
    }
}

fn average(mean: &mut f32, time: Duration) {
    let seconds = time.as_secs_f32();
    *mean = if *mean == 0.0 { seconds } else { *mean + NEWEST * (seconds - *mean) };
}
