//! One stream from its first source to its last token. When a source dies, stalls, leaves or lies, the stream continues at
//! another replica from what it has emitted; the client sees a pause, never an error, never a token lost or repeated.
//!
//! A source that is only silent, or that asks to be relieved, goes on until its successor speaks: whichever token comes first
//! counts, and since a generation is a pure function it does not matter whose it is.

use std::collections::BTreeMap;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::time::{Sleep, sleep_until};
use tracing::{info, warn};

use super::Shared;
use super::breaker::Attempt;
use super::dispatch::{Choice, Want};
use super::ledger::InFlight;
use super::source::{Replica, Sign, Source};
use super::stream_log::{Cursor, News, StreamLog};
use crate::cluster::{ClusterView, PeerStream};
use crate::health::NodePhase;
use crate::types::{Failure, FailureKind, Fingerprint, FinishReason, GenerationEvent, NodeId, NodeState, watch};

/// A replica that failed a stream is not asked again by it for this long.
const EXCLUSION: Duration = Duration::from_secs(1);
/// While no replica can be had, it is looked for this often, and whenever the cluster changes.
const SEARCH_INTERVAL: Duration = Duration::from_millis(250);
/// How often a stream that should leave looks for a place to go.
const HAND_OVER_INTERVAL: Duration = Duration::from_millis(500);

pub(super) struct FailoverStream {
    shared: Arc<Shared>,
    log: Arc<StreamLog>,
    want: Want,
    primary: Option<Source>,
    /// Takes over with its first token.
    successor: Option<Source>,
    opening: Option<Opening>,
    /// Why the successor is sought while the primary still lives.
    relief: Option<Relief>,
    excluded: BTreeMap<Replica, Instant>,
    /// The primary is another entry node's stream, which keeps the journal.
    follows: bool,
    /// Some replica has accepted the stream before this node ran it.
    was_accepted: bool,
    /// Nobody but this node can know any token of it, unless it knows them too.
    began_here: bool,
    has_ended: bool,
    /// Of the sources that were lost.
    failovers: u32,
    attempts: u32,
    last_failure: Option<Failure>,
    /// Since when there is no source and none is being opened.
    searching_since: Option<Instant>,
    not_before: Option<Instant>,
    alarm: Pin<Box<Sleep>>,
    gate: Option<BoxFuture<'static, ()>>,
    is_leaving: watch::Receiver<bool>,
    is_cut: watch::Receiver<bool>,
    view: watch::Receiver<Arc<ClusterView>>,
    phases: watch::Receiver<NodePhase>,
    /// The node's failure has been heard of.
    has_failed: bool,
}

struct Opening {
    node: NodeId,
    cursor: Cursor,
    attempt: Option<Attempt>,
    since: Instant,
    stream: BoxFuture<'static, Result<PeerStream, Failure>>,
    in_flight: InFlight,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relief {
    /// The primary is silent.
    Stall,
    /// The primary leaves.
    HandOver,
}

/// What the stream waits for.
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
    Source(Source),
    /// Another node answers for the stream as well; its events do.
    Follow(Source),
    /// The place is chosen already.
    Place(Choice),
    /// Continue what is known, wherever.
    Anywhere,
}

impl FailoverStream {
    pub(super) fn new(
        shared: Arc<Shared>,
        log: Arc<StreamLog>,
        want: Want,
        gate: Option<BoxFuture<'static, ()>>,
    ) -> Self {
        Self {
            is_leaving: shared.is_leaving.subscribe(),
            is_cut: shared.is_cut.subscribe(),
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
            attempts: 0,
            last_failure: None,
            searching_since: None,
            not_before: None,
            alarm: Box::pin(sleep_until(tokio::time::Instant::now())),
            gate,
        }
    }

    /// Runs until every choice has ended, the stream has failed, or nobody listens.
    pub(super) async fn run(mut self, beginning: Beginning) {
        self.began_here = matches!(beginning, Beginning::Source(_) | Beginning::Place(_));
        match beginning {
            // A journal may hold the whole stream.
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
            // The node may have begun to leave in this moment, and nobody says it twice.
            self.look_around();
        }
        loop {
            while !(self.log.is_complete() && self.gate.is_none()) {
                match self.step().await {
                    Step::Abandoned => break,
                    Step::Cut => self.cut(),
                    Step::GateOpened => {
                        self.gate = None;
                        self.log.open_gate();
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
            self.note_latency();
            // Somebody may have joined in this moment; then the stream goes on for them.
            if self.log.close(!self.log.is_complete()) {
                break;
            }
        }
        self.has_ended = true;
        self.shared.stream_ended(&self.log);
    }

    async fn step(&mut self) -> Step {
        let is_searching = self.primary.is_none() && self.opening.is_none() && self.successor.is_none();
        let wants_news = is_searching || self.relief.is_some();
        // All that a source says after the last token is that it ends, which is no failure.
        let is_complete = self.log.is_complete();
        tokio::select! {
            biased;
            () = self.log.abandoned() => Step::Abandoned,
            () = cut(&mut self.is_cut) => Step::Cut,
            () = optional(&mut self.gate) => Step::GateOpened,
            sign = next(&mut self.primary), if !is_complete => Step::Primary(sign),
            sign = next(&mut self.successor), if !is_complete => Step::Successor(sign),
            result = opened(&mut self.opening) => Step::Opened(result),
            () = self.alarm.as_mut() => Step::Alarm,
            () = failure(&mut self.phases), if !self.has_failed => Step::NodeFailed,
            Ok(()) = self.is_leaving.changed() => Step::Changed,
            Ok(()) = self.view.changed(), if wants_news => Step::Changed,
        }
    }

    fn hear_primary(&mut self, sign: Sign) {
        let mut next = Some(sign);
        while let Some(sign) = next {
            let Some(primary) = &mut self.primary else { return };
            if self.relief == Some(Relief::Stall) {
                // It was only slow.
                self.relief = None;
                self.successor = None;
                self.opening = None;
            }
            match sign {
                Sign::Event(GenerationEvent::Finished { reason, .. })
                    if self.follows && !reason.is_of_the_generation() =>
                {
                    // That was the time of another client.
                    return self
                        .lose_primary(Failure::new(FailureKind::PeerDisconnected, "The stream has ended there."));
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
            next = self.primary.as_mut().and_then(Source::try_next);
        }
    }

    fn hear_successor(&mut self, sign: Sign) {
        let successor = self.successor.as_mut().expect("it spoke");
        match sign {
            Sign::Event(event) => {
                let speaks = matches!(event, GenerationEvent::Token { .. } | GenerationEvent::Finished { .. });
                match self.shared.judge(&self.log, &mut successor.cursor, event) {
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

    /// The other entry node is gone, or silent: from now on this node answers for the stream. False if it did already.
    fn take_over(&mut self) -> bool {
        let followed = std::mem::take(&mut self.follows);
        if followed {
            self.log.follow(None);
            self.log.set_epoch(self.log.epoch() + 1);
            self.gate = self.shared.has_peers().then(|| self.shared.clone().replicate(self.log.clone()));
        }
        followed
    }

    /// The successor speaks: the primary is not needed any more.
    fn promote(&mut self) {
        let stalled = self.relief.take() == Some(Relief::Stall);
        self.take_over();
        self.note_latency();
        let before = std::mem::replace(&mut self.primary, self.successor.take());
        if let Some(before) = before {
            info!(from = %before.replica, to = %self.place_name(), stalled, "a stream moved");
            if stalled {
                self.failovers += 1;
                self.shared.metrics.failovers.with([FailureKind::PeerStalled.label()]).inc();
            } else {
                self.shared.metrics.hand_overs.inc();
            }
        }
        self.set_alarm();
    }

    fn lose_primary(&mut self, failure: Failure) {
        self.note_latency();
        let lost = self.primary.take().expect("it was lost");
        self.relief = None;
        if self.take_over() {
            self.excluded.insert(lost.replica, now() + EXCLUSION);
            self.last_failure = Some(failure);
            self.open();
            return self.set_alarm();
        }
        if !is_survivable(&failure, true) || !self.shared.can_move() {
            return self.log.fail(failure);
        }
        self.exclude(lost.replica.clone(), lost.attempt, &failure);
        self.failovers += 1;
        if self.failovers > self.shared.config.max_failovers {
            warn!(request = %self.log.head.id, failovers = self.failovers, "a stream lost too many replicas");
            return self.log.fail(failure);
        }
        self.shared.metrics.failovers.with([failure.kind.label()]).inc();
        info!(from = %lost.replica, cause = failure.kind.label(), "a stream lost its replica");
        self.last_failure = Some(failure);
        match self.successor.take() {
            Some(successor) => self.primary = Some(successor),
            None if self.opening.is_some() => {}
            None => self.open(),
        }
        self.set_alarm();
    }

    /// Remembers that the replica failed, here and for everybody.
    fn exclude(&mut self, replica: Replica, attempt: Option<Attempt>, failure: &Failure) {
        self.shared.failed(&replica, attempt, failure.kind);
        // A replica whose numbers are wrong is never asked again.
        let lies = failure.kind == FailureKind::NumericsInvalid;
        let until = if lies { now() + Duration::from_secs(86_400) } else { now() + EXCLUSION };
        self.excluded.insert(replica, until);
    }

    /// Looks for a replica and begins to open it. Without one, the stream waits.
    fn open(&mut self) {
        if self.opening.is_some() || self.not_before.is_some_and(|time| time > now()) {
            return;
        }
        let (excluded, now) = (&self.excluded, now());
        let is_free = |replica: &Replica| excluded.get(replica).is_none_or(|until| *until <= now);
        let mut choice = self.shared.choose(&self.want, &is_free, self.is_continuation());
        if matches!(choice, Choice::Nowhere(_)) && self.began_here && !self.log.has_begun() {
            choice = self.choose_other_numbers(choice, &is_free);
        }
        self.open_chosen(choice);
    }

    /// No replica of the stream's fingerprint is left, and it has no token yet: any replica of the model will do.
    fn choose_other_numbers(&self, nowhere: Choice, is_free: &dyn Fn(&Replica) -> bool) -> Choice {
        match self.shared.choose(&self.want.without_fingerprint(), is_free, self.is_continuation()) {
            Choice::Nowhere(_) | Choice::Shed(_) => nowhere,
            found => found,
        }
    }

    /// The stream's tokens will be those of another fingerprint. Its holders are told before the first.
    fn adopt(&mut self, fingerprint: Fingerprint) {
        let is_gated = self.log.is_named && self.shared.has_peers();
        info!(request = %self.log.head.id, %fingerprint, "a stream begins anew with other numbers");
        self.log.adopt(&fingerprint, is_gated);
        self.gate = is_gated.then(|| self.shared.clone().replicate(self.log.clone()));
        self.want.fingerprint = Some(fingerprint);
    }

    /// Looks at whose numbers the chosen replica has.
    fn note_numbers(&mut self, choice: &Choice) {
        let fingerprint = match choice {
            Choice::Here => self.shared.local().map(|local| local.model.fingerprint.clone()),
            Choice::Peer(_, fingerprint) => Some(fingerprint.clone()),
            Choice::Shed(_) | Choice::Nowhere(_) => None,
        };
        let Some(fingerprint) = fingerprint else { return };
        let differs = self.want.fingerprint.as_ref().is_some_and(|wanted| *wanted != fingerprint);
        if differs && self.began_here && !self.log.has_begun() {
            self.adopt(fingerprint);
        } else if self.primary.is_none() {
            self.log.show(&fingerprint);
        }
    }

    /// Whatever was accepted once is carried through; only a fresh request may be refused.
    fn is_continuation(&self) -> bool {
        self.failovers > 0 || self.was_accepted || self.primary.is_some() || self.log.has_begun()
    }

    fn open_chosen(&mut self, choice: Choice) {
        self.note_numbers(&choice);
        let is_continuation = self.is_continuation();
        let (starts, cursor) = self.log.continuation();
        self.attempts += 1;
        match choice {
            Choice::Here => match self.shared.open_here(&self.want, starts, cursor, is_continuation) {
                Ok(source) => self.entered(source),
                Err(failure) => self.refused(Replica::Here, None, failure),
            },
            Choice::Peer(peer, fingerprint) => {
                let call = self.want.call(starts, &fingerprint, is_continuation, now());
                let (attempt, in_flight) = self.shared.send_to(&peer, &self.want);
                let stream = self.shared.open_peer(&peer, call);
                self.opening =
                    Some(Opening { node: peer.id.clone(), cursor, attempt, since: now(), stream, in_flight });
            }
            // That all are full is for the client to know, whatever else went wrong on the way.
            Choice::Shed(failure) if !is_continuation => self.log.fail(failure),
            Choice::Shed(failure) | Choice::Nowhere(failure) => {
                if !is_continuation {
                    return self.log.fail(self.last_failure.take().unwrap_or(failure));
                }
                self.not_before = Some(now() + SEARCH_INTERVAL);
                self.last_failure.get_or_insert(failure);
            }
        }
    }

    fn opened(&mut self, result: Result<PeerStream, Failure>) {
        let Opening { node, cursor, attempt, since, mut in_flight, .. } = self.opening.take().expect("it was opened");
        match result {
            Ok(stream) => {
                in_flight.accepted(now() - since);
                self.entered(Source::peer(node, stream, attempt, in_flight, cursor, now()));
            }
            Err(failure) => self.refused(Replica::At(node), attempt, failure),
        }
        self.set_alarm();
    }

    fn entered(&mut self, source: Source) {
        self.searching_since = None;
        self.not_before = None;
        if self.primary.is_some() {
            self.successor = Some(source);
        } else {
            self.primary = Some(source);
            self.relief = None;
        }
    }

    /// The replica did not take the stream. A fresh request may try elsewhere within the retry budget.
    fn refused(&mut self, replica: Replica, attempt: Option<Attempt>, failure: Failure) {
        let is_continuation = self.is_continuation();
        self.exclude(replica, attempt, &failure);
        if !is_survivable(&failure, is_continuation) || !self.shared.can_move() {
            if self.primary.is_none() {
                self.log.fail(failure);
            }
            return;
        }
        let is_load =
            matches!(failure.kind, FailureKind::Overloaded | FailureKind::RateLimited | FailureKind::Internal);
        let tries_too_often = self.attempts > self.shared.config.max_failovers + 1;
        if !is_continuation && (tries_too_often || (is_load && !self.shared.may_retry())) {
            return self.log.fail(failure);
        }
        self.shared.metrics.placement_retries.inc();
        self.last_failure = Some(failure);
        self.not_before = is_continuation.then(|| now() + self.shared.backoff(self.attempts));
        if self.primary.is_none() && self.successor.is_none() {
            self.open();
        }
    }

    /// Checks everything that time may have changed.
    fn look_around(&mut self) {
        let (now, stall) = (now(), self.shared.config.peer_stall_timeout);
        let is_silent = |source: &Source| now.saturating_duration_since(source.last_sign()) >= stall;
        let stalled = || Failure::new(FailureKind::PeerStalled, "The replica stopped answering.");
        if self.successor.as_ref().is_some_and(is_silent) {
            let lost = self.successor.take().expect("it is silent");
            self.exclude(lost.replica, lost.attempt, &stalled());
        }
        let leaves = |source: &Source| source.is_leaving || (source.replica == Replica::Here && self.shared.leaves());
        match &self.primary {
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
            Some(_) => {}
            None if self.opening.is_none() && self.successor.is_none() => self.search(now),
            None => {}
        }
        self.set_alarm();
    }

    /// Opens a successor beside the primary, if there is none yet.
    fn relieve(&mut self) {
        if self.shared.can_move() && self.successor.is_none() && self.opening.is_none() {
            self.open();
        }
    }

    fn search(&mut self, now: Instant) {
        let since = *self.searching_since.get_or_insert(now);
        if self.want.deadline.is_some_and(|deadline| deadline <= now) {
            return match self.log.has_begun() {
                true => self.log.finish_all(&FinishReason::Deadline),
                false => self.log.fail(deadline_passed()),
            };
        }
        if now.saturating_duration_since(since) >= self.shared.config.failover_timeout {
            let nobody =
                || Failure::new(FailureKind::EngineFailed, "No replica is left that could continue the stream.");
            return self.log.fail(self.last_failure.take().unwrap_or_else(nobody));
        }
        self.open();
    }

    /// When to look around next, if nothing happens before.
    fn set_alarm(&mut self) {
        let now = now();
        let stall = self.shared.config.peer_stall_timeout;
        let silence = |source: &Source| (source.last_sign() + stall).max(now + Duration::from_millis(1));
        let mut alarm = now + Duration::from_secs(60);
        if let Some(primary) = &self.primary {
            alarm = alarm.min(match self.relief {
                None => silence(primary),
                Some(Relief::Stall) => now + SEARCH_INTERVAL,
                Some(Relief::HandOver) => silence(primary).min(now + HAND_OVER_INTERVAL),
            });
        }
        if let Some(successor) = &self.successor {
            alarm = alarm.min(silence(successor));
        }
        if self.primary.is_none() && self.successor.is_none() && self.opening.is_none() {
            let next = self.not_before.unwrap_or(now + SEARCH_INTERVAL).max(now + Duration::from_millis(1));
            alarm = alarm.min(next).min(self.want.deadline.map_or(next, |deadline| deadline.max(now)));
        }
        self.alarm.as_mut().reset(alarm.into());
    }

    /// This node's engine may hang for ever: nobody waits for it.
    fn node_failed(&mut self) {
        self.has_failed = true;
        if self.primary.as_ref().is_some_and(|primary| primary.replica == Replica::Here) {
            self.lose_primary(Failure::new(FailureKind::EngineFailed, "The engine has failed."));
        }
    }

    /// The node ends and can wait no longer: the client is told how to go on elsewhere.
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

    fn note_latency(&self) {
        if let Some(primary) = self.primary.as_ref().filter(|primary| primary.replica == Replica::Here)
            && let Some((first, between)) = primary.latencies()
        {
            self.shared.note_latency(first, between);
        }
    }

    fn place_name(&self) -> String {
        self.primary.as_ref().map_or_else(|| "nowhere".into(), |primary| primary.replica.to_string())
    }
}

impl Drop for FailoverStream {
    /// Whatever ends the task, the stream is not left without an end.
    fn drop(&mut self) {
        if !self.has_ended {
            self.log
                .fail(Failure::new(FailureKind::Internal, "The server made a mistake while it handled this stream."));
            self.log.close(false);
            self.shared.stream_ended(&self.log);
        }
    }
}

/// Whether another replica may do better. Once a stream has been accepted somewhere, what a replica says of the request
/// itself is only its own view.
fn is_survivable(failure: &Failure, was_accepted: bool) -> bool {
    match failure.kind {
        FailureKind::DeadlineExceeded | FailureKind::Cancelled => false,
        FailureKind::InvalidRequest | FailureKind::Unauthenticated => was_accepted,
        FailureKind::RateLimited
        | FailureKind::Overloaded
        | FailureKind::EngineFailed
        | FailureKind::NumericsInvalid
        | FailureKind::OutOfMemory
        | FailureKind::PeerUnreachable
        | FailureKind::PeerDisconnected
        | FailureKind::PeerStalled
        | FailureKind::Internal => true,
    }
}

pub(super) fn deadline_passed() -> Failure {
    Failure::new(FailureKind::DeadlineExceeded, "The deadline passed before the first token.")
}

pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn next(source: &mut Option<Source>) -> Sign {
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
