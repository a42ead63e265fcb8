//! What other threads can see of the engine thread: status, signs of life, unanswered work, counters.
//!
//! Unanswered work is counted by those who hand it over, never by the engine thread: a thread that hangs reports nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::counters::EngineCounters;
use super::pace_meter::PaceMeter;
use crate::types::{EngineStatus, Pace};

/// Tells the time: that of the system, or a simulated one.
pub type Clock = fn() -> Instant;

pub(super) struct StatusBoard {
    clock: Clock,
    epoch: Instant,
    /// Nanoseconds from `epoch` to the last sign of life.
    heartbeat: AtomicU64,
    /// Grows whenever work advances.
    progress: AtomicU64,
    /// Written after each step, held only to copy.
    status: Mutex<EngineStatus>,
    pub(super) is_draining: AtomicBool,
    /// Requests that hold a [`RequestSlot`].
    num_requests: AtomicUsize,
    /// Commands other than requests that were handed over and not obeyed yet.
    num_commands: AtomicUsize,
    pub(super) counters: EngineCounters,
    /// Written once or twice a step.
    pub(super) pace_meter: Mutex<PaceMeter>,
}

impl StatusBoard {
    pub(super) fn new(clock: Clock, kv_blocks_total: u32) -> Self {
        let now = clock();
        Self {
            clock,
            epoch: now,
            heartbeat: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            status: Mutex::new(EngineStatus::idle(now, kv_blocks_total)),
            is_draining: AtomicBool::new(false),
            num_requests: AtomicUsize::new(0),
            num_commands: AtomicUsize::new(0),
            counters: EngineCounters::default(),
            pace_meter: Mutex::new(PaceMeter::new(now)),
        }
    }

    pub(super) fn now(&self) -> Instant {
        (self.clock)()
    }

    /// The engine's thread runs, though it may have nothing to do.
    pub(super) fn beat(&self) {
        let since = u64::try_from(self.now().saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        self.heartbeat.store(since, Ordering::Relaxed);
    }

    /// Work has advanced: a command was obeyed, or a part of a step computed. Turns of the loop do not count.
    pub(super) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
        self.beat();
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut EngineStatus)) {
        change(&mut self.status.lock());
    }

    pub(super) fn status(&self) -> EngineStatus {
        let outstanding = self.num_requests.load(Ordering::Relaxed) + self.num_commands.load(Ordering::Relaxed);
        EngineStatus {
            heartbeat: self.epoch + Duration::from_nanos(self.heartbeat.load(Ordering::Relaxed)),
            progress: self.progress.load(Ordering::Relaxed),
            outstanding: outstanding as u64,
            numerics_invalid: self.counters.numerics_invalid.load(Ordering::Relaxed),
            ..self.status.lock().clone()
        }
    }

    pub(super) fn pace(&self) -> Option<Pace> {
        self.pace_meter.lock().pace(self.now())
    }

    pub(super) fn is_alive(&self) -> bool {
        self.status.lock().alive
    }

    /// A place among the `limit` requests that the engine holds at most. The request is owed until the slot is dropped.
    pub(super) fn take_slot(self: &Arc<Self>, limit: usize) -> Option<RequestSlot> {
        let taken = self.num_requests.fetch_add(1, Ordering::Relaxed);
        let slot = RequestSlot(Arc::clone(self));
        (taken < limit).then_some(slot)
    }

    /// Counts a command as owed until the token is dropped.
    pub(super) fn owe(self: &Arc<Self>) -> Owed {
        self.num_commands.fetch_add(1, Ordering::Relaxed);
        Owed(Arc::clone(self))
    }
}

/// Given back when dropped.
pub(super) struct RequestSlot(Arc<StatusBoard>);

impl Drop for RequestSlot {
    fn drop(&mut self) {
        self.0.num_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A command that is not obeyed yet.
pub(super) struct Owed(Arc<StatusBoard>);

impl Drop for Owed {
    fn drop(&mut self) {
        self.0.num_commands.fetch_sub(1, Ordering::Relaxed);
    }
}
