//! Decides whether a stream of a slow replica should be raced: continued at a second replica while the first one goes on, using
//! whichever token comes first. The second replica must compute the whole prompt again, so the gain must be large. Pure.

use std::time::Duration;

/// Length of a typical reply in tokens, since a stream may end long before its limit.
const HORIZON: u32 = 100;
/// The rest must arrive this many times sooner, and by at least this time.
const TIMES_SOONER: f64 = 2.0;
const LEAST_GAIN: Duration = Duration::from_millis(200);
/// A prompt is computed at least this many times faster than the same tokens one by one.
const PREFILL_SPEEDUP: f64 = 8.0;

/// A stream, with its current and its possible replica.
#[derive(Clone, Copy, Debug)]
pub struct Race {
    /// Tokens until its limit.
    pub tokens_left: u32,
    /// Tokens of prompt and output that must be computed again.
    pub replay_tokens: usize,
    /// Time since it was opened at its current replica, if no token has come from there.
    pub waited: Option<Duration>,
    pub here: Speed,
    pub there: Speed,
}

#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Seconds per unit of work: a token of a short sequence, alone in its step.
    pub unit_seconds: f64,
    /// Seconds per token of a stream.
    pub token_seconds: f64,
    /// Tokens through the model per second, as reported; 0 until measured.
    pub tokens_per_second: f64,
}

impl Race {
    pub fn is_worth_it(&self) -> bool {
        let tokens = f64::from(self.tokens_left.min(HORIZON));
        let prefill_here = match self.waited {
            Some(waited) => (self.prefill(self.here) - waited.as_secs_f64()).max(self.here.token_seconds),
            None => 0.0,
        };
        let here = prefill_here + tokens * self.here.token_seconds;
        let there = self.prefill(self.there) + tokens * self.there.token_seconds;
        here >= TIMES_SOONER * there && here - there >= LEAST_GAIN.as_secs_f64()
    }

    fn prefill(&self, speed: Speed) -> f64 {
        self.replay_tokens as f64 / speed.tokens_per_second.max(PREFILL_SPEEDUP / speed.unit_seconds)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn speed(unit_seconds: f64) -> Speed {
        Speed { unit_seconds, token_seconds: unit_seconds * 2.0, tokens_per_second: 4.0 / unit_seconds }
    }

    const UNIT: f64 = 0.005;

    fn race() -> Race {
        Race { tokens_left: 100, replay_tokens: 200, waited: None, here: speed(20.0 * UNIT), there: speed(UNIT) }
    }

    #[test]
    fn a_stream_of_a_slow_replica_is_raced_unless_it_is_nearly_done() {
        assert!(race().is_worth_it());
        assert!(!Race { tokens_left: 1, ..race() }.is_worth_it(), "the last token comes sooner than the prompt again");
        assert!(Race { tokens_left: 10, replay_tokens: 20, ..race() }.is_worth_it());
        assert!(!Race { replay_tokens: 30_000, ..race() }.is_worth_it(), "too much would be computed again");
        assert!(!Race { here: speed(1.2 * UNIT), ..race() }.is_worth_it());
    }

    #[test]
    fn a_stream_that_waits_for_its_first_token_is_raced_while_most_of_its_prompt_is_to_be_computed() {
        let waited = |seconds| Some(Duration::from_secs_f64(seconds));
        let waiting = |seconds| Race { waited: waited(seconds), tokens_left: 2, replay_tokens: 1000, ..race() };
        assert!(waiting(1.0).is_worth_it(), "more than eleven seconds of prompt are left");
        assert!(!waiting(12.0).is_worth_it());
    }

    proptest! {
        /// A race that pays off still pays off if the other replica is faster or the current one slower.
        #[test]
        fn worth_grows_with_the_difference(
            tokens_left in 1u32..4096,
            replay_tokens in 1usize..8192,
            here in 1.0f64..40.0,
            there in 0.5f64..4.0,
            more in 1.0f64..10.0,
        ) {
            let race = Race { tokens_left, replay_tokens, waited: None, here: speed(here * UNIT), there: speed(there * UNIT) };
            prop_assert!(here > there || !race.is_worth_it(), "never to a replica that is no faster");
            if race.is_worth_it() {
                let slower = Race { here: speed(here * more * UNIT), ..race };
                let faster = Race { there: speed(there / more * UNIT), ..race };
                prop_assert!(slower.is_worth_it() && faster.is_worth_it());
            }
        }
    }
}
