//! The state that the engine thread shares with other threads: status, heartbeat, counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::counters::EngineCounters;
use crate::types::EngineStatus;

/// Tells the time: that of the system, or a simulated one.
pub type Clock = fn() -> Instant;

pub(super) struct Shared {
    clock: Clock,
    epoch: Instant,
    /// Nanoseconds from `epoch` to the last sign of progress.
    heartbeat: AtomicU64,
    /// Written after each step, held only to copy.
    status: Mutex<EngineStatus>,
    pub(super) is_draining: AtomicBool,
    /// Requests that hold a [`RequestSlot`].
    num_requests: AtomicUsize,
    pub(super) counters: EngineCounters,
}

impl Shared {
    pub(super) fn new(clock: Clock, kv_blocks_total: u32) -> Self {
        let now = clock();
        let status = EngineStatus {
            alive: true,
            heartbeat: now,
            running: 0,
            waiting: 0,
            waiting_tokens: 0,
            preemptions: 0,
            kv_blocks_total,
            kv_blocks_used: 0,
            device_time: Duration::ZERO,
            numerics_invalid: 0,
            drain_tokens_per_second: 0.0,
        };
        Self {
            clock,
            epoch: now,
            heartbeat: AtomicU64::new(0),
            status: Mutex::new(status),
            is_draining: AtomicBool::new(false),
            num_requests: AtomicUsize::new(0),
            counters: EngineCounters::default(),
        }
    }

    pub(super) fn now(&self) -> Instant {
        (self.clock)()
    }

    pub(super) fn beat(&self) {
        let since = u64::try_from(self.now().saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        self.heartbeat.store(since, Ordering::Relaxed);
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut EngineStatus)) {
        change(&mut self.status.lock());
    }

    pub(super) fn status(&self) -> EngineStatus {
        let heartbeat = self.epoch + Duration::from_nanos(self.heartbeat.load(Ordering::Relaxed));
        let numerics_invalid = self.counters.numerics_invalid.load(Ordering::Relaxed);
        EngineStatus { heartbeat, numerics_invalid, ..self.status.lock().clone() }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.status.lock().alive
    }

    /// A place among the `limit` requests that the engine holds at most.
    pub(super) fn take_slot(self: &Arc<Self>, limit: usize) -> Option<RequestSlot> {
        let taken = self.num_requests.fetch_add(1, Ordering::Relaxed);
        let slot = RequestSlot(Arc::clone(self));
        (taken < limit).then_some(slot)
    }
}

/// Given back when dropped.
pub(super) struct RequestSlot(Arc<Shared>);

impl Drop for RequestSlot {
    fn drop(&mut self) {
        self.0.num_requests.fetch_sub(1, Ordering::Relaxed);
    }
}
