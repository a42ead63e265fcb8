//! Decides when this node's report is sent: when it has changed significantly, and periodically while it is renewed, so that
//! its age shows that the node still monitors itself. Pure; time is passed in.

use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::gossip::{Urgency, encode_prefixes, encode_report, urgency};
use crate::cluster::load_report::LoadReport;

/// An unchanged report is sent again after this time.
const MAX_AGE: Duration = Duration::from_secs(1);
/// Minimum time between prefix lists: they change with every request and are only a hint.
const PREFIX_SPACING: Duration = Duration::from_secs(1);

/// The values to publish.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) report: Option<String>,
    pub(super) prefixes: Option<String>,
    /// The values are sent at once instead of in the next round.
    pub(super) is_urgent: bool,
}

/// What was published last.
#[derive(Default)]
pub(super) struct Publisher {
    report: Option<(LoadReport, Instant)>,
    prefixes: Option<(Vec<u32>, Instant)>,
    sequence: u8,
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
        let is_urgent = urgency == Urgency::Urgent;
        let is_told = is_urgent || (is_round && urgency == Urgency::Routine);
        Publication {
            report: is_told.then(|| self.tell_report(report, now)),
            prefixes: is_round.then(|| self.tell_prefixes(report, now)).flatten(),
            is_urgent,
        }
    }

    fn tell_report(&mut self, report: &LoadReport, now: Instant) -> String {
        self.report = Some((report.clone(), now));
        self.sequence = self.sequence.wrapping_add(1);
        encode_report(report, self.sequence)
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
}
