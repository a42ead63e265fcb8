//! Detects that the engine hangs, as opposed to being idle, running a long step, or the whole process being paused. Pure: time
//! is passed in.
//!
//! The amount of work is counted by those who hand it over, never by the thread that is watched. Only progress resets the
//! clock. A client that gives up, or an abandoned synthetic inference, does not.

use std::time::{Duration, Instant};

/// A longer gap between two observations counts as this long, since the whole process may have been paused.
const MAX_GAP: Duration = Duration::from_secs(2);

/// Should observe several times a second. With fewer observations it underestimates the stall.
#[derive(Clone, Debug, Default)]
pub struct StallWatch {
    last: Option<Observation>,
    stalled: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Observation {
    at: Instant,
    has_work: bool,
    progress: u64,
}

impl StallWatch {
    /// How long there has been work without progress; `None` if there is no work. `outstanding`: requests handed over and not
    /// answered. `progress` changes whenever any of them advances.
    pub fn observe(&mut self, outstanding: u64, progress: u64, now: Instant) -> Option<Duration> {
        let has_work = outstanding > 0;
        let last = self.last.replace(Observation { at: now, has_work, progress });
        self.stalled = match last {
            Some(last) if last.has_work && has_work && last.progress == progress => {
                self.stalled + now.saturating_duration_since(last.at).min(MAX_GAP)
            }
            _ => Duration::ZERO,
        };
        has_work.then_some(self.stalled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(500);

    struct Observed {
        watch: StallWatch,
        now: Instant,
    }

    impl Observed {
        fn new() -> Self {
            Self { watch: StallWatch::default(), now: Instant::now() }
        }

        /// Observes every half second; returns the last result.
        fn run(&mut self, ticks: u32, outstanding: u64, progress: impl Fn(u32) -> u64) -> Option<Duration> {
            let mut answer = None;
            for tick in 0..ticks {
                self.now += TICK;
                answer = self.watch.observe(outstanding, progress(tick), self.now);
            }
            answer
        }
    }

    #[test]
    fn an_idle_engine_does_not_stall_and_has_its_time_when_work_comes() {
        let mut observed = Observed::new();
        assert_eq!(observed.run(7200, 0, |_| 5), None);
        assert_eq!(observed.run(1, 1, |_| 5), Some(Duration::ZERO));
        assert_eq!(observed.run(20, 1, |_| 5), Some(TICK * 20));
    }

    #[test]
    fn a_long_prefill_advances_and_a_hang_does_not() {
        let mut observed = Observed::new();
        assert_eq!(observed.run(240, 1, u64::from), Some(Duration::ZERO));
        assert_eq!(observed.run(60, 1, |_| 239), Some(TICK * 60));
        assert_eq!(observed.run(1, 1, |_| 240), Some(Duration::ZERO), "it moves again");
    }

    #[test]
    fn only_progress_starts_the_clock_anew() {
        let mut observed = Observed::new();
        observed.run(1, 1, |_| 7);
        for outstanding in [2, 1, 900, 3] {
            observed.run(5, outstanding, |_| 7);
        }
        assert_eq!(observed.watch.stalled, TICK * 20, "who comes and who gives up does not matter");
    }

    #[test]
    fn a_pause_of_the_whole_process_is_not_a_hang() {
        let mut observed = Observed::new();
        observed.run(5, 1, |_| 7);
        observed.now += Duration::from_secs(600);
        assert_eq!(observed.run(1, 1, |_| 7), Some(TICK * 4 + MAX_GAP));
    }

    #[test]
    fn a_hang_shows_even_if_it_is_looked_at_seldom() {
        let (mut watch, mut now) = (StallWatch::default(), Instant::now());
        let mut looks = 0;
        while watch.observe(1, 7, now).is_none_or(|stalled| stalled < Duration::from_secs(30)) {
            now += Duration::from_secs(10);
            looks += 1;
        }
        assert_eq!(looks, 15);
    }
}
