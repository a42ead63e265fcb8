//! Collects what is known about this node and its peers, and passes it to `placement` to choose a replica.

use std::sync::Arc;
use std::time::Duration;

use super::dispatch::{Destination, Want};
use super::failover::now;
use super::pace::ReplicaPace;
use super::peers::Peers;
use super::placement::{Candidate, Placement, PlacementRequest, place};
use super::source::Replica;
use super::this_node::ThisNode;
use crate::cluster::{ModelReport, Peer};
use crate::types::{Failure, FailureKind};

/// A peer's report is repeated every second. When it is older than this, the peer is out of reach, or this node is.
const LATE_REPORT: Duration = Duration::from_secs(3);
/// For a stream that has lost its replica. An idle peer repeats its report every second, and it is then passed on in rounds.
const LATE_REPORT_IN_HURRY: Duration = Duration::from_millis(1800);

impl Peers {
    /// Chooses where the request goes, among the replicas for which `is_free` holds. A node that is shutting down serves a
    /// request itself only if no other node takes it.
    pub(super) fn choose(
        &self,
        node: &ThisNode,
        want: &Want,
        is_free: &dyn Fn(&Replica) -> bool,
        is_continuation: bool,
    ) -> Destination {
        let choice = self.choose_placed(node, want, is_free, is_continuation);
        let is_last_resort = matches!(choice, Destination::Shed(_) | Destination::Nowhere(_)) && node.leaves();
        let suits = || node.local().is_some_and(|local| suits(want, &local.model));
        match is_last_resort && node.can_serve() && is_free(&Replica::Here) && suits() {
            true => Destination::Here,
            false => choice,
        }
    }

    fn choose_placed(
        &self,
        node: &ThisNode,
        want: &Want,
        is_free: &dyn Fn(&Replica) -> bool,
        is_continuation: bool,
    ) -> Destination {
        let (view, now) = (self.view.borrow().clone(), now());
        let here = node.local().filter(|local| suits(want, &local.model));
        let peers: Vec<(&Arc<Peer>, &ModelReport)> = view
            .peers
            .values()
            .filter_map(|peer| {
                let mut models = peer.description.models.iter().filter(|model| suits(want, model));
                Some((peer, models.next()?))
            })
            .collect();
        if here.is_some() && peers.is_empty() {
            return match node.may_serve() && is_free(&Replica::Here) {
                true => Destination::Here,
                false => Destination::Nowhere(node.unavailable()),
            };
        }
        let own_report = here.map(|_| node.report_now());
        let paces = self.pacing.found();
        let slowness = |replica: &Replica| paces.get(replica).and_then(ReplicaPace::slowness);
        // A stream that has lost its replica is in a hurry, and what took one peer out of reach may have taken others.
        let late_report = if is_continuation { LATE_REPORT_IN_HURRY } else { LATE_REPORT };
        let mut candidates = Vec::with_capacity(peers.len() + 1);
        candidates.extend(own_report.as_ref().map(|report| Candidate {
            report,
            age: Duration::ZERO,
            is_here: true,
            is_same_zone: true,
            sent_choices: 0,
            sent_tokens: 0,
            weight: 1.0,
            memory_share: node.memory_share(report),
            slowness: slowness(&Replica::Here),
            is_silent: false,
            may_serve: node.may_serve() && is_free(&Replica::Here),
        }));
        let num_here = candidates.len();
        candidates.extend(peers.iter().map(|(peer, _)| {
            let standing = self.ledger.standing(peer, now);
            let (replica, age) = (Replica::At(peer.id.clone()), peer.report_age(now));
            Candidate {
                report: &peer.report,
                age,
                is_here: false,
                is_same_zone: peer.description.zone == node.identity.zone,
                sent_choices: standing.sent_choices,
                sent_tokens: standing.sent_tokens,
                weight: standing.weight * peer.stability,
                memory_share: node.memory_share(&peer.report),
                slowness: slowness(&replica),
                is_silent: age >= late_report
                    || standing.silence.is_some_and(|silence| silence >= self.silence_limit()),
                may_serve: (standing.allows || (want.is_least && standing.is_trusted)) && is_free(&replica),
            }
        }));
        let request = PlacementRequest {
            prompt_tokens: want.envelope.prompt.len() as u64,
            choices: want.envelope.sampling.n,
            prefix_hashes: &want.prefixes,
            remaining: want.envelope.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            is_continuation,
        };
        let mut placement = place(want.strategy, &request, &candidates, self.draw());
        if placement == Placement::Nowhere && !is_continuation {
            // A new request would fail at once, so a peer that has failed recently is better than none. A stream that has begun
            // can wait for the breaker.
            for (candidate, (peer, _)) in candidates[num_here..].iter_mut().zip(&peers) {
                let is_trusted = self.ledger.standing(peer, now).is_trusted;
                candidate.may_serve = is_trusted && is_free(&Replica::At(peer.id.clone()));
            }
            placement = place(want.strategy, &request, &candidates, self.draw());
        }
        match placement {
            Placement::Serve(index) if index < num_here => Destination::Here,
            Placement::Serve(index) => {
                let (peer, model) = peers[index - num_here];
                Destination::Peer(peer.clone(), model.fingerprint.clone())
            }
            Placement::Shed { retry_after } => {
                let message = "Every node is busy: the queues of all replicas of the model are full.";
                Destination::Shed(Failure::new(FailureKind::Overloaded, message).with_retry_after(retry_after))
            }
            Placement::Nowhere => Destination::Nowhere(node.unavailable()),
        }
    }

    /// A peer silent for this long is only chosen if there is no other: two signs of life are missing, and its streams will
    /// soon look for another replica.
    fn silence_limit(&self) -> Duration {
        self.stall_timeout * 5 / 8
    }
}

fn suits(want: &Want, model: &ModelReport) -> bool {
    let has_same_numbers = want.fingerprint.as_ref() == Some(&model.fingerprint);
    let may_differ = want.fingerprint.is_none() || want.allows_other_fingerprint;
    *model.tokenizer == *want.envelope.tokenizer
        && want.length() <= u64::from(model.max_model_len)
        && (has_same_numbers || (may_differ && model.has_name(&want.envelope.model)))
}
