//! The handle to the router, and the three rooms behind it: this node, its peers, and its clients' streams. Each task gets the
//! rooms that it needs.

use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::config::Config;
use super::no_peers::NoPeers;
use super::peers::Peers;
use super::streams::Streams;
use super::this_node::{DepartureStage, LocalReplica, NodeIdentity, ThisNode};
use crate::admission::AdmissionController;
use crate::cluster::{ClusterView, ModelReport, Peer, PeerTransport};
use crate::health::Health;
use crate::observability::Metrics;
use crate::types::{Failure, NodeId, watch};

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

/// The handle to the router. Cheap to clone.
#[derive(Clone)]
pub struct Router {
    pub(super) node: Arc<ThisNode>,
    pub(super) peers: Arc<Peers>,
    pub(super) streams: Arc<Streams>,
}

impl Router {
    pub fn new(parts: RouterParts) -> Self {
        let RouterParts { config, own, identity, is_clustered, admission, health, metrics, transport, view, seed } =
            parts;
        let peers = Peers::new(&config, transport, view, seed);
        let streams = Streams::new(own.clone(), &config, &peers, metrics.clone());
        let node = ThisNode::new(own, identity, config, is_clustered, admission, health, metrics);
        Self { node: Arc::new(node), peers: Arc::new(peers), streams: Arc::new(streams) }
    }

    pub fn node_id(&self) -> &NodeId {
        &self.node.id
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
        self.node.attach(local);
        self.refresh();
    }

    pub fn local(&self) -> Option<&LocalReplica> {
        self.node.local()
    }

    /// The models that peers serve, each with a peer that serves it.
    pub fn peer_models(&self) -> Vec<(Arc<Peer>, ModelReport)> {
        let view = self.peers.view.borrow().clone();
        let of = |peer: &Arc<Peer>| {
            let models = peer.description.models.clone().into_iter();
            models.map(|model| (peer.clone(), model)).collect::<Vec<_>>()
        };
        view.peers.values().flat_map(of).collect()
    }

    /// Fetches the files of a peer's tokenizer.
    pub async fn fetch_tokenizer(&self, peer: &Peer, digest: &str) -> Result<Bytes, Failure> {
        self.peers.transport.tokenizer(peer, digest.to_owned()).await
    }

    /// Keeps the journals at other nodes up to date, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.streams.replicator.clone().run(shutdown).await;
    }

    /// Streams of this node's clients.
    pub fn open_streams(&self) -> u32 {
        self.streams.open()
    }

    /// This node is leaving: moves its streams elsewhere if possible, and starts nothing that a peer could take.
    pub fn leave(&self) {
        self.node.departure.send_replace(DepartureStage::HandsOver);
    }

    /// The node computes nothing any more. Streams go on where peers compute them; those that no peer takes end, and their
    /// clients are told how to go on elsewhere.
    pub fn stop_computing(&self) {
        self.node.departure.send_replace(DepartureStage::OnlyRelays);
    }

    /// Ends all streams, and tells clients how to continue elsewhere. No new stream is started.
    pub fn cut(&self) {
        self.node.is_cut.send_replace(true);
    }

    /// Whether there can be other nodes.
    pub fn is_clustered(&self) -> bool {
        self.node.is_clustered
    }

    /// Whether a peer could take a request for this model now.
    pub fn serves_elsewhere(&self, name: &str, tokenizer: &str) -> bool {
        let is_it = |model: &ModelReport| model.serves(name, tokenizer);
        let peers = &self.peers.view.borrow().peers;
        peers.values().any(|peer| peer.report.ready && peer.description.models.iter().any(is_it))
    }

    /// Whether this node or another could take a request now.
    pub fn can_serve(&self) -> bool {
        self.can_serve_here() || self.peers.view.borrow().peers.values().any(|peer| peer.report.ready)
    }

    /// The error for clients when no node can take a request.
    pub fn unavailable(&self) -> Failure {
        self.node.unavailable()
    }

    /// Whether this node's engine could take a request. While it leaves, only if no peer can.
    pub fn can_serve_here(&self) -> bool {
        self.node.can_serve()
    }
}
