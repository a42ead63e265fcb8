//! Tests with a few replicas on one board, compared ten times a second.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::router::pace::progress::ProgressPart;
use crate::types::NodeId;

const FACTOR: f64 = 4.0;
const TICK: Duration = Duration::from_millis(100);
const UNIT: f64 = 0.005;
const HEARTBEATS: Duration = Duration::from_millis(500);

/// A replica that reports before every comparison.
struct Node {
    replica: Replica,
    /// Factor of the usual time per unit of work.
    slowness: f64,
    /// The factor that it reports, if it is another one.
    claim: Option<f64>,
    /// Time since its last step.
    idle: Duration,
    progress: Arc<StreamProgress>,
    streams: Vec<ProgressPart>,
    /// How many of the streams its scheduler has preempted.
    preempted: usize,
    owed: f64,
}

fn reported(unit_seconds: f64, now: Instant) -> Reported {
    let (measured_at, reported_at) = (now, now);
    Reported {
        unit_seconds,
        token_seconds: unit_seconds,
        measured_at,
        reported_at,
        has_queue: false,
        confesses: false,
        stands_still: false,
    }
}

struct Scene {
    board: PaceBoard,
    nodes: Vec<Node>,
    now: Instant,
    found: Findings,
    changes: Vec<(Replica, Change, Duration)>,
    wanted_probe: bool,
}

fn at(number: usize) -> Replica {
    if number == 0 { Replica::Here } else { Replica::At(NodeId::new(format!("n{number}"))) }
}

impl Scene {
    /// Node 0 is this node.
    fn of(nodes: usize) -> Self {
        let now = Instant::now();
        let node = |number| Node {
            replica: at(number),
            slowness: 1.0,
            claim: None,
            idle: Duration::ZERO,
            progress: Arc::new(StreamProgress::new(now)),
            streams: Vec::new(),
            preempted: 0,
            owed: 0.0,
        };
        Self {
            board: PaceBoard::default(),
            nodes: (0..nodes).map(node).collect(),
            now,
            found: Findings::default(),
            changes: Vec::new(),
            wanted_probe: false,
        }
    }

    /// A stream of this node runs at each of the others.
    fn with_streams(mut self) -> Self {
        for node in &mut self.nodes[1..] {
            let mut part = node.progress.part(self.now);
            part.token(0, self.now);
            node.streams.push(part);
        }
        self
    }

    /// Lets time pass, and records changes with the time since this call.
    fn pass(&mut self, time: Duration) {
        let start = self.now;
        (self.changes, self.wanted_probe) = (Vec::new(), false);
        let fingerprint = Fingerprint::new("same");
        while self.now.saturating_duration_since(start) < time {
            self.now += TICK;
            let since_start = self.now.saturating_duration_since(start).as_millis();
            let is_beat = since_start.is_multiple_of(HEARTBEATS.as_millis());
            for node in &mut self.nodes {
                node.owed += TICK.as_secs_f64() / (UNIT * node.slowness);
                for stream in node.streams.iter_mut().skip(node.preempted) {
                    (0..node.owed as u64).for_each(|_| stream.token(0, self.now));
                }
                node.owed -= node.owed.floor();
                node.streams.iter_mut().filter(|_| is_beat).for_each(ProgressPart::heartbeat);
            }
            let sight = |node: &'_ Node| {
                let unit_seconds = UNIT * node.claim.unwrap_or(node.slowness);
                let (measured_at, has_queue) = (self.now - node.idle, node.preempted > 0);
                Reported { measured_at, has_queue, ..reported(unit_seconds, self.now) }
            };
            let sights: Vec<Sight<'_>> = self
                .nodes
                .iter()
                .map(|node| Sight {
                    replica: node.replica.clone(),
                    fingerprint: &fingerprint,
                    reported: Some(sight(node)),
                    progress: Some(&*node.progress).filter(|_| node.replica != Replica::Here),
                })
                .collect();
            self.found = self.board.look(&sights, FACTOR, self.now);
            let since = self.now - start;
            self.changes.extend(self.found.changes.iter().map(|(replica, change)| (replica.clone(), *change, since)));
            self.wanted_probe |= self.found.wants_probe;
        }
    }

    fn slow(&self) -> Vec<Replica> {
        let slow = self.found.paces.iter().filter(|(_, pace)| pace.slow_since.is_some());
        slow.map(|(replica, _)| replica.clone()).collect()
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[test]
fn one_that_falls_behind_its_siblings_is_slow_within_a_second_and_well_again_within_one() {
    for slow in 0..3 {
        let mut scene = Scene::of(3).with_streams();
        scene.pass(seconds(5.0));
        assert_eq!(scene.slow(), []);
        scene.nodes[slow].slowness = 20.0;
        scene.pass(seconds(1.0));
        assert_eq!(scene.slow(), [at(slow)]);
        let pace = scene.found.paces[&at(slow)];
        assert!((15.0..25.0).contains(&pace.ratio().expect("compared")), "{}", pace.explain());
        scene.nodes[slow].slowness = 1.0;
        scene.pass(seconds(3.0));
        assert_eq!(scene.slow(), []);
    }
}

#[test]
fn when_all_are_equally_slow_none_is() {
    let mut scene = Scene::of(3).with_streams();
    scene.pass(seconds(3.0));
    scene.nodes.iter_mut().for_each(|node| node.slowness = 20.0);
    scene.pass(seconds(10.0));
    assert_eq!((scene.slow(), scene.changes.len()), (vec![], 0));
}

#[test]
fn of_two_the_slower_one_is_slow_and_a_majority_sets_the_measure() {
    let mut pair = Scene::of(2);
    pair.nodes[0].slowness = 20.0;
    pair.pass(seconds(2.0));
    assert_eq!(pair.slow(), [at(0)]);
    let mut many = Scene::of(5);
    many.nodes[1].slowness = 0.05;
    many.pass(seconds(5.0));
    assert_eq!(many.slow(), [], "one that is exceptionally fast makes nobody slow");
}

#[test]
fn old_evidence_of_siblings_condemns_nobody_but_asks_for_news() {
    let mut scene = Scene::of(2);
    scene.nodes[1].slowness = 20.0;
    scene.nodes[0].idle = seconds(8.0);
    scene.pass(seconds(5.0));
    assert_eq!(scene.slow(), []);
    assert!(scene.wanted_probe, "this node's own pace is what is not known");
    (scene.nodes[0].idle, scene.nodes[0].slowness) = (seconds(0.1), 20.0);
    scene.pass(seconds(5.0));
    assert_eq!((scene.slow(), scene.wanted_probe), (vec![], false), "it is as slow");
    scene.nodes[0].slowness = 1.0;
    scene.pass(seconds(2.0));
    assert_eq!(scene.slow(), [at(1)]);
    scene.nodes[0].idle = seconds(2.0);
    scene.pass(seconds(0.5));
    assert!(scene.wanted_probe, "as long as somebody is slow");
}

#[test]
fn a_report_that_is_late_or_wrong_does_not_hide_what_streams_see() {
    let mut scene = Scene::of(3).with_streams();
    scene.nodes[2].claim = Some(1.0);
    scene.pass(seconds(5.0));
    scene.nodes[2].slowness = 20.0;
    scene.pass(seconds(2.0));
    assert_eq!(scene.slow(), [at(2)]);
    assert!(scene.found.paces[&at(2)].explain().contains("more slowly than it reports"));
    assert!(!scene.found.paces[&at(1)].explain().contains("more slowly than it reports"));
}

#[test]
fn when_all_seem_to_lag_it_is_this_node() {
    let mut scene = Scene::of(3).with_streams();
    scene.nodes.iter_mut().for_each(|node| node.claim = Some(1.0));
    scene.nodes[1..].iter_mut().for_each(|node| node.slowness = 20.0);
    scene.pass(seconds(10.0));
    assert_eq!(scene.slow(), []);
    // With a single peer, this node's own pace is the comparison.
    let mut pair = Scene::of(2).with_streams();
    (pair.nodes[0].slowness, pair.nodes[1].slowness, pair.nodes[1].claim) = (20.0, 20.0, Some(1.0));
    pair.pass(seconds(10.0));
    assert_eq!(pair.slow(), [at(0)]);
}

#[test]
fn a_factor_of_zero_turns_it_off() {
    let fingerprint = Fingerprint::new("same");
    let (mut board, now) = (PaceBoard::default(), Instant::now());
    for tick in 0..50 {
        let now = now + TICK * tick;
        let sight = |number: usize| {
            let unit_seconds = if number == 0 { 0.1 } else { 0.001 };
            let reported = reported(unit_seconds, now);
            Sight { replica: at(number), fingerprint: &fingerprint, reported: Some(reported), progress: None }
        };
        let found = board.look(&[sight(0), sight(1), sight(2)], 0.0, now);
        assert!(found.changes.is_empty() && !found.wants_probe);
    }
}

#[test]
fn other_fingerprints_are_no_siblings() {
    let fingerprints = ["fast", "fast", "slow"].map(Fingerprint::new);
    let (mut board, now) = (PaceBoard::default(), Instant::now());
    for tick in 0..50 {
        let now = now + TICK * tick;
        let sight = |number: usize| {
            let unit_seconds = if number == 2 { 0.1 } else { 0.001 };
            let reported = reported(unit_seconds, now);
            Sight { replica: at(number), fingerprint: &fingerprints[number], reported: Some(reported), progress: None }
        };
        let found = board.look(&[sight(0), sight(1), sight(2)], FACTOR, now);
        assert_eq!(found.changes, []);
    }
}

#[test]
fn a_replica_that_has_preempted_streams_of_this_node_is_not_slow() {
    // One of this node's streams there goes on, or none: it serves those of others.
    for preempted in [9, 10] {
        let mut scene = Scene::of(3).with_streams();
        for _ in 1..10 {
            let part = scene.nodes[1].progress.part(scene.now);
            scene.nodes[1].streams.push(part);
        }
        scene.pass(seconds(5.0));
        scene.nodes[1].preempted = preempted;
        scene.pass(seconds(10.0));
        assert_eq!((scene.slow(), scene.changes.len()), (vec![], 0), "{preempted} preempted");
        // While some are preempted, it can become slow for the others.
        scene.nodes[1].slowness = 20.0;
        scene.nodes[1].claim = Some(1.0);
        scene.nodes[1].preempted = 5;
        scene.pass(seconds(3.0));
        assert_eq!(scene.slow(), [at(1)], "{preempted} preempted");
    }
}

proptest! {
    /// If all paces change together, no replica is slow; noise below the factor changes nothing.
    #[test]
    fn common_changes_and_noise_move_nothing(
        common in prop::collection::vec(0.2f64..50.0, 1..8),
        noise in prop::collection::vec(0.75f64..1.45, 5),
    ) {
        let mut scene = Scene::of(5);
        for slowness in common {
            for (node, noise) in scene.nodes.iter_mut().zip(&noise) {
                node.slowness = slowness * noise;
            }
            scene.pass(seconds(3.0));
            prop_assert_eq!(scene.slow(), []);
        }
    }

    /// A replica much slower than all others is detected, and no other one.
    #[test]
    fn exactly_those_far_behind_are_found(
        slowness in prop::collection::vec(prop_oneof![3 => 0.8f64..1.3, 1 => 8.0f64..40.0], 3..7)
    ) {
        let behind = slowness.iter().filter(|slowness| **slowness > 4.0).count();
        prop_assume!(2 * behind < slowness.len() - 1);
        let mut scene = Scene::of(slowness.len()).with_streams();
        for (node, slowness) in scene.nodes.iter_mut().zip(&slowness) {
            node.slowness = *slowness;
        }
        scene.pass(seconds(4.0));
        let expected: Vec<Replica> = (0..slowness.len()).filter(|node| slowness[*node] > 4.0).map(at).collect();
        prop_assert_eq!(scene.slow(), expected);
    }
}

#[test]
fn a_process_that_stands_still_is_compared_with_what_it_heard_before() {
    let (mut board, start, fingerprint) = (PaceBoard::default(), Instant::now(), Fingerprint::new("same"));
    let now = start + Duration::from_secs(60);
    let mut look = |stands_still, age| {
        let sight = |number, reported| Sight {
            replica: at(number),
            fingerprint: &fingerprint,
            reported: Some(reported),
            progress: None,
        };
        let heard = reported(UNIT, now - Duration::from_secs(age));
        let own = Reported { stands_still, ..reported(10.0 * UNIT, now) };
        board.look(&[sight(0, own), sight(1, heard), sight(2, heard)], FACTOR, now).changes
    };
    assert_eq!(look(false, 10), [], "too old");
    assert_eq!(look(true, 30), [], "much too old");
    assert_eq!(look(true, 10), [(Replica::Here, Change::BecameSlow)]);
}
