//! Decides when this node's report is sent: when it has changed significantly, and periodically while it is renewed, so that
//! its age shows that the node still monitors itself. Pure; time is passed in.

use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::gossip::{Urgency, encode_pace, encode_prefixes, encode_report, urgency};
use crate::cluster::load_report::{LoadReport, PaceReport};

/// An unchanged report is sent again after this time.
const MAX_AGE: Duration = Duration::from_secs(1);
/// Minimum time between prefix lists: they change with every request and are only a hint.
const PREFIX_SPACING: Duration = Duration::from_secs(1);
/// A new measurement of the pace is told with the next round when it differs by this factor, else after `MAX_AGE`; and at
/// once, though not more often than this, when it differs by the larger factor.
const PACE_NEWS: f32 = 1.25;
const URGENT_PACE_NEWS: f32 = 2.0;
const URGENT_PACE_SPACING: Duration = Duration::from_millis(200);

/// The values to publish.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) report: Option<String>,
    pub(super) pace: Option<String>,
    pub(super) prefixes: Option<String>,
    /// The values are sent at once instead of in the next round.
    pub(super) is_urgent: bool,
}

/// What was published last.
#[derive(Default)]
pub(super) struct Publisher {
    report: Option<(LoadReport, Instant)>,
    pace: Option<ToldPace>,
    prefixes: Option<(Vec<u32>, Instant)>,
    sequence: u8,
}

struct ToldPace {
    unit_seconds: f32,
    measured_at: Instant,
    told_at: Instant,
}

impl Publisher {
    /// The part of `report` to publish now. Between rounds, only urgent changes. `is_kept_up`: the report was renewed recently,
    /// so it may be repeated.
    pub(super) fn publish(
        &mut self,
        report: &LoadReport,
        is_kept_up: bool,
        is_round: bool,
        now: Instant,
    ) -> Publication {
        let urgency = match &self.report {
            None => Urgency::Urgent,
            Some((told, at)) if is_kept_up && now.saturating_duration_since(*at) >= MAX_AGE => {
                urgency(told, report).max(Urgency::Routine)
            }
            Some((told, _)) => urgency(told, report),
        };
        let is_told = |urgency| urgency == Urgency::Urgent || (is_round && urgency == Urgency::Routine);
        let pace = report.pace.filter(|_| is_kept_up).map(|pace| (pace, self.pace_urgency(&pace, now)));
        let is_urgent = urgency == Urgency::Urgent || pace.is_some_and(|(_, urgency)| urgency == Urgency::Urgent);
        Publication {
            report: is_told(urgency).then(|| self.tell_report(report, now)),
            pace: pace.filter(|(_, urgency)| is_told(*urgency)).map(|(pace, _)| self.tell_pace(&pace, now)),
            prefixes: is_round.then(|| self.tell_prefixes(report, now)).flatten(),
            is_urgent,
        }
    }

    fn tell_report(&mut self, report: &LoadReport, now: Instant) -> String {
        self.report = Some((report.clone(), now));
        self.sequence = self.sequence.wrapping_add(1);
        encode_report(report, self.sequence)
    }

    /// How soon the others should hear of the pace.
    fn pace_urgency(&self, pace: &PaceReport, now: Instant) -> Urgency {
        let Some(told) = &self.pace else { return Urgency::Routine };
        if now.checked_sub(pace.age()).unwrap_or(now) <= told.measured_at + URGENT_PACE_SPACING / 2 {
            return Urgency::None;
        }
        let factor = (pace.unit_seconds / told.unit_seconds).max(told.unit_seconds / pace.unit_seconds);
        let since = now.saturating_duration_since(told.told_at);
        if factor >= URGENT_PACE_NEWS && since >= URGENT_PACE_SPACING {
            Urgency::Urgent
        } else if factor >= PACE_NEWS || since >= MAX_AGE {
            Urgency::Routine
        } else {
            Urgency::None
        }
    }

    fn tell_pace(&mut self, pace: &PaceReport, now: Instant) -> String {
        let (unit_seconds, measured_at) = (pace.unit_seconds, now.checked_sub(pace.age()).unwrap_or(now));
        self.pace = Some(ToldPace { unit_seconds, measured_at, told_at: now });
        self.sequence = self.sequence.wrapping_add(1);
        encode_pace(pace, self.sequence)
    }

    fn tell_prefixes(&mut self, report: &LoadReport, now: Instant) -> Option<String> {
        let (told, is_due) = match &self.prefixes {
            Some((told, at)) => (told.as_slice(), now.saturating_duration_since(*at) >= PREFIX_SPACING),
            None => ([].as_slice(), true),
        };
        if !is_due || told == report.hot_prefixes {
            return None;
        }
        self.prefixes = Some((report.hot_prefixes.clone(), now));
        Some(encode_prefixes(&report.hot_prefixes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::NodeState;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[tokio::test]
    async fn the_first_report_and_what_decides_on_traffic_are_urgent() {
        let start = Instant::now();
        let mut publisher = Publisher::default();
        let report = LoadReport::default();
        let first = publisher.publish(&report, true, false, start);
        assert!(first.is_urgent && first.report.is_some() && first.prefixes.is_none());
        let ready = LoadReport { ready: true, state: NodeState::Ready, ..report };
        assert!(publisher.publish(&ready, true, false, start).is_urgent);
        assert_eq!(publisher.publish(&ready, true, false, start), Publication::default());
    }

    #[tokio::test]
    async fn changes_wait_for_the_round_and_noise_for_its_age() {
        let start = Instant::now();
        let mut publisher = Publisher::default();
        let report = LoadReport { running: 4, kv_usage: 0.5, ..LoadReport::default() };
        publisher.publish(&report, true, true, start);
        let busier = LoadReport { running: 5, ..report.clone() };
        assert_eq!(publisher.publish(&busier, true, false, after(start, 10)), Publication::default());
        let told = publisher.publish(&busier, true, true, after(start, 250));
        assert!(told.report.is_some() && !told.is_urgent);
        let noisy = LoadReport { kv_usage: 0.505, ..busier };
        assert_eq!(publisher.publish(&noisy, true, true, after(start, 500)), Publication::default());
        assert_eq!(publisher.publish(&noisy, true, false, after(start, 1250)), Publication::default());
        assert_eq!(
            publisher.publish(&noisy, false, true, after(start, 1250)),
            Publication::default(),
            "nobody keeps it up"
        );
        assert!(publisher.publish(&noisy, true, true, after(start, 1250)).report.is_some());
    }

    #[tokio::test]
    async fn prefixes_are_told_when_they_changed_and_not_too_often() {
        let start = Instant::now();
        let mut publisher = Publisher::default();
        let report = |prefix| LoadReport { hot_prefixes: vec![prefix], ..LoadReport::default() };
        assert_eq!(publisher.publish(&report(1), true, true, start).prefixes, Some(encode_prefixes(&[1])));
        assert_eq!(publisher.publish(&report(2), true, true, after(start, 999)).prefixes, None);
        assert_eq!(publisher.publish(&report(2), true, false, after(start, 1000)).prefixes, None);
        assert_eq!(publisher.publish(&report(2), true, true, after(start, 1000)).prefixes, Some(encode_prefixes(&[2])));
        assert_eq!(publisher.publish(&report(2), true, true, after(start, 9000)).prefixes, None);
    }

    #[tokio::test]
    async fn a_pace_is_told_at_once_when_it_changes_much_and_never_twice() {
        let start = Instant::now();
        let mut publisher = Publisher::default();
        let report = |unit_seconds, age_seconds| LoadReport {
            pace: Some(PaceReport { unit_seconds, age_seconds }),
            ..LoadReport::default()
        };
        let mut told = |report: &LoadReport, is_round, millis| {
            let publication = publisher.publish(report, true, is_round, after(start, millis));
            (publication.pace.is_some(), publication.is_urgent)
        };
        assert_eq!(told(&LoadReport::default(), true, 0), (false, true), "the first report");
        assert_eq!(told(&report(0.004, 0.0), false, 10), (false, false));
        assert_eq!(told(&report(0.004, 0.0), true, 20), (true, false));
        assert_eq!(told(&report(0.0042, 0.0), true, 520), (false, false), "noise");
        assert_eq!(told(&report(0.08, 0.0), false, 530), (true, true));
        assert_eq!(told(&report(0.004, 0.0), false, 640), (false, false), "not so often");
        assert_eq!(told(&report(0.004, 0.2), true, 740), (false, false), "measured before");
        assert_eq!(told(&report(0.004, 0.0), false, 740), (true, true));
        assert_eq!(told(&report(0.004, 9.0), true, 9740), (false, false), "nothing new was measured");
        assert_eq!(told(&report(0.004, 0.0), true, 9740), (true, false));
    }
}
