//! Tests of the handle and its tasks, with an engine that the test controls.

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::device::{DeviceFault, DeviceProbeError, TemperatureLimits, Throttle};
use super::*;
use crate::types::{
    EngineStatus, Failure, FailureKind, Fingerprint, FinishReason, GenerateRequest, GenerationEvent, GenerationStream,
    NodeState, TokenLogprobs,
};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Conduct {
    Right,
    WrongToken,
    WrongBit,
    Nan,
    Silent,
    Refuse,
    Slow(Duration),
}

struct FakeEngine {
    conduct: Mutex<Conduct>,
    status: Mutex<EngineStatus>,
    /// Streams that stay open and get no answer.
    silent: Mutex<Vec<tokio::sync::mpsc::UnboundedSender<GenerationEvent>>>,
    requests: Mutex<Vec<GenerateRequest>>,
}

impl FakeEngine {
    fn new() -> Arc<Self> {
        let status = EngineStatus { kv_blocks_used: 4, ..EngineStatus::idle(Instant::now(), 10) };
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
        let max_tokens = request.envelope.sampling.max_tokens;
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
            Conduct::Nan => {
                let failure = Failure::new(FailureKind::NumericsInvalid, "no number");
                let _ = sender.send(GenerationEvent::Failed(failure));
            }
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
        let mut status = self.status.lock();
        // Handed-over requests count as outstanding even if the caller has given up.
        status.outstanding = status.outstanding.max(self.silent.lock().len() as u64);
        if *self.conduct.lock() != Conduct::Silent {
            status.heartbeat = Instant::now();
        }
        status.clone()
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
        probe_failure_threshold: 0,
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
        Self::start_with(config()).await
    }

    async fn start_with(config: Config) -> Self {
        let metrics = Arc::new(Metrics::new("m"));
        let health = Health::new(config, metrics.clone());
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
        self.health.readiness(QueueView::default()).reasons.iter().map(|reason| reason.code.code()).collect()
    }

    /// Waits for a condition; fails after ten seconds.
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
async fn numbers_that_went_wrong_for_somebody_are_tried_soon() {
    let node = Node::start_with(Config { probe_interval: Duration::from_secs(3600), ..config() }).await;
    node.engine.behave(Conduct::Nan);
    let asked = node.engine.requests.lock().len();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(node.engine.requests.lock().len(), asked, "no reason to ask");
    node.engine.status.lock().numerics_invalid += 1;
    node.until("unready", |node| node.codes() == ["probe_failed"]).await;
    node.engine.behave(Conduct::Right);
    node.until("ready", |node| node.codes().is_empty()).await;
}

#[tokio::test]
async fn numbers_that_stay_wrong_fail_the_node() {
    let node = Node::start_with(Config { probe_failure_threshold: 5, ..config() }).await;
    let asked = || node.engine.requests.lock().len();
    node.engine.behave(Conduct::Refuse);
    let before = asked();
    node.until("refused often", |_| asked() > before + 10).await;
    assert!(node.health.liveness().live, "a node that refuses may be full");
    node.engine.behave(Conduct::Nan);
    node.until("failed", |node| state(node) == NodeState::Failed).await;
    let reason = node.health.lifecycle().phase().reason;
    assert_eq!(reason, "the synthetic inference returned wrong numbers: no number, 5 times");
    assert!(!node.health.liveness().live);
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
    node.engine.behave(Conduct::Silent);
    node.until("unready", |node| node.codes() == ["engine_stalled"]).await;
    assert!(node.health.liveness().live, "unready comes before not live");
    node.until("given up on by the probe", |node| node.codes().contains(&"probe_failed")).await;
    assert!(node.codes().contains(&"engine_stalled"), "whoever gives up does not start the clock anew");
    node.until("failed", |node| state(node) == NodeState::Failed).await;
    assert!(node.engine.requests.lock().len() > 1);
    assert_eq!(node.health.liveness().reasons[0].code, NodeReason::Failed);
}

#[tokio::test]
async fn an_idle_engine_that_shows_no_life_is_tried_long_before_its_time() {
    let node = Node::start_with(Config { probe_interval: Duration::from_secs(3600), ..config() }).await;
    let asked = node.engine.requests.lock().len();
    let begin = Instant::now();
    node.engine.behave(Conduct::Silent);
    node.until("tried", |node| node.engine.requests.lock().len() > asked).await;
    assert!(begin.elapsed() > Duration::from_secs(1), "a moment's silence is no reason");
    node.until("failed", |node| state(node) == NodeState::Failed).await;
}

#[tokio::test]
async fn a_task_that_panics_fails_the_node() {
    let node = Node::start().await;
    node.health.supervise("ends well", async {}).await.expect("it ends");
    assert_eq!(state(&node), NodeState::Ready);
    node.health.supervise("does this", async { panic!("no {}", 7) }).await.expect("caught");
    assert_eq!(state(&node), NodeState::Failed);
    assert_eq!(node.health.lifecycle().phase().reason, "the task that does this panicked: no 7");
}

#[tokio::test]
async fn a_hang_with_work_ends_in_failure_and_a_long_prefill_does_not() {
    let node = Node::start().await;
    node.engine.status.lock().outstanding = 1;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(2500) {
        node.engine.status.lock().progress += 1;
        assert!(node.health.liveness().live && node.codes().is_empty());
        assert!(!node.health.engine_is_stalled());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.until("unready", |node| node.codes().contains(&"engine_stalled")).await;
    assert!(node.health.engine_is_stalled());
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
    assert!(node.health.lifecycle().phase().reason.contains("the engine has ended"));
}

#[tokio::test]
async fn the_probe_asks_as_a_probe_and_stops_when_the_node_drains() {
    let node = Node::start().await;
    node.until("probed", |node| node.engine.requests.lock().len() > 3).await;
    for request in node.engine.requests.lock().iter() {
        assert!(request.is_probe && request.bypass_prefix_cache && request.envelope.sampling.ignore_eos);
        assert_eq!((request.envelope.sampling.temperature, request.envelope.sampling.max_tokens), (0.0, 4));
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

/// Returns the value that the test sets; `None` means unreadable.
struct SimulatedMemory(Arc<Mutex<Option<u64>>>);

impl MemoryProbe for SimulatedMemory {
    fn source(&self) -> &'static str {
        "simulated"
    }

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError> {
        let silent = MemoryProbeError::Silent { source_name: "simulated", seconds: 10 };
        self.0.lock().map(|used_bytes| MemoryReading { used_bytes, total_bytes: 100 }).ok_or(silent)
    }
}

/// Panics once, then returns readings.
struct PanickingMemory(bool);

impl MemoryProbe for PanickingMemory {
    fn source(&self) -> &'static str {
        "panicking"
    }

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError> {
        assert!(std::mem::replace(&mut self.0, true), "the first reading panics");
        Ok(MemoryReading { used_bytes: 30, total_bytes: 100 })
    }
}

#[tokio::test]
async fn a_source_that_panics_is_silent_and_asked_again() {
    let node = Node::start().await;
    tokio::spawn(watch_memory(node.health.clone(), Box::new(PanickingMemory(false)), node.shutdown.clone()));
    node.until("measured", |node| pressure(node) == Some(0.3)).await;
}

/// Returns what the test sets; reports its faults once.
struct SimulatedDevice(Arc<Mutex<Answer>>);

enum Answer {
    Reading(DeviceReading),
    Silent,
    Lost,
}

impl DeviceProbe for SimulatedDevice {
    fn read(&mut self) -> Result<DeviceReading, DeviceProbeError> {
        match &mut *self.0.lock() {
            Answer::Reading(reading) => {
                Ok(DeviceReading { faults: std::mem::take(&mut reading.faults), ..reading.clone() })
            }
            Answer::Silent => Err(DeviceProbeError::Silent("a riddle".into())),
            Answer::Lost => Err(DeviceProbeError::Lost("off the bus".into())),
        }
    }
}

fn using(used_bytes: u64) -> DeviceReading {
    DeviceReading { memory: MemoryReading { used_bytes, total_bytes: 100 }, ..Default::default() }
}

/// A ready node with a device that the test controls. 6 of 10 KV blocks, of one byte each, are free.
async fn node_with_device(answer: DeviceReading) -> (Node, Arc<Mutex<Answer>>) {
    let node = Node::start().await;
    let answer = Arc::new(Mutex::new(Answer::Reading(answer)));
    let probe = Box::new(SimulatedDevice(answer.clone()));
    tokio::spawn(watch_device(node.health.clone(), probe, 1, node.shutdown.clone()));
    (node, answer)
}

fn pressure(node: &Node) -> Option<f64> {
    node.health.snapshot(QueueView::default()).memory.pressure
}

fn state(node: &Node) -> NodeState {
    node.health.lifecycle().state()
}

#[tokio::test]
async fn memory_of_the_host_degrades_then_removes_and_is_unknown_when_it_cannot_be_read() {
    let node = Node::start().await;
    let reading = Arc::new(Mutex::new(Some(50)));
    let probe = Box::new(SimulatedMemory(reading.clone()));
    tokio::spawn(watch_memory(node.health.clone(), probe, node.shutdown.clone()));
    node.until("measured", |node| pressure(node) == Some(0.5)).await;
    *reading.lock() = Some(91);
    node.until("degraded", |node| state(node) == NodeState::Degraded).await;
    assert!(node.codes().is_empty(), "91 % shrinks the weight only");
    *reading.lock() = Some(96);
    node.until("unready", |node| node.codes() == ["memory"]).await;
    *reading.lock() = None;
    node.until("unknown", |node| pressure(node).is_none()).await;
    assert!(node.codes().is_empty());
    *reading.lock() = Some(50);
    node.until("recovered", |node| state(node) == NodeState::Ready).await;
    assert!(node.metrics.prometheus_text().contains("outrigger_memory_pressure_ratio{source=\"simulated\"} 0.5"));
}

#[tokio::test]
async fn memory_of_the_device_counts_without_its_free_blocks_and_the_tighter_one_decides() {
    let (node, answer) = node_with_device(using(50)).await;
    let set = |used| *answer.lock() = Answer::Reading(using(used));
    node.until("measured", |node| pressure(node) == Some(0.44)).await;
    let host = Box::new(SimulatedMemory(Arc::new(Mutex::new(Some(60)))));
    tokio::spawn(watch_memory(node.health.clone(), host, node.shutdown.clone()));
    node.until("both measured", |node| pressure(node) == Some(0.6)).await;
    set(97);
    node.until("degraded", |node| state(node) == NodeState::Degraded).await;
    assert_eq!(node.health.lifecycle().phase().reason, "device memory at 91.0 %");
    set(102);
    node.until("unready", |node| node.codes() == ["memory"]).await;
    *answer.lock() = Answer::Silent;
    node.until("silent", |node| node.codes() == ["device_lost"]).await;
    assert_eq!(pressure(&node), Some(0.6), "the host's is known");
    set(50);
    node.until("ready", |node| node.codes().is_empty()).await;
    node.until("recovered", |node| state(node) == NodeState::Ready).await;
    assert!(node.metrics.prometheus_text().contains("outrigger_memory_pressure_ratio{source=\"gpu\"} 0.44"));
}

#[tokio::test]
async fn a_device_that_is_throttled_or_hot_degrades_the_node_until_it_is_not() {
    let (node, answer) = node_with_device(using(50)).await;
    let limits = TemperatureLimits { slowdown: Some(87), shutdown: Some(92) };
    let hot = DeviceReading { celsius: Some(86), limits, watts: Some(650.5), utilization: Some(0.75), ..using(50) };
    let throttled = DeviceReading { throttles: vec![Throttle::HardwareThermal], ..using(50) };
    for (reading, reason) in [(hot, "86 °C"), (throttled, "slowed down by its hardware for its temperature")] {
        *answer.lock() = Answer::Reading(reading);
        node.until("degraded", |node| state(node) == NodeState::Degraded).await;
        let phase = node.health.lifecycle().phase();
        assert!(phase.reason.contains(reason), "{phase:?}");
        assert!(node.codes().is_empty(), "it is slower, and ready");
        *answer.lock() = Answer::Reading(using(50));
        node.until("ready", |node| state(node) == NodeState::Ready).await;
    }
    let text = node.metrics.prometheus_text();
    for line in [
        "outrigger_device_temperature_celsius{device=\"gpu\"} 86.0",
        "outrigger_device_power_watts{device=\"gpu\"} 650.5",
        "outrigger_device_utilization_ratio{device=\"gpu\"} 0.75",
        "outrigger_device_memory_used_bytes{device=\"gpu\"} 50.0",
        "outrigger_device_memory_bytes{device=\"gpu\"} 100.0",
        "outrigger_device_throttled{reason=\"hw_thermal\"} 0.0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn faults_of_the_device_fail_the_node_unless_they_are_others() {
    let (node, answer) = node_with_device(using(50)).await;
    let report = |fault| *answer.lock() = Answer::Reading(DeviceReading { faults: vec![fault], ..using(50) });
    let counted = |node: &Node, kind: &str| {
        node.metrics.prometheus_text().contains(&format!("outrigger_device_errors_total{{kind=\"{kind}\"}} 1"))
    };
    report(DeviceFault::Xid(Some(31)));
    node.until("counted", |node| counted(node, "xid_application")).await;
    report(DeviceFault::Xid(Some(63)));
    node.until("counted", |node| counted(node, "xid_notice")).await;
    assert_eq!(state(&node), NodeState::Ready);
    report(DeviceFault::Xid(Some(79)));
    node.until("failed", |node| state(node) == NodeState::Failed).await;
    assert_eq!(node.health.lifecycle().phase().reason, "the device's driver reports XID 79");
    assert!(counted(&node, "xid_fatal"));
    assert!(!node.health.liveness().live && node.codes().contains(&"failed"));
}

#[tokio::test]
async fn a_memory_error_and_a_lost_device_fail_the_node_too() {
    for (answer, reason) in [
        (Answer::Lost, "the device is lost: off the bus"),
        (
            Answer::Reading(DeviceReading { faults: vec![DeviceFault::UncorrectableMemory], ..using(50) }),
            "the device read memory that it could not correct",
        ),
    ] {
        let (node, current) = node_with_device(using(50)).await;
        node.until("measured", |node| pressure(node).is_some()).await;
        *current.lock() = answer;
        node.until("failed", |node| state(node) == NodeState::Failed).await;
        assert_eq!(node.health.lifecycle().phase().reason, reason);
    }
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
