//! Runs one stream from its first source to its last token. If a source dies, stalls, leaves or computes wrong numbers, the
//! stream continues at another replica from the tokens so far. The client sees a pause, but no error and no lost or repeated
//! token.
//!
//! A source that is only silent or slow, or that asks to be replaced, keeps running until its successor delivers. The first
//! token to arrive counts; since a generation is a pure function, both are equal. If a source turns out to have computed wrong
//! numbers, its tokens cannot be trusted, and the stream ends with an error.

mod opening;
mod rescue;

use std::collections::BTreeMap;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::time::{Sleep, sleep_until};
use tracing::{info, warn};

use super::breaker::Attempt;
use super::dispatch::{Destination, Want};
use super::shared::{DepartureStage, RouterState, has_left};
use super::source::{Replica, Sign, StreamSource};
use super::stream_log::{News, StreamLog};
use crate::cluster::{ClusterView, PeerStream};
use crate::health::NodePhase;
use crate::types::reaction::{Avoid, Elsewhere, Loss};
use crate::types::{Failure, FailureKind, FinishReason, GenerationEvent, NodeState, watch};
use opening::Opening;

/// A replica that failed a stream is not used again by that stream for this long.
const EXCLUSION: Duration = Duration::from_secs(1);
/// Longer than any stream.
const EXCLUSION_FOR_GOOD: Duration = Duration::from_secs(86_400);
/// How often to look for a replica while there is none. It is also looked for whenever the cluster changes.
const SEARCH_INTERVAL: Duration = Duration::from_millis(250);
/// How often a stream on a leaving replica looks for another one.
const HAND_OVER_INTERVAL: Duration = Duration::from_millis(500);
/// How often a stream of a slow replica considers a race.
const RACE_INTERVAL: Duration = Duration::from_millis(250);

pub(super) struct FailoverStream {
    shared: Arc<RouterState>,
    log: Arc<StreamLog>,
    want: Want,
    primary: Option<StreamSource>,
    /// Takes over with its first token.
    successor: Option<StreamSource>,
    opening: Option<Opening>,
    /// Why a successor is wanted while the primary is still alive.
    relief: Option<Relief>,
    excluded: BTreeMap<Replica, Instant>,
    /// The primary is a stream of another entry node, which keeps the journal.
    follows: bool,
    /// Some replica has accepted the stream.
    was_accepted: bool,
    /// A fresh stream: no other node has tokens that we lack.
    began_here: bool,
    has_ended: bool,
    /// Number of sources lost so far.
    failovers: u32,
    /// Number of races won.
    rescues: u32,
    attempts: u32,
    last_failure: Option<Failure>,
    /// Since when there is no source and none is being opened.
    searching_since: Option<Instant>,
    not_before: Option<Instant>,
    alarm: Pin<Box<Sleep>>,
    gate: Option<BoxFuture<'static, ()>>,
    /// The failure with which the stream ends when the gate opens.
    spoiled_by: Option<Failure>,
    departure: watch::Receiver<DepartureStage>,
    is_cut: watch::Receiver<bool>,
    paces: watch::Receiver<()>,
    /// The retry budget did not allow a race that was wanted.
    lacked_budget: bool,
    view: watch::Receiver<Arc<ClusterView>>,
    phases: watch::Receiver<NodePhase>,
    /// This node's failure has been noticed.
    has_failed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relief {
    /// The primary is silent.
    Stall,
    /// The primary is leaving.
    HandOver,
    /// The primary is slow: a race.
    Slow,
}

/// The events for which the stream waits.
enum Step {
    Abandoned,
    Cut,
    GateOpened,
    Primary(Sign),
    Successor(Sign),
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
        shared: Arc<RouterState>,
        log: Arc<StreamLog>,
        want: Want,
        gate: Option<BoxFuture<'static, ()>>,
    ) -> Self {
        Self {
            departure: shared.departure.subscribe(),
            is_cut: shared.is_cut.subscribe(),
            paces: shared.pacing.changes.subscribe(),
            lacked_budget: false,
            view: shared.view.clone(),
            phases: shared.health.lifecycle().subscribe(),
            has_failed: false,
            shared,
            log,
            want,
            primary: None,
            successor: None,
            opening: None,
            relief: None,
            excluded: BTreeMap::new(),
            follows: false,
            was_accepted: false,
            began_here: false,
            has_ended: false,
            failovers: 0,
            rescues: 0,
            attempts: 0,
            last_failure: None,
            searching_since: None,
            not_before: None,
            alarm: Box::pin(sleep_until(tokio::time::Instant::now())),
            gate,
            spoiled_by: None,
        }
    }

    /// Runs until every choice has ended, the stream has failed, or nobody listens.
    pub(super) async fn run(mut self, beginning: Beginning) {
        self.began_here = matches!(beginning, Beginning::Source(_) | Beginning::Place(_));
        match beginning {
            // The journal may contain the whole stream.
            _ if self.log.is_complete() => {}
            Beginning::Source(source) => self.primary = Some(source),
            Beginning::Follow(source) => {
                self.follows = true;
                self.was_accepted = true;
                self.log.follow(match &source.replica {
                    Replica::At(node) => Some(node.clone()),
                    Replica::Here => None,
                });
                self.primary = Some(source);
            }
            Beginning::Place(choice) => self.open_chosen(choice),
            Beginning::Anywhere => self.open(),
        }
        if !self.log.is_complete() {
            // The node may have begun to leave just now, which is not reported a second time.
            self.look_around();
        }
        loop {
            while !(self.log.is_complete() && self.gate.is_none()) {
                match self.step().await {
                    Step::Abandoned => break,
                    Step::Cut => self.cut(),
                    Step::GateOpened => {
                        self.gate = None;
                        match self.spoiled_by.take() {
                            Some(failure) => self.log.fail(failure),
                            None => self.log.open_gate(),
                        }
                    }
                    Step::Primary(sign) => self.hear_primary(sign),
                    Step::Successor(sign) => self.hear_successor(sign),
                    Step::Opened(result) => self.opened(result),
                    Step::Alarm => self.look_around(),
                    Step::NodeFailed => self.node_failed(),
                    Step::Changed => {
                        self.not_before = None;
                        self.look_around();
                    }
                }
            }
            // If a listener joined just now, the stream continues for it.
            if self.log.close(!self.log.is_complete()) {
                break;
            }
        }
        self.give_up_race();
        self.has_ended = true;
        self.shared.stream_ended(&self.log);
    }

    async fn step(&mut self) -> Step {
        let is_searching = self.primary.is_none() && self.opening.is_none() && self.successor.is_none();
        let wants_news = is_searching || self.relief.is_some();
        // After the last token a source can only report its end, which is not a failure.
        let is_complete = self.log.is_complete();
        tokio::select! {
            biased;
            () = self.log.abandoned() => Step::Abandoned,
            () = cut(&mut self.is_cut) => Step::Cut,
            Ok(()) = self.departure.changed() => Step::Changed,
            () = optional(&mut self.gate) => Step::GateOpened,
            sign = next(&mut self.primary), if !is_complete => Step::Primary(sign),
            sign = next(&mut self.successor), if !is_complete => Step::Successor(sign),
            result = opened(&mut self.opening) => Step::Opened(result),
            () = self.alarm.as_mut() => Step::Alarm,
            () = failure(&mut self.phases), if !self.has_failed => Step::NodeFailed,
            Ok(()) = self.paces.changed() => Step::Changed,
            Ok(()) = self.view.changed(), if wants_news => Step::Changed,
        }
    }

    fn hear_primary(&mut self, sign: Sign) {
        let mut next = Some(sign);
        while let Some(sign) = next {
            let Some(primary) = &mut self.primary else { return };
            if self.relief == Some(Relief::Stall) {
                // The primary was only slow.
                self.relief = None;
                self.successor = None;
                self.opening = None;
            }
            match sign {
                Sign::Event(GenerationEvent::Finished { reason, .. })
                    if self.follows && !reason.is_of_the_generation() =>
                {
                    // The deadline belonged to another client.
                    return self.lose_primary(Failure::new(
                        FailureKind::PeerDisconnected,
                        "The stream has ended at the other node.",
                    ));
                }
                Sign::Event(event) => match self.shared.judge(&self.log, &mut primary.cursor, event) {
                    Ok(_) => self.shared.accepted(primary),
                    Err(failure) => return self.lose_primary(failure),
                },
                Sign::Heartbeat => {}
                Sign::HandOver => {
                    primary.is_leaving = true;
                    return self.look_around();
                }
            }
            next = self.primary.as_mut().and_then(StreamSource::try_next);
        }
    }

    fn hear_successor(&mut self, sign: Sign) {
        let successor = self.successor.as_mut().expect("it spoke");
        match sign {
            Sign::Event(event) => {
                let speaks = matches!(event, GenerationEvent::Token { .. } | GenerationEvent::Finished { .. });
                match self.shared.judge(&self.log, &mut successor.cursor, event) {
                    // In a race the successor is behind until it has brought a token that the stream did not have.
                    Ok(News::Known) if self.relief == Some(Relief::Slow) => {}
                    Ok(News::Taken | News::Known) if speaks => self.promote(),
                    Ok(_) => {}
                    Err(failure) => {
                        let lost = self.successor.take().expect("it spoke");
                        self.exclude(lost.replica, lost.attempt, &failure);
                        self.set_alarm();
                    }
                }
            }
            Sign::Heartbeat => {}
            Sign::HandOver => {
                let replica = self.successor.take().expect("it spoke").replica;
                self.excluded.insert(replica, now() + EXCLUSION);
                self.set_alarm();
            }
        }
    }

    /// The other entry node is gone or silent, so this node now answers for the stream. Returns false if it already did.
    fn take_over(&mut self) -> bool {
        let followed = std::mem::take(&mut self.follows);
        if followed {
            self.log.follow(None);
            self.log.set_epoch(self.log.epoch() + 1);
            self.gate = self.shared.has_peers().then(|| self.shared.clone().replicate(self.log.clone()));
        }
        followed
    }

    /// Makes the successor the primary: it has delivered a token.
    fn promote(&mut self) {
        let relief = self.relief.take();
        self.take_over();
        let before = std::mem::replace(&mut self.primary, self.successor.take());
        if let Some(before) = before {
            let cause = match relief {
                Some(Relief::Stall) => "its replica is silent",
                Some(Relief::Slow) => "its replica is slow",
                Some(Relief::HandOver) | None => "its replica is leaving",
            };
            info!(request = %self.log.envelope.id, from = %before.replica, to = %self.place_name(), cause, "a stream moved");
            match relief {
                Some(Relief::Stall) => {
                    self.failovers += 1;
                    self.shared.metrics.failovers.with([FailureKind::PeerStalled.label()]).inc();
                }
                Some(Relief::Slow) => {
                    self.rescues += 1;
                    self.shared.metrics.rescues.with(["won"]).inc();
                }
                Some(Relief::HandOver) | None => _ = self.shared.metrics.hand_overs.inc(),
            }
        }
        self.set_alarm();
    }

    fn lose_primary(&mut self, failure: Failure) {
        let lost = self.primary.take().expect("it was lost");
        self.relief = None;
        let reaction = failure.kind.reaction();
        if reaction.elsewhere == Elsewhere::UnlessItSpoke && lost.has_spoken() {
            return self.spoil(failure);
        }
        if self.take_over() {
            self.excluded.insert(lost.replica, now() + EXCLUSION);
            self.last_failure = Some(failure);
            self.open();
            return self.set_alarm();
        }
        if !reaction.elsewhere.allows(true) || !self.shared.can_move() {
            return self.log.fail(failure);
        }
        self.exclude(lost.replica.clone(), lost.attempt, &failure);
        self.was_accepted = true;
        self.failovers += u32::from(reaction.loss == Loss::Failover);
        if self.failovers > self.shared.config.max_failovers {
            warn!(request = %self.log.envelope.id, failovers = self.failovers, "a stream lost too many replicas");
            return self.log.fail(failure);
        }
        match reaction.loss {
            Loss::HandOver => _ = self.shared.metrics.hand_overs.inc(),
            Loss::Failover => _ = self.shared.metrics.failovers.with([reaction.label]).inc(),
        }
        info!(from = %lost.replica, cause = failure.shown_code(), "a stream lost its replica");
        self.last_failure = Some(failure);
        match self.successor.take() {
            Some(successor) => self.primary = Some(successor),
            None if self.opening.is_some() => {}
            None => self.open(),
        }
        self.set_alarm();
    }

    /// The tokens may be wrong. The stream ends as soon as no replica can continue it.
    fn spoil(&mut self, failure: Failure) {
        self.successor = None;
        self.opening = None;
        self.spoiled_by = Some(failure);
        self.gate = Some(self.shared.clone().forget(self.log.clone()));
    }

    /// Remembers that the replica failed, for this stream and in its breaker.
    fn exclude(&mut self, replica: Replica, attempt: Option<Attempt>, failure: &Failure) {
        self.shared.failed(&replica, attempt, failure.kind);
        let until = match failure.kind.reaction().avoid {
            Avoid::Briefly => now() + EXCLUSION,
            Avoid::ByThisStream => now() + EXCLUSION_FOR_GOOD,
        };
        self.excluded.insert(replica, until);
    }

    /// Checks everything that may have changed with time.
    fn look_around(&mut self) {
        if self.spoiled_by.is_some() {
            return self.set_alarm();
        }
        let (now, stall) = (now(), self.shared.config.peer_stall_timeout);
        let is_silent = |source: &StreamSource| now.saturating_duration_since(source.last_sign()) >= stall;
        let stalled = || Failure::new(FailureKind::PeerStalled, "The replica stopped answering.");
        if self.successor.as_ref().is_some_and(is_silent) {
            let lost = self.successor.take().expect("it is silent");
            self.exclude(lost.replica, lost.attempt, &stalled());
        }
        let leaves =
            |source: &StreamSource| source.is_leaving || (source.replica == Replica::Here && self.shared.leaves());
        match &self.primary {
            Some(primary) if primary.replica == Replica::Here && self.shared.only_relays() => {
                match self.shared.has_peers() {
                    true => self.lose_primary(has_left()),
                    false => self.cut(),
                }
            }
            Some(primary) if is_silent(primary) && self.relief != Some(Relief::Stall) => {
                let (replica, attempt) = (primary.replica.clone(), primary.attempt);
                self.relief = Some(Relief::Stall);
                self.exclude(replica, attempt, &stalled());
                self.last_failure = Some(stalled());
                self.relieve();
            }
            Some(primary) if is_silent(primary) => self.relieve(),
            Some(primary) if leaves(primary) => {
                self.relief = Some(Relief::HandOver);
                let replica = primary.replica.clone();
                self.excluded.insert(replica, now + EXCLUSION);
                self.relieve();
            }
            Some(_) => self.race_if_slow(),
            None if self.opening.is_none() && self.successor.is_none() => self.search(now),
            None => {}
        }
        self.set_alarm();
    }

    /// Opens a successor beside the primary, unless there is one.
    fn relieve(&mut self) {
        if self.shared.can_move() && self.successor.is_none() && self.opening.is_none() {
            self.open();
        }
    }

    fn search(&mut self, now: Instant) {
        let since = *self.searching_since.get_or_insert(now);
        if self.want.envelope.deadline.is_some_and(|deadline| deadline <= now) {
            return match self.log.has_begun() {
                true => self.log.finish_all(&FinishReason::Deadline),
                false => self.log.fail(Failure::deadline_passed()),
            };
        }
        if now.saturating_duration_since(since) >= self.shared.config.failover_timeout {
            if self.shared.only_relays() {
                return self.cut();
            }
            let nobody =
                || Failure::new(FailureKind::EngineFailed, "No replica is left that could continue the stream.");
            return self.log.fail(self.last_failure.take().unwrap_or_else(nobody));
        }
        self.open();
    }

    /// Sets the time of the next check, if no event comes first.
    fn set_alarm(&mut self) {
        let now = now();
        let stall = self.shared.config.peer_stall_timeout;
        let silence = |source: &StreamSource| (source.last_sign() + stall).max(now + Duration::from_millis(1));
        let mut alarm = now + Duration::from_secs(60);
        if let Some(primary) = &self.primary {
            alarm = alarm.min(match self.relief {
                None => silence(primary),
                // A refusal asks for a short pause before the next replica is tried.
                Some(Relief::Stall) => self.not_before.filter(|at| *at > now).unwrap_or(now + SEARCH_INTERVAL),
                Some(Relief::HandOver) => silence(primary).min(now + HAND_OVER_INTERVAL),
                Some(Relief::Slow) => silence(primary).min(now + RACE_INTERVAL),
            });
            if self.relief.is_none() && self.shared.pacing.is_slow(&primary.replica) {
                alarm = alarm.min(now + RACE_INTERVAL);
            }
        }
        if let Some(successor) = &self.successor {
            alarm = alarm.min(silence(successor));
        }
        if self.primary.is_none() && self.successor.is_none() && self.opening.is_none() {
            let next = self.not_before.unwrap_or(now + SEARCH_INTERVAL).max(now + Duration::from_millis(1));
            alarm = alarm.min(next).min(self.want.envelope.deadline.map_or(next, |deadline| deadline.max(now)));
        }
        self.alarm.as_mut().reset(alarm.into());
    }

    /// This node has failed. Its engine may hang forever, so do not wait for it.
    fn node_failed(&mut self) {
        self.has_failed = true;
        if self.primary.as_ref().is_some_and(|primary| primary.replica == Replica::Here) {
            self.lose_primary(self.shared.health.engine_failure());
        }
    }

    /// The node ends, and waits no longer or finds no replica: the client is told how to go on elsewhere.
    fn cut(&mut self) {
        self.primary = None;
        self.successor = None;
        self.opening = None;
        let why = if self.has_failed { "The node's engine has failed." } else { "The node is shutting down." };
        let message = format!(
            "{why} Send the request again to another node, with the headers `idempotency-key` and `last-event-id`, to get \
             the rest."
        );
        self.log.fail(Failure::new(FailureKind::EngineFailed, message).with_code("stream_interrupted"));
    }

    fn place_name(&self) -> String {
        self.primary.as_ref().map_or_else(|| "nowhere".into(), |primary| primary.replica.to_string())
    }
}

impl Drop for FailoverStream {
    /// Makes sure that the stream has an end, however the task ends.
    fn drop(&mut self) {
        if !self.has_ended {
            self.log.fail(Failure::new(FailureKind::Internal, "Internal error while handling this stream."));
            self.log.close(false);
            self.shared.stream_ended(&self.log);
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
