//! Compares replicas with the same fingerprint: what each reports about its pace, what this node's streams observe, and what
//! its siblings do at the same time. A replica is slow if equal work takes it several times as long as most others; if all are
//! equally slow, none is. Pure: time is passed in.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::detector::{Change, Detector, EntryHold};
use super::progress::{ProgressWindow, StreamProgress};
use crate::router::source::Replica;
use crate::types::Fingerprint;

/// Older measurements are not used.
const FRESH: Duration = Duration::from_secs(3);
/// A process that stands still uses measurements of others up to this age.
const FRESH_FOR_STOPPED: Duration = Duration::from_secs(20);
/// An idle node measures itself again if its last measurement is older than this and some replica's pace is in doubt.
const STALE: Duration = Duration::from_secs(1);
/// An old and a new measurement that differ by this factor are in doubt.
const DOUBT: f64 = 2.0;
/// If streams advance this many times more slowly than their replica reports, its report is late or wrong, or the connection is
/// bad.
const DISBELIEF: f64 = 2.5;
/// An older report is not compared with what streams observe.
const BELIEVED: Duration = Duration::from_secs(2);

/// The input of the board for one replica.
pub struct Sight<'a> {
    pub replica: Replica,
    pub fingerprint: &'a Fingerprint,
    pub reported: Option<Reported>,
    /// What this node's streams observe; none for this node's own engine, which is measured directly.
    pub progress: Option<&'a StreamProgress>,
}

/// What a replica reports about its pace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reported {
    /// Seconds per unit of work.
    pub unit_seconds: f64,
    /// Seconds per token of a stream; 0 if not reported.
    pub token_seconds: f64,
    pub measured_at: Instant,
    pub reported_at: Instant,
    /// Sequences wait there: for a seat, or because they were preempted.
    pub has_queue: bool,
    /// It has itself detected that it is slow.
    pub confesses: bool,
    /// The pace includes standstills of the process. A process that stands still hears little from others, so it is compared
    /// with what they said some time ago.
    pub stands_still: bool,
}

/// The result for one replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplicaPace {
    /// Seconds per unit of work, from its report and from observation.
    pub unit_seconds: f64,
    /// Seconds per token of a stream there.
    pub token_seconds: f64,
    /// How many times more slowly streams advance than it reports; 1 if they do not.
    pub disbelief: f64,
    /// Seconds per unit of work at most siblings, if known.
    pub sibling_seconds: Option<f64>,
    pub is_fresh: bool,
    pub slow_since: Option<Instant>,
}

#[derive(Default)]
struct Entry {
    detector: Detector,
    window: ProgressWindow,
}

/// The result of one comparison.
#[derive(Debug, Default, PartialEq)]
pub struct Findings {
    pub paces: BTreeMap<Replica, ReplicaPace>,
    pub changes: Vec<(Replica, Change)>,
    /// Whether this node should measure itself now, because a pace is in doubt and its own measurement is old.
    pub wants_probe: bool,
}

#[derive(Default)]
pub struct PaceBoard {
    entries: BTreeMap<Replica, Entry>,
}

impl ReplicaPace {
    /// How many times as long as its siblings it takes.
    pub fn ratio(&self) -> Option<f64> {
        self.sibling_seconds.map(|siblings| self.unit_seconds / siblings)
    }

    /// An explanation for people.
    pub fn explain(&self) -> String {
        let (unit, disbelief) = (self.unit_seconds, self.disbelief);
        let compared = match self.sibling_seconds {
            Some(siblings) => format!(
                "equal work takes {:.1} times as long as at other replicas ({:.1} ms instead of {:.1} ms)",
                unit / siblings,
                unit * 1e3,
                siblings * 1e3
            ),
            None => format!("a unit of work takes {:.1} ms; no other replica was measured lately", unit * 1e3),
        };
        match disbelief > 1.0 {
            true => format!("{compared}; its streams advance {disbelief:.1} times more slowly than it reports"),
            false => compared,
        }
    }
}

impl PaceBoard {
    /// Compares all live replicas. `factor`: a replica is slow if it takes this many times as long as its siblings; 0 means
    /// never.
    pub fn look(&mut self, sights: &[Sight<'_>], factor: f64, now: Instant) -> Findings {
        self.entries.retain(|replica, _| sights.iter().any(|sight| sight.replica == *replica));
        let disbeliefs = self.disbeliefs(sights, now);
        let mut findings = Findings::default();
        for (sight, &disbelief) in sights.iter().zip(&disbeliefs) {
            let Some(reported) = sight.reported else { continue };
            let pace = ReplicaPace {
                unit_seconds: reported.unit_seconds * disbelief,
                token_seconds: reported.token_seconds.max(reported.unit_seconds) * disbelief,
                disbelief,
                sibling_seconds: None,
                is_fresh: is_fresh(&reported, now),
                slow_since: None,
            };
            findings.paces.insert(sight.replica.clone(), pace);
        }
        let limit = if factor > 0.0 { factor } else { f64::INFINITY };
        for sight in sights {
            let (Some(reported), Some(pace)) = (sight.reported, findings.paces.get(&sight.replica).copied()) else {
                continue;
            };
            let limit_of_age = if reported.stands_still { FRESH_FOR_STOPPED } else { FRESH };
            let fresh_since = now.checked_sub(limit_of_age).unwrap_or(now);
            let compare = |since: Instant| {
                let since = if reported.stands_still { fresh_since } else { since.max(fresh_since) };
                Some(pace.unit_seconds / siblings(sight, sights, &findings.paces, since)?)
            };
            let ratio = compare(fresh_since).filter(|_| pace.is_fresh);
            let is_sure = reported.confesses || reported.stands_still;
            let hold = if is_sure { EntryHold::None } else { EntryHold::Usual };
            let entry = self.entries.entry(sight.replica.clone()).or_default();
            let change = entry.detector.observe(ratio, limit, hold, compare, now);
            let siblings = siblings(sight, sights, &findings.paces, fresh_since);
            let pace = findings.paces.get_mut(&sight.replica).expect("just seen");
            pace.sibling_seconds = siblings;
            findings.changes.extend(change.map(|change| (sight.replica.clone(), change)));
            pace.slow_since = entry.detector.slow_since();
        }
        findings.wants_probe = factor > 0.0 && self.wants_probe(sights, now);
        findings
    }

    /// How many times more slowly streams advance at each replica than it reports, as far as the replica is the cause. If all
    /// seem to lag, it is this node that reads slowly.
    fn disbeliefs(&mut self, sights: &[Sight<'_>], now: Instant) -> Vec<f64> {
        let mut seen = Vec::with_capacity(sights.len());
        for sight in sights {
            let window = &mut self.entries.entry(sight.replica.clone()).or_default().window;
            if let Some(progress) = sight.progress {
                if let Some(reported) = sight.reported.filter(|reported| reported.has_queue) {
                    progress.queue_seen(reported.reported_at);
                }
                window.look(progress, now);
            }
            let of_report = |reported: Reported| {
                let is_young = now.saturating_duration_since(reported.reported_at) < BELIEVED;
                let said = reported.token_seconds.max(reported.unit_seconds);
                window.token_seconds().filter(|_| is_young && said > 0.0).map(|seen| seen / said)
            };
            seen.push(sight.reported.and_then(of_report));
        }
        let here_is_slow = self
            .entries
            .get(&Replica::Here)
            .is_some_and(|here| here.detector.slow_since().is_some() || here.detector.is_suspicious());
        let of = |index: usize| {
            let others = seen.iter().enumerate().filter(|(other, _)| *other != index);
            let usual = others.filter_map(|(_, lag)| *lag).min_by(f64::total_cmp).unwrap_or(1.0).max(1.0);
            let lag = seen[index].unwrap_or(1.0) / usual;
            if lag >= DISBELIEF && !here_is_slow { lag } else { 1.0 }
        };
        (0..sights.len()).map(of).collect()
    }

    fn wants_probe(&self, sights: &[Sight<'_>], now: Instant) -> bool {
        let Some(here) = sights.iter().find(|sight| sight.replica == Replica::Here) else { return false };
        let Some(own) = here.reported else { return false };
        if now.saturating_duration_since(own.measured_at) < STALE {
            return false;
        }
        let siblings = || sights.iter().filter(|sight| sight.fingerprint == here.fingerprint);
        let is_in_doubt = |sight: &Sight<'_>| {
            let detector = self.entries.get(&sight.replica).map(|entry| &entry.detector);
            detector.is_some_and(|detector| detector.is_suspicious() || detector.slow_since().is_some())
        };
        let is_far = |reported: Reported| {
            let ratio = reported.unit_seconds / own.unit_seconds;
            is_fresh(&reported, now) && !(1.0 / DOUBT..DOUBT).contains(&ratio)
        };
        siblings().any(|sight| is_in_doubt(sight) || sight.reported.is_some_and(is_far))
    }
}

fn is_fresh(reported: &Reported, now: Instant) -> bool {
    now.saturating_duration_since(reported.measured_at) < FRESH
}

/// The pace of the siblings measured since then: the upper median. So of two different ones the slower one counts, and one
/// exceptionally fast replica makes no other slow.
fn siblings(
    sight: &Sight<'_>,
    sights: &[Sight<'_>],
    paces: &BTreeMap<Replica, ReplicaPace>,
    since: Instant,
) -> Option<f64> {
    let others = sights.iter().filter(|other| other.replica != sight.replica && other.fingerprint == sight.fingerprint);
    let measured = others.filter(|other| other.reported.is_some_and(|reported| reported.measured_at >= since));
    let mut paces: Vec<f64> =
        measured.filter_map(|other| paces.get(&other.replica)).map(|pace| pace.unit_seconds).collect();
    paces.sort_by(f64::total_cmp);
    paces.get(paces.len() / 2).copied()
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;
