//! Collects what is known about this node and its peers, and passes it to `placement` to choose a replica.

use std::sync::Arc;
use std::time::Duration;

use super::dispatch::{Destination, Want};
use super::failover::now;
use super::pace::ReplicaPace;
use super::placement::{Candidate, Placement, PlacementRequest, place};
use super::shared::RouterState;
use super::source::Replica;
use crate::cluster::{LoadReport, ModelReport, Peer};
use crate::types::{Failure, FailureKind, NodeState};

/// A peer's report is repeated every second. When it is older than this, the peer is out of reach, or this node is.
const LATE_REPORT: Duration = Duration::from_secs(3);
/// For a stream that has lost its replica. An idle peer repeats its report every second, and it is then passed on in rounds.
const LATE_REPORT_IN_HURRY: Duration = Duration::from_millis(1800);

impl RouterState {
    /// Chooses where the request goes, among the replicas for which `is_free` holds. A node that is shutting down serves a
    /// request itself only if no other node takes it.
    pub(super) fn choose(&self, want: &Want, is_free: &dyn Fn(&Replica) -> bool, is_continuation: bool) -> Destination {
        let choice = self.choose_placed(want, is_free, is_continuation);
        let is_last_resort = matches!(choice, Destination::Shed(_) | Destination::Nowhere(_)) && self.leaves();
        let suits = || self.local().is_some_and(|local| self.suits(want, &local.model));
        match is_last_resort && self.can_serve_here() && is_free(&Replica::Here) && suits() {
            true => Destination::Here,
            false => choice,
        }
    }

    fn choose_placed(&self, want: &Want, is_free: &dyn Fn(&Replica) -> bool, is_continuation: bool) -> Destination {
        let (view, now) = (self.view.borrow().clone(), now());
        let here = self.local().filter(|local| self.suits(want, &local.model));
        let peers: Vec<(&Arc<Peer>, &ModelReport)> = view
            .peers
            .values()
            .filter_map(|peer| {
                let mut models = peer.description.models.iter().filter(|model| self.suits(want, model));
                Some((peer, models.next()?))
            })
            .collect();
        if here.is_some() && peers.is_empty() {
            return match self.may_serve_here() && is_free(&Replica::Here) {
                true => Destination::Here,
                false => Destination::Nowhere(self.unavailable()),
            };
        }
        let own_report = here.map(|_| self.own_report_now());
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
            memory_share: self.memory_share(report),
            slowness: slowness(&Replica::Here),
            is_silent: false,
            may_serve: self.may_serve_here() && is_free(&Replica::Here),
        }));
        let num_here = candidates.len();
        candidates.extend(peers.iter().map(|(peer, _)| {
            let standing = self.ledger.standing(peer, now);
            let (replica, age) = (Replica::At(peer.id.clone()), peer.report_age(now));
            Candidate {
                report: &peer.report,
                age,
                is_here: false,
                is_same_zone: peer.description.zone == self.identity.zone,
                sent_choices: standing.sent_choices,
                sent_tokens: standing.sent_tokens,
                weight: standing.weight * peer.stability,
                memory_share: self.memory_share(&peer.report),
                slowness: slowness(&replica),
                is_silent: age >= late_report
                    || standing.silence.is_some_and(|silence| silence >= self.silence_limit()),
                may_serve: standing.allows && is_free(&replica),
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
            Placement::Nowhere => Destination::Nowhere(self.unavailable()),
        }
    }

    /// A peer silent for this long is only chosen if there is no other: two signs of life are missing, and its streams will
    /// soon look for another replica.
    fn silence_limit(&self) -> Duration {
        self.config.peer_stall_timeout * 5 / 8
    }

    /// What memory pressure leaves of a replica's share: what the replica says, by its own marks. For one of an earlier version,
    /// which says nothing, this node's marks count.
    fn memory_share(&self, report: &LoadReport) -> f64 {
        let by_our_marks = || self.health.config().memory_share(report.memory_pressure.into());
        report.memory_share.map_or_else(by_our_marks, f64::from)
    }

    fn suits(&self, want: &Want, model: &ModelReport) -> bool {
        let has_same_numbers = want.fingerprint.as_ref() == Some(&model.fingerprint);
        let may_differ = want.fingerprint.is_none() || want.allows_other_fingerprint;
        *model.tokenizer == *want.envelope.tokenizer
            && want.length() <= u64::from(model.max_model_len)
            && (has_same_numbers || (may_differ && model.names.iter().any(|name| **name == *want.envelope.model)))
    }

    /// Whether requests may be placed on this node.
    pub(super) fn may_serve_here(&self) -> bool {
        self.can_serve_here() && !self.leaves()
    }

    /// Whether this node's engine would accept a request.
    pub(super) fn can_serve_here(&self) -> bool {
        let state = self.health.lifecycle().state();
        let is_up = matches!(state, NodeState::Ready | NodeState::Degraded | NodeState::Draining);
        // Requests given to a hanging engine would wait until the node fails.
        is_up && self.local().is_some() && !self.only_relays() && !self.is_cut() && !self.health.engine_is_stalled()
    }

    pub(super) fn unavailable(&self) -> Failure {
        let retry_after = Duration::from_secs(2);
        let (message, code) = match self.health.lifecycle().state() {
            NodeState::Ready | NodeState::Degraded if !self.leaves() => match self.health.engine_is_stalled() {
                true => ("The engine makes no progress. See /readyz.", "engine_stalled"),
                false => ("No replica of the model can take the request now.", "no_replica"),
            },
            NodeState::Starting | NodeState::Warming => ("The model is still loading. See /startupz.", "model_loading"),
            NodeState::Failed => {
                let failure = Failure::new(FailureKind::EngineFailed, "The engine has failed. See /livez.");
                return failure.with_retry_after(retry_after);
            }
            NodeState::Ready | NodeState::Degraded | NodeState::Draining | NodeState::Stopped => {
                ("The server is shutting down.", "shutting_down")
            }
        };
        Failure::new(FailureKind::Unavailable, message).with_code(code).with_retry_after(retry_after)
    }
}
