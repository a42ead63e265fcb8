//! Measures the tokens per second of a busy engine, as a decaying average. Pure; time is passed in.

use std::time::Duration;

/// Busy time after which the weight of a measurement falls to 1/e.
const MEMORY: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct DrainMeter {
    tokens: f64,
    seconds: f64,
}

impl DrainMeter {
    #[expect(clippy::disallowed_methods, reason = "an estimate; no token depends on it")]
    pub(super) fn record(&mut self, tokens: usize, took: Duration) {
        let keep = (-took.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        self.tokens = self.tokens * keep + tokens as f64;
        self.seconds = self.seconds * keep + took.as_secs_f64();
    }

    /// 0 until something was measured.
    pub(super) fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_a_change_within_a_few_memories() {
        let mut meter = DrainMeter::default();
        assert_eq!(meter.tokens_per_second(), 0.0);
        for _ in 0..100 {
            meter.record(10, Duration::from_millis(100));
        }
        assert!((meter.tokens_per_second() - 100.0).abs() < 1e-6);
        for _ in 0..250 {
            meter.record(100, Duration::from_millis(100));
        }
        assert!(meter.tokens_per_second() > 990.0, "{}", meter.tokens_per_second());
    }
}
