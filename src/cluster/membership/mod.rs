//! Membership: this node's part in the gossip, and the resulting view of the cluster.
//!
//! Chitchat replicates each node's key-values and heartbeats, and decides by phi accrual which nodes are alive. Around it are
//! encrypted datagrams (`seal`), encoded values (`gossip`), the peers to contact first (`seeds`), and the view (`roster`). One
//! task owns all of it; `Membership` is its handle.

mod damping;
mod diagnosis;
mod publisher;
mod roster;
mod seeds;
mod task;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use self::task::{MembershipParts, MembershipTask, Own};
use super::seal::Introduction;
use super::seal::transport::{Datagrams, NoRandomness, SealedTransport};
use super::{ClusterView, Config, KeyRing, LoadReport, NodeDescription, Problems};
use crate::observability::Metrics;
use crate::types::{NodeId, tasks, watch};

/// Time limit for announcing that this node leaves.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("gossip_addr: {addr} cannot be bound")]
    Bind {
        addr: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("gossip_addr is not set")]
    Alone,
    #[error("the gossip does not start")]
    Gossip(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
}

/// This node's part in the cluster. When the last handle is dropped, the node falls silent as if it had died.
#[derive(Clone)]
pub struct Membership {
    id: NodeId,
    incarnation: u64,
    gossip_addr: Option<SocketAddr>,
    view: watch::Receiver<Arc<ClusterView>>,
    own: watch::Sender<Own>,
    problems: Problems,
    /// `None` for a single node, like `leave`.
    transport: Option<SealedTransport>,
    leave: Option<tokio::sync::mpsc::Sender<oneshot::Sender<()>>>,
    has_left: Arc<AtomicBool>,
}

impl Membership {
    /// A single node without a cluster: the view stays empty.
    pub fn alone(config: &Config) -> Self {
        let (_, view) = watch::channel(Arc::default());
        Self {
            id: node_id(config),
            incarnation: incarnation_now(),
            gossip_addr: None,
            view,
            own: watch::channel(Own::default()).0,
            problems: Problems::default(),
            transport: None,
            leave: None,
            has_left: Arc::default(),
        }
    }

    /// Binds the gossip address and starts to gossip. Other nodes do not use this node as a peer before `describe`.
    pub async fn start(config: &Config, keys: &KeyRing, metrics: Arc<Metrics>) -> Result<Self, MembershipError> {
        let addr = config.gossip_addr.ok_or(MembershipError::Alone)?;
        let socket = UdpSocket::bind(addr).await.map_err(|source| MembershipError::Bind { addr, source })?;
        Self::start_on(Arc::new(socket), config, keys, metrics).await
    }

    /// Like `start`, on another network than the machine's.
    pub async fn start_on(
        datagrams: Arc<dyn Datagrams>,
        config: &Config,
        keys: &KeyRing,
        metrics: Arc<Metrics>,
    ) -> Result<Self, MembershipError> {
        let bound = datagrams.local_addr().map_err(|error| MembershipError::Gossip(error.into()))?;
        let (id, incarnation, problems) = (node_id(config), incarnation_now(), Problems::default());
        let introduction = Introduction { cluster_id: config.cluster_id.clone(), node_id: id.as_str().to_owned() };
        let transport = SealedTransport::new(datagrams, keys, introduction, Arc::clone(&metrics), problems.clone())?;
        let (view_sender, view) = watch::channel(Arc::default());
        let (own, own_receiver) = watch::channel(Own::default());
        let (leave, leave_receiver) = tokio::sync::mpsc::channel(1);
        let parts = MembershipParts {
            id: id.clone(),
            incarnation,
            bound,
            config: config.clone(),
            transport: transport.clone(),
            metrics,
            problems: problems.clone(),
            view: view_sender,
            own: own_receiver,
        };
        let task = MembershipTask::start(parts).await.map_err(MembershipError::Gossip)?;
        tasks::spawn("keeps the membership", task.run(leave_receiver));
        Ok(Self {
            id,
            incarnation,
            gossip_addr: Some(bound),
            view,
            own,
            problems,
            transport: Some(transport),
            leave: Some(leave),
            has_left: Arc::default(),
        })
    }

    pub fn id(&self) -> &NodeId {
        &self.id
    }

    /// The incarnation with which the process started.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// The bound gossip address; `None` for a single node.
    pub fn gossip_addr(&self) -> Option<SocketAddr> {
        self.gossip_addr
    }

    pub fn view(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.clone()
    }

    /// The problems between this node and others.
    pub fn problems(&self) -> &Problems {
        &self.problems
    }

    /// From now on encrypts with the first of these keys, and decrypts with any of them.
    pub fn set_keys(&self, keys: &KeyRing) {
        if let Some(transport) = &self.transport {
            transport.set_keys(keys);
        }
    }

    /// Publishes this node's load. Call it several times a second. Small changes are not sent, changes that affect traffic are
    /// sent at once, and a report that is not renewed is not repeated, so that other nodes see it age.
    pub fn publish(&self, report: LoadReport) {
        self.own.send_if_modified(|own| {
            let is_news = own.report != report;
            *own = Own { report, reported_at: Some(Instant::now()), description: own.description.take() };
            is_news
        });
    }

    /// Publishes this node's description.
    pub fn describe(&self, description: NodeDescription) {
        self.own.send_if_modified(|own| {
            let is_news = own.description.as_ref() != Some(&description);
            own.description = Some(description);
            is_news
        });
    }

    /// Changes the description, once there is one.
    pub fn describe_anew(&self, change: impl FnOnce(&mut NodeDescription)) {
        self.own.send_if_modified(|own| {
            let Some(description) = &mut own.description else { return false };
            let before = description.clone();
            change(description);
            *description != before
        });
    }

    /// Returns if gossip ends unexpectedly.
    pub async fn broke(&self) {
        if let Some(leave) = &self.leave {
            leave.closed().await;
        }
        if self.leave.is_none() || self.has_left.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    }

    /// Announces that this node leaves, so that others need not detect it, and stops gossip.
    pub async fn leave(&self) {
        let Some(leave) = &self.leave else { return };
        self.has_left.store(true, Ordering::Relaxed);
        let (done, is_done) = oneshot::channel();
        if leave.send(done).await.is_ok() {
            let _ = tokio::time::timeout(LEAVE_TIMEOUT, is_done).await;
        }
    }
}

/// The configured name, or a random one.
fn node_id(config: &Config) -> NodeId {
    let random = || Uuid::new_v4().simple().to_string()[..12].to_owned();
    NodeId::new(config.node_id.clone().unwrap_or_else(random))
}

/// Increases from one process of a name to the next: the start time in microseconds since the epoch.
#[expect(clippy::disallowed_methods, reason = "only compared with the earlier starts of the same node")]
fn incarnation_now() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)
}
