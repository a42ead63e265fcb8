//! Measures how fast the queue empties: requests and prompt tokens that left it per second while it was not empty, over
//! about the last half minute of such time. Time is passed in.

use std::time::{Duration, Instant};

/// Time with a queue after which an observation's weight falls to 1/e.
const MEMORY: Duration = Duration::from_secs(30);
/// With less time than this, there is no measurement.
const MIN_BUSY: Duration = Duration::from_millis(500);
const MIN_REQUESTS: f64 = 4.0;

#[derive(Clone, Debug)]
pub struct DrainRate {
    last: Instant,
    /// Seconds with a queue, requests and tokens that left, each discounted by age.
    busy: f64,
    requests: f64,
    tokens: f64,
}

impl DrainRate {
    pub fn new(now: Instant) -> Self {
        Self { last: now, busy: 0.0, requests: 0.0, tokens: 0.0 }
    }

    /// Accounts for the time since the last call, during which the queue was either always empty or never empty.
    pub fn advance(&mut self, now: Instant, was_queued: bool) {
        let elapsed = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = self.last.max(now);
        if was_queued {
            let keep = libm::exp(-elapsed / MEMORY.as_secs_f64());
            self.busy = self.busy * keep + elapsed;
            self.requests *= keep;
            self.tokens *= keep;
        }
    }

    pub fn departed(&mut self, tokens: u64) {
        self.requests += 1.0;
        self.tokens += tokens as f64;
    }

    /// Estimates how long a queue of this length takes to empty, by requests and by tokens. `None` until measured.
    pub fn waits(&self, requests: u32, tokens: u64) -> Option<[Duration; 2]> {
        if self.busy < MIN_BUSY.as_secs_f64() || self.requests < MIN_REQUESTS {
            return None;
        }
        let by_requests = f64::from(requests) * self.busy / self.requests;
        let by_tokens = if self.tokens > 0.0 { tokens as f64 * self.busy / self.tokens } else { by_requests };
        Some([by_requests, by_tokens].map(seconds))
    }
}

/// A duration from seconds of any size, bounded by a day.
pub fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.clamp(0.0, 86_400.0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_departures_only_while_there_is_a_queue() {
        let mut now = Instant::now();
        let mut rate = DrainRate::new(now);
        assert_eq!(rate.waits(10, 10), None);
        for _ in 0..200 {
            now += Duration::from_millis(500);
            rate.advance(now, true);
            rate.departed(100);
            now += Duration::from_secs(20);
            rate.advance(now, false);
        }
        let [by_requests, by_tokens] = rate.waits(10, 1000).unwrap();
        assert!((by_requests.as_secs_f64() - 5.0).abs() < 0.1, "{by_requests:?}");
        assert!((by_tokens.as_secs_f64() - 5.0).abs() < 0.1, "{by_tokens:?}");
    }

    #[test]
    fn follows_a_change_and_a_standstill() {
        let mut now = Instant::now();
        let mut rate = DrainRate::new(now);
        let mut run = |rate: &mut DrainRate, step: Duration, count: u32| {
            for _ in 0..count {
                now += step;
                rate.advance(now, true);
                rate.departed(1);
            }
            now
        };
        run(&mut rate, Duration::from_millis(10), 6000);
        let now = run(&mut rate, Duration::from_secs(1), 120);
        let [slow, _] = rate.waits(1, 1).unwrap();
        assert!((0.3..1.1).contains(&slow.as_secs_f64()), "{slow:?}");
        rate.advance(now + Duration::from_secs(300), true);
        assert!(rate.waits(1, 1).is_none_or(|[wait, _]| wait > Duration::from_secs(10)));
    }
}
