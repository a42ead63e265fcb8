//! Finds a replica for a stream on the machine's terms, and asks it.

use std::time::Instant;

use futures::future::BoxFuture;
use tracing::{debug, info};

use super::machine::{Input, Terms};
use super::{FailoverStream, now};
use crate::cluster::{Peer, PeerStream};
use crate::router::breaker::Attempt;
use crate::router::dispatch::{Destination, Want};
use crate::router::ledger::InFlight;
use crate::router::pace::Paces;
use crate::router::pace::rescue::Race;
use crate::router::source::{Replica, StreamSource};
use crate::router::stream_log::Cursor;
use crate::types::{ChoiceStart, Failure, Fingerprint, NodeId};

/// A peer that has been asked and has not answered.
pub(super) struct Opening {
    pub(super) replica: Replica,
    node: NodeId,
    pub(super) attempt: Option<Attempt>,
    pub(super) stream: BoxFuture<'static, Result<PeerStream, Failure>>,
    cursor: Cursor,
    since: Instant,
    in_flight: InFlight,
}

impl FailoverStream {
    /// If no replica with the stream's fingerprint is left, any replica of the model will do for a stream without tokens.
    pub(super) fn choose(&self, terms: &Terms) -> Destination {
        let is_free = |replica: &Replica| !terms.excluded.contains(replica);
        let choice = self.peers.choose(&self.node, &self.want, &is_free, terms.is_continuation);
        if !terms.allows_other_numbers || !matches!(choice, Destination::Nowhere(_)) {
            return choice;
        }
        match self.peers.choose(&self.node, &self.want.without_fingerprint(), &is_free, terms.is_continuation) {
            Destination::Nowhere(_) | Destination::Shed(_) => choice,
            found => found,
        }
    }

    /// Asks the replica, and tells the machine.
    pub(super) fn open(&mut self, choice: Destination, terms: &Terms) {
        self.note_numbers(&choice, terms);
        let (starts, cursor) = self.log.continuation();
        if self.log.is_scored() {
            self.want.prompt_is_scored();
        }
        match choice {
            Destination::Here => match self.node.open(&self.want, starts, cursor, terms.is_continuation) {
                Ok(source) => self.enter(source),
                Err(failure) => self.refused(Replica::Here, failure),
            },
            Destination::Peer(peer, fingerprint) => self.ask(&peer, &fingerprint, starts, cursor, terms),
            Destination::Shed(failure) => self.tell(Input::Shed(failure)),
            Destination::Nowhere(failure) => {
                self.tell(Input::Nowhere { failure, may_come: self.node.may_yet_serve() });
            }
        }
    }

    fn ask(&mut self, peer: &Peer, fingerprint: &Fingerprint, starts: Vec<ChoiceStart>, cursor: Cursor, terms: &Terms) {
        let now = now();
        let call = self.want.call(starts, fingerprint, terms.is_continuation, now);
        let (attempt, in_flight) = self.peers.send_to(peer, &self.want);
        let stream = self.peers.open(peer, call, self.peers.answer_limit(terms.is_continuation));
        let (node, replica) = (peer.id.clone(), Replica::At(peer.id.clone()));
        self.opening = Some(Opening { replica: replica.clone(), node, attempt, stream, cursor, since: now, in_flight });
        self.tell(Input::Asked(replica));
    }

    /// The peer that was asked has answered.
    pub(super) fn opened(&mut self, result: Result<PeerStream, Failure>) {
        match result {
            Ok(stream) => {
                let opening = self.opening.take().expect("it was opened");
                let Opening { node, attempt, cursor, since, mut in_flight, .. } = opening;
                in_flight.accepted(now() - since);
                let progress = in_flight.progress.part(now());
                self.enter(StreamSource::peer(node, stream, attempt, in_flight, cursor, Some(progress), now()));
            }
            Err(failure) => {
                let replica = self.opening.as_ref().expect("it was opened").replica.clone();
                self.refused(replica, failure);
            }
        }
    }

    fn enter(&mut self, source: StreamSource) {
        let replica = source.replica.clone();
        match self.primary {
            Some(_) => self.successor = Some(source),
            None => self.primary = Some(source),
        }
        self.tell(Input::Accepted(replica));
    }

    fn refused(&mut self, replica: Replica, failure: Failure) {
        self.tell(Input::Refused { replica, failure, random: self.peers.draw() });
    }

    /// Notes the fingerprint of the chosen replica.
    fn note_numbers(&mut self, choice: &Destination, terms: &Terms) {
        let fingerprint = match choice {
            Destination::Here => self.node.local().map(|local| local.model.fingerprint.clone()),
            Destination::Peer(_, fingerprint) => Some(fingerprint.clone()),
            Destination::Shed(_) | Destination::Nowhere(_) => None,
        };
        let Some(fingerprint) = fingerprint else { return };
        let differs = self.want.fingerprint.as_ref().is_some_and(|wanted| *wanted != fingerprint);
        if differs && terms.allows_other_numbers {
            self.adopt(fingerprint);
        } else if terms.is_only_source {
            self.log.show(&fingerprint);
        }
    }

    /// The stream's tokens will have another fingerprint. Its holders are told before the first one.
    fn adopt(&mut self, fingerprint: Fingerprint) {
        let is_gated = self.log.key().is_some() && self.peers.are_there();
        info!(request = %self.log.envelope.id, %fingerprint, "restarting a stream without tokens on a replica with another fingerprint");
        self.log.adopt(&fingerprint, is_gated);
        self.gate = is_gated.then(|| self.streams.replicate(self.log.clone()));
        self.want.fingerprint = Some(fingerprint);
    }

    /// A replica from which the rest would come much sooner than from the primary, if there is one.
    pub(super) fn faster_replica(&self, excluded: &[Replica]) -> Option<Destination> {
        let (primary, paces) = (self.primary.as_ref()?, self.peers.pacing.found());
        let is_free = |replica: &Replica| !excluded.contains(replica) && self.has_room(&paces, replica);
        // With another fingerprint, tokens would not be equal.
        let want = Want { allows_other_fingerprint: false, ..self.want.clone() };
        let choice = self.peers.choose(&self.node, &want, &is_free, true);
        let chosen = match &choice {
            Destination::Here => Replica::Here,
            Destination::Peer(peer, _) => Replica::At(peer.id.clone()),
            Destination::Shed(_) | Destination::Nowhere(_) => return None,
        };
        let speed = |replica: &Replica| Some(paces.get(replica)?.speed(self.peers.load_of(&self.node, replica)?));
        let emitted = self.log.longest();
        let race = Race {
            tokens_left: self
                .want
                .envelope
                .sampling
                .max_tokens
                .saturating_sub(u32::try_from(emitted).unwrap_or(u32::MAX)),
            replay_tokens: self.want.envelope.prompt.len() + emitted,
            waited: primary.waited(now()),
            here: speed(&primary.replica)?,
            there: speed(&chosen)?,
        };
        if !race.is_worth_it() {
            return None;
        }
        debug!(request = %self.log.envelope.id, from = %primary.replica, to = %chosen, "another replica is much faster");
        Some(choice)
    }

    /// Whether it was measured recently, is not slow, and has a free seat for every choice: all streams of a slow replica look
    /// for another one at the same moment.
    fn has_room(&self, paces: &Paces, replica: &Replica) -> bool {
        let is_well = paces.get(replica).is_some_and(|pace| pace.is_fresh && pace.slow_since.is_none());
        is_well
            && self.peers.load_of(&self.node, replica).is_some_and(|load| {
                let sent = self.peers.sent_since_report(replica);
                let occupied = [load.waiting, sent, self.want.envelope.sampling.n]
                    .into_iter()
                    .fold(load.running, u32::saturating_add);
                occupied <= load.seats
            })
    }
}
