//! The router's state, shared by all its streams.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::breaker::Attempt;
use super::config::Config;
use super::dispatch::Want;
use super::failover::now;
use super::hot_prefixes::HotPrefixes;
use super::ledger::{InFlight, Ledger};
use super::load::FirstTokenAverage;
use super::meter::Meter;
use super::no_peers::NoPeers;
use super::pace::Pacing;
use super::replicator::Replicator;
use super::retry_budget::RetryBudget;
use super::source::{Replica, StreamSource};
use super::stream_log::{Cursor, News, StreamLog};
use crate::admission::{AdmissionController, Demand};
use crate::cluster::{
    ClusterView, GenerateCall, JournalRecord, JournalStore, LoadReport, ModelReport, Peer, PeerStream, PeerTransport,
};
use crate::health::Health;
use crate::observability::Metrics;
use crate::types::{
    Backend, ChoiceStart, Failure, FailureKind, FinishReason, GenerateRequest, GenerationEvent, JournalKey, NodeId,
    watch,
};

/// However short the stall timeout, a peer has this long to accept a stream that has lost its replica.
const LEAST_ANSWER_LIMIT: Duration = Duration::from_millis(100);
/// The model that this node serves, and its engine.
pub struct LocalReplica {
    pub engine: Arc<dyn Backend>,
    pub model: ModelReport,
    /// Sequences that the engine can compute at the same time.
    pub seats: u32,
    /// The tokenizer files for peers.
    pub tokenizer: Bytes,
}

/// This node's identity, for other nodes and operators.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    pub cluster_id: String,
    pub incarnation: u64,
    pub zone: String,
    /// Address for calls from peers; none for a single node.
    pub peer_addr: Option<SocketAddr>,
}

pub struct RouterParts {
    pub config: Config,
    pub own: NodeId,
    pub identity: NodeIdentity,
    /// Whether there can be other nodes.
    pub is_clustered: bool,
    pub admission: AdmissionController,
    pub health: Health,
    pub metrics: Arc<Metrics>,
    pub transport: Arc<dyn PeerTransport>,
    pub view: watch::Receiver<Arc<ClusterView>>,
    /// Breaks ties and jitters waits.
    pub seed: u64,
}

/// How far a node has gone on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DepartureStage {
    Stays,
    /// What it computes is handed to peers, and nothing is begun here that a peer could take.
    HandsOver,
    /// It computes nothing any more, and passes on what peers compute.
    OnlyRelays,
}

/// The handle to the router. Cheap to clone.
#[derive(Clone)]
pub struct Router {
    pub(super) shared: Arc<RouterState>,
}

pub struct RouterState {
    pub(super) config: Config,
    pub(super) own: NodeId,
    pub(super) identity: NodeIdentity,
    is_clustered: bool,
    pub(super) admission: AdmissionController,
    pub(super) health: Health,
    pub(super) metrics: Arc<Metrics>,
    pub(super) transport: Arc<dyn PeerTransport>,
    pub(super) view: watch::Receiver<Arc<ClusterView>>,
    local: OnceLock<LocalReplica>,
    pub(super) streams: Mutex<BTreeMap<JournalKey, Arc<StreamLog>>>,
    pub(super) journals: Mutex<JournalStore>,
    pub(super) replicator: Arc<Replicator>,
    pub(super) ledger: Ledger,
    retry_budget: Mutex<RetryBudget>,
    pub(super) hot_prefixes: Mutex<HotPrefixes>,
    pub(super) own_report: Mutex<LoadReport>,
    pub(super) first_tokens: Mutex<FirstTokenAverage>,
    pub(super) pacing: Pacing,
    draws: AtomicU64,
    open_streams: AtomicU32,
    /// Requests held while the node starts.
    pub(super) held: AtomicUsize,
    pub(super) departure: watch::Sender<DepartureStage>,
    pub(super) is_cut: watch::Sender<bool>,
}

impl Router {
    pub fn new(parts: RouterParts) -> Self {
        let RouterParts { config, own, identity, is_clustered, admission, health, metrics, transport, view, seed } =
            parts;
        let journals = Mutex::new(JournalStore::new(config.journal_ttl, config.journal_memory));
        let replicator = Arc::new(Replicator::new(
            own.clone(),
            transport.clone(),
            view.clone(),
            metrics.clone(),
            config.journal_ack_timeout,
        ));
        let retry_budget = Mutex::new(RetryBudget::new(config.retry_budget, now()));
        let shared = RouterState {
            config,
            own,
            identity,
            is_clustered,
            admission,
            health,
            metrics,
            transport,
            view,
            local: OnceLock::new(),
            streams: Mutex::default(),
            journals,
            replicator,
            ledger: Ledger::default(),
            retry_budget,
            hot_prefixes: Mutex::default(),
            own_report: Mutex::default(),
            first_tokens: Mutex::default(),
            pacing: Pacing::new(now()),
            draws: seed.into(),
            open_streams: 0.into(),
            held: 0.into(),
            departure: watch::Sender::new(DepartureStage::Stays),
            is_cut: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    pub fn node_id(&self) -> &NodeId {
        &self.shared.own
    }

    /// A router without peers.
    pub fn alone(config: Config, admission: AdmissionController, health: Health, metrics: Arc<Metrics>) -> Self {
        let identity = NodeIdentity { cluster_id: String::new(), incarnation: 0, zone: String::new(), peer_addr: None };
        let (_, view) = watch::channel(Arc::default());
        Self::new(RouterParts {
            config,
            own: NodeId::new("alone"),
            identity,
            is_clustered: false,
            admission,
            health,
            metrics,
            transport: Arc::new(NoPeers),
            view,
            seed: 0,
        })
    }

    /// From now on this node can generate. Only the first call has an effect.
    pub fn attach(&self, local: LocalReplica) {
        let first = self.shared.local.set(local).is_ok();
        assert!(first, "a node serves one model");
        self.refresh();
    }

    pub fn local(&self) -> Option<&LocalReplica> {
        self.shared.local.get()
    }

    /// The models that peers serve, each with a peer that serves it.
    pub fn peer_models(&self) -> Vec<(Arc<Peer>, ModelReport)> {
        let view = self.shared.view.borrow().clone();
        let of = |peer: &Arc<Peer>| {
            let models = peer.description.models.clone().into_iter();
            models.map(|model| (peer.clone(), model)).collect::<Vec<_>>()
        };
        view.peers.values().flat_map(of).collect()
    }

    /// Fetches the files of a peer's tokenizer.
    pub async fn fetch_tokenizer(&self, peer: &Peer, digest: &str) -> Result<Bytes, Failure> {
        self.shared.transport.tokenizer(peer, digest.to_owned()).await
    }

    /// Keeps the journals at other nodes up to date, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.shared.replicator.clone().run(shutdown).await;
    }

    /// Streams of this node's clients.
    pub fn open_streams(&self) -> u32 {
        self.shared.open_streams.load(Ordering::Relaxed)
    }

    /// This node is leaving: moves its streams elsewhere if possible, and starts nothing that a peer could take.
    pub fn leave(&self) {
        self.shared.departure.send_replace(DepartureStage::HandsOver);
    }

    /// The node computes nothing any more. Streams go on where peers compute them; those that no peer takes end, and their
    /// clients are told how to go on elsewhere.
    pub fn stop_computing(&self) {
        self.shared.departure.send_replace(DepartureStage::OnlyRelays);
    }

    /// Ends all streams, and tells clients how to continue elsewhere. No new stream is started.
    pub fn cut(&self) {
        self.shared.is_cut.send_replace(true);
    }

    /// Whether there can be other nodes.
    pub fn is_clustered(&self) -> bool {
        self.shared.is_clustered
    }

    /// Whether a peer could take a request for this model now.
    pub fn serves_elsewhere(&self, name: &str, tokenizer: &str) -> bool {
        let is_it = |model: &ModelReport| model.tokenizer == tokenizer && model.names.iter().any(|known| known == name);
        let peers = &self.shared.view.borrow().peers;
        peers.values().any(|peer| peer.report.ready && peer.description.models.iter().any(is_it))
    }

    /// Whether this node or another could take a request now.
    pub fn can_serve(&self) -> bool {
        self.can_serve_here() || self.shared.view.borrow().peers.values().any(|peer| peer.report.ready)
    }

    /// The error for clients when no node can take a request.
    pub fn unavailable(&self) -> Failure {
        self.shared.unavailable()
    }

    /// Whether this node's engine could take a request. While it leaves, only if no peer can.
    pub fn can_serve_here(&self) -> bool {
        self.shared.can_serve_here()
    }
}

impl RouterState {
    pub(super) fn local(&self) -> Option<&LocalReplica> {
        self.local.get()
    }

    /// Whether a stream that loses its replica may find another.
    pub(super) fn can_move(&self) -> bool {
        self.is_clustered
    }

    pub(super) fn is_clustered(&self) -> bool {
        self.is_clustered
    }

    pub(super) fn has_peers(&self) -> bool {
        self.is_clustered && !self.view.borrow().peers.is_empty()
    }

    /// Whether no new stream may be started.
    pub(super) fn is_cut(&self) -> bool {
        *self.is_cut.borrow()
    }

    pub(super) fn leaves(&self) -> bool {
        *self.departure.borrow() >= DepartureStage::HandsOver
    }

    pub(super) fn only_relays(&self) -> bool {
        *self.departure.borrow() == DepartureStage::OnlyRelays
    }

    /// Starts the generation in this node's engine.
    pub(super) fn open_here(
        &self,
        want: &Want,
        starts: Vec<ChoiceStart>,
        cursor: Cursor,
        is_continuation: bool,
    ) -> Result<StreamSource, Failure> {
        let local = self.local.get().filter(|_| self.can_serve_here()).ok_or_else(|| self.unavailable())?;
        let request = want.request(starts, is_continuation);
        self.admit(local, request, &want.prefixes, cursor, is_continuation)
    }

    /// Admits a request to this node's engine, whoever sent it, and starts its generation. A stream that was accepted before is
    /// not refused because of load.
    pub(super) fn admit(
        &self,
        local: &LocalReplica,
        request: GenerateRequest,
        prefixes: &[u32],
        cursor: Cursor,
        is_continuation: bool,
    ) -> Result<StreamSource, Failure> {
        let (engine, demand) = (local.engine.clone(), Demand::of(&request));
        let permit = match is_continuation {
            true => self.admission.admit_continuation(demand),
            false => {
                let rate = engine.status().drain_tokens_per_second;
                self.admission.try_admit(demand, rate).map_err(Failure::from)?
            }
        };
        let progress = self.pacing.own.part(now());
        let meter = Meter::new(self.metrics.clone(), &request, now());
        let stream = engine.generate(request)?;
        self.hot_prefixes.lock().record(prefixes);
        Ok(StreamSource::engine(stream, engine, permit, meter, cursor, progress, now()))
    }

    pub(super) fn open_peer(
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
        let stall = self.config.peer_stall_timeout;
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

    /// Passes an event to the stream. An error ends its source.
    pub(super) fn judge(&self, log: &StreamLog, cursor: &mut Cursor, event: GenerationEvent) -> Result<News, Failure> {
        let event = match event {
            GenerationEvent::Failed(failure) => return Err(failure),
            GenerationEvent::Finished { reason: FinishReason::Shutdown, .. } if self.can_move() => {
                return Err(has_left());
            }
            event => event,
        };
        match log.take(cursor, event) {
            News::Contradiction { choice, position } => {
                self.metrics.stream_contradictions.inc();
                let request = &log.envelope.id;
                tracing::error!(%request, choice, position, "a replica contradicts the tokens sent so far");
                Err(Failure::new(FailureKind::NumericsInvalid, "The replica computes different numbers."))
            }
            News::Foreign => {
                Err(Failure::new(FailureKind::PeerDisconnected, "The replica sent an event that belongs to no choice."))
            }
            news => Ok(news),
        }
    }

    pub(super) fn first_attempt(&self) {
        self.retry_budget.lock().first_attempt();
    }

    pub(super) fn may_retry(&self) -> bool {
        self.retry_budget.lock().try_retry(now())
    }

    /// Registers the stream as running. Returns the stream that already runs under its name, if any.
    pub(super) fn register(&self, log: &Arc<StreamLog>) -> Option<Arc<StreamLog>> {
        let key = log.key()?;
        let mut streams = self.streams.lock();
        if let Some(running) = streams.get(&key).filter(|running| !running.is_closed()) {
            return Some(running.clone());
        }
        streams.insert(key, log.clone());
        None
    }

    pub(super) fn replicate(self: Arc<Self>, log: Arc<StreamLog>) -> BoxFuture<'static, ()> {
        let replicator = self.replicator.clone();
        Box::pin(async move { replicator.place(log).await })
    }

    pub(super) fn forget(self: Arc<Self>, log: Arc<StreamLog>) -> BoxFuture<'static, ()> {
        Box::pin(async move { self.replicator.forget(&log).await })
    }

    /// The journal of a stream that this node has kept.
    pub(super) fn kept(&self, key: &JournalKey) -> Option<JournalRecord> {
        let mut journals = self.journals.lock();
        journals.expire(now());
        journals.get(key).cloned()
    }

    pub(super) fn stream_began(&self) {
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        self.metrics.streams_open.inc();
    }

    /// The stream has ended; keeps its journal for a while.
    pub(super) fn stream_ended(&self, log: &Arc<StreamLog>) {
        if let Some(key) = log.key() {
            match (log.is_superseded(), log.is_spoiled()) {
                // Its key belongs to another stream.
                (true, _) => {}
                (false, true) => self.journals.lock().remove(key),
                // A later epoch may already be stored.
                (false, false) => _ = self.journals.lock().put(log.record(&self.own), now()),
            }
            let mut streams = self.streams.lock();
            if streams.get(&key).is_some_and(|running| Arc::ptr_eq(running, log)) {
                streams.remove(&key);
            }
            drop(streams);
            self.replicator.end(log);
        }
        self.metrics.streams_open.dec();
        self.open_streams.fetch_sub(1, Ordering::Relaxed);
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

/// Why a source ends whose node computes nothing any more.
pub(super) fn has_left() -> Failure {
    Failure::shutting_down("The replica is shutting down.")
}
