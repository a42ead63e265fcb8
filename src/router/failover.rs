//! Runs one stream from its first source to its last token. If a source dies, stalls, leaves or computes wrong numbers, the
//! stream continues at another replica from the tokens so far. The client sees a pause, but no error and no lost or repeated
//! token.
//!
//! What becomes of the stream is decided by `machine`, whose head explains failover. This file waits for events, translates
//! them for the machine, and does what it says; `opening` finds and asks replicas.

mod machine;
mod opening;

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::future::BoxFuture;
use tokio::time::{Sleep, sleep_until};
use tracing::{info, warn};

use super::dispatch::{Destination, Want};
use super::handle::Router;
use super::peers::Peers;
use super::source::{Replica, Sign, StreamSource};
use super::stream_log::{News, StreamLog};
use super::streams::Streams;
use super::this_node::{DepartureStage, ThisNode};
use crate::cluster::{ClusterView, PeerStream};
use crate::health::NodePhase;
use crate::types::reaction::Loss;
use crate::types::{Failure, FailureKind, FinishReason, GenerationEvent, NodeState, watch};
use machine::{Action, Heard, Input, Note, Relief, Rules, Seen, Slot, SourceSeen, Start, StreamMachine};
use opening::Opening;

pub(super) struct FailoverStream {
    node: Arc<ThisNode>,
    peers: Arc<Peers>,
    streams: Arc<Streams>,
    log: Arc<StreamLog>,
    want: Want,
    machine: StreamMachine,
    primary: Option<StreamSource>,
    successor: Option<StreamSource>,
    opening: Option<Opening>,
    /// A place that was chosen before the machine asked for one.
    chosen: Option<Destination>,
    /// The work of the journal's holders that the stream waits for.
    gate: Option<BoxFuture<'static, ()>>,
    alarm: Pin<Box<Sleep>>,
    changes: Changes,
    has_ended: bool,
}

/// What changes outside the stream.
struct Changes {
    departure: watch::Receiver<DepartureStage>,
    is_cut: watch::Receiver<bool>,
    paces: watch::Receiver<()>,
    view: watch::Receiver<Arc<ClusterView>>,
    phases: watch::Receiver<NodePhase>,
}

/// The events for which the stream waits.
enum Step {
    Abandoned,
    Cut,
    GateOpened,
    Heard(Slot, Sign),
    Opened(Result<PeerStream, Failure>),
    Alarm,
    Changed,
    NodeFailed,
}

/// How a stream begins.
pub(super) enum Beginning {
    Source(StreamSource),
    /// Follow a stream that another node answers for.
    Follow(StreamSource),
    /// At a place that has already been chosen.
    Place(Destination),
    /// Continue the known tokens, at any replica.
    Anywhere,
}

impl FailoverStream {
    pub(super) fn new(
        router: Router,
        log: Arc<StreamLog>,
        want: Want,
        gate: Option<BoxFuture<'static, ()>>,
        beginning: Beginning,
    ) -> Self {
        let Router { node, peers, streams } = router;
        let (start, primary, chosen) = match beginning {
            Beginning::Source(source) => (Start::Accepted(source.replica.clone()), Some(source), None),
            Beginning::Follow(source) => (Start::Following(source.replica.clone()), Some(source), None),
            Beginning::Place(choice) => (Start::New, None, Some(choice)),
            Beginning::Anywhere => (Start::Resumed, None, None),
        };
        if let Start::Following(Replica::At(entry)) = &start {
            log.follow(Some(entry.clone()));
        }
        let rules = Rules {
            can_move: node.is_clustered,
            peer_stall_timeout: node.config.peer_stall_timeout,
            failover_timeout: node.config.failover_timeout,
            max_failovers: node.config.max_failovers,
            deadline: want.envelope.deadline,
        };
        Self {
            changes: Changes {
                departure: node.departure.subscribe(),
                is_cut: node.is_cut.subscribe(),
                paces: peers.pacing.changes.subscribe(),
                view: peers.view.clone(),
                phases: node.health.lifecycle().subscribe(),
            },
            machine: StreamMachine::new(rules, start),
            node,
            peers,
            streams,
            log,
            want,
            primary,
            successor: None,
            opening: None,
            chosen,
            gate,
            alarm: Box::pin(sleep_until(tokio::time::Instant::now())),
            has_ended: false,
        }
    }

    /// Runs until every choice has ended, the stream has failed, or nobody listens.
    pub(super) async fn run(mut self) {
        // The journal may contain the whole stream.
        if !self.log.is_complete() {
            self.tell(Input::Begin);
            // The node may have begun to leave just now, which is not reported a second time.
            self.tell(Input::Alarm);
            self.set_alarm();
        }
        loop {
            while !(self.log.is_complete() && self.gate.is_none()) {
                match self.step().await {
                    Step::Abandoned => break,
                    step => self.take(step),
                }
            }
            // If a listener joined just now, the stream continues for it.
            if self.log.close(!self.log.is_complete()) {
                break;
            }
        }
        self.tell(Input::End);
        self.has_ended = true;
        self.streams.ended(&self.log);
    }

    async fn step(&mut self) -> Step {
        // After the last token a source can only report its end, which is not a failure, and no other is needed.
        let is_open = !self.log.is_complete();
        let wants_news = self.machine.wants_news();
        let has_failed = self.machine.knows_node_failed();
        let changes = &mut self.changes;
        tokio::select! {
            biased;
            () = self.log.abandoned() => Step::Abandoned,
            () = cut(&mut changes.is_cut) => Step::Cut,
            Ok(()) = changes.departure.changed(), if is_open => Step::Changed,
            () = optional(&mut self.gate) => Step::GateOpened,
            sign = next(&mut self.primary), if is_open => Step::Heard(Slot::Primary, sign),
            sign = next(&mut self.successor), if is_open => Step::Heard(Slot::Successor, sign),
            result = opened(&mut self.opening), if is_open => Step::Opened(result),
            () = self.alarm.as_mut(), if is_open => Step::Alarm,
            () = failure(&mut changes.phases), if is_open && !has_failed => Step::NodeFailed,
            Ok(()) = changes.paces.changed(), if is_open => Step::Changed,
            Ok(()) = changes.view.changed(), if is_open && wants_news => Step::Changed,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Abandoned => return,
            Step::GateOpened => {
                self.gate = None;
                return self.tell(Input::GateOpened);
            }
            Step::Heard(slot, sign) => return self.hear(slot, sign),
            Step::Cut => self.tell(Input::Cut),
            Step::Opened(result) => self.opened(result),
            Step::Alarm => self.tell(Input::Alarm),
            Step::Changed => self.tell(Input::Changed),
            Step::NodeFailed => self.tell(Input::NodeFailed(self.node.health.engine_failure())),
        }
        self.set_alarm();
    }

    /// Passes on what a source says, and all that it has said already.
    fn hear(&mut self, slot: Slot, sign: Sign) {
        let mut next = Some(sign);
        while let Some(sign) = next {
            let heard = match sign {
                Sign::Event(event) => self.judge(slot, event),
                Sign::Heartbeat => Ok(Heard::Life),
                Sign::HandOver => {
                    // It speaks, so it is not silent.
                    self.heard(slot, Heard::Life);
                    self.tell(Input::HandOver(slot));
                    return self.set_alarm();
                }
            };
            match heard {
                Ok(heard) => self.heard(slot, heard),
                Err(failure) => {
                    self.heard(slot, Heard::Life);
                    self.tell(Input::Lost(slot, failure));
                    return self.set_alarm();
                }
            }
            next = match slot {
                Slot::Primary => self.primary.as_mut().and_then(StreamSource::try_next),
                Slot::Asked | Slot::Successor => None,
            };
        }
    }

    fn heard(&mut self, slot: Slot, heard: Heard) {
        let actions = self.machine.heard(slot, heard);
        if !actions.is_empty() {
            self.obey(actions);
            // After a sign of the primary the alarm may be early, and the next look sets it.
            if slot == Slot::Successor {
                self.set_alarm();
            }
        }
    }

    /// Passes an event to the journal. An error ends its source.
    fn judge(&mut self, slot: Slot, event: GenerationEvent) -> Result<Heard, Failure> {
        let source = match slot {
            Slot::Primary => self.primary.as_mut(),
            Slot::Asked | Slot::Successor => self.successor.as_mut(),
        };
        let source = source.expect("it spoke");
        if let GenerationEvent::Finished { reason, .. } = &event
            && slot == Slot::Primary
            && self.machine.follows()
            && !reason.is_of_the_generation()
        {
            // The deadline belonged to another client.
            let message = "The stream has ended at the other node.";
            return Err(Failure::new(FailureKind::PeerDisconnected, message));
        }
        let is_output = matches!(event, GenerationEvent::Token { .. } | GenerationEvent::Finished { .. });
        let news = self.streams.judge(&self.log, &mut source.cursor, event, self.node.is_clustered)?;
        if slot == Slot::Primary {
            self.peers.accepted(source);
        }
        Ok(match is_output {
            true => Heard::Output { is_new: news == News::Taken },
            false => Heard::Life,
        })
    }

    /// Tells the machine, and does what it says until it has nothing more to say.
    fn tell(&mut self, input: Input) {
        let seen = self.seen();
        let actions = self.machine.on(input, &seen);
        self.obey(actions);
    }

    fn obey(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Open(terms) => {
                    let choice = self.chosen.take().unwrap_or_else(|| self.choose(&terms));
                    self.open(choice, &terms);
                }
                Action::SeekFaster { excluded } => {
                    if let Some(choice) = self.faster_replica(&excluded) {
                        self.chosen = Some(choice);
                        self.tell(Input::Faster { is_allowed: self.peers.may_retry() });
                    }
                }
                Action::OpenFaster(terms) => {
                    let choice = self.chosen.take().expect("a faster one was found");
                    self.open(choice, &terms);
                }
                Action::TakeRetry => self.tell(Input::Retry { is_allowed: self.peers.may_retry() }),
                Action::Blame(slot, kind) => self.blame(slot, kind),
                Action::Drop(Slot::Primary) => self.primary = None,
                Action::Drop(Slot::Asked) => self.opening = None,
                Action::Drop(Slot::Successor) => self.successor = None,
                Action::Promote => self.primary = self.successor.take(),
                Action::TakeOver => {
                    self.log.follow(None);
                    self.log.set_epoch(self.log.epoch() + 1);
                    self.gate = self.peers.are_there().then(|| self.streams.replicate(self.log.clone()));
                }
                Action::Forget => self.gate = Some(self.streams.forget(self.log.clone())),
                Action::OpenGate => self.log.open_gate(),
                Action::FinishLate => self.log.finish_all(&FinishReason::Deadline),
                Action::Fail(failure) => self.log.fail(failure),
                Action::Note(note) => self.note(note),
            }
        }
    }

    fn blame(&self, slot: Slot, kind: FailureKind) {
        let attempt = match slot {
            Slot::Primary => self.primary.as_ref().and_then(|source| source.attempt),
            Slot::Asked => self.opening.as_ref().and_then(|opening| opening.attempt),
            Slot::Successor => self.successor.as_ref().and_then(|source| source.attempt),
        };
        if let Some(replica) = self.replica(slot) {
            self.peers.failed(replica, attempt, kind);
        }
    }

    fn note(&self, note: Note) {
        let (request, metrics) = (&self.log.envelope.id, &self.node.metrics);
        match note {
            Note::Lost { from, failure } => {
                match failure.kind.reaction().loss {
                    Loss::HandOver => _ = metrics.hand_overs.inc(),
                    Loss::Failover => _ = metrics.failovers.with([failure.kind.label()]).inc(),
                }
                info!(%request, %from, cause = failure.shown_code(), "a stream lost its replica");
            }
            Note::LostTooMany { failovers } => warn!(%request, failovers, "a stream lost too many replicas"),
            Note::Moved { from, to, why } => {
                let cause = match why {
                    Relief::Stall => "its replica is silent",
                    Relief::Slow => "its replica is slow",
                    Relief::HandOver => "its replica is leaving",
                };
                match why {
                    Relief::Stall => _ = metrics.failovers.with([FailureKind::PeerStalled.label()]).inc(),
                    Relief::Slow => _ = metrics.rescues.with(["won"]).inc(),
                    Relief::HandOver => _ = metrics.hand_overs.inc(),
                }
                info!(%request, %from, %to, cause, "a stream moved");
            }
            Note::Retried => _ = metrics.placement_retries.inc(),
            Note::RaceLost => _ = metrics.rescues.with(["lost"]).inc(),
            Note::RaceWithoutBudget => _ = metrics.rescues.with(["no_budget"]).inc(),
        }
    }

    fn seen(&self) -> Seen {
        let see = |source: &StreamSource| SourceSeen { last_sign: source.last_sign(), has_spoken: source.has_spoken() };
        Seen {
            now: now(),
            primary: self.primary.as_ref().map(see),
            successor: self.successor.as_ref().map(see),
            is_slow: self.primary.as_ref().is_some_and(|primary| self.peers.pacing.is_slow(&primary.replica)),
            has_begun: self.log.has_begun(),
            has_peers: self.peers.are_there(),
            leaves: self.node.leaves(),
            only_relays: self.node.only_relays(),
        }
    }

    /// Sets the time of the next look, if no event comes first.
    fn set_alarm(&mut self) {
        let Some(wake) = self.machine.wake(&self.seen()) else { return };
        for slot in [Slot::Primary, Slot::Asked, Slot::Successor] {
            assert_eq!(self.replica(slot), self.machine.replica(slot), "{slot:?}");
        }
        self.alarm.as_mut().reset(wake.into());
    }

    fn replica(&self, slot: Slot) -> Option<&Replica> {
        match slot {
            Slot::Primary => self.primary.as_ref().map(|source| &source.replica),
            Slot::Asked => self.opening.as_ref().map(|opening| &opening.replica),
            Slot::Successor => self.successor.as_ref().map(|source| &source.replica),
        }
    }
}

impl Drop for FailoverStream {
    /// Makes sure that the stream has an end, however the task ends.
    fn drop(&mut self) {
        if !self.has_ended {
            self.log.fail(Failure::new(FailureKind::Internal, "Internal error while handling this stream."));
            self.log.close(false);
            self.streams.ended(&self.log);
        }
    }
}

pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn next(source: &mut Option<StreamSource>) -> Sign {
    match source {
        Some(source) => source.next().await,
        None => pending().await,
    }
}

async fn opened(opening: &mut Option<Opening>) -> Result<PeerStream, Failure> {
    match opening {
        Some(opening) => (&mut opening.stream).await,
        None => pending().await,
    }
}

async fn optional(future: &mut Option<BoxFuture<'static, ()>>) {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

async fn failure(phases: &mut watch::Receiver<NodePhase>) {
    if phases.wait_for(|phase| phase.state == NodeState::Failed).await.is_err() {
        pending().await
    }
}

async fn cut(is_cut: &mut watch::Receiver<bool>) {
    if is_cut.wait_for(|is_cut| *is_cut).await.is_err() {
        pending().await
    }
}
