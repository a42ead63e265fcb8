//! A circuit breaker for each peer: stops requests to a peer that has just failed, and lets single probes find out whether it
//! has recovered. The reaction depends on what the kind of failure teaches. Pure; time and jitter are passed in.
//!
//! It supplements gossip: it reacts at once to what a report shows a second later.

use std::time::{Duration, Instant};

use super::retry_budget::jittered;
use crate::types::FailureKind;
use crate::types::reaction::Lesson;

/// Waiting times of an open breaker: the first one, and the limit of its doubling.
const UNREACHABLE: Backoff = Backoff { first: Duration::from_millis(250), most: Duration::from_secs(10) };
const BROKEN: Backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(10) };
/// Wrong numbers are worse than no answer, and rarely go away by themselves.
const WRONG_NUMBERS: Backoff = Backoff { first: Duration::from_secs(60), most: Duration::from_secs(600) };
/// A full queue changes within a moment.
const BUSY: Duration = Duration::from_millis(200);

/// Consecutive failures that put the peer in doubt and open the breaker.
const MAX_DOUBTS: u32 = 3;
/// A probe without an outcome for this long is abandoned, and another may start.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
/// After being closed for this long, a breaker starts again with the first waiting time.
const STEADY: Duration = Duration::from_secs(60);

/// Each out-of-memory failure halves the weight, down to this minimum.
const LEAST_WEIGHT: f64 = 1.0 / 16.0;
/// The missing weight is halved in this time, and shrinks by an eighth with each success.
const WEIGHT_HALF_LIFE: Duration = Duration::from_secs(10);
const KEPT_AT_SUCCESS: f64 = 7.0 / 8.0;

#[derive(Clone, Copy, Debug)]
struct Backoff {
    first: Duration,
    most: Duration,
}

impl Backoff {
    fn after(self, trips: u32) -> Duration {
        self.first.saturating_mul(1 << trips.min(16)).min(self.most)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    Open,
    HalfOpen,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Closed { since: Instant },
    Open { until: Instant },
    HalfOpen { probe: Option<Probe> },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Probe {
    number: u64,
    started: Instant,
}

/// Given to one call, to report its outcome. May be dropped without a report; a probe is then abandoned after a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    incarnation: u64,
    number: u64,
}

#[derive(Clone, Debug)]
pub struct Breaker {
    /// The incarnation of the peer when it was last seen.
    incarnation: u64,
    state: State,
    /// How often the breaker has opened since it was last steady.
    trips: u32,
    doubts_in_a_row: u32,
    /// It was opened because of wrong numbers, and there was no success since.
    has_lied: bool,
    /// No new request before this time, although the breaker is closed.
    busy_until: Option<Instant>,
    /// The part of the weight lost to memory failures, 0 to 1 - `LEAST_WEIGHT`, and the time of the last one.
    lack: f64,
    lack_at: Instant,
    attempts: u64,
}

impl Breaker {
    pub fn new(incarnation: u64, now: Instant) -> Self {
        Self {
            incarnation,
            state: State::Closed { since: now },
            trips: 0,
            doubts_in_a_row: 0,
            has_lied: false,
            busy_until: None,
            lack: 0.0,
            lack_at: now,
            attempts: 0,
        }
    }

    /// Notes the peer's current incarnation. A new process starts with a clean record; outcomes of calls to the previous one
    /// are ignored.
    pub fn see(&mut self, incarnation: u64, now: Instant) {
        if incarnation != self.incarnation {
            *self = Self { attempts: self.attempts, ..Self::new(incarnation, now) };
        }
    }

    /// Whether a call may be made now.
    pub fn allows(&self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => self.busy_until.is_none_or(|until| until <= now),
            State::Open { until } => until <= now,
            State::HalfOpen { probe: None } => true,
            State::HalfOpen { probe: Some(probe) } => probe.started + PROBE_PATIENCE <= now,
        }
    }

    /// The fraction of its normal share that the peer should get, above 0 and at most 1.
    pub fn weight(&self, now: Instant) -> f64 {
        1.0 - self.lack_now(now)
    }

    /// Whether the peer may be called if there is no other, although the breaker is open.
    pub fn is_trusted(&self) -> bool {
        !self.has_lied
    }

    pub fn state(&self, now: Instant) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { until } if until > now => BreakerState::Open,
            State::Open { .. } | State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Begins a call, if one is allowed. After an opening, only one call is allowed until its outcome is known.
    pub fn begin(&mut self, now: Instant) -> Option<Attempt> {
        if !self.allows(now) {
            return None;
        }
        self.attempts += 1;
        if !matches!(self.state, State::Closed { .. }) {
            self.state = State::HalfOpen { probe: Some(Probe { number: self.attempts, started: now }) };
        }
        Some(Attempt { incarnation: self.incarnation, number: self.attempts })
    }

    /// The call succeeded: its first event is enough.
    pub fn succeeded(&mut self, attempt: Attempt, now: Instant) {
        if attempt.incarnation != self.incarnation {
            return;
        }
        match self.state {
            State::HalfOpen { probe: Some(probe) } if probe.number == attempt.number => {
                self.state = State::Closed { since: now };
                self.has_lied = false;
            }
            // A success of a call that began before the failure does not close the breaker.
            State::Open { .. } | State::HalfOpen { .. } => return,
            State::Closed { since } if now.saturating_duration_since(since) >= STEADY => self.trips = 0,
            State::Closed { .. } => {}
        }
        self.doubts_in_a_row = 0;
        self.lack = self.lack_now(now) * KEPT_AT_SUCCESS;
        self.lack_at = now;
    }

    /// A call has failed. `random` jitters the wait.
    pub fn failed(&mut self, attempt: Attempt, kind: FailureKind, now: Instant, random: u64) {
        if attempt.incarnation != self.incarnation {
            return;
        }
        match kind.reaction().lesson {
            Lesson::Nothing => self.end_probe(attempt),
            Lesson::Busy => {
                self.busy_until = Some(now + jittered(BUSY, random));
                self.answered(attempt, now);
            }
            Lesson::ShortOfMemory => {
                self.lack = (1.0 - (1.0 - self.lack_now(now)) / 2.0).min(1.0 - LEAST_WEIGHT);
                self.lack_at = now;
                self.answered(attempt, now);
            }
            Lesson::WrongNumbers => {
                self.has_lied = true;
                self.open(attempt, WRONG_NUMBERS, now, random);
            }
            Lesson::Broken | Lesson::Silent => self.open(attempt, BROKEN, now, random),
            Lesson::Unreachable => self.open(attempt, UNREACHABLE, now, random),
            Lesson::Doubt => {
                self.doubts_in_a_row += 1;
                if self.doubts_in_a_row >= MAX_DOUBTS || self.is_probe(attempt) {
                    self.open(attempt, BROKEN, now, random);
                }
            }
        }
    }

    /// The call has ended without an outcome. If it was a probe, the next call is one.
    pub fn abandoned(&mut self, attempt: Attempt) {
        if attempt.incarnation == self.incarnation {
            self.end_probe(attempt);
        }
    }

    /// Opens the breaker, unless the call began before the failure that opened it: a hundred streams that break together are
    /// one failure.
    fn open(&mut self, attempt: Attempt, backoff: Backoff, now: Instant, random: u64) {
        let wait = jittered(backoff.after(self.trips), random);
        match self.state {
            State::Open { until } => self.state = State::Open { until: until.max(now + backoff.first) },
            State::HalfOpen { .. } if !self.is_probe(attempt) => {}
            State::Closed { .. } | State::HalfOpen { .. } => {
                self.state = State::Open { until: now + wait };
                self.trips = self.trips.saturating_add(1);
            }
        }
        self.doubts_in_a_row = 0;
    }

    /// The peer is alive and answered, although it did not serve the request.
    fn answered(&mut self, attempt: Attempt, now: Instant) {
        if self.is_probe(attempt) {
            self.state = State::Closed { since: now };
        }
    }

    /// The outcome tells nothing, so the next call is another probe.
    fn end_probe(&mut self, attempt: Attempt) {
        if self.is_probe(attempt) {
            self.state = State::HalfOpen { probe: None };
        }
    }

    fn is_probe(&self, attempt: Attempt) -> bool {
        matches!(self.state, State::HalfOpen { probe: Some(probe) } if probe.number == attempt.number)
    }

    fn lack_now(&self, now: Instant) -> f64 {
        let half_lives = now.saturating_duration_since(self.lack_at).as_secs_f64() / WEIGHT_HALF_LIFE.as_secs_f64();
        self.lack * libm::exp2(-half_lives)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The random value that gives the longest wait.
    const LATEST: u64 = u64::MAX;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn fail(breaker: &mut Breaker, kind: FailureKind, now: Instant) {
        let attempt = breaker.begin(now).expect("a call may be made");
        breaker.failed(attempt, kind, now, LATEST);
    }

    /// For how long no call is allowed.
    fn closed_for(breaker: &Breaker, now: Instant) -> Duration {
        let millis = (0..1_000_000).find(|&millis| breaker.allows(now + Duration::from_millis(millis)));
        Duration::from_millis(millis.expect("it opens some day"))
    }

    #[test]
    fn each_kind_of_failure_has_its_own_consequence() {
        let now = Instant::now();
        for kind in FailureKind::ALL {
            let mut breaker = Breaker::new(1, now);
            fail(&mut breaker, kind, now);
            let lesson = kind.reaction().lesson;
            let (state, wait) = match lesson {
                Lesson::Nothing | Lesson::ShortOfMemory | Lesson::Doubt => (BreakerState::Closed, Duration::ZERO),
                Lesson::Busy => (BreakerState::Closed, BUSY),
                Lesson::WrongNumbers => (BreakerState::Open, WRONG_NUMBERS.first),
                Lesson::Unreachable => (BreakerState::Open, UNREACHABLE.first),
                Lesson::Broken | Lesson::Silent => (BreakerState::Open, BROKEN.first),
            };
            assert_eq!((breaker.state(now), closed_for(&breaker, now)), (state, wait), "{kind:?}");
            assert_eq!(breaker.is_trusted(), lesson != Lesson::WrongNumbers, "{kind:?}");
            assert_eq!(breaker.weight(now), if lesson == Lesson::ShortOfMemory { 0.5 } else { 1.0 }, "{kind:?}");
        }
    }

    #[test]
    fn one_probe_at_a_time_decides() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        fail(&mut breaker, FailureKind::PeerStalled, now);
        assert!(breaker.begin(now).is_none());
        let later = now + BROKEN.first;
        let probe = breaker.begin(later).expect("the probe");
        assert_eq!(breaker.state(later), BreakerState::HalfOpen);
        assert!(breaker.begin(later).is_none(), "one at a time");
        breaker.succeeded(probe, later);
        assert_eq!(breaker.state(later), BreakerState::Closed);
        assert!(breaker.allows(later));
    }

    #[test]
    fn a_probe_that_says_nothing_or_is_lost_makes_room_for_another() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        fail(&mut breaker, FailureKind::PeerStalled, now);
        let later = now + BROKEN.first;
        let probe = breaker.begin(later).expect("the probe");
        breaker.failed(probe, FailureKind::DeadlineExceeded, later, LATEST);
        assert_eq!(breaker.state(later), BreakerState::HalfOpen);
        let probe = breaker.begin(later).expect("another probe");
        breaker.abandoned(probe);
        breaker.begin(later).expect("another probe, which gets lost");
        assert!(!breaker.allows(later + PROBE_PATIENCE - seconds(0.001)));
        assert!(breaker.allows(later + PROBE_PATIENCE));
    }

    #[test]
    fn waits_double_up_to_the_cap_and_start_again_after_a_steady_time() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        let mut waits = Vec::new();
        for _ in 0..8 {
            fail(&mut breaker, FailureKind::PeerUnreachable, now);
            let wait = closed_for(&breaker, now);
            waits.push(wait.as_millis());
            now += wait;
        }
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        let probe = breaker.begin(now).expect("the probe");
        breaker.succeeded(probe, now);
        let attempt = breaker.begin(now).expect("closed");
        now += STEADY;
        breaker.succeeded(attempt, now);
        fail(&mut breaker, FailureKind::PeerUnreachable, now);
        assert_eq!(closed_for(&breaker, now).as_millis(), 250);
    }

    #[test]
    fn streams_that_break_together_are_one_failure() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        let attempts: Vec<Attempt> = (0..100).map(|_| breaker.begin(now).expect("closed")).collect();
        attempts.iter().for_each(|&attempt| breaker.failed(attempt, FailureKind::PeerDisconnected, now, LATEST));
        assert_eq!(closed_for(&breaker, now), BROKEN.first);
        breaker.succeeded(attempts[0], now);
        assert_eq!(breaker.state(now), BreakerState::Open, "an old call's success proves nothing");
    }

    #[test]
    fn internal_failures_open_only_in_a_row() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        fail(&mut breaker, FailureKind::Internal, now);
        fail(&mut breaker, FailureKind::Internal, now);
        let attempt = breaker.begin(now).expect("closed");
        breaker.succeeded(attempt, now);
        fail(&mut breaker, FailureKind::Internal, now);
        fail(&mut breaker, FailureKind::Internal, now);
        assert!(breaker.allows(now));
        fail(&mut breaker, FailureKind::Internal, now);
        assert!(!breaker.allows(now));
    }

    #[test]
    fn memory_takes_weight_and_time_and_success_give_it_back() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        (0..20).for_each(|_| fail(&mut breaker, FailureKind::OutOfMemory, now));
        assert_eq!(breaker.weight(now), LEAST_WEIGHT);
        assert!(breaker.allows(now), "less is not nothing");
        let after_time = breaker.weight(now + WEIGHT_HALF_LIFE);
        assert!((after_time - (1.0 + LEAST_WEIGHT) / 2.0).abs() < 1e-9);
        let attempt = breaker.begin(now).expect("closed");
        breaker.succeeded(attempt, now);
        assert!(breaker.weight(now) > LEAST_WEIGHT + 0.1);
    }

    #[test]
    fn another_process_of_the_name_starts_clean() {
        let now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        let old = breaker.begin(now).expect("closed");
        fail(&mut breaker, FailureKind::NumericsInvalid, now);
        breaker.see(1, now);
        assert!(!breaker.allows(now));
        breaker.see(2, now);
        assert!(breaker.allows(now));
        breaker.failed(old, FailureKind::PeerDisconnected, now, LATEST);
        assert!(breaker.allows(now), "that was the process before");
    }

    proptest! {
        #[test]
        fn it_always_opens_up_again_and_never_lets_two_probes_run(
            steps in prop::collection::vec((0u64..3000, 0usize..16, any::<u64>()), 1..200)
        ) {
            let mut now = Instant::now();
            let mut breaker = Breaker::new(1, now);
            let mut calls: Vec<Attempt> = Vec::new();
            for (millis, outcome, random) in steps {
                now += Duration::from_millis(millis);
                let was_closed = breaker.state(now) == BreakerState::Closed;
                if let Some(attempt) = breaker.begin(now) {
                    calls.push(attempt);
                    if !was_closed {
                        prop_assert!(breaker.begin(now).is_none(), "two probes");
                    }
                }
                if !calls.is_empty() {
                    let attempt = calls.swap_remove(random as usize % calls.len());
                    match FailureKind::ALL.get(outcome) {
                        Some(&kind) => breaker.failed(attempt, kind, now, random),
                        None => breaker.succeeded(attempt, now),
                    }
                }
                prop_assert!((LEAST_WEIGHT..=1.0).contains(&breaker.weight(now)));
                prop_assert!(breaker.allows(now + WRONG_NUMBERS.most + PROBE_PATIENCE));
            }
        }
    }
}
