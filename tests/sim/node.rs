//! A node in the simulation: the real router, admission, health and engine of one process, connected as in the server, with
//! the server's real order of starting and stopping.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use outrigger::admission::{self, AdmissionController};
use outrigger::app::life::{Action, Bounds, Life, Seen};
use outrigger::cluster::{ClusterView, ModelReport, NodeDescription, PROTOCOL};
use outrigger::health::inference_probe::InferenceProbe;
use outrigger::health::{self, Health, watch_engine};
use outrigger::observability::Metrics;
use outrigger::router::{self, LocalReplica, NodeIdentity, Router, RouterParts};
use outrigger::types::{Backend, NodeState, watch};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::engine::{EngineSize, MAX_MODEL_LEN, SimEngine, fingerprint};
use crate::net::{Net, Process, SimTransport, node_id};

pub const MODEL: &str = "model";
pub const TOKENIZER: &str = "letters";

/// The configuration of all nodes of a run.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub router: router::Config,
    pub admission: admission::Config,
    pub engine: EngineSize,
    pub zones: usize,
    /// The time limits of the shutdown's phases.
    pub bounds: Bounds,
    /// One bit for each node. Nodes whose bit is set plan a step while another is in flight.
    pub devices: u64,
}

impl NodeConfig {
    /// Whether there is enough memory to keep all journals.
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
    /// Cancelled when the process dies. Tasks of it that still run have no effect.
    pub death: CancellationToken,
    pub view: Arc<watch::Sender<Arc<ClusterView>>>,
    zone: String,
    door: Arc<Door>,
}

/// The state of the node's listener and process, as clients and the simulator see it.
#[derive(Default)]
struct Door {
    /// New connections are refused.
    is_shut: AtomicBool,
    /// The node has ended its remaining streams and accepts no requests: each connection closes after its current answer.
    has_stopped: AtomicBool,
    /// The engine was told to stop.
    ends_engine: AtomicBool,
    /// The number of connections that wait for an answer.
    connections: AtomicUsize,
    /// Notified on SIGTERM.
    signal: Notify,
    /// Cancelled when the process has exited by itself.
    ended: CancellationToken,
}

/// A client's connection while a request uses it.
pub struct Connection(Arc<Door>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Node {
    /// Starts a new process, which takes `loading` to load its model.
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
        let door = Arc::default();
        let node = Self { process, router, admission, health, metrics, engine, death, view, zone, door };
        tokio::spawn({
            let (router, death) = (node.router.clone(), node.death.clone());
            async move { router.run(death).await }
        });
        tokio::spawn({
            let (node, seats, bounds) = (node.clone(), config.engine.seats, config.bounds);
            async move {
                let death = node.death.clone();
                death.run_until_cancelled(node.live(bounds, loading, seats)).await;
            }
        });
        node
    }

    /// Runs the process's life cycle as `app::driver` does.
    async fn live(self, bounds: Bounds, loading: Duration, seats: usize) {
        let mut life = Life::new(bounds);
        let mut loading = pin!(self.load(loading, seats));
        let (mut model, mut has_failed) = (None, false);
        let has_engine = Arc::new(AtomicBool::new(false));
        loop {
            let seen = Seen {
                has_streams: self.router.open_streams() > 0,
                has_work: self.admission.status().admitted_requests > 0,
                has_connections: self.door.connections.load(Ordering::Relaxed) > 0,
                has_engine: has_engine.load(Ordering::Relaxed),
                progress: self.engine.status().progress,
                has_left: true,
            };
            for action in life.look(seen, now()) {
                self.act(action, &has_engine);
            }
            if self.door.ended.is_cancelled() {
                return;
            }
            let is_loading = life.is_loading();
            let wake = life.wake(now());
            let actions = tokio::select! {
                biased;
                () = self.door.signal.notified() => life.signalled(true, now()),
                () = self.failed(), if !is_loading && !has_failed => {
                    has_failed = true;
                    life.failed(now())
                }
                loaded = &mut loading, if is_loading => match loaded {
                    Some(loaded) => {
                        has_engine.store(true, Ordering::Relaxed);
                        model = Some(loaded);
                        life.loaded()
                    }
                    None => {
                        let _ = self.health.lifecycle().fail("the first inference failed");
                        life.load_failed(now())
                    }
                },
                () = sleep_until(wake.map_or_else(far_away, Instant::from_std)) => Vec::new(),
            };
            for action in actions {
                if action == Action::Serve
                    && let Some((replica, probe)) = model.take()
                {
                    self.router.attach(replica);
                    let _ = self.health.lifecycle().ready("simulated");
                    tokio::spawn(probe.run(self.death.clone()));
                }
                self.act(action, &has_engine);
            }
        }
    }

    fn act(&self, action: Action, has_engine: &Arc<AtomicBool>) {
        match action {
            Action::Serve => {}
            Action::Leave => {
                // The transition fails if the node has failed meanwhile; it leaves in any case.
                let _ = self.health.lifecycle().drain("simulated");
                self.router.leave();
            }
            Action::GiveUpEngine => self.engine.give_up(self.health.engine_failure()),
            Action::StopAccepting => self.door.is_shut.store(true, Ordering::Relaxed),
            Action::StopComputing => {
                self.router.stop_computing();
                self.end_engine(has_engine);
            }
            Action::Stop => {
                self.door.has_stopped.store(true, Ordering::Relaxed);
                self.admission.close();
                self.router.cut();
                self.end_engine(has_engine);
            }
            Action::SayGoodbye => {}
            Action::Exit(_) => self.door.ended.cancel(),
        }
    }

    fn end_engine(&self, has_engine: &Arc<AtomicBool>) {
        if self.door.ends_engine.swap(true, Ordering::Relaxed) {
            return;
        }
        let (engine, has_engine) = (self.engine.clone(), has_engine.clone());
        tokio::spawn(async move {
            engine.drain(Duration::ZERO).await;
            has_engine.store(false, Ordering::Relaxed);
        });
    }

    async fn load(&self, loading: Duration, seats: usize) -> Option<(LocalReplica, InferenceProbe)> {
        sleep(loading).await;
        let backend: Arc<dyn Backend> = Arc::new(self.engine.clone());
        self.health.attach(backend.clone());
        self.health.lifecycle().warming("simulated").ok()?;
        tokio::spawn(watch_engine(self.health.clone(), self.death.clone()));
        let probe = InferenceProbe::calibrate(self.health.clone(), backend.clone(), Arc::from([3, 1, 2])).await.ok()?;
        let replica = LocalReplica { engine: backend, model: model(), seats: seats as u32, tokenizer: Bytes::new() };
        Some((replica, probe))
    }

    async fn failed(&self) {
        let mut phases = self.health.lifecycle().subscribe();
        // The lifecycle lives in `self`.
        drop(phases.wait_for(|phase| phase.state == NodeState::Failed).await);
    }

    /// Whether the node has ended its streams and tells clients to go elsewhere.
    pub fn has_stopped(&self) -> bool {
        self.door.has_stopped.load(Ordering::Relaxed)
    }

    /// Asks the process to shut down, as SIGTERM does.
    pub fn terminate(&self) {
        self.door.signal.notify_one();
    }

    /// Returns once the process has exited by itself.
    pub async fn ended(&self) {
        self.door.ended.cancelled().await;
    }

    /// Opens a connection, or uses the one that the client has. `None` if the node accepts none.
    pub fn connect(&self, has_connection: bool) -> Option<Connection> {
        let is_refused = !has_connection && self.door.is_shut.load(Ordering::Relaxed);
        if is_refused || self.has_stopped() {
            return None;
        }
        self.door.connections.fetch_add(1, Ordering::Relaxed);
        Some(Connection(self.door.clone()))
    }

    pub fn description(&self) -> NodeDescription {
        let is_loaded = self.router.local().is_some();
        NodeDescription {
            protocol: PROTOCOL,
            version: "simulated".into(),
            peer_addr: ([127, 0, 0, 1], 1).into(),
            zone: self.zone.clone(),
            models: is_loaded.then(model).into_iter().collect(),
            tenants: None,
        }
    }

    /// Resources that are still held although all clients are gone, as text. `None` if there are none.
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

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
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
