//! Tests of the problem log with a scripted clock.

use super::*;

fn after(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

fn addr(number: u32) -> SocketAddr {
    SocketAddr::from((number.to_be_bytes(), 7946))
}

fn strike(log: &mut ProblemLog, reason: ProblemReason, from: SocketAddr, times: u32, now: Instant) {
    (0..times).for_each(|_| log.event(reason, ProblemSource::Addr(from), String::new, now));
}

fn sources(log: &ProblemLog, reason: ProblemReason, now: Instant) -> Vec<String> {
    log.list(now).into_iter().filter(|problem| problem.reason == reason).map(|problem| problem.source).collect()
}

#[tokio::test]
async fn one_damaged_datagram_is_no_problem_and_several_are_until_they_stop() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 2, start);
    assert_eq!((log.list(start).len(), log.lines(start).len()), (0, 0));
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 1, after(start, 1));
    let problems = log.list(after(start, 2));
    assert_eq!((problems[0].count, problems[0].since_seconds, problems[0].age_seconds), (3, 2.0, 1.0));
    assert!(matches!(log.lines(after(start, 2)).as_slice(), [Line::Begun { events: 3, .. }]));
    assert_eq!(log.lines(after(start, 92)), [Line::Over { reason: ProblemReason::ForeignKey }]);
    assert_eq!((log.list(after(start, 92)).len(), log.lines(after(start, 200)).len()), (0, 0));
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 1, after(start, 300));
    assert!(log.list(after(start, 300)).is_empty(), "it begins anew");
}

#[tokio::test]
async fn a_flood_from_ever_other_addresses_costs_neither_memory_nor_the_log() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    let mut lines = 0;
    for second in 0..600u32 {
        let now = after(start, second.into());
        for number in 0..200 {
            for reason in
                [ProblemReason::ForeignKey, ProblemReason::Unreadable, ProblemReason::Unproven, ProblemReason::Replayed]
            {
                strike(&mut log, reason, addr(second * 200 + number), 1, now);
            }
        }
        lines += log.lines(now).len();
        assert!(log.groups.iter().all(|group| group.entries.len() <= MAX_SOURCES));
    }
    assert!((4..=4 * 11).contains(&lines), "{lines} lines in ten minutes");
}

#[tokio::test]
async fn a_configured_peer_pushes_strangers_out() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    log.expect([addr(1)].into());
    for number in 100..200 {
        strike(&mut log, ProblemReason::ForeignKey, addr(number), 3, start);
    }
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 3, start);
    assert!(sources(&log, ProblemReason::ForeignKey, start).contains(&addr(1).to_string()));
    for number in 200..300 {
        strike(&mut log, ProblemReason::ForeignKey, addr(number), 3, start);
    }
    let seen = sources(&log, ProblemReason::ForeignKey, start);
    assert!(seen.contains(&addr(1).to_string()) && seen.len() == MAX_SOURCES, "{seen:?}");
}

#[tokio::test]
async fn many_addresses_that_strike_once_are_seen_together() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    for number in 0..MAX_SOURCES as u32 + 2 {
        strike(&mut log, ProblemReason::ForeignKey, addr(number), 1, start);
    }
    assert!(log.list(start).is_empty());
    strike(&mut log, ProblemReason::ForeignKey, addr(1000), 1, start);
    assert_eq!(log.list(start).len(), MAX_SOURCES);
    assert!(matches!(log.lines(start).as_slice(), [Line::Begun { others: 3, .. }]));
}

#[tokio::test]
async fn the_same_sources_are_told_every_ten_minutes_and_others_after_one() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    let mut told = Vec::new();
    for second in 0..1300 {
        let now = after(start, second);
        let mut found = vec![("a".to_owned(), "why".to_owned())];
        if second >= 90 {
            found.push(("b".into(), String::new()));
        }
        log.state(ProblemReason::Unheard, found, now);
        told.extend(log.lines(now).into_iter().map(|line| (second, line)));
    }
    let [(0, Line::Begun { sources, .. }), (90, _), (690, _), (1290, _)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(sources, "a (why)");
    log.state(ProblemReason::Unheard, Vec::new(), after(start, 1300));
    assert_eq!(log.lines(after(start, 1300)), [Line::Over { reason: ProblemReason::Unheard }]);
}

#[tokio::test]
async fn whoever_is_heard_has_no_foreign_key_any_more() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    for from in [addr(1), addr(2)] {
        strike(&mut log, ProblemReason::ForeignKey, from, 3, start);
        strike(&mut log, ProblemReason::Unreadable, from, 3, start);
    }
    log.expect([addr(1)].into());
    log.heard(addr(1));
    assert_eq!(sources(&log, ProblemReason::ForeignKey, start), [addr(2).to_string()]);
    assert_eq!(
        sources(&log, ProblemReason::Unreadable, start).len(),
        2,
        "that may be somebody behind the same address"
    );
    log.heard(addr(2));
    assert_eq!(log.answered, [addr(1)].into(), "only of configured peers it is remembered");
}

#[tokio::test]
async fn who_tells_of_another_cluster_has_no_foreign_key() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 5, start);
    log.event(ProblemReason::ForeignCluster, ProblemSource::Addr(addr(1)), || "cluster_id `b`".into(), start);
    strike(&mut log, ProblemReason::ForeignKey, addr(1), 5, start);
    let [problem] = log.list(start).try_into().expect("one");
    assert_eq!((problem.reason, problem.detail.as_str()), (ProblemReason::ForeignCluster, "cluster_id `b`"));
}

#[tokio::test]
async fn a_session_is_unproven_only_if_it_stays_so() {
    let (mut log, start) = (ProblemLog::new(), Instant::now());
    strike(&mut log, ProblemReason::Unproven, addr(1), 50, start);
    assert!(log.list(start).is_empty(), "all at once is a start");
    strike(&mut log, ProblemReason::Unproven, addr(1), 1, after(start, 6));
    assert_eq!(log.list(after(start, 6)).len(), 1);
}

#[test]
fn reasons_have_labels_of_their_own_and_the_same_in_json() {
    let labels: BTreeSet<_> = ProblemReason::ALL.iter().map(|reason| reason.label()).collect();
    assert_eq!(labels.len(), ProblemReason::ALL.len());
    for (index, reason) in ProblemReason::ALL.into_iter().enumerate() {
        assert_eq!(serde_json::to_value(reason).expect("a word"), reason.label());
        assert_eq!(reason as usize, index);
    }
}
