//! The router's state, shared by all its streams.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::breaker::Attempt;
use super::config::Config;
use super::dispatch::{Choice, Want};
use super::failover::now;
use super::hot_prefixes::HotPrefixes;
use super::ledger::{InFlight, Ledger};
use super::placement::{Candidate, Placement, PlacementRequest, place};
use super::replicator::Replicator;
use super::retry_budget::{self, RetryBudget};
use super::source::{Replica, Source};
use super::stream_log::{Cursor, News, StreamLog};
use crate::admission::AdmissionController;
use crate::cluster::{
    ClusterView, FollowCall, GenerateCall, JournalBatch, JournalKey, JournalRecord, JournalRefusal, JournalStore,
    LoadReport, ModelReport, Peer, PeerStream, PeerTransport, rendezvous,
};
use crate::health::{Health, QueueView};
use crate::observability::Metrics;
use crate::types::{
    Backend, ChoiceStart, Failure, FailureKind, FinishReason, GenerationEvent, NodeId, NodeState, watch,
};

/// Peers that are asked for a journal, in the order of the key's rendezvous.
const LOOKUPS: usize = 8;
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(250);
/// Weight of the newest measurement in the moving averages.
const NEWEST: f32 = 0.1;

/// The model that this node serves, and the engine that does.
pub struct LocalReplica {
    pub engine: Arc<dyn Backend>,
    pub model: ModelReport,
    /// Sequences that the engine computes at one time.
    pub seats: u32,
    /// What peers need to turn text into this model's ids.
    pub tokenizer: Bytes,
}

/// How this node is known to the others, and to operators.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    pub cluster_id: String,
    pub incarnation: u64,
    pub zone: String,
    /// Where peers call; none in a cluster of one.
    pub peer_addr: Option<SocketAddr>,
}

pub struct RouterParts {
    pub config: Config,
    pub own: NodeId,
    pub identity: NodeIdentity,
    /// Whether there may be other nodes at all.
    pub is_clustered: bool,
    pub admission: AdmissionController,
    pub health: Health,
    pub metrics: Arc<Metrics>,
    pub transport: Arc<dyn PeerTransport>,
    pub view: watch::Receiver<Arc<ClusterView>>,
    /// Settles what is equal and jitters what waits.
    pub seed: u64,
}

/// Handle to the router. Cheap to clone.
#[derive(Clone)]
pub struct Router {
    pub(super) shared: Arc<Shared>,
}

pub struct Shared {
    pub(super) config: Config,
    pub(super) own: NodeId,
    pub(super) identity: NodeIdentity,
    is_clustered: bool,
    admission: AdmissionController,
    pub(super) health: Health,
    pub(super) metrics: Arc<Metrics>,
    pub(super) transport: Arc<dyn PeerTransport>,
    pub(super) view: watch::Receiver<Arc<ClusterView>>,
    local: OnceLock<LocalReplica>,
    pub(super) streams: Mutex<BTreeMap<JournalKey, Arc<StreamLog>>>,
    pub(super) journals: Mutex<JournalStore>,
    replicator: Arc<Replicator>,
    pub(super) ledger: Ledger,
    retry_budget: Mutex<RetryBudget>,
    pub(super) hot_prefixes: Mutex<HotPrefixes>,
    own_report: Mutex<LoadReport>,
    latencies: Mutex<Latencies>,
    draws: AtomicU64,
    open_streams: AtomicU32,
    /// The last stream has ended.
    pub(super) idle: Notify,
    is_closed: AtomicBool,
    pub(super) is_leaving: watch::Sender<bool>,
    pub(super) is_cut: watch::Sender<bool>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Latencies {
    first_token: f32,
    inter_token: f32,
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
        let shared = Shared {
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
            latencies: Mutex::default(),
            draws: seed.into(),
            open_streams: 0.into(),
            idle: Notify::new(),
            is_closed: false.into(),
            is_leaving: watch::Sender::new(false),
            is_cut: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    pub fn node_id(&self) -> &NodeId {
        &self.shared.own
    }

    /// A node that never has a peer.
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

    /// From now on this node can generate. Only the first call counts.
    pub fn attach(&self, local: LocalReplica) {
        let first = self.shared.local.set(local).is_ok();
        assert!(first, "a node serves one model");
        self.refresh();
    }

    pub fn local(&self) -> Option<&LocalReplica> {
        self.shared.local.get()
    }

    /// The models that peers serve, with somebody who does.
    pub fn peer_models(&self) -> Vec<(Arc<Peer>, ModelReport)> {
        let view = self.shared.view.borrow().clone();
        let of = |peer: &Arc<Peer>| {
            let models = peer.description.models.clone().into_iter();
            models.map(|model| (peer.clone(), model)).collect::<Vec<_>>()
        };
        view.peers.values().flat_map(of).collect()
    }

    /// The files of a peer's tokenizer.
    pub async fn fetch_tokenizer(&self, peer: &Peer, digest: &str) -> Result<Bytes, Failure> {
        self.shared.transport.tokenizer(peer, digest.to_owned()).await
    }

    /// Keeps journals with other nodes up to date, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.shared.replicator.clone().run(shutdown).await;
    }

    /// Looks at this node anew, and says what there is to say of it.
    pub fn refresh(&self) -> LoadReport {
        let report = self.shared.assess();
        *self.shared.own_report.lock() = report.clone();
        let mut journals = self.shared.journals.lock();
        journals.expire(now());
        self.shared.metrics.journals_held.set(journals.len() as i64);
        self.shared.metrics.journal_bytes.set(i64::try_from(journals.bytes()).unwrap_or(i64::MAX));
        report
    }

    /// What this node says of itself, as it is now.
    pub fn report(&self) -> LoadReport {
        self.shared.own_report_now()
    }

    /// The queue as the readiness verdict looks at it.
    pub fn queue(&self) -> QueueView {
        self.shared.queue()
    }

    /// Streams for which this node answers to clients.
    pub fn open_streams(&self) -> u32 {
        self.shared.open_streams.load(Ordering::Relaxed)
    }

    /// The node wants to end: what it generates is taken elsewhere where that can be, and nothing new is begun here.
    pub fn leave(&self) {
        self.shared.is_leaving.send_replace(true);
    }

    /// Returns once no stream is open any more.
    pub async fn drained(&self) {
        loop {
            let idle = self.shared.idle.notified();
            if self.open_streams() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// From now on no stream is begun, neither here nor at a peer.
    pub fn close(&self) {
        self.shared.is_closed.store(true, Ordering::Relaxed);
    }

    /// Ends all streams; their clients are told how to go on elsewhere.
    pub fn cut(&self) {
        self.shared.is_cut.send_replace(true);
    }

    /// Whether there may be other nodes at all.
    pub fn is_clustered(&self) -> bool {
        self.shared.is_clustered
    }

    /// Whether a peer could take a request for this model now.
    pub fn serves_elsewhere(&self, name: &str, tokenizer: &str) -> bool {
        let is_it = |model: &ModelReport| model.tokenizer == tokenizer && model.names.iter().any(|known| known == name);
        let peers = &self.shared.view.borrow().peers;
        peers.values().any(|peer| peer.report.ready && peer.description.models.iter().any(is_it))
    }

    /// Whether another node could take a request now.
    pub fn has_ready_peer(&self) -> bool {
        self.shared.view.borrow().peers.values().any(|peer| peer.report.ready)
    }
}

impl Shared {
    pub(super) fn local(&self) -> Option<&LocalReplica> {
        self.local.get()
    }

    /// Whether a stream that loses its replica may find another.
    pub(super) fn can_move(&self) -> bool {
        self.is_clustered
    }

    pub(super) fn has_peers(&self) -> bool {
        self.is_clustered && !self.view.borrow().peers.is_empty()
    }

    /// Refuses when no stream may be begun any more.
    pub(super) fn check_open(&self) -> Result<(), Failure> {
        if self.is_closed.load(Ordering::Relaxed) { Err(self.unavailable()) } else { Ok(()) }
    }

    pub(super) fn leaves(&self) -> bool {
        *self.is_leaving.borrow()
    }

    /// Where the request goes, among the replicas for which `is_free` holds.
    pub(super) fn choose(&self, want: &Want, is_free: &dyn Fn(&Replica) -> bool, is_continuation: bool) -> Choice {
        let (view, now) = (self.view.borrow().clone(), now());
        let here = self.local.get().filter(|local| self.suits(want, &local.model));
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
                true => Choice::Here,
                false => Choice::Nowhere(self.unavailable()),
            };
        }
        let own_report = here.map(|_| self.own_report_now());
        let mut candidates = Vec::with_capacity(peers.len() + 1);
        candidates.extend(own_report.as_ref().map(|report| Candidate {
            report,
            age: Duration::ZERO,
            is_here: true,
            is_same_zone: true,
            sent_choices: 0,
            sent_tokens: 0,
            weight: 1.0,
            may_serve: self.may_serve_here() && is_free(&Replica::Here),
        }));
        let num_here = candidates.len();
        candidates.extend(peers.iter().map(|(peer, _)| {
            let standing = self.ledger.standing(peer, now);
            Candidate {
                report: &peer.report,
                age: peer.report_age(now),
                is_here: false,
                is_same_zone: peer.description.zone == self.identity.zone,
                sent_choices: standing.sent_choices,
                sent_tokens: standing.sent_tokens,
                weight: standing.weight * peer.stability,
                may_serve: standing.allows && is_free(&Replica::At(peer.id.clone())),
            }
        }));
        let request = PlacementRequest {
            prompt_tokens: want.prompt.len() as u64,
            choices: want.sampling.n,
            prefix_hashes: &want.prefixes,
            remaining: want.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            is_continuation,
        };
        let mut placement = place(want.strategy, &request, &candidates, self.draw());
        if placement == Placement::Nowhere && !is_continuation {
            // A fresh request would fail at once: better a peer that has lately failed than nobody. A stream that has begun
            // can wait for the breaker.
            for (candidate, (peer, _)) in candidates[num_here..].iter_mut().zip(&peers) {
                let is_trusted = self.ledger.standing(peer, now).is_trusted;
                candidate.may_serve = is_trusted && is_free(&Replica::At(peer.id.clone()));
            }
            placement = place(want.strategy, &request, &candidates, self.draw());
        }
        match placement {
            Placement::Serve(index) if index < num_here => Choice::Here,
            Placement::Serve(index) => {
                let (peer, model) = peers[index - num_here];
                Choice::Peer(peer.clone(), model.fingerprint.clone())
            }
            Placement::Shed { retry_after } => {
                let message = "Every node is busy: the queues of all replicas of the model are full.";
                Choice::Shed(Failure::new(FailureKind::Overloaded, message).with_retry_after(retry_after))
            }
            Placement::Nowhere => Choice::Nowhere(self.unavailable()),
        }
    }

    fn suits(&self, want: &Want, model: &ModelReport) -> bool {
        let has_same_numbers = want.fingerprint.as_ref() == Some(&model.fingerprint);
        let may_differ = want.fingerprint.is_none() || want.allows_other_fingerprint;
        model.tokenizer == want.tokenizer
            && want.length() <= u64::from(model.max_model_len)
            && (has_same_numbers || (may_differ && model.names.contains(&want.model)))
    }

    pub(super) fn may_serve_here(&self) -> bool {
        let is_up = matches!(self.health.lifecycle().state(), NodeState::Ready | NodeState::Degraded);
        is_up && self.local.get().is_some() && !self.leaves()
    }

    fn unavailable(&self) -> Failure {
        let (message, code) = match self.health.lifecycle().state() {
            NodeState::Ready | NodeState::Degraded if !self.leaves() => {
                ("No replica of the model can take the request now.", "no_replica")
            }
            NodeState::Starting | NodeState::Warming => ("The model is still loading. See /startupz.", "model_loading"),
            NodeState::Failed => ("The engine has failed. See /livez.", "engine_failed"),
            NodeState::Ready | NodeState::Degraded | NodeState::Draining | NodeState::Stopped => {
                ("The server is shutting down.", "shutting_down")
            }
        };
        Failure::new(FailureKind::EngineFailed, message).with_code(code).with_retry_after(Duration::from_secs(2))
    }

    /// Starts the generation in this node's engine.
    pub(super) fn open_here(
        &self,
        want: &Want,
        starts: Vec<ChoiceStart>,
        cursor: Cursor,
        is_continuation: bool,
    ) -> Result<Source, Failure> {
        let local = self.local.get().filter(|_| self.may_serve_here()).ok_or_else(|| self.unavailable())?;
        let engine = local.engine.clone();
        let permit = match is_continuation {
            true => self.admission.admit_continuation(want.demand()),
            false => {
                let rate = engine.status().drain_tokens_per_second;
                self.admission.try_admit(want.demand(), rate).map_err(Failure::from)?
            }
        };
        let stream = engine.generate(want.request(starts, is_continuation))?;
        self.hot_prefixes.lock().record(&want.prefixes);
        Ok(Source::engine(stream, engine, permit, cursor, now()))
    }

    pub(super) fn open_peer(&self, peer: &Peer, call: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        self.bounded(self.transport.generate(peer, call))
    }

    /// A peer that does not even answer the call in this time has stalled.
    pub(super) fn bounded<T: Send + 'static>(
        &self,
        call: BoxFuture<'static, Result<T, Failure>>,
    ) -> BoxFuture<'static, Result<T, Failure>> {
        let limit = self.config.peer_stall_timeout;
        Box::pin(async move {
            let stalled = || Err(Failure::new(FailureKind::PeerStalled, "The replica does not answer."));
            timeout(limit, call).await.unwrap_or_else(|_| stalled())
        })
    }

    /// Counts a request as on its way to the peer.
    pub(super) fn send_to(&self, peer: &Peer, want: &Want) -> (Option<Attempt>, InFlight) {
        self.ledger.send(peer, want.sampling.n, want.prompt.len() as u64, now())
    }

    /// The source does what was asked of it.
    pub(super) fn accepted(&self, source: &mut Source) {
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

    /// Feeds an event to the stream. An error is the end of its source.
    pub(super) fn judge(&self, log: &StreamLog, cursor: &mut Cursor, event: GenerationEvent) -> Result<News, Failure> {
        let event = match event {
            GenerationEvent::Failed(failure) => return Err(failure),
            GenerationEvent::Finished { reason: FinishReason::Shutdown, .. } if self.can_move() => {
                return Err(Failure::new(FailureKind::Overloaded, "The replica is shutting down."));
            }
            event => event,
        };
        match log.take(cursor, event) {
            News::Contradiction { choice, position } => {
                self.metrics.stream_contradictions.inc();
                let request = &log.head.id;
                tracing::error!(%request, choice, position, "a replica contradicts what was emitted");
                Err(Failure::new(FailureKind::NumericsInvalid, "The replica computes other numbers."))
            }
            News::Foreign => {
                Err(Failure::new(FailureKind::PeerDisconnected, "The replica sent what belongs to no choice."))
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

    pub(super) fn backoff(&self, attempt: u32) -> Duration {
        retry_budget::backoff(attempt, self.draw())
    }

    /// Puts the stream among the running ones, unless one of its name runs already: then that one.
    pub(super) fn register(&self, log: &Arc<StreamLog>) -> Option<Arc<StreamLog>> {
        if !log.is_named {
            return None;
        }
        let mut streams = self.streams.lock();
        if let Some(running) = streams.get(&log.key()).filter(|running| !running.is_closed()) {
            return Some(running.clone());
        }
        streams.insert(log.key(), log.clone());
        None
    }

    pub(super) fn replicate(self: Arc<Self>, log: Arc<StreamLog>) -> BoxFuture<'static, ()> {
        let replicator = self.replicator.clone();
        Box::pin(async move { replicator.place(log).await })
    }

    /// The journal that this node keeps of a stream.
    pub(super) fn kept(&self, key: &JournalKey) -> Option<JournalRecord> {
        let mut journals = self.journals.lock();
        journals.expire(now());
        journals.get(key).cloned()
    }

    pub(super) fn stream_began(&self) {
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        self.metrics.streams_open.inc();
    }

    /// The stream runs no more; what is known of it is kept for a while.
    pub(super) fn stream_ended(&self, log: &Arc<StreamLog>) {
        if log.is_named {
            // A later epoch than ours may be kept already.
            let _ = self.journals.lock().put(log.record(&self.own), now());
            let mut streams = self.streams.lock();
            if streams.get(&log.key()).is_some_and(|running| Arc::ptr_eq(running, log)) {
                streams.remove(&log.key());
            }
            drop(streams);
            self.replicator.end(log);
        }
        self.metrics.streams_open.dec();
        if self.open_streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.idle.notify_waiters();
        }
    }

    /// What other nodes know of a stream.
    pub(super) async fn lookup(&self, key: &JournalKey) -> Vec<JournalRecord> {
        let view = self.view.borrow().clone();
        let ranked = rendezvous::rank(key, view.peers.keys());
        let lookups = ranked.into_iter().take(LOOKUPS);
        let lookups = lookups.map(|node| timeout(LOOKUP_TIMEOUT, self.transport.lookup(&view.peers[node], *key)));
        let mut answers: FuturesUnordered<_> = lookups.collect();
        let mut records = Vec::new();
        while let Some(answer) = answers.next().await {
            records.extend(answer.ok().and_then(Result::ok).flatten());
        }
        records
    }

    pub(super) fn note_latency(&self, first: Duration, between: Option<Duration>) {
        let mut latencies = self.latencies.lock();
        let Latencies { first_token, inter_token } = &mut *latencies;
        average(first_token, first);
        between.into_iter().for_each(|between| average(inter_token, between));
    }

    pub(super) fn queue(&self) -> QueueView {
        let mark = self.health.config().queue_saturation_mark as f32;
        let is_below = |peer: &Arc<Peer>| peer.report.ready && peer.report.queue_saturation < mark;
        QueueView {
            saturation: self.admission.status().saturation,
            other_ready_peer_below_mark: self.view.borrow().peers.values().any(is_below),
        }
    }

    /// The last assessment, with what changes from request to request as it is now.
    fn own_report_now(&self) -> LoadReport {
        let report = self.own_report.lock().clone();
        let state = self.health.lifecycle().state();
        // The assessment may be a moment older than the state.
        let ready = if report.state == state { report.ready } else { self.may_serve_here() };
        self.with_load(LoadReport { state, ready, ..report })
    }

    fn with_load(&self, report: LoadReport) -> LoadReport {
        let Some(local) = self.local.get() else { return report };
        let (status, door) = (local.engine.status(), self.admission.status());
        let total = status.kv_blocks_total.max(1) as f32;
        LoadReport {
            running: status.running,
            waiting: status.waiting.max(door.queued_requests),
            waiting_tokens: status.waiting_tokens.max(door.queued_tokens),
            seats: local.seats,
            queue_saturation: door.saturation as f32,
            kv_usage: status.kv_blocks_used as f32 / total,
            drain_tokens_per_second: status.drain_tokens_per_second as f32,
            free_token_budget: self.admission.free_token_budget(),
            ..report
        }
    }

    fn assess(&self) -> LoadReport {
        let readiness = self.health.readiness(self.queue());
        let Latencies { first_token, inter_token } = *self.latencies.lock();
        self.with_load(LoadReport {
            state: self.health.lifecycle().state(),
            ready: readiness.ready && !self.leaves(),
            reasons: readiness.reasons.iter().map(|reason| reason.code.to_string()).collect(),
            memory_pressure: readiness.memory_pressure.unwrap_or(0.0) as f32,
            time_to_first_token: first_token,
            inter_token_latency: inter_token,
            hot_prefixes: self.hot_prefixes.lock().digest(),
            ..LoadReport::default()
        })
    }

    /// A number that nobody else draws.
    fn draw(&self) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        let state = self.draws.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn admission(&self) -> &AdmissionController {
        &self.admission
    }
}

fn average(mean: &mut f32, time: Duration) {
    let seconds = time.as_secs_f32();
    *mean = if *mean == 0.0 { seconds } else { *mean + NEWEST * (seconds - *mean) };
}

/// The way to the peers of a node that has none.
struct NoPeers;

impl NoPeers {
    fn refuse<T: Send + 'static>() -> BoxFuture<'static, Result<T, Failure>> {
        let failure = Failure::new(FailureKind::PeerUnreachable, "This node has no peers.");
        Box::pin(std::future::ready(Err(failure)))
    }
}

impl PeerTransport for NoPeers {
    fn generate(&self, _: &Peer, _: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        Self::refuse()
    }

    fn follow(&self, _: &Peer, _: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        Self::refuse()
    }

    fn journal(&self, _: &Peer, _: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>> {
        Self::refuse()
    }

    fn lookup(&self, _: &Peer, _: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>> {
        Self::refuse()
    }

    fn tokenizer(&self, _: &Peer, _: String) -> BoxFuture<'static, Result<Bytes, Failure>> {
        Self::refuse()
    }
}
