//! Races for streams of slow replicas: a second replica computes the stream too, and whichever token comes first counts.

use tracing::debug;

use super::{FailoverStream, Relief, now};
use crate::router::dispatch::{Destination, Want};
use crate::router::pace::Paces;
use crate::router::pace::rescue::Race;
use crate::router::source::Replica;

impl FailoverStream {
    /// Starts a race if the primary is slow and another replica would be much sooner. Ends one that is no longer needed.
    pub(super) fn race_if_slow(&mut self) {
        let Some(primary) = &self.primary else { return };
        if !self.shared.pacing.is_slow(&primary.replica) {
            return self.give_up_race();
        }
        let is_under_way = self.successor.is_some() || self.opening.is_some();
        let may_move = self.shared.can_move() && !self.follows && !self.log.is_complete();
        if is_under_way || !may_move || self.failovers + self.rescues >= self.shared.config.max_failovers {
            return;
        }
        let Some(choice) = self.faster_replica() else { return };
        if !self.shared.may_retry() {
            if !std::mem::replace(&mut self.lacked_budget, true) {
                self.shared.metrics.rescues.with(["no_budget"]).inc();
            }
            return;
        }
        debug!(request = %self.log.envelope.id, from = %primary.replica, "a stream is raced");
        self.relief = Some(Relief::Slow);
        self.open_chosen(choice);
    }

    /// The primary has recovered, or the stream has ended.
    pub(super) fn give_up_race(&mut self) {
        if self.relief == Some(Relief::Slow) {
            self.relief = None;
            if self.successor.take().is_some() | self.opening.take().is_some() {
                self.shared.metrics.rescues.with(["lost"]).inc();
            }
        }
    }

    /// A replica from which the rest would come much sooner than from the primary, if there is one.
    fn faster_replica(&self) -> Option<Destination> {
        let (primary, now) = (self.primary.as_ref()?, now());
        let (paces, excluded) = (self.shared.pacing.found(), &self.excluded);
        let is_free = |replica: &Replica| {
            let is_excluded = excluded.get(replica).is_some_and(|until| *until > now);
            !is_excluded && *replica != primary.replica && self.has_room(&paces, replica)
        };
        // With another fingerprint, tokens would not be equal.
        let want = Want { allows_other_fingerprint: false, ..self.want.clone() };
        let choice = self.shared.choose(&want, &is_free, true);
        let chosen = match &choice {
            Destination::Here => Replica::Here,
            Destination::Peer(peer, _) => Replica::At(peer.id.clone()),
            Destination::Shed(_) | Destination::Nowhere(_) => return None,
        };
        let speed = |replica: &Replica| Some(paces.get(replica)?.speed(self.shared.load_of(replica)?));
        let emitted = self.log.longest();
        let race = Race {
            tokens_left: self
                .want
                .envelope
                .sampling
                .max_tokens
                .saturating_sub(u32::try_from(emitted).unwrap_or(u32::MAX)),
            replay_tokens: self.want.envelope.prompt.len() + emitted,
            waited: primary.waited(now),
            here: speed(&primary.replica)?,
            there: speed(&chosen)?,
        };
        race.is_worth_it().then_some(choice)
    }

    /// Whether it was measured recently, is not slow, and has a free seat for every choice: all streams of a slow replica look
    /// for another one at the same moment.
    fn has_room(&self, paces: &Paces, replica: &Replica) -> bool {
        let is_well = paces.get(replica).is_some_and(|pace| pace.is_fresh && pace.slow_since.is_none());
        is_well
            && self.shared.load_of(replica).is_some_and(|load| {
                let sent = self.shared.sent_since_report(replica);
                let occupied = [load.waiting, sent, self.want.envelope.sampling.n]
                    .into_iter()
                    .fold(load.running, u32::saturating_add);
                occupied <= load.seats
            })
    }
}
