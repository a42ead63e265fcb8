//! The other nodes: how to reach them, what they are known to be worth, and how often they may be asked again.
//!
//! `choosing` picks the replica for a request; `pace` compares how fast they are. Knows no streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::breaker::Attempt;
use super::config::Config;
use super::dispatch::Want;
use super::failover::now;
use super::ledger::{InFlight, Ledger};
use super::pace::Pacing;
use super::retry_budget::RetryBudget;
use super::source::{Replica, StreamSource};
use crate::cluster::{ClusterView, GenerateCall, Peer, PeerStream, PeerTransport};
use crate::types::{Failure, FailureKind, watch};

/// However short the stall timeout, a peer has this long to accept a stream that has lost its replica.
const LEAST_ANSWER_LIMIT: Duration = Duration::from_millis(100);

pub(super) struct Peers {
    pub(super) transport: Arc<dyn PeerTransport>,
    pub(super) view: watch::Receiver<Arc<ClusterView>>,
    pub(super) ledger: Ledger,
    pub(super) pacing: Pacing,
    retry_budget: Mutex<RetryBudget>,
    pub(super) stall_timeout: Duration,
    draws: AtomicU64,
}

impl Peers {
    /// `seed` breaks ties and jitters waits.
    pub(super) fn new(
        config: &Config,
        transport: Arc<dyn PeerTransport>,
        view: watch::Receiver<Arc<ClusterView>>,
        seed: u64,
    ) -> Self {
        Self {
            transport,
            view,
            ledger: Ledger::default(),
            pacing: Pacing::new(),
            retry_budget: Mutex::new(RetryBudget::new(config.retry_budget, now())),
            stall_timeout: config.peer_stall_timeout,
            draws: seed.into(),
        }
    }

    /// Whether this node knows another one.
    pub(super) fn are_there(&self) -> bool {
        !self.view.borrow().peers.is_empty()
    }

    pub(super) fn open(
        &self,
        peer: &Peer,
        call: GenerateCall,
        limit: Duration,
    ) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        bounded(self.transport.generate(peer, call), limit)
    }

    /// How long a peer may take to accept a call. A stream that has lost its replica has already waited, so it waits less: a
    /// peer that does not answer soon is probably unreachable too.
    pub(super) fn answer_limit(&self, is_continuation: bool) -> Duration {
        let stall = self.stall_timeout;
        if is_continuation { (stall / 4).max(LEAST_ANSWER_LIMIT).min(stall) } else { stall }
    }

    /// Choices that were sent to the peer since it last reported its load. This node's own load is always known.
    pub(super) fn sent_since_report(&self, replica: &Replica) -> u32 {
        let Replica::At(node) = replica else { return 0 };
        let view = self.view.borrow().clone();
        view.peers.get(node).map_or(0, |peer| self.ledger.standing(peer, now()).sent_choices)
    }

    /// Counts a request as on its way to the peer.
    pub(super) fn send_to(&self, peer: &Peer, want: &Want) -> (Option<Attempt>, InFlight) {
        self.ledger.send(peer, want.envelope.sampling.n, want.envelope.prompt.len() as u64, now())
    }

    /// The source has started to deliver.
    pub(super) fn accepted(&self, source: &mut StreamSource) {
        let attempt = source.unreported();
        if let (Replica::At(node), Some(attempt)) = (&source.replica, attempt) {
            self.ledger.succeeded(node, attempt, now());
        }
    }

    pub(super) fn failed(&self, replica: &Replica, attempt: Option<Attempt>, kind: FailureKind) {
        if let (Replica::At(node), Some(attempt)) = (replica, attempt) {
            self.ledger.failed(node, attempt, kind, now(), self.draw());
        }
    }

    pub(super) fn first_attempt(&self) {
        self.retry_budget.lock().first_attempt();
    }

    pub(super) fn may_retry(&self) -> bool {
        self.retry_budget.lock().try_retry(now())
    }

    /// A pseudo-random number, unique to the caller.
    pub(super) fn draw(&self) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        let state = self.draws.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// A peer that does not answer the call within this time counts as stalled.
pub(super) fn bounded<T: Send + 'static>(
    call: BoxFuture<'static, Result<T, Failure>>,
    limit: Duration,
) -> BoxFuture<'static, Result<T, Failure>> {
    Box::pin(async move {
        let stalled = || Err(Failure::new(FailureKind::PeerStalled, "The replica does not answer."));
        timeout(limit, call).await.unwrap_or_else(|_| stalled())
    })
}
