//! Keeps an account of each peer: its breaker, and the requests on their way that its report cannot include yet.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::breaker::{Attempt, Breaker, BreakerState};
use super::pace::progress::StreamProgress;
use crate::cluster::Peer;
use crate::types::{FailureKind, NodeId};

/// Maximum number of counted requests on their way to one peer.
const MAX_SENT: usize = 4096;
/// Maximum number of peers; the one not called for longest is dropped first.
const MAX_PEERS: usize = 1024;

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Ledger(Arc<Mutex<BTreeMap<NodeId, Account>>>);

struct Account {
    breaker: Breaker,
    sent: VecDeque<Sent>,
    /// Streams on their way to the peer and running there.
    open: u32,
    /// The part of them that the peer has accepted.
    accepted: u32,
    last_failure: Option<(FailureKind, Instant)>,
    last_call: Instant,
    /// Time from the last call to its acceptance.
    round_trip: Option<Duration>,
    /// What this node's streams observe of the peer.
    progress: Arc<StreamProgress>,
}

struct Sent {
    at: Instant,
    choices: u32,
    tokens: u64,
}

/// What placement needs to know about a peer besides its report.
#[derive(Clone, Copy, Debug)]
pub struct PeerStanding {
    pub allows: bool,
    /// The peer may be called if there is no other.
    pub is_trusted: bool,
    pub weight: f64,
    pub breaker: BreakerState,
    pub sent_choices: u32,
    pub sent_tokens: u64,
    /// Streams of this node that the peer has accepted and not finished.
    pub accepted: u32,
    pub last_failure: Option<(FailureKind, Instant)>,
    pub round_trip: Option<Duration>,
    /// How long nothing has been heard from it, if streams are open there.
    pub silence: Option<Duration>,
}

/// Counts a stream at a peer for as long as it lives.
pub struct InFlight {
    ledger: Ledger,
    node: NodeId,
    attempt: Option<Attempt>,
    pub progress: Arc<StreamProgress>,
    is_accepted: bool,
}

impl InFlight {
    /// The peer has accepted the stream after this time.
    pub fn accepted(&mut self, round_trip: Duration) {
        if let Some(account) = self.ledger.0.lock().get_mut(&self.node) {
            account.round_trip = Some(round_trip);
            account.accepted += u32::from(!self.is_accepted);
            self.is_accepted = true;
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(account) = self.ledger.0.lock().get_mut(&self.node) {
            account.open = account.open.saturating_sub(1);
            account.accepted = account.accepted.saturating_sub(self.is_accepted.into());
            if let Some(attempt) = self.attempt {
                account.breaker.abandoned(attempt);
            }
        }
    }
}

impl Account {
    fn new(peer: &Peer, now: Instant) -> Self {
        let breaker = Breaker::new(peer.incarnation, now);
        Self {
            breaker,
            sent: VecDeque::new(),
            open: 0,
            accepted: 0,
            last_failure: None,
            last_call: now,
            round_trip: None,
            progress: Arc::new(StreamProgress::new(now)),
        }
    }
}

impl Ledger {
    /// What this node's streams observe of the peer, if there ever were any.
    pub fn progress(&self, node: &NodeId) -> Option<Arc<StreamProgress>> {
        self.0.lock().get(node).map(|account| account.progress.clone())
    }

    pub fn standing(&self, peer: &Peer, now: Instant) -> PeerStanding {
        let mut accounts = self.0.lock();
        let Some(account) = accounts.get_mut(&peer.id) else {
            let breaker = Breaker::new(peer.incarnation, now);
            return PeerStanding {
                allows: true,
                is_trusted: true,
                weight: breaker.weight(now),
                breaker: breaker.state(now),
                sent_choices: 0,
                sent_tokens: 0,
                accepted: 0,
                last_failure: None,
                round_trip: None,
                silence: None,
            };
        };
        account.breaker.see(peer.incarnation, now);
        while account.sent.front().is_some_and(|sent| sent.at < peer.reported_at) {
            account.sent.pop_front();
        }
        PeerStanding {
            allows: account.breaker.allows(now),
            is_trusted: account.breaker.is_trusted(),
            weight: account.breaker.weight(now),
            breaker: account.breaker.state(now),
            sent_choices: account.sent.iter().map(|sent| sent.choices).sum(),
            sent_tokens: account.sent.iter().map(|sent| sent.tokens).sum(),
            accepted: account.accepted,
            last_failure: account.last_failure,
            round_trip: account.round_trip,
            silence: account.progress.silence(now),
        }
    }

    /// Begins a call. If the breaker has opened in the meantime there is no attempt; the call may still be made, but its
    /// outcome is not recorded.
    pub fn send(&self, peer: &Peer, choices: u32, tokens: u64, now: Instant) -> (Option<Attempt>, InFlight) {
        let mut accounts = self.0.lock();
        let account = accounts.entry(peer.id.clone()).or_insert_with(|| Account::new(peer, now));
        account.breaker.see(peer.incarnation, now);
        account.open += 1;
        account.last_call = now;
        if account.sent.len() == MAX_SENT {
            account.sent.pop_front();
        }
        account.sent.push_back(Sent { at: now, choices, tokens });
        let attempt = account.breaker.begin(now);
        let progress = account.progress.clone();
        if accounts.len() > MAX_PEERS {
            let idle = accounts.iter().filter(|(_, account)| account.open == 0);
            let oldest = idle.min_by_key(|(_, account)| account.last_call).map(|(node, _)| node.clone());
            oldest.and_then(|node| accounts.remove(&node));
        }
        let (ledger, node) = (self.clone(), peer.id.clone());
        (attempt, InFlight { ledger, node, attempt, progress, is_accepted: false })
    }

    /// Streams on their way to any peer, and running there.
    pub fn open(&self) -> u64 {
        self.0.lock().values().map(|account| u64::from(account.open)).sum()
    }

    pub fn succeeded(&self, node: &NodeId, attempt: Attempt, now: Instant) {
        if let Some(account) = self.0.lock().get_mut(node) {
            account.breaker.succeeded(attempt, now);
        }
    }

    pub fn failed(&self, node: &NodeId, attempt: Attempt, kind: FailureKind, now: Instant, random: u64) {
        if let Some(account) = self.0.lock().get_mut(node) {
            account.last_failure = Some((kind, now));
            account.breaker.failed(attempt, kind, now, random);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{LoadReport, NodeDescription, PROTOCOL};

    #[test]
    fn a_stream_is_there_from_its_acceptance_to_its_end() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        let peer = Peer {
            id: NodeId::new("b"),
            incarnation: 1,
            protocol: PROTOCOL.newest,
            description: NodeDescription {
                protocol: PROTOCOL,
                version: String::new(),
                peer_addr: "127.0.0.1:7000".parse().expect("an address"),
                zone: String::new(),
                models: Vec::new(),
                tenants: None,
            },
            report: LoadReport::default(),
            reported_at: now,
            measured_at: now,
            stability: 1.0,
        };
        let (_, mut taken) = ledger.send(&peer, 1, 8, now);
        let (_, refused) = ledger.send(&peer, 1, 8, now);
        assert_eq!((ledger.open(), ledger.standing(&peer, now).accepted), (2, 0));
        taken.accepted(Duration::from_millis(3));
        drop(refused);
        let standing = ledger.standing(&peer, now);
        assert_eq!((ledger.open(), standing.accepted), (1, 1));
        assert_eq!(standing.round_trip, Some(Duration::from_millis(3)));
        drop(taken);
        assert_eq!((ledger.open(), ledger.standing(&peer, now).accepted), (0, 0));
    }
}
