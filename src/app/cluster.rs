//! Connects this node to its cluster: gossip, the endpoint for peers, and this node's load reports.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::tenants::Comparison;
use crate::admission::AdmissionController;
use crate::api;
use crate::api::admin::OverviewSource;
use crate::api::listener::listen;
use crate::cluster::membership::Membership;
use crate::cluster::peer_client::HttpPeerTransport;
use crate::cluster::problems::ProblemReason;
use crate::cluster::reach::Reach;
use crate::cluster::reload::{CurrentKeys, Reload, check_permissions};
use crate::cluster::tls::PeerTls;
use crate::cluster::{self, KeyRing, ModelReport, NodeDescription, PROTOCOL, PeerTransport};
use crate::config::Config;
use crate::health::Health;
use crate::observability::Metrics;
use crate::router::{ClusterOverview, NodeIdentity, Router, RouterParts};
use crate::tenancy::Tenants;
use crate::types::tasks;

/// How often this node's load report is renewed.
const ASSESSMENT_INTERVAL: Duration = Duration::from_millis(100);
/// How often this node's tenants are compared with its peers'.
const COMPARISON_INTERVAL: Duration = Duration::from_secs(1);

pub struct Cluster {
    membership: Arc<Membership>,
    /// None in a cluster of one node.
    network: Option<Network>,
    zone: String,
    tenants: Tenants,
    shutdown: CancellationToken,
}

struct Network {
    /// Taken when the node starts to serve peers.
    listener: Option<TcpListener>,
    config: cluster::Config,
    key_file: PathBuf,
    keys: CurrentKeys,
    tls: PeerTls,
    transport: Arc<dyn PeerTransport>,
    /// The address at which other nodes reach the peer endpoint.
    peer_addr: SocketAddr,
}

impl Cluster {
    /// Binds the ports for other nodes and starts to gossip. Peers send no requests until the node reports a model.
    pub async fn join(config: &Config, tenants: &Tenants, metrics: &Arc<Metrics>) -> anyhow::Result<Self> {
        let (config, shutdown) = (&config.cluster, CancellationToken::new());
        let zone = config.zone.clone();
        let Some(key_file) = config.cluster_key_file.as_deref().filter(|_| config.is_clustered()) else {
            let membership = Arc::new(Membership::alone(config));
            return Ok(Self { membership, network: None, zone, tenants: tenants.clone(), shutdown });
        };
        let keys = KeyRing::from_file(key_file)?;
        check_permissions(key_file);
        tracing::info!(keys = ?keys.ids(), "cluster keys: the first encrypts, all of them decrypt");
        let tls = PeerTls::new(config, &keys)?;
        let membership = Membership::start(config, &keys, metrics.clone()).await?;
        let address = config.peer_listen_addr().context("there is no address for peers")?;
        let listener =
            listen(address).await.with_context(|| format!("peer_addr: cannot listen on {address} for other nodes"))?;
        let bound = listener.local_addr().context("the listener for peers has no address")?;
        let peer_addr = config.peer_advertised(bound);
        let transport = HttpPeerTransport::new(tls.clone(), config.peer_connect_timeout, membership.view());
        let network = Network {
            listener: Some(listener),
            config: config.clone(),
            key_file: key_file.to_owned(),
            keys: CurrentKeys::new(keys),
            tls,
            transport: Arc::new(transport),
            peer_addr,
        };
        let (membership, network) = (Arc::new(membership), Some(network));
        Ok(Self { membership, network, zone, tenants: tenants.clone(), shutdown })
    }

    /// Creates the router, with connections to the peers.
    pub fn router(
        &self,
        config: &Config,
        admission: AdmissionController,
        health: Health,
        metrics: Arc<Metrics>,
    ) -> Router {
        let Some(network) = &self.network else {
            return Router::alone(config.router.clone(), admission, health, metrics);
        };
        Router::new(RouterParts {
            config: config.router.clone(),
            own: self.membership.id().clone(),
            identity: NodeIdentity {
                cluster_id: config.cluster.cluster_id.clone(),
                incarnation: self.membership.incarnation(),
                zone: self.zone.clone(),
                peer_addr: Some(network.peer_addr),
            },
            is_clustered: true,
            admission,
            health,
            metrics,
            transport: network.transport.clone(),
            view: self.membership.view(),
            seed: Uuid::new_v4().as_u64_pair().0,
        })
    }

    /// Starts serving peers, replicating journals and reporting this node's load, until [`Cluster::leave`].
    pub fn run(&mut self, router: &Router, health: &Health, metrics: &Arc<Metrics>) {
        self.describe(Vec::new());
        let assessment = assess(router.clone(), self.membership.clone(), health.clone(), self.shutdown.clone());
        health.supervise("assesses this node", assessment);
        let (replicating, shutdown) = (router.clone(), self.shutdown.clone());
        health.supervise("replicates journals", async move { replicating.run(shutdown).await });
        let Some(network) = &mut self.network else { return };
        health.supervise("watches the gossip", fail_without_gossip(self.membership.clone(), health.clone()));
        health.supervise("reads the keys again", network.reload(&self.membership).run(self.shutdown.clone()));
        tasks::spawn("tries whether peers are reached", network.reach(&self.membership).run(self.shutdown.clone()));
        let comparison = compare(self.membership.clone(), self.tenants.clone(), self.shutdown.clone());
        health.supervise("compares the tenants", comparison);
        let problems = self.membership.problems().clone();
        let (listener, tls, service) = (network.listener.take(), network.tls.clone(), Arc::new(router.clone()));
        let (metrics, shutdown) = (metrics.clone(), self.shutdown.clone());
        if let Some(listener) = listener {
            health.supervise("answers peers", async move {
                api::peer::serve(listener, &tls, service, metrics, problems, shutdown).await;
            });
        }
    }

    /// A function that returns the cluster's overview, with problems between nodes.
    pub fn overview(&self, router: Router) -> OverviewSource {
        let problems = self.membership.problems().clone();
        let keys = self.network.as_ref().map(|network| network.keys.clone());
        Arc::new(move || {
            let ids = keys.as_ref().map(|keys| keys.get().ids()).unwrap_or_default();
            let keys = ids.iter().map(ToString::to_string).collect();
            ClusterOverview { keys, problems: problems.list(), ..router.overview() }
        })
    }

    /// Reports the models of this node to the others.
    pub fn describe(&self, models: Vec<ModelReport>) {
        let Some(network) = &self.network else { return };
        self.membership.describe(NodeDescription {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peer_addr: network.peer_addr,
            zone: self.zone.clone(),
            models,
            tenants: self.tenants.get().digest(),
        });
    }

    /// Tells the other nodes that this one leaves, so that they need not detect it.
    pub fn leave(&self) -> impl Future<Output = ()> + Send + use<> {
        let (membership, shutdown) = (self.membership.clone(), self.shutdown.clone());
        async move {
            membership.leave().await;
            shutdown.cancel();
        }
    }
}

/// Fails the node if its gossip ends: it would see no peers, and peers would keep an outdated report of it.
async fn fail_without_gossip(membership: Arc<Membership>, health: Health) {
    membership.broke().await;
    // This has no effect if the node has already failed or stopped.
    let _ = health.lifecycle().fail("the gossip with other nodes has ended by itself");
}

impl Network {
    fn reload(&self, membership: &Arc<Membership>) -> Reload {
        Reload {
            config: self.config.clone(),
            key_file: self.key_file.clone(),
            keys: self.keys.clone(),
            tls: self.tls.clone(),
            membership: membership.clone(),
            problems: membership.problems().clone(),
        }
    }

    fn reach(&self, membership: &Membership) -> Reach {
        Reach {
            transport: self.transport.clone(),
            tls: self.tls.clone(),
            connect_timeout: self.config.peer_connect_timeout,
            view: membership.view(),
            problems: membership.problems().clone(),
        }
    }
}

/// Tells the other nodes which tenants this one knows, and reports peers that know others.
async fn compare(membership: Arc<Membership>, tenants: Tenants, shutdown: CancellationToken) {
    let mut ticks = interval(COMPARISON_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut comparison = Comparison::default();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let own = tenants.get().digest();
        membership.describe_anew(|description| description.tenants = own);
        let view = membership.view().borrow().clone();
        let peers = view.peers.iter().map(|(id, peer)| (id.clone(), peer.description.tenants)).collect();
        membership.problems().state(ProblemReason::OtherTenants, comparison.found(own, &peers, Instant::now()));
    }
}

/// Renews this node's load report periodically, and at once when the node's state changes.
async fn assess(router: Router, membership: Arc<Membership>, health: Health, shutdown: CancellationToken) {
    let mut ticks = interval(ASSESSMENT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut phases = health.lifecycle().subscribe();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
            Ok(()) = phases.changed() => {}
        }
        membership.publish(router.refresh());
    }
}
