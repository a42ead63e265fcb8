//! The cluster as one node sees it: for `/cluster` on the admin address, the table of `outrigger status`, and the measurements
//! of `outrigger drill`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Router;
use super::breaker::BreakerState;
use super::failover::now;
use super::pace::ReplicaPace;
use super::peers::Peers;
use super::placement::pace_weight;
use super::source::Replica;
use crate::cluster::{LoadReport, ModelReport, Peer, Problem};
use crate::types::{FailureKind, NodeId};

/// What a node knows about itself and the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterOverview {
    pub cluster_id: String,
    /// The node that produced this overview.
    pub node: NodeOverview,
    /// Live peers, by name.
    pub peers: Vec<PeerOverview>,
    /// This node's pace compared with its siblings'; none until measured.
    #[serde(default)]
    pub pace: Option<PaceOverview>,
    /// Peers that are considered dead and not yet forgotten.
    pub dead: Vec<NodeId>,
    pub streams: StreamCounts,
    /// Ids of this node's cluster keys; the first one encrypts. Not filled in by the router.
    #[serde(default)]
    pub keys: Vec<String>,
    /// Problems between this node and others.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

/// A node's own report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeOverview {
    pub id: NodeId,
    /// Higher for a later process with the same name.
    pub incarnation: u64,
    /// Version of the software.
    pub version: String,
    pub zone: String,
    /// Address for calls from peers; none for a single node.
    pub peer_addr: Option<SocketAddr>,
    /// Empty while the model loads.
    pub models: Vec<ModelReport>,
    pub report: LoadReport,
}

/// What this node knows about a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerOverview {
    #[serde(flatten)]
    pub node: NodeOverview,
    /// Time since its report arrived.
    pub report_age_seconds: f64,
    pub breaker: BreakerPosition,
    /// Factor of its share of requests; 1 for a healthy node.
    pub weight: f64,
    /// 1 for a stable node, less for one that comes and goes.
    pub stability: f64,
    /// Streams of this node's clients that it has accepted and not finished.
    pub streams: u64,
    /// Of the last call that it answered.
    pub round_trip_seconds: Option<f64>,
    pub last_failure: Option<PeerFailure>,
    /// Its pace compared with its siblings', as this node sees it; none until measured.
    #[serde(default)]
    pub pace: Option<PaceOverview>,
}

/// A replica's pace compared with its siblings of the same fingerprint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PaceOverview {
    /// It gets few requests, and its streams may be raced at other replicas.
    pub is_slow: bool,
    pub slow_for_seconds: Option<f64>,
    /// How many times as long as most siblings it takes for equal work; none if no sibling was measured recently.
    pub ratio: Option<f64>,
    /// Seconds per unit of work, from its report and from this node's streams.
    pub unit_seconds: f64,
    /// Seconds per token of a stream there.
    pub token_seconds: f64,
    /// An explanation for people.
    pub why: String,
}

/// Whether calls to a peer are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerPosition {
    #[default]
    Closed,
    Open,
    /// A single call tests whether it has recovered.
    HalfOpen,
}

/// The last failed call to a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerFailure {
    /// Label of the failure's kind.
    pub kind: String,
    pub age_seconds: f64,
}

/// The streams whose clients are connected to this node. Totals count since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamCounts {
    /// Open now, wherever they are computed.
    pub open: u64,
    /// The part of them that this node's engine computes.
    pub local: u64,
    /// Streams of other nodes' clients that this node's engine computes now.
    pub for_peers: u64,
    /// Total of streams that lost their replica and continued elsewhere, by kind of failure.
    pub failovers: BTreeMap<String, u64>,
    /// Total of streams that moved away from a slow replica.
    #[serde(default)]
    pub rescued: u64,
    /// Total of streams that a draining replica handed over.
    pub hand_overs: u64,
    /// Total of streams resumed from a journal after their entry node was gone.
    pub resumed: u64,
    /// Journals held, for other nodes and for own streams, and their size.
    pub journals: u64,
    pub journal_bytes: u64,
    /// Total of streams that started without a second holder of their journal.
    pub unreplicated: u64,
}

impl StreamCounts {
    /// Failovers of every kind.
    pub fn failovers_total(&self) -> u64 {
        self.failovers.values().sum()
    }
}

impl ClusterOverview {
    /// This node, then its live peers.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeOverview> {
        std::iter::once(&self.node).chain(self.peers.iter().map(|peer| &peer.node))
    }
}

impl Router {
    /// The cluster as this node sees it now.
    pub fn overview(&self) -> ClusterOverview {
        let Router { node, peers: others, streams } = self;
        let (view, now, identity) = (others.view.borrow().clone(), now(), &node.identity);
        let paces = others.pacing.found();
        let overview = |peer: &Arc<Peer>| others.overview(peer, paces.get(&Replica::At(peer.id.clone())), now);
        let peers: Vec<PeerOverview> = view.peers.values().map(overview).collect();
        let metrics = &node.metrics;
        let failovers = FailureKind::ALL.into_iter().map(|kind| {
            let label = kind.label();
            (label.to_owned(), metrics.failovers.with([label]).get())
        });
        let resumed = ["journal", "follow"].map(|from| metrics.streams_resumed.with([from]).get());
        let open = u64::from(self.open_streams());
        let journals = streams.journals.lock();
        ClusterOverview {
            cluster_id: identity.cluster_id.clone(),
            node: NodeOverview {
                id: node.id.clone(),
                incarnation: identity.incarnation,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                zone: identity.zone.clone(),
                peer_addr: identity.peer_addr,
                models: self.local().map(|local| local.model.clone()).into_iter().collect(),
                report: self.report(),
            },
            streams: StreamCounts {
                open,
                local: open.saturating_sub(others.ledger.open()),
                for_peers: u64::try_from(metrics.streams_served.get()).unwrap_or(0),
                failovers: failovers.filter(|(_, count)| *count > 0).collect(),
                rescued: metrics.rescues.with(["won"]).get(),
                hand_overs: metrics.hand_overs.get(),
                resumed: resumed.iter().sum(),
                journals: journals.len() as u64,
                journal_bytes: journals.bytes(),
                unreplicated: metrics.journal_unreplicated.get(),
            },
            peers,
            pace: paces.get(&Replica::Here).map(|pace| PaceOverview::of(pace, now)),
            dead: view.dead.clone(),
            keys: Vec::new(),
            problems: Vec::new(),
        }
    }
}

impl Peers {
    fn overview(&self, peer: &Peer, pace: Option<&ReplicaPace>, now: Instant) -> PeerOverview {
        let standing = self.ledger.standing(peer, now);
        let description = &peer.description;
        PeerOverview {
            node: NodeOverview {
                id: peer.id.clone(),
                incarnation: peer.incarnation,
                version: description.version.clone(),
                zone: description.zone.clone(),
                peer_addr: Some(description.peer_addr),
                models: description.models.clone(),
                report: peer.report.clone(),
            },
            report_age_seconds: peer.report_age(now).as_secs_f64(),
            breaker: match standing.breaker {
                BreakerState::Closed => BreakerPosition::Closed,
                BreakerState::Open => BreakerPosition::Open,
                BreakerState::HalfOpen => BreakerPosition::HalfOpen,
            },
            weight: standing.weight * peer.stability * pace_weight(pace.and_then(ReplicaPace::slowness)),
            stability: peer.stability,
            streams: standing.accepted.into(),
            round_trip_seconds: standing.round_trip.map(|time| time.as_secs_f64()),
            last_failure: standing.last_failure.map(|(kind, at)| PeerFailure {
                kind: kind.label().to_owned(),
                age_seconds: now.saturating_duration_since(at).as_secs_f64(),
            }),
            pace: pace.map(|pace| PaceOverview::of(pace, now)),
        }
    }
}

impl PaceOverview {
    fn of(pace: &ReplicaPace, now: Instant) -> Self {
        Self {
            is_slow: pace.slow_since.is_some(),
            slow_for_seconds: pace.slow_since.map(|since| now.saturating_duration_since(since).as_secs_f64()),
            ratio: pace.ratio(),
            unit_seconds: pace.unit_seconds,
            token_seconds: pace.token_seconds,
            why: pace.explain(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_reads_back_from_json_and_is_flat_there() {
        let peer = PeerOverview {
            node: NodeOverview {
                id: NodeId::new("b"),
                incarnation: 7,
                version: "0.1.0".into(),
                zone: "z".into(),
                peer_addr: Some(([127, 0, 0, 1], 7000).into()),
                models: Vec::new(),
                report: LoadReport { kv_usage: 0.25, ..LoadReport::default() },
            },
            report_age_seconds: 0.5,
            breaker: BreakerPosition::HalfOpen,
            weight: 1.0,
            stability: 0.5,
            streams: 3,
            round_trip_seconds: Some(0.001),
            last_failure: Some(PeerFailure { kind: "peer_stalled".into(), age_seconds: 2.0 }),
            pace: None,
        };
        let json = serde_json::to_value(&peer).expect("plain data");
        assert_eq!((&json["id"], &json["breaker"]), (&"b".into(), &"half_open".into()));
        assert_eq!(serde_json::from_value::<PeerOverview>(json).expect("the same"), peer);
    }
}
