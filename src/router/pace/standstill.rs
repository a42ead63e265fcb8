//! Measures how much of the time this process stands still: stopped by a signal, or frozen by its control group or virtual
//! machine. The engine's measurements miss that when all work fits in between. Pure: time is passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time between two looks at which the process runs.
const USUAL: Duration = Duration::from_millis(100);
/// A process that has not looked for longer than this has stood still.
const LEAST: Duration = Duration::from_millis(500);
const WINDOW: Duration = Duration::from_secs(5);
/// What this much time says is enough: on a busy machine, two short pauses may follow each other.
const LEAST_WINDOW: Duration = Duration::from_secs(3);

/// The other standstills together must be at least this fraction of the longest.
const REPEATED: f64 = 0.5;
/// From this factor on, the process stands still most of the time.
const MOSTLY: f64 = 2.0;

#[derive(Debug)]
pub(super) struct Standstills {
    looked_at: Option<Instant>,
    factor: f64,
    /// Beginning and end, the oldest first. At most `WINDOW / LEAST`, and one that began before the window.
    recent: VecDeque<(Instant, Instant)>,
}

impl Default for Standstills {
    fn default() -> Self {
        Self { looked_at: None, factor: 1.0, recent: VecDeque::new() }
    }
}

impl Standstills {
    /// How many times as long everything takes as if the process ran all the time. The longest standstill is left out, because
    /// a single pause is not slowness.
    pub(super) fn look(&mut self, now: Instant) -> f64 {
        self.factor = self.factor_at(now);
        self.factor
    }

    pub(super) fn is_mostly_still(&self) -> bool {
        self.factor >= MOSTLY
    }

    fn factor_at(&mut self, now: Instant) -> f64 {
        let before = self.looked_at.replace(now).unwrap_or(now);
        if now.saturating_duration_since(before) > LEAST {
            self.recent.push_back((before + USUAL, now));
        }
        while self.recent.front().is_some_and(|(_, end)| now.saturating_duration_since(*end) >= WINDOW) {
            self.recent.pop_front();
        }
        let Some((first, _)) = self.recent.front() else { return 1.0 };
        let ago = |time| now.checked_sub(time).unwrap_or(*first);
        let begin = (*first).clamp(ago(WINDOW), ago(LEAST_WINDOW));
        let times =
            || self.recent.iter().map(|(from, to)| to.saturating_duration_since(begin.max(*from)).as_secs_f64());
        let (longest, sum) = (times().fold(0.0, f64::max), times().sum::<f64>());
        // After a long pause, the rest of the process's work is often delayed once more.
        if sum - longest < longest * REPEATED {
            return 1.0;
        }
        let span = now.saturating_duration_since(begin).as_secs_f64() - longest;
        let runs = span + longest - sum;
        (span / runs.max(USUAL.as_secs_f64())).max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// Looks at each end of a standstill and every `TICK` in between, for so long. Returns the last result and the greatest.
    fn run(standstills: &mut Standstills, now: &mut Instant, time: Duration) -> (f64, f64) {
        let end = *now + time;
        let (mut last, mut greatest) = (1.0, 0.0_f64);
        while *now < end {
            *now += TICK;
            last = standstills.look(*now);
            greatest = greatest.max(last);
        }
        (last, greatest)
    }

    #[test]
    fn a_process_that_runs_a_sixteenth_of_the_time_takes_many_times_as_long_until_it_has_run_for_a_while() {
        let (mut standstills, mut now) = (Standstills::default(), Instant::now());
        assert_eq!(run(&mut standstills, &mut now, WINDOW).1, 1.0);
        let mut factors = Vec::new();
        for _ in 0..6 {
            now += Duration::from_millis(1500);
            factors.push(run(&mut standstills, &mut now, TICK).0);
        }
        assert_eq!(factors[0], 1.0, "one pause is no slowness");
        assert!(factors[1..].iter().all(|factor| (8.0..20.0).contains(factor)), "{factors:?}");
        assert!(run(&mut standstills, &mut now, Duration::from_secs(3)).0 < 2.0);
        assert_eq!(run(&mut standstills, &mut now, WINDOW).0, 1.0);
        assert!(standstills.recent.is_empty());
    }

    #[test]
    fn pauses_that_are_short_or_rare_hardly_count() {
        let (mut standstills, mut now) = (Standstills::default(), Instant::now());
        for _ in 0..20 {
            now += Duration::from_millis(400);
            assert_eq!(run(&mut standstills, &mut now, TICK).1, 1.0, "a busy machine");
        }
        for _ in 0..2 {
            now += Duration::from_secs(1);
            assert!(run(&mut standstills, &mut now, TICK).1 < 3.0, "a very busy one");
        }
        run(&mut standstills, &mut now, WINDOW);
        for _ in 0..5 {
            now += Duration::from_secs(1);
            assert!(run(&mut standstills, &mut now, Duration::from_secs(2)).1 < 2.0);
        }
        for hiccup in [600, 800, 1000] {
            now += Duration::from_secs(3);
            run(&mut standstills, &mut now, TICK);
            now += Duration::from_millis(hiccup);
            assert!(run(&mut standstills, &mut now, WINDOW).1 < MOSTLY, "a pause, and a hiccup after it");
        }
        now += Duration::from_secs(3600);
        assert_eq!(run(&mut standstills, &mut now, Duration::from_secs(10)).1, 1.0, "the machine slept");
    }
}
