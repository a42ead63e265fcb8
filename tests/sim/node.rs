//! A node in the simulation: the real router, admission, health and engine of one process, wired as the server wires them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrigger::admission::{self, AdmissionController};
use outrigger::cluster::{ClusterView, ModelReport, NodeDescription, PROTOCOL_VERSION};
use outrigger::health::inference_probe::InferenceProbe;
use outrigger::health::{self, Health, watch_engine};
use outrigger::observability::Metrics;
use outrigger::router::{self, LocalReplica, NodeIdentity, Router, RouterParts};
use outrigger::types::{Backend, NodeState, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::engine::{EngineSize, MAX_MODEL_LEN, SimEngine, fingerprint};
use crate::net::{Net, Process, SimTransport, node_id};

pub const MODEL: &str = "model";
pub const TOKENIZER: &str = "letters";

/// The same for all nodes of a run.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub router: router::Config,
    pub admission: admission::Config,
    pub engine: EngineSize,
    pub zones: usize,
    /// The bits of the nodes whose engines plan a step while another is in flight.
    pub devices: u64,
}

impl NodeConfig {
    /// No journal is forgotten for lack of memory.
    pub fn keeps_all_journals(&self) -> bool {
        self.router.journal_memory >= 1 << 20
    }
}

/// A running process.
#[derive(Clone)]
pub struct Node {
    pub process: Process,
    pub router: Router,
    pub admission: AdmissionController,
    pub health: Health,
    pub metrics: Arc<Metrics>,
    pub engine: SimEngine,
    /// Whatever still runs of it after this does so unseen.
    pub death: CancellationToken,
    pub view: Arc<watch::Sender<Arc<ClusterView>>>,
    zone: String,
}

impl Node {
    /// A fresh process, which loads for so long.
    pub fn start(process: Process, config: &NodeConfig, net: &Arc<Net>, seed: u64, loading: Duration) -> Self {
        let death = CancellationToken::new();
        let metrics = Arc::new(Metrics::new(MODEL));
        let admission = AdmissionController::new(config.admission, config.engine.seats as u32, metrics.clone());
        let probing = health::Config { probe_interval: Duration::from_secs(3), ..health::Config::default() };
        let health = Health::new(probing, metrics.clone());
        let zone = format!("z{}", process.node % config.zones);
        let view = Arc::new(watch::Sender::new(Arc::default()));
        let router = Router::new(RouterParts {
            config: config.router.clone(),
            own: node_id(process.node),
            identity: NodeIdentity {
                cluster_id: "simulated".into(),
                incarnation: process.incarnation,
                zone: zone.clone(),
                peer_addr: None,
            },
            is_clustered: true,
            admission: admission.clone(),
            health: health.clone(),
            metrics: metrics.clone(),
            transport: Arc::new(SimTransport { net: net.clone(), own: process.clone() }),
            view: view.subscribe(),
            seed,
        });
        let depth = if config.devices >> process.node & 1 == 1 { 2 } else { 1 };
        let engine = SimEngine::spawn(&EngineSize { depth, ..config.engine.clone() }, death.clone());
        net.join(&process, router.clone(), death.clone());
        let node = Self { process, router, admission, health, metrics, engine, death, view, zone };
        tokio::spawn({
            let (router, death) = (node.router.clone(), node.death.clone());
            async move { router.run(death).await }
        });
        tokio::spawn({
            let (node, seats) = (node.clone(), config.engine.seats);
            async move {
                let death = node.death.clone();
                death.run_until_cancelled(node.load(loading, seats)).await;
            }
        });
        node
    }

    async fn load(self, loading: Duration, seats: usize) {
        let Self { router, health, engine, death, .. } = self;
        sleep(loading).await;
        let backend: Arc<dyn Backend> = Arc::new(engine);
        health.attach(backend.clone());
        if health.lifecycle().warming("simulated").is_err() {
            return;
        }
        tokio::spawn(watch_engine(health.clone(), death.clone()));
        let Ok(probe) = InferenceProbe::calibrate(health.clone(), backend.clone(), Arc::from([3, 1, 2])).await else {
            // Whoever looks after the process starts it again.
            let _ = health.lifecycle().fail("the first inference failed");
            return;
        };
        router.attach(LocalReplica { engine: backend, model: model(), seats: seats as u32, tokenizer: Bytes::new() });
        if health.lifecycle().ready("simulated").is_ok() {
            probe.run(death).await;
        }
    }

    pub fn state(&self) -> NodeState {
        self.health.lifecycle().state()
    }

    /// As at SIGTERM, in the server's order: gives away what it can, ends the rest at the limit, and goes on serving for a
    /// while whoever does not know yet.
    pub async fn drain(&self, limit: Duration, linger: Duration) {
        // A node that has failed meanwhile leaves all the same.
        let _ = self.health.lifecycle().drain("simulated");
        self.router.leave();
        self.admission.close();
        let relayed = async {
            if timeout(limit, self.router.drained()).await.is_err() {
                self.router.cut();
            }
        };
        let ended = async {
            tokio::join!(self.engine.drain(limit), relayed, sleep(linger.min(limit)));
        };
        // A hung engine does not end its streams.
        let _ = timeout(limit + Duration::from_secs(1), ended).await;
        sleep(Duration::from_millis(50)).await;
    }

    pub fn description(&self) -> NodeDescription {
        let is_loaded = self.router.local().is_some();
        NodeDescription {
            protocol: PROTOCOL_VERSION,
            version: "simulated".into(),
            peer_addr: ([127, 0, 0, 1], 1).into(),
            zone: self.zone.clone(),
            models: is_loaded.then(model).into_iter().collect(),
        }
    }

    /// What is still held here though nobody wants it any more; nothing if all is well.
    pub fn leftovers(&self) -> Option<String> {
        let (status, door) = (self.engine.status(), self.admission.status());
        let overview = self.router.overview();
        let engine = (status.running, status.waiting, status.kv_blocks_used);
        let elsewhere: u64 = overview.peers.iter().map(|peer| peer.streams).sum();
        let streams = (self.router.open_streams(), overview.streams.for_peers, elsewhere);
        let is_clean = engine == (0, 0, 0) && door.admitted_requests == 0 && streams == (0, 0, 0);
        let text = || {
            format!(
                "n{} holds {} running and {} waiting sequences, {} blocks, {} permits, {} streams, {} for peers, {} at peers",
                self.process.node,
                engine.0,
                engine.1,
                engine.2,
                door.admitted_requests,
                streams.0,
                streams.1,
                streams.2
            )
        };
        (status.alive && !is_clean).then(text)
    }
}

fn model() -> ModelReport {
    ModelReport {
        names: vec![MODEL.into()],
        fingerprint: fingerprint(),
        tokenizer: TOKENIZER.into(),
        max_model_len: MAX_MODEL_LEN as u32,
        created: 1,
    }
}
