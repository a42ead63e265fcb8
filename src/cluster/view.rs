//! The cluster as this node sees it at one moment: the live peers with their latest reports.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::load_report::{LoadReport, ModelReport, NodeDescription};
use crate::types::NodeId;

/// A snapshot. Replaced as a whole when something changes.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    /// Live peers, not including this node.
    pub peers: BTreeMap<NodeId, Arc<Peer>>,
    /// Peers that gossip considers dead and has not yet forgotten.
    pub dead: Vec<NodeId>,
}

/// A live peer.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    pub id: NodeId,
    /// Higher for a later process with the same name.
    pub incarnation: u64,
    pub description: NodeDescription,
    /// The version of the protocol in which it is called.
    pub protocol: u16,
    pub report: LoadReport,
    /// When the report arrived, by this node's clock.
    pub reported_at: Instant,
    /// When the pace in the report was measured, by this node's clock; meaningless without one.
    pub measured_at: Instant,
    /// 0 to 1; below 1 for a peer that has often come and gone recently. Multiplies the peer's weight.
    pub stability: f64,
}

impl Peer {
    pub fn report_age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.reported_at)
    }

    pub fn model(&self, name: &str) -> Option<&ModelReport> {
        self.description.models.iter().find(|model| model.has_name(name))
    }
}
