//! The HTTP side of the node: starts listening first, ends last, and keeps running when the engine fails.

use std::sync::Arc;

use anyhow::Context;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::announce;
use super::cluster::Cluster;
use super::fault_injection::{FaultTarget, fault_routes};
use super::tenants;
use crate::admission::AdmissionController;
use crate::api::listener::listen;
use crate::api::{self, ApiState};
use crate::config::Config;
use crate::health::Health;
use crate::hub::{Catalog, ModelReference};
use crate::observability::Metrics;
use crate::router::Router;
use crate::types::NodeState;
use crate::types::tasks::spawn_background;

pub struct Front {
    pub api: ApiState,
    pub metrics: Arc<Metrics>,
    pub admission: AdmissionController,
    pub health: Health,
    pub router: Router,
    pub cluster: Cluster,
    /// Where fault injection finds the engine, if fault injection is enabled.
    pub fault_target: Option<FaultTarget>,
    /// The URL for clients on this machine.
    pub base_url: String,
    /// Whether it listens on a loopback address only.
    pub is_local: bool,
    server: JoinHandle<()>,
    stops_accepting: CancellationToken,
    /// Stops the admin server when the front is dropped.
    _admin: DropGuard,
}

impl Front {
    /// Starts listening. Answers probes; forwards requests to peers until a model is served here.
    pub async fn open(config: &Config) -> anyhow::Result<Self> {
        // Configuration errors are reported before anything listens.
        let model = ModelReference::parse(&config.process.model, &Catalog::embedded())?.name();
        let tenants = tenants::read(&config.api)?;
        let (host, port) = (config.api.host.as_str(), config.api.port);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let listener = listen((host, port)).await.with_context(|| format!("cannot listen on {host}:{port}"))?;
        let address = listener.local_addr().context("the listener has no address")?;

        let metrics = Arc::new(Metrics::new(&config.process.served_names(&model)[0]));
        let max_num_seqs = u32::try_from(config.engine.max_num_seqs).unwrap_or(u32::MAX);
        let admission = AdmissionController::new(config.admission, max_num_seqs, metrics.clone());
        let health = Health::new(config.health.clone(), metrics.clone());
        let mut cluster = Cluster::join(config, &tenants, &metrics).await?;
        let router = cluster.router(config, admission.clone(), health.clone(), metrics.clone());
        cluster.run(&router, &health, &metrics);
        tenants::watch(&config.api, &tenants, &health, &metrics)?;
        let (api_config, health_of_api) = (config.api.clone(), health.clone());
        let api = ApiState::new(api_config, tenants, metrics.clone(), admission.clone(), health_of_api, router.clone());
        api.expect_model(config.process.served_names(&model).swap_remove(0));
        let fault_target = config.process.fault_injection.then(FaultTarget::default);
        let extra = fault_target.as_ref().map(|target| fault_routes(target.clone(), api.clone())).unwrap_or_default();
        let stops_accepting = CancellationToken::new();
        let server = spawn_background(api::serve(listener, api.clone(), extra, stops_accepting.clone()));
        let admin = CancellationToken::new();
        if let Some(address) = config.api.admin_addr {
            let listener = listen(address).await.with_context(|| format!("admin_addr: cannot listen on {address}"))?;
            let overview = cluster.overview(router.clone());
            spawn_background(api::admin::serve(listener, api.clone(), overview, admin.clone()));
        }
        Ok(Self {
            api,
            metrics,
            admission,
            health,
            router,
            cluster,
            fault_target,
            base_url: announce::base_url(address),
            is_local: address.ip().is_loopback(),
            server,
            stops_accepting,
            _admin: admin.drop_guard(),
        })
    }

    /// Waits until the node fails. Returns the reason.
    pub async fn failed(&self) -> String {
        let mut phases = self.health.lifecycle().subscribe();
        match phases.wait_for(|phase| phase.state == NodeState::Failed).await {
            Ok(phase) => phase.reason.to_string(),
            // Cannot happen: `self` keeps the lifecycle alive.
            Err(_) => std::future::pending().await,
        }
    }

    /// Stops accepting connections; existing ones end after their current response. The admin address stays open, so that
    /// probes and metrics remain available until the end.
    pub fn stop_accepting(&self) {
        self.stops_accepting.cancel();
    }

    /// Whether a client is connected or still can connect.
    pub fn has_connections(&self) -> bool {
        !self.server.is_finished()
    }
}
