//! Finds a replica for a stream: where to ask next, for which fingerprint, and how to handle a refusal.

use std::time::Instant;

use futures::future::BoxFuture;
use tracing::info;

use super::{FailoverStream, SEARCH_INTERVAL, now};
use crate::cluster::PeerStream;
use crate::router::breaker::Attempt;
use crate::router::dispatch::Destination;
use crate::router::ledger::InFlight;
use crate::router::source::{Replica, StreamSource};
use crate::router::stream_log::Cursor;
use crate::types::reaction::Retry;
use crate::types::{Failure, FailureKind, Fingerprint, NodeId};

/// A peer that has been asked and has not answered.
pub(super) struct Opening {
    pub(super) node: NodeId,
    pub(super) cursor: Cursor,
    pub(super) attempt: Option<Attempt>,
    pub(super) since: Instant,
    pub(super) stream: BoxFuture<'static, Result<PeerStream, Failure>>,
    pub(super) in_flight: InFlight,
}

impl FailoverStream {
    /// Chooses a replica and starts to open it. If there is none, the stream waits.
    pub(super) fn open(&mut self) {
        if self.opening.is_some() || self.not_before.is_some_and(|time| time > now()) {
            return;
        }
        let (excluded, now) = (&self.excluded, now());
        let is_free = |replica: &Replica| excluded.get(replica).is_none_or(|until| *until <= now);
        let mut choice = self.shared.choose(&self.want, &is_free, self.is_continuation());
        if matches!(choice, Destination::Nowhere(_)) && self.is_unbound() {
            choice = self.choose_other_numbers(choice, &is_free);
        }
        self.open_chosen(choice);
    }

    /// Whether the fingerprint is still open, because there is no token yet.
    fn is_unbound(&self) -> bool {
        self.began_here && !self.log.has_begun()
    }

    /// If no replica with the stream's fingerprint is left, any replica of the model will do.
    fn choose_other_numbers(&self, nowhere: Destination, is_free: &dyn Fn(&Replica) -> bool) -> Destination {
        match self.shared.choose(&self.want.without_fingerprint(), is_free, self.is_continuation()) {
            Destination::Nowhere(_) | Destination::Shed(_) => nowhere,
            found => found,
        }
    }

    /// The stream's tokens will have another fingerprint. Its holders are told before the first one.
    fn adopt(&mut self, fingerprint: Fingerprint) {
        let is_gated = self.log.key().is_some() && self.shared.has_peers();
        info!(request = %self.log.envelope.id, %fingerprint, "restarting a stream without tokens on a replica with another fingerprint");
        self.log.adopt(&fingerprint, is_gated);
        self.gate = is_gated.then(|| self.shared.clone().replicate(self.log.clone()));
        self.want.fingerprint = Some(fingerprint);
    }

    /// Notes the fingerprint of the chosen replica.
    fn note_numbers(&mut self, choice: &Destination) {
        let fingerprint = match choice {
            Destination::Here => self.shared.local().map(|local| local.model.fingerprint.clone()),
            Destination::Peer(_, fingerprint) => Some(fingerprint.clone()),
            Destination::Shed(_) | Destination::Nowhere(_) => None,
        };
        let Some(fingerprint) = fingerprint else { return };
        let differs = self.want.fingerprint.as_ref().is_some_and(|wanted| *wanted != fingerprint);
        if differs && self.is_unbound() {
            self.adopt(fingerprint);
        } else if self.primary.is_none() {
            self.log.show(&fingerprint);
        }
    }

    /// A stream that was accepted before is always continued; only a new request may be refused.
    pub(super) fn is_continuation(&self) -> bool {
        self.failovers > 0 || self.was_accepted || self.primary.is_some() || self.log.has_begun()
    }

    pub(super) fn open_chosen(&mut self, choice: Destination) {
        self.note_numbers(&choice);
        let is_continuation = self.is_continuation();
        let (starts, cursor) = self.log.continuation();
        if self.log.is_scored() {
            self.want.prompt_is_scored();
        }
        self.attempts += 1;
        match choice {
            Destination::Here => match self.shared.open_here(&self.want, starts, cursor, is_continuation) {
                Ok(source) => self.entered(source),
                Err(failure) => self.refused(Replica::Here, None, failure),
            },
            Destination::Peer(peer, fingerprint) => {
                let call = self.want.call(starts, &fingerprint, is_continuation, now());
                let (attempt, in_flight) = self.shared.send_to(&peer, &self.want);
                let limit = self.shared.answer_limit(is_continuation);
                let stream = self.shared.open_peer(&peer, call, limit);
                let (node, since) = (peer.id.clone(), now());
                self.opening = Some(Opening { node, cursor, attempt, since, stream, in_flight });
            }
            // The client should learn that all queues are full, whatever else went wrong.
            Destination::Shed(failure) if !is_continuation => self.log.fail(failure),
            Destination::Shed(failure) | Destination::Nowhere(failure) => {
                // A node that starts may know its peers by what they were before they restarted.
                if !is_continuation && !self.shared.may_yet_serve() {
                    return self.log.fail(self.last_failure.take().unwrap_or(failure));
                }
                self.not_before = Some(now() + SEARCH_INTERVAL);
                self.last_failure.get_or_insert(failure);
            }
        }
    }

    pub(super) fn opened(&mut self, result: Result<PeerStream, Failure>) {
        let opening = self.opening.take().expect("it was opened");
        let Opening { node, cursor, attempt, since, mut in_flight, .. } = opening;
        match result {
            Ok(stream) => {
                in_flight.accepted(now() - since);
                let progress = in_flight.progress.part(now());
                self.entered(StreamSource::peer(node, stream, attempt, in_flight, cursor, Some(progress), now()));
            }
            // A stream in a hurry does not wait for it, but another one that asks without a hurry may still be answered.
            Err(failure)
                if failure.kind == FailureKind::PeerStalled
                    && now() - since < self.shared.config.peer_stall_timeout =>
            {
                self.refused(Replica::At(node), None, failure);
            }
            Err(failure) => self.refused(Replica::At(node), attempt, failure),
        }
        self.set_alarm();
    }

    fn entered(&mut self, source: StreamSource) {
        self.searching_since = None;
        self.not_before = None;
        if self.primary.is_some() {
            self.successor = Some(source);
        } else {
            self.primary = Some(source);
            self.relief = None;
        }
    }

    /// The replica refused the stream. A new request may try another one within the retry budget.
    fn refused(&mut self, replica: Replica, attempt: Option<Attempt>, failure: Failure) {
        let is_continuation = self.is_continuation();
        self.exclude(replica, attempt, &failure);
        let reaction = failure.kind.reaction();
        if !reaction.elsewhere.allows(is_continuation) || !self.shared.can_move() {
            if self.primary.is_none() {
                self.log.fail(failure);
            }
            return;
        }
        let tries_too_often = self.attempts > self.shared.config.max_failovers + 1;
        if !is_continuation && (tries_too_often || (reaction.retry == Retry::Counts && !self.shared.may_retry())) {
            return self.log.fail(failure);
        }
        self.shared.metrics.placement_retries.inc();
        self.last_failure = Some(failure);
        self.not_before = is_continuation.then(|| now() + self.shared.backoff(self.attempts));
        if self.primary.is_none() && self.successor.is_none() {
            self.open();
        }
    }
}
