//! The handle and its tasks, against an engine that does what the test says.

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::types::{
    EngineStatus, Failure, FailureKind, Fingerprint, FinishReason, GenerateRequest, GenerationEvent, GenerationStream,
    NodeState, TokenLogprobs,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Conduct {
    Right,
    WrongToken,
    WrongBit,
    Silent,
    Refuse,
    Slow(Duration),
}

struct FakeEngine {
    conduct: Mutex<Conduct>,
    status: Mutex<EngineStatus>,
    /// Streams that never get an answer, kept open.
    silent: Mutex<Vec<tokio::sync::mpsc::UnboundedSender<GenerationEvent>>>,
    requests: Mutex<Vec<GenerateRequest>>,
}

impl FakeEngine {
    fn new() -> Arc<Self> {
        let status = EngineStatus {
            alive: true,
            heartbeat: Instant::now(),
            running: 0,
            waiting: 0,
            waiting_tokens: 0,
            preemptions: 0,
            kv_blocks_total: 10,
            kv_blocks_used: 4,
            drain_tokens_per_second: 0.0,
        };
        Arc::new(Self {
            conduct: Mutex::new(Conduct::Right),
            status: Mutex::new(status),
            silent: Mutex::default(),
            requests: Mutex::default(),
        })
    }

    fn behave(&self, conduct: Conduct) {
        *self.conduct.lock() = conduct;
    }
}

impl Backend for FakeEngine {
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure> {
        let conduct = *self.conduct.lock();
        let (sender, stream) = GenerationStream::channel();
        let max_tokens = request.sampling.max_tokens;
        self.requests.lock().push(request);
        let answer = move |sender: &tokio::sync::mpsc::UnboundedSender<GenerationEvent>| {
            let _ = sender.send(GenerationEvent::Scheduled { cached_tokens: 0 });
            for index in 0..max_tokens {
                let token = index + u32::from(conduct == Conduct::WrongToken && index == 2);
                let logprob = if conduct == Conduct::WrongBit { -1.000_000_1 } else { -1.0 };
                let logprobs = Some(Box::new(TokenLogprobs { logprob, rank: 1, top: Vec::new() }));
                let _ = sender.send(GenerationEvent::Token { choice: 0, token, logprobs });
            }
            let _ = sender.send(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length });
        };
        match conduct {
            Conduct::Refuse => return Err(Failure::new(FailureKind::EngineFailed, "no")),
            Conduct::Silent => self.silent.lock().push(sender),
            Conduct::Slow(delay) => {
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    answer(&sender);
                });
            }
            Conduct::Right | Conduct::WrongToken | Conduct::WrongBit => answer(&sender),
        }
        Ok(stream)
    }

    fn status(&self) -> EngineStatus {
        self.status.lock().clone()
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("00")
    }
}

fn config() -> Config {
    Config {
        probe_interval: Duration::from_millis(10),
        probe_soft_limit: Duration::from_millis(150),
        probe_hard_limit: Duration::from_millis(1200),
        stall_timeout: Duration::from_millis(800),
        liveness_timeout: Duration::from_secs(2),
        memory_interval: Duration::from_millis(10),
        ..Config::default()
    }
}

/// A ready node and its engine; `shutdown` ends its tasks when dropped.
struct Node {
    health: Health,
    engine: Arc<FakeEngine>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Node {
    async fn start() -> Self {
        let metrics = Arc::new(Metrics::new("m"));
        let health = Health::new(config(), metrics.clone());
        let engine = FakeEngine::new();
        health.attach(engine.clone());
        health.lifecycle().warming("loaded").unwrap();
        let probe = InferenceProbe::calibrate(health.clone(), engine.clone(), Arc::from([1, 2, 3])).await.unwrap();
        health.lifecycle().ready("probe passed").unwrap();
        let shutdown = CancellationToken::new();
        tokio::spawn(probe.run(shutdown.clone()));
        tokio::spawn(watch_engine(health.clone(), shutdown.clone()));
        Self { health, engine, metrics, shutdown }
    }

    fn codes(&self) -> Vec<&'static str> {
        self.health.readiness(QueueView::default()).reasons.iter().map(|reason| reason.code).collect()
    }

    /// Waits until the node is as wanted; fails after ten seconds.
    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_so(self) {
            let state = self.health.snapshot(QueueView::default());
            assert!(Instant::now() < deadline, "not {what} in time: {state:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn wrong_numbers_make_the_node_unready_and_right_ones_ready_again() {
    let node = Node::start().await;
    for conduct in [Conduct::WrongToken, Conduct::WrongBit, Conduct::Refuse] {
        node.until("ready", |node| node.codes().is_empty()).await;
        node.engine.behave(conduct);
        node.until("unready", |node| node.codes() == ["probe_failed"]).await;
        assert!(node.health.liveness().live, "{conduct:?}");
        node.engine.behave(Conduct::Right);
    }
    node.until("ready again", |node| node.codes().is_empty()).await;
    let text = node.metrics.prometheus_text();
    assert!(text.contains("outrigger_probe_results_total{result=\"wrong\"}"), "{text}");
}

#[tokio::test]
async fn a_slow_probe_degrades_and_a_fast_one_recovers() {
    let node = Node::start().await;
    node.engine.behave(Conduct::Slow(Duration::from_millis(200)));
    node.until("degraded", |node| node.health.lifecycle().state() == NodeState::Degraded).await;
    assert!(node.health.readiness(QueueView::default()).ready);
    node.engine.behave(Conduct::Right);
    node.until("ready", |node| node.health.lifecycle().state() == NodeState::Ready).await;
}

#[tokio::test]
async fn an_idle_engine_that_hangs_is_found_by_the_probe() {
    let node = Node::start().await;
    node.engine.status.lock().heartbeat = Instant::now();
    node.engine.behave(Conduct::Silent);
    node.until("unready", |node| !node.codes().is_empty()).await;
    assert!(node.health.liveness().live, "unready comes before not live");
    node.until("unready by the hard limit", |node| node.codes().contains(&"probe_failed")).await;
}

#[tokio::test]
async fn a_hang_with_work_ends_in_failure_and_a_long_prefill_does_not() {
    let node = Node::start().await;
    node.engine.status.lock().running = 1;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(2500) {
        node.engine.status.lock().heartbeat = Instant::now();
        assert!(node.health.liveness().live && node.codes().is_empty());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.until("unready", |node| node.codes().contains(&"engine_stalled")).await;
    node.until("failed", |node| node.health.lifecycle().state() == NodeState::Failed).await;
    assert!(!node.health.liveness().live);
}

#[tokio::test]
async fn a_dead_engine_fails_the_node() {
    let node = Node::start().await;
    assert!(node.health.liveness().live);
    node.engine.status.lock().alive = false;
    assert!(!node.health.liveness().live, "seen without waiting for the task");
    node.until("failed", |node| node.health.lifecycle().state() == NodeState::Failed).await;
    assert!(node.health.lifecycle().phase().reason.contains("engine thread"));
}

#[tokio::test]
async fn the_probe_asks_as_a_probe_and_stops_when_the_node_drains() {
    let node = Node::start().await;
    node.until("probed", |node| node.engine.requests.lock().len() > 3).await;
    for request in node.engine.requests.lock().iter() {
        assert!(request.is_probe && request.bypass_prefix_cache && request.sampling.ignore_eos);
        assert_eq!((request.sampling.temperature, request.sampling.max_tokens), (0.0, 4));
    }
    node.health.lifecycle().drain("SIGTERM").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let asked = node.engine.requests.lock().len();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(node.engine.requests.lock().len(), asked);
}

#[tokio::test]
async fn a_model_that_cannot_repeat_itself_is_not_served() {
    let metrics = Arc::new(Metrics::new("m"));
    let health = Health::new(config(), metrics);
    let engine = FakeEngine::new();
    engine.behave(Conduct::Refuse);
    let result = InferenceProbe::calibrate(health.clone(), engine.clone(), Arc::from([1])).await;
    assert!(matches!(result, Err(CalibrationError::Failed(_))));
    engine.behave(Conduct::Slow(Duration::from_millis(300)));
    let calibration = tokio::spawn(InferenceProbe::calibrate(health.clone(), engine.clone(), Arc::from([1])));
    while engine.requests.lock().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    engine.behave(Conduct::WrongToken);
    assert!(matches!(calibration.await.unwrap(), Err(CalibrationError::NotReproducible(_))));
    assert!(!health.readiness(QueueView::default()).ready);
}

/// Reads what the test says.
struct SimulatedMemory {
    reading: Arc<Mutex<Option<u64>>>,
    is_device: bool,
}

impl MemoryProbe for SimulatedMemory {
    fn source(&self) -> &'static str {
        "simulated"
    }

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError> {
        let lost = MemoryProbeError::Device { index: 0, message: "lost".into() };
        self.reading.lock().map(|used_bytes| MemoryReading { used_bytes, total_bytes: 100 }).ok_or(lost)
    }

    fn is_compute_device(&self) -> bool {
        self.is_device
    }
}

#[tokio::test]
async fn memory_degrades_then_removes_and_a_lost_device_is_unready() {
    let node = Node::start().await;
    let reading = Arc::new(Mutex::new(Some(50)));
    let set = |value| *reading.lock() = value;
    let probe = Box::new(SimulatedMemory { reading: reading.clone(), is_device: true });
    // 6 of 10 blocks are free: 6 bytes of what is used.
    tokio::spawn(watch_memory(node.health.clone(), probe, 1, node.shutdown.clone()));
    let pressure = |node: &Node| node.health.snapshot(QueueView::default()).memory.pressure;
    node.until("measured", |node| pressure(node) == Some(0.44)).await;
    set(Some(97));
    node.until("degraded", |node| node.health.lifecycle().state() == NodeState::Degraded).await;
    assert!(node.codes().is_empty(), "91 % shrinks the weight only");
    set(Some(102));
    node.until("unready", |node| node.codes() == ["memory"]).await;
    set(None);
    node.until("lost", |node| node.codes() == ["device_lost"]).await;
    set(Some(50));
    node.until("ready", |node| node.codes().is_empty()).await;
    node.until("recovered", |node| node.health.lifecycle().state() == NodeState::Ready).await;
    assert!(node.metrics.prometheus_text().contains("outrigger_memory_pressure_ratio{source=\"simulated\"} 0.44"));
}

#[tokio::test]
async fn a_host_that_cannot_be_read_is_unknown_and_not_unready() {
    let node = Node::start().await;
    let probe = Box::new(SimulatedMemory { reading: Arc::new(Mutex::new(None)), is_device: false });
    tokio::spawn(watch_memory(node.health.clone(), probe, 1, node.shutdown.clone()));
    node.until("read", |node| node.health.shared.observed.lock().memory_is_unreadable).await;
    assert!(node.codes().is_empty());
}

#[test]
fn startup_reports_what_was_set_until_ready() {
    let health = Health::new(config(), Arc::new(Metrics::new("m")));
    health.set_loading(LoadPhase::LoadingWeights, 0.5);
    let startup = health.startup();
    assert!(!startup.started);
    assert_eq!(startup.loading, LoadProgress { phase: LoadPhase::LoadingWeights, fraction: 0.5 });
    health.lifecycle().warming("loaded").unwrap();
    health.lifecycle().ready("passed").unwrap();
    health.lifecycle().drain("SIGTERM").unwrap();
    assert!(health.startup().started);
}

#[test]
fn the_configuration_names_every_problem() {
    let problems = |config: Config| {
        let mut errors = Vec::new();
        config.validate(&mut errors);
        errors.join("\n")
    };
    assert_eq!(problems(Config::default()), "");
    let bad = Config {
        probe_interval: Duration::ZERO,
        probe_soft_limit: Duration::from_secs(40),
        stall_timeout: Duration::from_secs(31),
        probe_max_tokens: 0,
        probe_recovery: 0,
        memory_warn_mark: 0.92,
        queue_saturation_mark: f64::NAN,
        ..Config::default()
    };
    let text = problems(bad);
    for key in [
        "probe_interval",
        "probe_soft_limit",
        "stall_timeout",
        "probe_max_tokens",
        "probe_recovery",
        "memory_warn_mark",
        "queue_saturation_mark",
    ] {
        assert!(text.contains(key), "{key} in {text}");
    }
}
