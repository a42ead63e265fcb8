//! Tests of the roster with scripted gossip and a scripted clock.

use proptest::prelude::*;

use super::*;
use crate::cluster::gossip::{encode_description, encode_pace, encode_prefixes, encode_report};
use crate::cluster::load_report::PaceReport;
use crate::cluster::protocol::VERSION_1;

/// A process as seen through gossip.
#[derive(Clone)]
struct Process {
    id: &'static str,
    incarnation: u64,
    is_alive: bool,
    has_left: bool,
    description: Option<(u64, String)>,
    report: Option<(u64, String)>,
    pace: Option<(u64, String)>,
    prefixes: Option<(u64, String)>,
}

fn description(port: u16) -> NodeDescription {
    NodeDescription {
        protocol: PROTOCOL,
        version: "1".into(),
        peer_addr: SocketAddr::from(([10, 0, 0, 1], port)),
        zone: String::new(),
        models: Vec::new(),
        tenants: None,
    }
}

fn report(running: u32) -> LoadReport {
    LoadReport { state: NodeState::Ready, ready: true, running, ..LoadReport::default() }
}

impl Process {
    fn new(id: &'static str, incarnation: u64, port: u16) -> Self {
        Self {
            id,
            incarnation,
            is_alive: true,
            has_left: false,
            description: Some((1, encode_description(&description(port)))),
            report: Some((2, encode_report(&report(1), 0))),
            pace: None,
            prefixes: None,
        }
    }

    fn observed(&self) -> Observed<'_> {
        fn value(value: &Option<(u64, String)>) -> Option<Value<'_>> {
            value.as_ref().map(|(version, text)| Value { version: *version, text })
        }
        Observed {
            id: self.id,
            incarnation: self.incarnation,
            is_alive: self.is_alive,
            has_left: self.has_left,
            description: value(&self.description),
            report: value(&self.report),
            pace: value(&self.pace),
            prefixes: value(&self.prefixes),
        }
    }
}

fn roster() -> Roster {
    Roster::new(NodeId::new("own"), 100)
}

fn update(roster: &mut Roster, processes: &[Process], now: Instant) -> Update {
    roster.update(processes.iter().map(Process::observed), now)
}

fn changes(update: &Update) -> Vec<(&str, Change)> {
    update.changes.iter().map(|(id, change)| (id.as_str(), *change)).collect()
}

fn peer(roster: &Roster, id: &str) -> Arc<Peer> {
    Arc::clone(&roster.view.peers[&NodeId::new(id)])
}

fn after(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

#[tokio::test]
async fn a_peer_joins_reports_and_dies() {
    let start = Instant::now();
    let mut roster = roster();
    let mut a = Process::new("a", 1, 1);
    let joined = update(&mut roster, std::slice::from_ref(&a), start);
    assert_eq!(changes(&joined), [("a", Change::Joined)]);
    assert_eq!(joined.view.expect("a view").peers.len(), 1);
    assert!(update(&mut roster, std::slice::from_ref(&a), after(start, 1)).view.is_none(), "nothing is new");
    assert_eq!(peer(&roster, "a").reported_at, start.into_std());

    a.report = Some((3, encode_report(&report(5), 1)));
    a.prefixes = Some((4, encode_prefixes(&[1, 2])));
    assert!(update(&mut roster, std::slice::from_ref(&a), after(start, 2)).view.is_some());
    let fresh = peer(&roster, "a");
    assert_eq!((fresh.report.running, fresh.report.hot_prefixes.as_slice()), (5, [1, 2].as_slice()));
    assert_eq!(fresh.reported_at, after(start, 2).into_std());
    a.report = Some((5, encode_report(&report(6), 2)));
    update(&mut roster, std::slice::from_ref(&a), after(start, 3));
    assert_eq!(peer(&roster, "a").report.hot_prefixes, [1, 2], "they come apart and stay together");

    a.is_alive = false;
    let died = update(&mut roster, std::slice::from_ref(&a), after(start, 4));
    assert_eq!(changes(&died), [("a", Change::Died)]);
    let view = died.view.expect("a view");
    assert_eq!((view.peers.len(), view.dead.as_slice()), (0, [NodeId::new("a")].as_slice()));
    assert!(update(&mut roster, &[], after(start, 60)).view.expect("a view").dead.is_empty(), "forgotten");
}

#[tokio::test]
async fn a_goodbye_removes_at_once_and_is_no_flap() {
    let start = Instant::now();
    let mut roster = roster();
    for round in 0..10 {
        let mut a = Process::new("a", round, 1);
        update(&mut roster, std::slice::from_ref(&a), after(start, round * 10));
        assert_eq!(peer(&roster, "a").stability, 1.0);
        a.has_left = true;
        let left = update(&mut roster, std::slice::from_ref(&a), after(start, round * 10 + 5));
        assert_eq!(changes(&left), [("a", Change::Left)]);
        assert!(left.view.expect("a view").dead.is_empty(), "it is not dead, it has left");
        a.is_alive = false;
        assert!(update(&mut roster, &[a], after(start, round * 10 + 6)).view.is_none());
    }
}

#[tokio::test]
async fn of_two_processes_of_one_name_the_later_counts() {
    let start = Instant::now();
    let mut roster = roster();
    let (mut earlier, later) = (Process::new("a", 1, 1), Process::new("a", 2, 2));
    update(&mut roster, std::slice::from_ref(&earlier), start);
    let replaced = update(&mut roster, &[later.clone(), earlier.clone()], after(start, 1));
    assert_eq!(changes(&replaced), [("a", Change::Replaced)]);
    assert_eq!((peer(&roster, "a").incarnation, peer(&roster, "a").description.peer_addr.port()), (2, 2));
    earlier.is_alive = false;
    assert!(update(&mut roster, &[earlier, later], after(start, 2)).view.is_none());
    assert!(roster.view.dead.is_empty());
}

#[tokio::test]
async fn this_node_is_no_peer_of_its_own() {
    let start = Instant::now();
    let mut roster = roster();
    let own = Process::new("own", 100, 1);
    let (earlier, later) = (Process::new("own", 99, 1), Process::new("own", 101, 1));
    update(&mut roster, &[own.clone(), earlier.clone()], start);
    assert!(!roster.strangers().is_superseded);
    assert!(update(&mut roster, &[own.clone(), later.clone()], start).view.is_none());
    assert!(roster.strangers().is_superseded);
    let gone = Process { is_alive: false, ..later };
    update(&mut roster, &[own, gone], start);
    assert!(!roster.strangers().is_superseded);
}

#[tokio::test]
async fn who_cannot_be_understood_is_left_out_and_told_of() {
    let start = Instant::now();
    let mut roster = roster();
    let other = NodeDescription { protocol: VERSION_1, ..description(1) };
    let text = encode_description(&other);
    let foreign = Process { description: Some((1, text)), ..Process::new("a", 1, 1) };
    let broken = Process { description: Some((1, "\u{7f}".repeat(50))), ..Process::new("b", 1, 1) };
    let silent = Process { description: None, ..Process::new("c", 1, 1) };
    let first = update(&mut roster, &[foreign.clone(), broken.clone(), silent.clone()], start);
    let refused: Vec<&str> = first.refused.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(refused, ["b"], "once");
    assert_eq!(roster.strangers().of_other_protocols, [(NodeId::new("a"), VERSION_1)]);
    assert!(first.view.is_none() && first.changes.is_empty());
    assert!(update(&mut roster, &[foreign.clone(), broken.clone(), silent], start).refused.is_empty());
    // The process now publishes something valid.
    let understood = Process { description: Some((2, encode_description(&description(1)))), ..foreign };
    assert_eq!(changes(&update(&mut roster, &[understood, broken], start)), [("a", Change::Joined)]);
    assert_eq!((roster.strangers(), peer(&roster, "a").report.running), (Strangers::default(), 1));
}

#[tokio::test]
async fn a_report_that_cannot_be_read_leaves_the_one_before() {
    let start = Instant::now();
    let mut roster = roster();
    let mut a = Process::new("a", 1, 1);
    update(&mut roster, std::slice::from_ref(&a), start);
    a.report = Some((3, "ä".into()));
    a.prefixes = Some((4, "xy".into()));
    let second = update(&mut roster, std::slice::from_ref(&a), after(start, 1));
    assert_eq!((second.refused.len(), second.view.is_none()), (2, true));
    assert_eq!((peer(&roster, "a").report.running, peer(&roster, "a").reported_at), (1, start.into_std()));
}

#[tokio::test]
async fn what_is_only_heard_of_is_dead_after_a_while() {
    let start = Instant::now();
    let mut roster = roster();
    let unborn = Process { is_alive: false, description: None, ..Process::new("a", 1, 1) };
    assert!(update(&mut roster, std::slice::from_ref(&unborn), start).view.is_none());
    let later = update(&mut roster, &[unborn], start + BIRTH + Duration::from_millis(1));
    assert_eq!(later.view.expect("a view").dead, [NodeId::new("a")]);
}

/// Both a stable name and a stable address are remembered.
#[tokio::test]
async fn a_node_that_comes_and_goes_is_damped_and_recovers() {
    let names = ["a0", "a1", "a2", "a3", "a4", "a5"];
    for has_name in [true, false] {
        let start = Instant::now();
        let mut roster = roster();
        let mut stabilities = Vec::new();
        for (round, name) in (0u64..).zip(names) {
            let (id, port) = if has_name { ("a", round as u16 + 1) } else { (name, 1) };
            let mut a = Process::new(id, round, port);
            update(&mut roster, std::slice::from_ref(&a), after(start, round * 10));
            stabilities.push(peer(&roster, id).stability);
            a.is_alive = false;
            update(&mut roster, &[a], after(start, round * 10 + 5));
        }
        assert_eq!(stabilities[..2], [1.0, 1.0]);
        assert!(stabilities[1..].is_sorted_by(|a, b| a > b || *b < 0.2), "{stabilities:?}");
        let back = Process::new(if has_name { "a" } else { "a6" }, 99, 1);
        update(&mut roster, std::slice::from_ref(&back), after(start, 60));
        assert!(peer(&roster, back.id).stability < 0.2);
        update(&mut roster, std::slice::from_ref(&back), after(start, 60 + 180));
        assert_eq!(peer(&roster, back.id).stability, 1.0, "the view follows without any other news");
    }
}

#[tokio::test]
async fn readiness_that_comes_and_goes_is_damped_and_a_drain_is_not() {
    let start = Instant::now();
    let stability_after = |unready: LoadReport| {
        let mut roster = roster();
        let mut a = Process::new("a", 1, 1);
        for round in 0..8u64 {
            let next = if round % 2 == 0 { unready.clone() } else { report(1) };
            a.report = Some((round * 2 + 1, encode_report(&report(1), 0)));
            update(&mut roster, std::slice::from_ref(&a), after(start, round));
            a.report = Some((round * 2 + 2, encode_report(&next, 0)));
            update(&mut roster, std::slice::from_ref(&a), after(start, round));
        }
        peer(&roster, "a").stability
    };
    let unready = LoadReport { ready: false, ..report(1) };
    assert!(stability_after(unready.clone()) < 0.6);
    assert_eq!(stability_after(LoadReport { state: NodeState::Draining, ..unready }), 1.0);
}

#[tokio::test]
async fn a_pace_keeps_the_time_of_its_measurement_while_reports_come_and_go() {
    let (mut roster, start) = (roster(), after(Instant::now(), 60));
    let mut process = Process::new("a", 1, 1);
    update(&mut roster, &[process.clone()], start);
    assert_eq!(peer(&roster, "a").report.pace, None, "a node of an earlier version says nothing of it");
    let pace = PaceReport { unit_seconds: 0.25, age_seconds: 2.0 };
    process.pace = Some((3, encode_pace(&pace, 0)));
    update(&mut roster, &[process.clone()], after(start, 10));
    process.report = Some((4, encode_report(&report(2), 1)));
    update(&mut roster, &[process.clone()], after(start, 20));
    let seen = peer(&roster, "a");
    assert_eq!((seen.report.pace, seen.report.running), (Some(pace), 2));
    assert_eq!(seen.measured_at, after(start, 8).into_std());
    assert_eq!(seen.reported_at, after(start, 20).into_std());
    process.pace = Some((5, "no base64!".into()));
    assert_eq!(update(&mut roster, &[process], after(start, 30)).refused.len(), 1);
    assert_eq!(peer(&roster, "a").report.pace, Some(pace));
}

proptest! {
    /// For any gossip: peers are alive, have not left, are the latest of their name, and are not listed as dead.
    #[test]
    fn views_are_sound(
        steps in prop::collection::vec(prop::collection::vec((0usize..4, 0u64..4, any::<(bool, bool, bool)>(), "[a-z]{0,9}"), 0..8), 1..20)
    ) {
        let start = Instant::now();
        let mut roster = roster();
        for (second, step) in (0u64..).zip(steps) {
            let processes: BTreeMap<(&str, u64), Process> = step.into_iter().map(|(id, incarnation, flags, text)| {
                let id = ["own", "a", "b", "c"][id];
                let mut process = Process::new(id, incarnation, 1);
                (process.is_alive, process.has_left) = (flags.0, flags.1 && flags.2);
                if flags.2 {
                    process.report = Some((second, text));
                }
                ((id, incarnation), process)
            }).collect();
            let processes: Vec<Process> = processes.into_values().collect();
            update(&mut roster, &processes, after(start, second));
            for (id, peer) in &roster.view.peers {
                prop_assert!(id.as_str() != "own" && !roster.view.dead.contains(id));
                let same_name = processes.iter().filter(|process| process.id == id.as_str() && process.is_alive);
                let known_left = |process: &&Process| !roster.known[&(id.clone(), process.incarnation)].has_left;
                prop_assert_eq!(same_name.filter(known_left).map(|process| process.incarnation).max(), Some(peer.incarnation));
            }
        }
    }
}
