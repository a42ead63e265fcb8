//! This node, as a place where requests can be computed: its identity, its engine, and how far it is on its way out.
//!
//! What it tells others about itself is in `load`. Knows no peers and no streams.

use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::config::Config;
use super::dispatch::Want;
use super::failover::now;
use super::hot_prefixes::HotPrefixes;
use super::meter::Meter;
use super::pace::OwnPace;
use super::source::StreamSource;
use super::stream_log::Cursor;
use crate::admission::{AdmissionController, Demand};
use crate::cluster::{LoadReport, ModelReport};
use crate::health::Health;
use crate::observability::Metrics;
use crate::types::{Backend, ChoiceStart, Failure, FailureKind, GenerateRequest, NodeId, NodeState, watch};

/// The model that this node serves, and its engine.
pub struct LocalReplica {
    pub engine: Arc<dyn Backend>,
    pub model: ModelReport,
    /// Sequences that the engine can compute at the same time.
    pub seats: u32,
    /// The tokenizer files for peers.
    pub tokenizer: Bytes,
}

impl LocalReplica {
    /// The tokens per second that the engine has measured; 0 if it has not.
    pub(super) fn drain_rate(&self) -> f64 {
        self.engine.status().drain_tokens_per_second
    }
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

/// How far a node has gone on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DepartureStage {
    Stays,
    /// What it computes is handed to peers, and nothing is begun here that a peer could take.
    HandsOver,
    /// It computes nothing any more, and passes on what peers compute.
    OnlyRelays,
}

pub(super) struct ThisNode {
    pub(super) id: NodeId,
    pub(super) identity: NodeIdentity,
    pub(super) config: Config,
    /// Whether there can be other nodes.
    pub(super) is_clustered: bool,
    pub(super) admission: AdmissionController,
    pub(super) health: Health,
    pub(super) metrics: Arc<Metrics>,
    local: OnceLock<LocalReplica>,
    /// The last assessment.
    pub(super) report: Mutex<LoadReport>,
    pub(super) pace: OwnPace,
    pub(super) hot_prefixes: Mutex<HotPrefixes>,
    /// Requests held while the node starts.
    pub(super) held: AtomicUsize,
    pub(super) departure: watch::Sender<DepartureStage>,
    pub(super) is_cut: watch::Sender<bool>,
}

impl ThisNode {
    pub(super) fn new(
        id: NodeId,
        identity: NodeIdentity,
        config: Config,
        is_clustered: bool,
        admission: AdmissionController,
        health: Health,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            id,
            identity,
            config,
            is_clustered,
            admission,
            health,
            metrics,
            local: OnceLock::new(),
            report: Mutex::default(),
            pace: OwnPace::new(now()),
            hot_prefixes: Mutex::default(),
            held: 0.into(),
            departure: watch::Sender::new(DepartureStage::Stays),
            is_cut: watch::Sender::new(false),
        }
    }

    /// From now on this node can generate. Only the first call has an effect.
    pub(super) fn attach(&self, local: LocalReplica) {
        let first = self.local.set(local).is_ok();
        assert!(first, "a node serves one model");
    }

    pub(super) fn local(&self) -> Option<&LocalReplica> {
        self.local.get()
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

    /// Whether requests may be placed on this node.
    pub(super) fn may_serve(&self) -> bool {
        self.can_serve() && !self.leaves()
    }

    /// Whether this node's engine would accept a request.
    pub(super) fn can_serve(&self) -> bool {
        let state = self.health.lifecycle().state();
        let is_up = matches!(state, NodeState::Ready | NodeState::Degraded | NodeState::Draining);
        // Requests given to a hanging engine would wait until the node fails.
        is_up && self.local().is_some() && !self.only_relays() && !self.is_cut() && !self.health.engine_is_stalled()
    }

    /// Whether the model may soon be loaded or a peer found, even if the node has been asked to end before it was ready.
    pub(super) fn may_yet_serve(&self) -> bool {
        let is_loading = matches!(self.health.lifecycle().state(), NodeState::Starting | NodeState::Warming);
        !self.is_cut() && (is_loading || (self.is_clustered && self.local().is_none()))
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
        Failure::unavailable(code, message).with_retry_after(retry_after)
    }

    /// Starts the generation in this node's engine.
    pub(super) fn open(
        &self,
        want: &Want,
        starts: Vec<ChoiceStart>,
        cursor: Cursor,
        is_continuation: bool,
    ) -> Result<StreamSource, Failure> {
        let local = self.local.get().filter(|_| self.can_serve()).ok_or_else(|| self.unavailable())?;
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
            false => self.admission.try_admit(demand, local.drain_rate()).map_err(Failure::from)?,
        };
        let progress = self.pace.streams.part(now());
        let meter = Meter::new(self.metrics.clone(), &request, now());
        let stream = engine.generate(request)?;
        self.hot_prefixes.lock().record(prefixes);
        Ok(StreamSource::engine(stream, engine, permit, meter, cursor, progress, now()))
    }

    /// What memory pressure leaves of a replica's share: what the replica says, by its own marks. For one of an earlier version,
    /// which says nothing, this node's marks count.
    pub(super) fn memory_share(&self, report: &LoadReport) -> f64 {
        let by_our_marks = || self.health.config().memory_share(report.memory_pressure.into());
        report.memory_share.map_or_else(by_our_marks, f64::from)
    }
}
