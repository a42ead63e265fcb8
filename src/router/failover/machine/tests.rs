//! The machine in a world that answers at random, and single scenes.

mod world;

use proptest::prelude::*;

use super::*;
use world::{RULES, STALL, World, failure, gone, peer};

#[derive(Clone, Debug)]
enum Event {
    Wait(u64),
    Hear(Slot, Heard),
    HandOver(Slot),
    Lose(Slot, Failure),
    Accept,
    Refuse(Failure),
    Changed,
    See { is_slow: bool, has_peers: bool },
    Leave,
    OnlyRelay,
    GateOpened,
    NodeFailed(FailureKind),
    Cut,
}

fn a_failure() -> impl Strategy<Value = Failure> {
    let kind = prop::sample::select(FailureKind::ALL.to_vec());
    prop_oneof![4 => Just(gone()), 1 => Just(has_left()), 5 => kind.prop_map(failure)]
}

fn a_source() -> impl Strategy<Value = Slot> {
    prop_oneof![Just(Slot::Primary), Just(Slot::Successor)]
}

fn an_event() -> impl Strategy<Value = Event> {
    let heard = prop_oneof![Just(Heard::Life), any::<bool>().prop_map(|is_new| Heard::Output { is_new })];
    prop_oneof![
        30 => (1u64..3000).prop_map(Event::Wait),
        30 => (a_source(), heard).prop_map(|(slot, heard)| Event::Hear(slot, heard)),
        12 => (a_source(), a_failure()).prop_map(|(slot, failure)| Event::Lose(slot, failure)),
        20 => Just(Event::Accept),
        12 => a_failure().prop_map(Event::Refuse),
        6 => a_source().prop_map(Event::HandOver),
        6 => Just(Event::Changed),
        6 => (any::<bool>(), any::<bool>()).prop_map(|(is_slow, has_peers)| Event::See { is_slow, has_peers }),
        4 => Just(Event::GateOpened),
        1 => Just(Event::Leave),
        1 => Just(Event::OnlyRelay),
        1 => prop_oneof![Just(FailureKind::EngineFailed), Just(FailureKind::NumericsSuspect)].prop_map(Event::NodeFailed),
        1 => Just(Event::Cut),
    ]
}

fn a_start() -> impl Strategy<Value = Start> {
    prop_oneof![
        Just(Start::Accepted(Replica::Here)),
        Just(Start::New),
        Just(Start::Resumed),
        Just(Start::Following(peer(0))),
    ]
}

impl World {
    fn suffer(&mut self, event: Event) {
        match event {
            Event::Wait(millis) => {
                let until = self.now + Duration::from_millis(millis);
                while let Some(wake) = self.machine.wake(&self.seen()).filter(|wake| *wake <= until) {
                    self.now = self.now.max(wake);
                    self.tell(Input::Alarm);
                }
                self.now = until;
            }
            Event::Hear(slot, heard) => self.hear(slot, heard),
            Event::HandOver(slot) => {
                if let Some(replica) = self.replica(slot).cloned() {
                    self.hear(slot, Heard::Life);
                    self.excluded.insert(replica, self.now + Duration::from_secs(1));
                    self.tell(Input::HandOver(slot));
                }
            }
            Event::Lose(slot, failure) => {
                if let Some(replica) = self.replica(slot).cloned() {
                    // The node that is followed only tells what has happened to it.
                    let of_replica =
                        if self.machine.follows() && slot == Slot::Primary { gone() } else { failure.clone() };
                    self.exclude(replica, &of_replica);
                    self.tell(Input::Lost(slot, failure));
                }
            }
            Event::Accept => self.asked.clone().into_iter().for_each(|replica| self.accept(replica)),
            Event::Refuse(failure) => {
                if let Some(replica) = self.asked.clone() {
                    self.refuse(replica, failure);
                }
            }
            Event::Changed => self.tell(Input::Changed),
            Event::See { is_slow, has_peers } => (self.is_slow, self.has_peers) = (is_slow, has_peers),
            Event::Leave => self.leaves = true,
            Event::OnlyRelay => (self.leaves, self.only_relays) = (true, true),
            Event::GateOpened if self.last.is_none() => self.tell(Input::GateOpened),
            Event::GateOpened => {}
            Event::NodeFailed(kind) => {
                if self.replica(Slot::Primary) == Some(&Replica::Here) {
                    self.exclude(Replica::Here, &failure(kind));
                }
                self.tell(Input::NodeFailed(failure(kind)));
            }
            Event::Cut => {
                self.tell(Input::Cut);
                assert!(self.last.is_some(), "it was cut");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// The world asserts what must hold of each action; this drives it.
    #[test]
    fn whatever_happens_the_stream_keeps_its_promises(
        start in a_start(), seed in any::<u64>(), can_move in prop::bool::weighted(0.9),
        deadline in prop::option::weighted(0.3, 0u64..60), events in prop::collection::vec(an_event(), 1..150)
    ) {
        let mut world = World::new(Rules { can_move, ..RULES }, start);
        world.random = seed;
        let deadline = deadline.map(|seconds| world.now + Duration::from_secs(seconds));
        (world.rules.deadline, world.machine.rules.deadline) = (deadline, deadline);
        world.tell(Input::Begin);
        world.tell(Input::Alarm);
        for event in events {
            world.suffer(event);
            world.check();
        }
        // Whatever state it is in, one that loses its replicas and finds no other ends in time.
        world.is_empty = true;
        for event in [
            Event::Lose(Slot::Successor, gone()),
            Event::Lose(Slot::Primary, gone()),
            Event::Refuse(gone()),
            Event::GateOpened,
            Event::Wait(31_000),
        ] {
            world.suffer(event);
        }
        prop_assert!(world.last.is_some(), "it searches forever: {:?}", world.machine.state);
    }
}

/// A stream that runs on the first peer.
fn running() -> World {
    let mut world = World::new(RULES, Start::Accepted(peer(0)));
    world.is_empty = true;
    world
}

/// What the machine says to the input, if nothing is answered.
fn said(world: &mut World, input: Input) -> Vec<Action> {
    world.machine.on(input, &world.seen())
}

fn opens(actions: &[Action]) -> bool {
    matches!(actions.last(), Some(Action::Open(_)))
}

fn token(is_new: bool) -> Heard {
    Heard::Output { is_new }
}

/// A stream whose second computes because of `why`.
fn relieved(why: Relief) -> World {
    let mut world = running();
    match why {
        Relief::Stall => {
            world.now += STALL;
            assert!(opens(&said(&mut world, Input::Alarm)));
        }
        Relief::HandOver => assert!(opens(&said(&mut world, Input::HandOver(Slot::Primary)))),
        Relief::Slow => {
            world.is_slow = true;
            assert!(matches!(said(&mut world, Input::Alarm)[..], [Action::SeekFaster { .. }]));
            assert!(matches!(said(&mut world, Input::Faster { is_allowed: true })[..], [Action::OpenFaster(_)]));
        }
    }
    world.tell(Input::Asked(peer(1)));
    world.accept(peer(1));
    assert_eq!(world.replica(Slot::Successor), Some(&peer(1)));
    world
}

#[test]
fn a_second_takes_over_with_its_first_token_and_in_a_race_with_one_that_leads() {
    for why in [Relief::Stall, Relief::HandOver, Relief::Slow] {
        let mut world = relieved(why);
        assert_eq!(world.machine.heard(Slot::Successor, Heard::Life), [], "{why:?}");
        if why == Relief::Slow {
            assert_eq!(world.machine.heard(Slot::Successor, token(false)), []);
        }
        let moved = Note::Moved { from: peer(0), to: peer(1), why };
        let is_new = why == Relief::Slow;
        let promoted = [Action::Note(moved), Action::Promote];
        assert_eq!(world.machine.heard(Slot::Successor, token(is_new)), promoted, "{why:?}");
        assert_eq!(world.machine.heard(Slot::Primary, token(true)), [], "{why:?}");
    }
}

#[test]
fn a_primary_that_speaks_again_or_recovers_is_kept() {
    let mut world = relieved(Relief::Stall);
    assert_eq!(world.machine.heard(Slot::Primary, Heard::Life), [Action::Drop(Slot::Successor)]);
    let mut world = relieved(Relief::Slow);
    assert_eq!(world.machine.heard(Slot::Primary, token(true)), [], "the race goes on");
    world.is_slow = false;
    let lost = [Action::Drop(Slot::Successor), Action::Note(Note::RaceLost)];
    assert_eq!(said(&mut world, Input::Alarm), lost);
    let mut world = relieved(Relief::HandOver);
    assert_eq!(world.machine.heard(Slot::Primary, token(true)), [], "it still leaves");
    let mut world = relieved(Relief::Slow);
    assert_eq!(said(&mut world, Input::End), lost, "the primary was sooner");
}

#[test]
fn silence_is_noticed_after_the_stall_timeout_and_not_before() {
    let mut world = running();
    assert_eq!(world.machine.wake(&world.seen()), Some(world.now + STALL));
    world.now += STALL - Duration::from_millis(1);
    assert_eq!(said(&mut world, Input::Alarm), []);
    world.now += Duration::from_millis(1);
    let actions = said(&mut world, Input::Alarm);
    assert_eq!(actions[0], Action::Blame(Slot::Primary, FailureKind::PeerStalled));
    assert!(opens(&actions));
    // The successor is silent as well.
    let mut world = relieved(Relief::HandOver);
    world.now += STALL;
    world.primary.as_mut().expect("it runs").last_sign = world.now;
    let actions = said(&mut world, Input::Alarm);
    let lost = [Action::Blame(Slot::Successor, FailureKind::PeerStalled), Action::Drop(Slot::Successor)];
    assert_eq!(actions[..2], lost);
    assert!(opens(&actions));
}

#[test]
fn a_replica_that_ends_in_order_is_no_failover_and_too_many_failovers_end_the_stream() {
    let mut world = running();
    for turn in 0..20u8 {
        let actions = said(&mut world, Input::Lost(Slot::Primary, has_left()));
        assert!(opens(&actions), "{turn}");
        said(&mut world, Input::Accepted(peer(turn)));
    }
    for turn in 0..RULES.max_failovers {
        assert!(opens(&said(&mut world, Input::Lost(Slot::Primary, gone()))), "{turn}");
        said(&mut world, Input::Accepted(peer(0)));
    }
    let actions = said(&mut world, Input::Lost(Slot::Primary, gone()));
    assert_eq!(actions.last(), Some(&Action::Fail(gone())));
    assert_eq!(world.machine.wake(&world.seen()), None);
}

#[test]
fn a_stream_with_wrong_tokens_waits_for_its_holders_and_fails() {
    let suspect = failure(FailureKind::NumericsSuspect);
    let mut world = relieved(Relief::Slow);
    world.primary.as_mut().expect("it runs").has_spoken = true;
    let actions = said(&mut world, Input::Lost(Slot::Primary, suspect.clone()));
    assert_eq!(actions, [Action::Drop(Slot::Primary), Action::Drop(Slot::Successor), Action::Forget]);
    for input in [Input::Alarm, Input::Changed, Input::NodeFailed(gone())] {
        assert_eq!(said(&mut world, input), []);
    }
    assert_eq!(said(&mut world, Input::GateOpened), [Action::Fail(suspect.clone())]);
    // Nothing of it was sent, so another replica may continue it.
    let mut world = running();
    assert!(opens(&said(&mut world, Input::Lost(Slot::Primary, suspect))));
}

#[test]
fn a_new_request_is_retried_within_the_budget_and_one_that_was_accepted_always() {
    let full = failure(FailureKind::Overloaded);
    let refused = |failure: &Failure| Input::Refused { replica: peer(1), failure: failure.clone(), random: 0 };
    let mut world = World::new(RULES, Start::New);
    world.machine.on(Input::Begin, &world.seen());
    said(&mut world, Input::Asked(peer(1)));
    assert_eq!(said(&mut world, refused(&full)).last(), Some(&Action::TakeRetry));
    assert_eq!(said(&mut world, Input::Retry { is_allowed: false }), [Action::Fail(full.clone())]);
    let mut world = running();
    said(&mut world, Input::Lost(Slot::Primary, gone()));
    said(&mut world, Input::Asked(peer(1)));
    assert_eq!(said(&mut world, refused(&full)).last(), Some(&Action::Note(Note::Retried)), "after a pause");
    let wake = world.machine.wake(&world.seen()).expect("it goes on");
    assert!(wake > world.now && wake < world.now + Duration::from_millis(100));
    // Even if another replica calls the request invalid.
    world.now = wake;
    assert!(opens(&said(&mut world, Input::Alarm)));
    said(&mut world, Input::Asked(peer(1)));
    let invalid = failure(FailureKind::InvalidRequest);
    assert_eq!(said(&mut world, refused(&invalid)).last(), Some(&Action::Note(Note::Retried)));
}

#[test]
fn a_followed_stream_is_taken_over_once_when_its_node_is_gone() {
    let mut world = World::new(RULES, Start::Following(peer(0)));
    let actions = said(&mut world, Input::Lost(Slot::Primary, gone()));
    assert_eq!(actions[..2], [Action::TakeOver, Action::Drop(Slot::Primary)]);
    assert!(opens(&actions));
    said(&mut world, Input::Accepted(peer(1)));
    assert!(!said(&mut world, Input::Lost(Slot::Primary, gone())).contains(&Action::TakeOver));
}

#[test]
fn a_patient_peer_is_not_blamed_by_one_in_a_hurry() {
    for (waited, is_blamed) in [(STALL / 4, false), (STALL, true)] {
        let mut world = running();
        said(&mut world, Input::Lost(Slot::Primary, gone()));
        said(&mut world, Input::Asked(peer(1)));
        world.now += waited;
        let actions = said(&mut world, Input::Refused { replica: peer(1), failure: stalled(), random: 0 });
        assert_eq!(actions.contains(&Action::Blame(Slot::Asked, FailureKind::PeerStalled)), is_blamed);
    }
}

#[test]
fn the_deadline_ends_a_search_with_what_there_is() {
    for has_begun in [true, false] {
        let mut world = running();
        world.has_begun = has_begun;
        world.machine.rules.deadline = Some(world.now + Duration::from_millis(100));
        said(&mut world, Input::Lost(Slot::Primary, gone()));
        assert_eq!(world.machine.wake(&world.seen()), world.machine.rules.deadline);
        world.now += Duration::from_millis(100);
        let last = if has_begun { Action::FinishLate } else { Action::Fail(Failure::deadline_passed()) };
        assert_eq!(said(&mut world, Input::Alarm), [last]);
    }
}

#[test]
fn a_node_that_only_relays_gives_up_what_it_computes() {
    let mut world = World::new(RULES, Start::Accepted(Replica::Here));
    (world.leaves, world.only_relays) = (true, true);
    let actions = said(&mut world, Input::Changed);
    let lost = Note::Lost { from: Replica::Here, failure: has_left() };
    assert_eq!(actions[1], Action::Note(lost));
    let mut world = World::new(RULES, Start::Accepted(Replica::Here));
    (world.leaves, world.only_relays, world.has_peers) = (true, true, false);
    let actions = said(&mut world, Input::Changed);
    let [Action::Fail(failure)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(failure.code, Some("stream_interrupted"));
}
