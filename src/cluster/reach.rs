//! Checks that peers that gossip can be called too, and what answers over TCP at addresses that do not answer gossip. Problems
//! are found before a client's request meets them, and each peer's connection is already open.
//!
//! Knows nothing of requests; reports its findings to `Problems`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::problems::{ProblemReason, Problems};
use super::tls::{self, PeerTls};
use super::transport::PeerTransport;
use super::{ClusterView, Peer};
use crate::types::{Failure, JournalKey, NodeId, NodeState, Tenant, watch, with_causes};

const INTERVAL: Duration = Duration::from_secs(1);
/// Interval of calls to a peer, after success and after failure.
const RECHECK: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(5);
/// Consecutive failures before a problem is reported: the peer may just have died.
const FAILURES: u32 = 2;
/// Concurrent calls of each kind.
const MAX_CALLS: usize = 8;
/// Time limit of a handshake with an unknown address.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

pub struct Reach {
    pub transport: Arc<dyn PeerTransport>,
    pub tls: PeerTls,
    pub connect_timeout: Duration,
    pub view: watch::Receiver<Arc<ClusterView>>,
    pub problems: Problems,
}

/// One process at one address.
type Process = (NodeId, u64, SocketAddr);

/// The results of calls to one process.
struct CallRecord {
    next: Instant,
    failures: u32,
    /// Why the last call failed.
    detail: String,
}

impl Reach {
    /// Calls every peer periodically, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut peers: BTreeMap<Process, CallRecord> = BTreeMap::new();
        let mut dialled: BTreeMap<SocketAddr, Instant> = BTreeMap::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let round = async {
                tokio::join!(self.call_peers(&mut peers), self.dial_silent(&mut dialled));
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = round => {}
            }
        }
    }

    async fn call_peers(&self, peers: &mut BTreeMap<Process, CallRecord>) {
        let (view, now) = (self.view.borrow().clone(), Instant::now());
        let stays = |peer: &&Arc<Peer>| !matches!(peer.report.state, NodeState::Draining | NodeState::Stopped);
        let present: BTreeMap<Process, Arc<Peer>> =
            view.peers.values().filter(stays).map(|peer| (process(peer), peer.clone())).collect();
        for (id, ..) in peers.keys().filter(|process| !present.contains_key(*process)) {
            self.problems.clear(ProblemReason::Untrusted, id.as_str());
        }
        peers.retain(|process, _| present.contains_key(process));
        for process in present.keys() {
            peers.entry(process.clone()).or_insert(CallRecord { next: now, failures: 0, detail: String::new() });
        }
        let due = peers.iter().filter(|(_, record)| record.next <= now).take(MAX_CALLS);
        let calls: FuturesUnordered<_> =
            due.map(|(process, _)| self.call(process.clone(), &present[process])).collect();
        for (process, result) in calls.collect::<Vec<_>>().await {
            let record = peers.get_mut(&process).expect("it was called");
            self.learn(process.0.as_str(), record, result);
        }
        let failing = peers.iter().filter(|(_, record)| record.failures >= FAILURES && !record.detail.is_empty());
        let found = failing.map(|((id, ..), record)| (id.to_string(), record.detail.clone()));
        self.problems.state(ProblemReason::Unreachable, found.collect());
    }

    async fn call(&self, process: Process, peer: &Peer) -> (Process, Result<(), Failure>) {
        // An ordinary call with no contents.
        let key = JournalKey::new(&Tenant::default(), "reach", 0);
        (process, self.transport.lookup(peer, key).await.map(drop))
    }

    fn learn(&self, name: &str, record: &mut CallRecord, result: Result<(), Failure>) {
        let failure = result.err().filter(|failure| !failure.kind.reaction().lesson.has_answered());
        let Some(failure) = failure else {
            *record = CallRecord { next: Instant::now() + RECHECK, failures: 0, detail: String::new() };
            return self.problems.clear(ProblemReason::Untrusted, name);
        };
        record.next = Instant::now() + RETRY;
        record.failures += 1;
        if tls::is_distrust(&failure) {
            // Reported as another problem.
            record.detail.clear();
            self.problems.event_at(ProblemReason::Untrusted, name, || with_causes(&failure).to_string());
        } else {
            record.detail = with_causes(&failure).to_string();
            self.problems.clear(ProblemReason::Untrusted, name);
        }
    }

    /// Connects to the TCP ports at silent gossip addresses, since by default a node has both at the same port.
    async fn dial_silent(&self, dialled: &mut BTreeMap<SocketAddr, Instant>) {
        let (silent, now) = (self.problems.silent(), Instant::now());
        dialled.retain(|addr, _| silent.contains(addr));
        let is_due =
            |addr: &&SocketAddr| dialled.get(*addr).is_none_or(|at| now.saturating_duration_since(*at) >= RECHECK);
        let due: Vec<SocketAddr> = silent.iter().filter(is_due).take(MAX_CALLS).copied().collect();
        dialled.extend(due.iter().map(|addr| (*addr, now)));
        let calls: FuturesUnordered<_> =
            due.into_iter().map(|addr| async move { (addr, self.dial(addr).await) }).collect();
        for (addr, found) in calls.collect::<Vec<_>>().await {
            self.problems.explain(addr, found);
        }
    }

    /// What a silent address answers over TCP.
    async fn dial(&self, addr: SocketAddr) -> String {
        let stream = match timeout(self.connect_timeout, TcpStream::connect(addr)).await {
            Err(_) => return "no answer over TCP either: the host is down or out of reach".into(),
            Ok(Err(error)) => return format!("no answer over UDP, and over TCP: {error}"),
            Ok(Ok(stream)) => stream,
        };
        match timeout(HANDSHAKE_TIMEOUT, self.tls.connect(stream)).await {
            Err(_) => "it accepts TCP connections, but does not answer like an Outrigger node".into(),
            Ok(Err(error)) if tls::is_distrust(&error) => {
                "it has another cluster key, or certificates of another authority".into()
            }
            Ok(Err(error)) => {
                format!("it accepts TCP connections, but does not answer like an Outrigger node: {error}")
            }
            Ok(Ok(_)) => {
                "it has the same key and answers over TCP: UDP is blocked between the nodes, or its cluster_id differs"
                    .into()
            }
        }
    }
}

fn process(peer: &Peer) -> Process {
    (peer.id.clone(), peer.incarnation, peer.description.peer_addr)
}
