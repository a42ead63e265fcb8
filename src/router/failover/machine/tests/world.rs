//! A world for the machine: it answers at random, and checks every action.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::super::super::now;
use super::super::{
    Action, Heard, Input, LEAST_WAIT, Note, Relief, Rules, Seen, Slot, SourceSeen, Start, StreamMachine, Terms,
};
use crate::router::source::Replica;
use crate::types::reaction::{Avoid, Elsewhere, Loss};
use crate::types::{Failure, FailureKind, NodeId};

pub const STALL: Duration = Duration::from_secs(2);
pub const RULES: Rules = Rules {
    can_move: true,
    peer_stall_timeout: STALL,
    failover_timeout: Duration::from_secs(30),
    max_failovers: 3,
    deadline: None,
};
/// A replica that lies or is too old is not asked for longer than any test lasts.
const NEVER: Duration = Duration::from_secs(3600);

pub fn peer(index: u8) -> Replica {
    Replica::At(NodeId::new(format!("n{index}")))
}

pub fn all() -> [Replica; 4] {
    [Replica::Here, peer(0), peer(1), peer(2)]
}

pub fn failure(kind: FailureKind) -> Failure {
    Failure::new(kind, kind.label())
}

pub fn gone() -> Failure {
    failure(FailureKind::PeerDisconnected)
}

/// What a stream's shell knows, and what it checks of each action.
pub struct World {
    pub machine: StreamMachine,
    pub rules: Rules,
    pub now: Instant,
    pub random: u64,
    pub primary: Option<Fake>,
    pub asked: Option<Replica>,
    pub successor: Option<Fake>,
    pub has_begun: bool,
    pub is_slow: bool,
    pub has_peers: bool,
    pub leaves: bool,
    pub only_relays: bool,
    /// No replica is left.
    pub is_empty: bool,
    /// Replicas that must not be asked, and until when.
    pub excluded: BTreeMap<Replica, Instant>,
    was_accepted: bool,
    failovers: u32,
    races_won: u32,
    /// Retries that the budget has allowed, and that were not used yet.
    allowed: u32,
    lacked_budget: u32,
    is_spoiled: bool,
    /// The last action, if the machine ended the stream.
    pub last: Option<Action>,
}

#[derive(Clone, Debug)]
pub struct Fake {
    replica: Replica,
    pub last_sign: Instant,
    pub has_spoken: bool,
}

impl World {
    pub fn new(rules: Rules, start: Start) -> Self {
        let now = now();
        let fake = |replica: &Replica| Fake { replica: replica.clone(), last_sign: now, has_spoken: false };
        let primary = match &start {
            Start::Accepted(replica) | Start::Following(replica) => Some(fake(replica)),
            Start::New | Start::Resumed => None,
        };
        Self {
            rules,
            now,
            random: 1,
            was_accepted: primary.is_some(),
            primary,
            asked: None,
            successor: None,
            has_begun: matches!(start, Start::Resumed | Start::Following(_)),
            machine: StreamMachine::new(rules, start),
            is_slow: false,
            has_peers: true,
            leaves: false,
            only_relays: false,
            is_empty: false,
            excluded: BTreeMap::new(),
            failovers: 0,
            races_won: 0,
            allowed: 0,
            lacked_budget: 0,
            is_spoiled: false,
            last: None,
        }
    }

    pub fn seen(&self) -> Seen {
        let see = |source: &Fake| SourceSeen { last_sign: source.last_sign, has_spoken: source.has_spoken };
        Seen {
            now: self.now,
            primary: self.primary.as_ref().map(see),
            successor: self.successor.as_ref().map(see),
            is_slow: self.is_slow,
            has_begun: self.has_begun,
            has_peers: self.has_peers,
            leaves: self.leaves,
            only_relays: self.only_relays,
        }
    }

    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.random >> 33
    }

    pub fn exclude(&mut self, replica: Replica, failure: &Failure) {
        let time = match failure.kind.reaction().avoid {
            Avoid::Briefly => Duration::from_secs(1),
            Avoid::ByThisStream => NEVER,
        };
        self.excluded.insert(replica, self.now + time);
    }

    fn is_excluded(&self, replica: &Replica) -> bool {
        self.excluded.get(replica).is_some_and(|until| *until > self.now)
    }

    /// Gives an input, and does what the machine says.
    pub fn tell(&mut self, input: Input) {
        let may_end = match &input {
            Input::Refused { failure, .. } => failure.kind.reaction().elsewhere == Elsewhere::Never,
            Input::Shed(_) | Input::Nowhere { .. } | Input::Retry { .. } => false,
            _ => true,
        };
        let must_go_on = self.was_accepted && self.rules.can_move && !may_end;
        let actions = self.machine.on(input, &self.seen());
        let fails = actions.iter().any(|action| matches!(action, Action::Fail(_)));
        assert!(!(fails && must_go_on), "it was accepted: {actions:?}");
        self.obey(actions);
    }

    fn obey(&mut self, actions: Vec<Action>) {
        for action in actions {
            assert!(self.last.is_none(), "it had ended, and then: {action:?}");
            assert!(
                !self.is_spoiled || matches!(action, Action::Drop(_) | Action::Forget | Action::Fail(_)),
                "nobody may continue it: {action:?}"
            );
            match action {
                Action::Open(terms) | Action::OpenFaster(terms) if self.asked.is_some() => {
                    panic!("one is asked already: {terms:?}")
                }
                Action::Open(terms) => self.open(&terms, false),
                Action::OpenFaster(terms) => {
                    assert!(self.allowed > 0, "a race without budget");
                    self.allowed -= 1;
                    self.open(&terms, true);
                }
                Action::SeekFaster { excluded } => {
                    assert!(self.failovers + self.races_won < self.rules.max_failovers, "it moves too often");
                    let primary = self.primary.as_ref().expect("a race needs a primary");
                    assert!(excluded.contains(&primary.replica), "it races against itself");
                    let is_allowed = self.draw().is_multiple_of(2);
                    if all().iter().any(|replica| !excluded.contains(replica)) && self.draw().is_multiple_of(2) {
                        self.allowed += u32::from(is_allowed);
                        self.tell(Input::Faster { is_allowed });
                    }
                }
                Action::TakeRetry => {
                    assert!(!self.was_accepted, "it was accepted");
                    let is_allowed = !self.draw().is_multiple_of(4);
                    self.tell(Input::Retry { is_allowed });
                    assert!(is_allowed || matches!(self.last, Some(Action::Fail(_))), "it retries without budget");
                }
                Action::Blame(slot, kind) => {
                    let replica = self.replica(slot).expect("it is there to be blamed").clone();
                    if kind == FailureKind::PeerStalled {
                        self.exclude(replica, &failure(kind));
                    }
                }
                Action::Drop(slot) => {
                    assert!(self.replica(slot).is_some(), "{slot:?} is empty");
                    match slot {
                        Slot::Primary => self.primary = None,
                        Slot::Asked => self.asked = None,
                        Slot::Successor => self.successor = None,
                    }
                }
                Action::Promote => {
                    self.primary = Some(self.successor.take().expect("somebody is promoted"));
                }
                Action::TakeOver => assert!(!self.machine.follows()),
                Action::Forget => self.is_spoiled = true,
                Action::OpenGate => {}
                Action::FinishLate => {
                    assert!(self.rules.deadline.is_some_and(|deadline| deadline <= self.now) && self.has_begun);
                    self.end(action);
                }
                Action::Fail(ref failure) => {
                    assert!(!failure.message.is_empty());
                    let is_suspect = failure.kind == FailureKind::NumericsSuspect || failure.code.is_some();
                    assert!(!self.is_spoiled || is_suspect, "{failure}");
                    self.end(action);
                }
                Action::Note(note) => self.note(note),
            }
        }
    }

    fn end(&mut self, last: Action) {
        self.last = Some(last);
        (self.primary, self.asked, self.successor) = (None, None, None);
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Lost { failure, .. } => {
                self.failovers += u32::from(failure.kind.reaction().loss == Loss::Failover);
                assert!(self.failovers <= self.rules.max_failovers, "it lost too many");
            }
            Note::LostTooMany { failovers } => {
                // A second that took over from a silent primary may have been one too many already.
                assert!(failovers > self.rules.max_failovers && failovers <= self.failovers + 1, "it has lost few");
            }
            Note::Moved { why, from, to } => {
                // A replica that was silent may have started again.
                assert!(from != to || why == Relief::Stall);
                self.failovers += u32::from(why == Relief::Stall);
                self.races_won += u32::from(why == Relief::Slow);
            }
            Note::RaceWithoutBudget => {
                self.lacked_budget += 1;
                assert_eq!(self.lacked_budget, 1, "counted once");
            }
            Note::Retried | Note::RaceLost => {}
        }
    }

    fn open(&mut self, terms: &Terms, is_race: bool) {
        assert!(self.successor.is_none(), "a third one is opened");
        assert_eq!(terms.is_only_source, self.primary.is_none());
        assert!(terms.is_continuation || !self.was_accepted, "it was accepted");
        assert!(!terms.allows_other_numbers || !self.has_begun, "it has tokens with its numbers");
        for replica in all() {
            assert!(!self.is_excluded(&replica) || terms.excluded.contains(&replica), "{replica} is asked again");
        }
        let primary = self.replica(Slot::Primary).filter(|_| is_race).cloned();
        let is_free = |replica: &Replica| !terms.excluded.contains(replica) && Some(replica) != primary.as_ref();
        let free: Vec<Replica> = all().into_iter().filter(is_free).collect();
        let failure = failure(FailureKind::ALL[self.draw() as usize % FailureKind::ALL.len()]);
        match self.draw() % 8 {
            0 if !is_race && !self.is_empty => self.tell(Input::Shed(failure)),
            1 if !is_race && !self.is_empty => {
                let may_come = self.draw().is_multiple_of(2);
                self.tell(Input::Nowhere { failure, may_come });
            }
            _ if free.is_empty() || self.is_empty => self.tell(Input::Nowhere { failure, may_come: true }),
            draw => match free[self.draw() as usize % free.len()].clone() {
                Replica::Here if draw < 4 => self.refuse(Replica::Here, failure),
                Replica::Here => self.accept(Replica::Here),
                replica => {
                    self.asked = Some(replica.clone());
                    self.tell(Input::Asked(replica));
                }
            },
        }
    }

    pub fn accept(&mut self, replica: Replica) {
        self.asked = None;
        let fake = Fake { replica: replica.clone(), last_sign: self.now, has_spoken: false };
        match self.primary {
            Some(_) => assert!(self.successor.replace(fake).is_none(), "two successors"),
            None => self.primary = Some(fake),
        }
        self.was_accepted = true;
        self.tell(Input::Accepted(replica));
    }

    pub fn refuse(&mut self, replica: Replica, failure: Failure) {
        self.exclude(replica.clone(), &failure);
        let random = self.draw();
        self.tell(Input::Refused { replica, failure, random });
    }

    pub fn replica(&self, slot: Slot) -> Option<&Replica> {
        match slot {
            Slot::Primary => self.primary.as_ref().map(|source| &source.replica),
            Slot::Asked => self.asked.as_ref(),
            Slot::Successor => self.successor.as_ref().map(|source| &source.replica),
        }
    }

    fn source(&mut self, slot: Slot) -> Option<&mut Fake> {
        match slot {
            Slot::Primary => self.primary.as_mut(),
            Slot::Asked => None,
            Slot::Successor => self.successor.as_mut(),
        }
    }

    pub fn hear(&mut self, slot: Slot, heard: Heard) {
        let now = self.now;
        let Some(source) = self.source(slot) else { return };
        source.last_sign = now;
        let speaks = matches!(heard, Heard::Output { .. });
        source.has_spoken |= speaks;
        self.has_begun |= speaks;
        let actions = self.machine.heard(slot, heard);
        let promotions = actions.iter().filter(|action| **action == Action::Promote).count();
        let leads = slot == Slot::Successor && heard == Heard::Output { is_new: true };
        assert!(promotions == usize::from(leads) || (slot == Slot::Successor && speaks && promotions <= 1));
        self.obey(actions);
    }

    /// Whatever happened, the slots agree, and the machine waits for something or has said how the stream ends.
    pub fn check(&self) {
        let wake = self.machine.wake(&self.seen());
        assert_eq!(wake.is_none(), self.last.is_some());
        let Some(wake) = wake else { return };
        assert!(wake <= self.now + Duration::from_secs(60));
        for slot in [Slot::Primary, Slot::Asked, Slot::Successor] {
            assert_eq!(self.replica(slot), self.machine.replica(slot), "{slot:?}");
        }
        let sources = [&self.primary, &self.successor].into_iter().flatten();
        let next = sources.map(|source| source.last_sign + STALL).min();
        let is_stalled = self.machine.state.relief() == Some(Relief::Stall);
        assert!(
            is_stalled || next.is_none_or(|next| wake <= next.max(self.now + LEAST_WAIT)),
            "silence is noticed late"
        );
    }
}
