//! Limits retries before the first token, so that a cluster in trouble is not overloaded by second attempts: a token bucket
//! filled by first attempts, and slowly by time. Continuations of running streams are not limited here. Pure; time and
//! randomness are passed in.

use std::time::{Duration, Instant};

/// Retries that a quiet node may make.
const FLOOR_PER_SECOND: f64 = 1.0;
/// Maximum saved retries; also the initial value.
const MAX_SAVED: f64 = 10.0;
/// Busy nodes may save more: this many seconds' worth of their traffic, up to this maximum.
const MAX_SAVED_BUSY: f64 = 100.0;

/// Waits before retries double from the first to the maximum.
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct RetryBudget {
    /// Retries per first attempt; 0 allows none.
    ratio: f64,
    saved: f64,
    filled_at: Instant,
}

impl RetryBudget {
    pub fn new(ratio: f64, now: Instant) -> Self {
        Self { ratio, saved: MAX_SAVED, filled_at: now }
    }

    /// A request makes its first attempt.
    pub fn first_attempt(&mut self) {
        self.saved = (self.saved + self.ratio).min(MAX_SAVED_BUSY);
    }

    /// Whether a request may make another attempt; if so, takes it from the budget.
    pub fn try_retry(&mut self, now: Instant) -> bool {
        self.fill(now);
        let may_retry = self.ratio > 0.0 && self.saved >= 1.0;
        if may_retry {
            self.saved -= 1.0;
        }
        may_retry
    }

    /// Time alone never saves more than a quiet node needs.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.filled_at = self.filled_at.max(now);
        let room = (MAX_SAVED - self.saved).max(0.0);
        self.saved += (elapsed * FLOOR_PER_SECOND).min(room);
    }
}

/// How long to wait before the `retry`-th retry, counted from 0. `random` gives the jitter.
pub fn backoff(retry: u32, random: u64) -> Duration {
    let doubled = FIRST_BACKOFF.saturating_mul(1 << retry.min(16)).min(MAX_BACKOFF);
    jittered(doubled, random)
}

/// Half of `longest` to all of it, so that requests that failed together do not retry together.
pub fn jittered(longest: Duration, random: u64) -> Duration {
    longest.mul_f64(0.5 + 0.5 * unit(random))
}

/// A number in [0, 1), from the upper bits.
pub fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn retries_are_a_fraction_of_traffic() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(0.2, now);
        while budget.try_retry(now) {}
        let mut retries = 0;
        for _ in 0..1000 {
            budget.first_attempt();
            retries += u32::from(budget.try_retry(now));
        }
        assert!((199..=200).contains(&retries), "{retries}");
    }

    #[test]
    fn a_quiet_node_regains_a_few_and_no_more() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(0.2, start);
        let spend = |budget: &mut RetryBudget, now| {
            std::iter::repeat_with(|| budget.try_retry(now)).take_while(|ok| *ok).count()
        };
        assert_eq!(spend(&mut budget, start), 10);
        assert_eq!(spend(&mut budget, start + Duration::from_millis(900)), 0);
        assert_eq!(spend(&mut budget, start + Duration::from_secs(3)), 3);
        assert_eq!(spend(&mut budget, start + Duration::from_secs(3600)), 10);
        assert_eq!(spend(&mut budget, start), 0, "a clock that goes back gives nothing");
    }

    #[test]
    fn zero_turns_retries_off() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(0.0, start);
        assert!(!budget.try_retry(start + Duration::from_secs(100)));
    }

    #[test]
    fn what_traffic_saves_is_capped() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(1.0, now);
        (0..10_000).for_each(|_| budget.first_attempt());
        let spent =
            std::iter::repeat_with(|| budget.try_retry(now + Duration::from_secs(60))).take_while(|ok| *ok).count();
        assert_eq!(spent, MAX_SAVED_BUSY as usize);
    }

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let longest = |retry| backoff(retry, u64::MAX);
        assert!(longest(0) <= FIRST_BACKOFF && longest(0) > FIRST_BACKOFF / 2);
        assert!(longest(3) > FIRST_BACKOFF * 7 && longest(3) <= FIRST_BACKOFF * 8);
        assert!(longest(40) <= MAX_BACKOFF && backoff(u32::MAX, 0) == MAX_BACKOFF / 2);
    }

    proptest! {
        #[test]
        fn no_more_retries_than_ratio_and_floor_allow(ratio in 0.01f64..2.0, steps in prop::collection::vec((0u64..400, any::<bool>()), 1..300)) {
            let start = Instant::now();
            let mut now = start;
            let mut budget = RetryBudget::new(ratio, start);
            let (mut attempts, mut retries) = (0.0, 0.0);
            for (millis, is_first) in steps {
                now += Duration::from_millis(millis);
                match is_first {
                    true => { budget.first_attempt(); attempts += 1.0; }
                    false => retries += f64::from(u8::from(budget.try_retry(now))),
                }
                let elapsed = (now - start).as_secs_f64();
                prop_assert!(retries <= MAX_SAVED + attempts * ratio + elapsed * FLOOR_PER_SECOND + 1e-6);
            }
        }
    }
}
