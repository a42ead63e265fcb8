//! Tells a hang from idleness, from a long step and from a pause of the whole process. Pure: time is passed in.

use std::time::{Duration, Instant};

/// A longer gap between two observations means that the whole process stood still, and says nothing of the engine.
const MAX_GAP: Duration = Duration::from_secs(2);

/// Must be told often (at most a second apart) for its answers to mean anything.
#[derive(Clone, Debug, Default)]
pub struct EngineWatch {
    last_observed: Option<Instant>,
    /// Since when every observation has seen work.
    work_since: Option<Instant>,
}

impl EngineWatch {
    /// How long the engine has had work and made no progress; `None` when it has no work. An engine that was idle for an
    /// hour has an old heartbeat and is given its time from the moment that work is seen.
    pub fn observe(&mut self, has_work: bool, heartbeat: Instant, now: Instant) -> Option<Duration> {
        let gap = self.last_observed.is_some_and(|last| now.saturating_duration_since(last) > MAX_GAP);
        self.last_observed = Some(now);
        if gap || !has_work {
            self.work_since = None;
        }
        if !has_work {
            return None;
        }
        let since = *self.work_since.get_or_insert(now);
        Some(now.saturating_duration_since(since.max(heartbeat)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(500);

    /// Observes every half second; returns the last answer.
    fn run(
        watch: &mut EngineWatch,
        now: &mut Instant,
        ticks: u32,
        work: bool,
        beat: impl Fn(Instant) -> Instant,
    ) -> Option<Duration> {
        let mut answer = None;
        for _ in 0..ticks {
            *now += TICK;
            answer = watch.observe(work, beat(*now), *now);
        }
        answer
    }

    #[test]
    fn an_idle_engine_does_not_stall_and_has_its_time_when_work_comes() {
        let (mut watch, start) = (EngineWatch::default(), Instant::now());
        let mut now = start;
        assert_eq!(run(&mut watch, &mut now, 7200, false, |_| start), None);
        assert_eq!(run(&mut watch, &mut now, 1, true, |_| start), Some(Duration::ZERO));
        assert_eq!(run(&mut watch, &mut now, 20, true, |_| start), Some(TICK * 20));
    }

    #[test]
    fn a_long_prefill_beats_and_a_hang_does_not() {
        let (mut watch, start) = (EngineWatch::default(), Instant::now());
        let mut now = start;
        let beating = run(&mut watch, &mut now, 240, true, |now| now - Duration::from_millis(200));
        assert_eq!(beating, Some(Duration::from_millis(200)));
        let last_beat = now;
        assert_eq!(run(&mut watch, &mut now, 60, true, |_| last_beat), Some(TICK * 60));
    }

    #[test]
    fn a_pause_of_the_whole_process_is_not_a_hang() {
        let (mut watch, start) = (EngineWatch::default(), Instant::now());
        let mut now = start;
        run(&mut watch, &mut now, 4, true, |now| now);
        let last_beat = now;
        now += Duration::from_secs(600);
        assert_eq!(run(&mut watch, &mut now, 1, true, |_| last_beat), Some(Duration::ZERO));
        assert_eq!(run(&mut watch, &mut now, 4, true, |_| last_beat), Some(TICK * 4));
    }
}
