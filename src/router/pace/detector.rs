//! Decides whether one replica is slow: after bad evidence for a while, until good evidence for a while. A replica that becomes
//! slow again soon after recovering must be good for longer. Pure: time is passed in.

use std::time::{Duration, Instant};

/// A replica is slow after bad evidence for this long.
const ENTRY_HOLD: Duration = Duration::from_millis(400);
/// Siblings must have been measured this long after the evidence became bad: what slows all of them at once, such as a
/// throttled machine, shows a little sooner in one than in another.
const SETTLING: Duration = Duration::from_millis(300);
/// It has recovered after good evidence for this long. The time doubles with each relapse, up to the limit.
const EXIT_HOLD: Duration = Duration::from_millis(500);
const MAX_EXIT_HOLD: Duration = Duration::from_secs(16);
/// Becoming slow again within this time after recovering is a relapse.
const RELAPSE: Duration = Duration::from_secs(60);
/// After this long without evidence, a slow replica gets another chance, and bad evidence is forgotten.
const SILENCE: Duration = Duration::from_secs(20);
/// A replica has recovered below this fraction of the factor above which it is slow.
const WELL: f64 = 0.5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    BecameSlow,
    Recovered,
}

/// How long the evidence must be bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryHold {
    /// No time: the replica itself has detected that it is slow, after waiting.
    None,
    Usual,
}

#[derive(Clone, Copy, Debug)]
enum State {
    AtPace { bad: Option<Bad> },
    Slow { since: Instant, good_since: Option<Instant>, heard: Instant },
}

/// Evidence that is bad.
#[derive(Clone, Copy, Debug)]
struct Bad {
    since: Instant,
    last: Instant,
}

#[derive(Clone, Debug)]
pub struct Detector {
    state: State,
    recovered_at: Option<Instant>,
    exit_hold: Duration,
}

impl Default for Detector {
    fn default() -> Self {
        Self { state: State::AtPace { bad: None }, recovered_at: None, exit_hold: EXIT_HOLD }
    }
}

impl Detector {
    /// `ratio`: how many times as long as its siblings it takes, if known. It is slow from `factor` on, if siblings measured
    /// since the given time, soon after it began to look slow, confirm that.
    pub fn observe(
        &mut self,
        ratio: Option<f64>,
        factor: f64,
        hold: EntryHold,
        confirmed: impl Fn(Instant) -> Option<f64>,
        now: Instant,
    ) -> Option<Change> {
        match &mut self.state {
            State::AtPace { bad } => {
                // Without evidence the time of bad evidence continues for a while, since a replica that hangs gives none.
                bad.take_if(|bad| now.saturating_duration_since(bad.last) >= SILENCE);
                let is_bad = ratio? >= factor;
                *bad = is_bad.then(|| Bad { since: bad.map_or(now, |bad| bad.since), last: now });
                let since = (*bad)?.since;
                let (hold, settling) = match hold {
                    EntryHold::None => (Duration::ZERO, Duration::ZERO),
                    EntryHold::Usual => (ENTRY_HOLD, SETTLING),
                };
                let is_long = now.saturating_duration_since(since) >= hold;
                (is_long && confirmed(since + settling)? >= factor).then(|| self.enter(now))
            }
            State::Slow { good_since, heard, .. } => {
                match ratio {
                    None if now.saturating_duration_since(*heard) >= SILENCE => return Some(self.leave(now)),
                    None => return None,
                    Some(ratio) if ratio > factor * WELL => *good_since = None,
                    Some(_) => _ = good_since.get_or_insert(now),
                }
                *heard = now;
                let is_well = good_since.is_some_and(|since| now.saturating_duration_since(since) >= self.exit_hold);
                is_well.then(|| self.leave(now))
            }
        }
    }

    pub fn slow_since(&self) -> Option<Instant> {
        match self.state {
            State::AtPace { .. } => None,
            State::Slow { since, .. } => Some(since),
        }
    }

    /// Whether the last evidence was bad, though not for long enough.
    pub fn is_suspicious(&self) -> bool {
        matches!(self.state, State::AtPace { bad: Some(_) })
    }

    fn enter(&mut self, now: Instant) -> Change {
        let is_relapse = self.recovered_at.is_some_and(|at| now.saturating_duration_since(at) < RELAPSE);
        self.exit_hold = if is_relapse { (self.exit_hold * 2).min(MAX_EXIT_HOLD) } else { EXIT_HOLD };
        self.state = State::Slow { since: now, good_since: None, heard: now };
        Change::BecameSlow
    }

    fn leave(&mut self, now: Instant) -> Change {
        self.recovered_at = Some(now);
        self.state = State::AtPace { bad: None };
        Change::Recovered
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FACTOR: f64 = 4.0;
    const TICK: Duration = Duration::from_millis(100);

    /// Gives the detector the same evidence for this long. Returns what changed, and when.
    fn show(detector: &mut Detector, now: &mut Instant, ratio: Option<f64>, time: Duration) -> Vec<(Change, Duration)> {
        let start = *now;
        let mut changes = Vec::new();
        while now.saturating_duration_since(start) < time {
            *now += TICK;
            let change = detector.observe(ratio, FACTOR, EntryHold::Usual, |_| ratio, *now);
            changes.extend(change.map(|change| (change, *now - start)));
        }
        changes
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn it_takes_a_while_of_bad_evidence_and_a_while_of_good() {
        let (mut detector, mut now) = (Detector::default(), Instant::now());
        assert_eq!(show(&mut detector, &mut now, Some(3.9), seconds(60.0)), []);
        assert_eq!(show(&mut detector, &mut now, Some(20.0), seconds(0.4)), []);
        assert!(detector.is_suspicious());
        assert_eq!(show(&mut detector, &mut now, Some(1.0), seconds(0.1)), []);
        assert!(!detector.is_suspicious(), "a moment is forgiven");
        let changes = show(&mut detector, &mut now, Some(20.0), seconds(5.0));
        assert_eq!(changes, [(Change::BecameSlow, ENTRY_HOLD + TICK)]);
        assert_eq!(show(&mut detector, &mut now, Some(2.1), seconds(60.0)), [], "between the marks nothing changes");
        let changes = show(&mut detector, &mut now, Some(2.0), seconds(5.0));
        assert_eq!(changes, [(Change::Recovered, EXIT_HOLD + TICK)]);
    }

    #[test]
    fn no_evidence_changes_nothing_for_a_while() {
        let (mut detector, mut now) = (Detector::default(), Instant::now());
        assert_eq!(show(&mut detector, &mut now, None, seconds(60.0)), []);
        show(&mut detector, &mut now, Some(20.0), seconds(0.3));
        assert_eq!(
            show(&mut detector, &mut now, None, seconds(1.5)),
            [],
            "it stands still, as it does again and again"
        );
        assert_eq!(show(&mut detector, &mut now, Some(20.0), TICK), [(Change::BecameSlow, TICK)]);
        let changes = show(&mut detector, &mut now, None, seconds(60.0));
        assert_eq!(changes, [(Change::Recovered, SILENCE)]);
        show(&mut detector, &mut now, Some(20.0), TICK);
        show(&mut detector, &mut now, None, SILENCE);
        assert_eq!(show(&mut detector, &mut now, Some(20.0), TICK), [], "the first bad evidence is forgotten");
    }

    #[test]
    fn who_relapses_has_to_be_well_for_longer() {
        let (mut detector, mut now) = (Detector::default(), Instant::now());
        let mut holds = Vec::new();
        for _ in 0..8 {
            show(&mut detector, &mut now, Some(20.0), seconds(1.0));
            let changes = show(&mut detector, &mut now, Some(1.0), seconds(20.0));
            holds.push((changes[0].1 - TICK).as_secs_f64());
        }
        assert_eq!(holds, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]);
        show(&mut detector, &mut now, Some(1.0), RELAPSE);
        show(&mut detector, &mut now, Some(20.0), seconds(1.0));
        assert_eq!(show(&mut detector, &mut now, Some(1.0), seconds(5.0)).len(), 1, "that was long ago");
    }

    #[test]
    fn siblings_must_have_been_measured_since_and_a_confession_needs_no_time() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        for tick in 0..20 {
            let old = detector.observe(Some(20.0), FACTOR, EntryHold::Usual, |_| None, start + TICK * tick);
            assert_eq!(old, None, "the siblings' evidence is older");
        }
        let since = |asked| (asked == start + SETTLING).then_some(20.0);
        let change = detector.observe(Some(20.0), FACTOR, EntryHold::Usual, since, start + TICK * 20);
        assert_eq!(change, Some(Change::BecameSlow));
        let mut confessing = Detector::default();
        let change = confessing.observe(Some(20.0), FACTOR, EntryHold::None, |_| Some(20.0), start);
        assert_eq!(change, Some(Change::BecameSlow));
    }

    proptest! {
        #[test]
        fn it_never_changes_faster_than_its_holds_and_alternates(
            evidence in prop::collection::vec(prop::option::of(0.1f64..40.0), 0..600)
        ) {
            let (mut detector, start) = (Detector::default(), Instant::now());
            let mut last: Option<(Change, Instant)> = None;
            for (tick, ratio) in evidence.into_iter().enumerate() {
                let now = start + TICK * tick as u32;
                let change = detector.observe(ratio, FACTOR, EntryHold::Usual, |_| ratio, now);
                let Some(change) = change else { continue };
                let (before, at) = last.unwrap_or((Change::Recovered, start));
                prop_assert_ne!(change, before);
                prop_assert!(now - at >= ENTRY_HOLD);
                prop_assert_eq!(detector.slow_since().is_some(), change == Change::BecameSlow);
                last = Some((change, now));
            }
        }
    }
}
