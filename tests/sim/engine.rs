//! A node's engine in the simulation: the real engine on the fake runner, stepped by a task on the simulated clock, with
//! faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outrigger::engine::fake_device::FakeDevice;
use outrigger::engine::fake_runner::{FakeModel, FakeRunner};
use outrigger::engine::{
    Config, EngineHandle, EngineParts, HostSampling, LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RunnerError,
    SteppedEngine, StopTexts,
};
use outrigger::types::{
    Backend, EngineStatus, Failure, FailureKind, Fingerprint, GenerateRequest, GenerationStream, Pace, TokenId, watch,
};
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::plan;

pub const EOS: TokenId = 0;
pub const VOCABULARY: u32 = 32;
pub const MAX_MODEL_LEN: usize = 128;

/// An idle engine takes a step this often.
const IDLE_HEARTBEAT: Duration = Duration::from_millis(500);

/// The faults that an engine has at present.
#[derive(Default)]
struct Faults {
    returns_nan: AtomicBool,
    has_no_memory: AtomicBool,
}

/// The fake runner, with faults that come and go.
struct FaultyRunner {
    inner: FakeRunner,
    faults: Arc<Faults>,
    /// For a device, memory is checked before a step is launched instead.
    is_device: bool,
}

impl LogitsRunner for FaultyRunner {
    fn forward(&mut self, batch: &[LogitsEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        if !self.is_device && self.faults.has_no_memory.load(Ordering::Relaxed) {
            return Err(RunnerError::OutOfMemory { tokens: batch.iter().map(|entry| entry.tokens.len()).sum() });
        }
        self.inner.forward(batch, progress)?;
        if self.faults.returns_nan.load(Ordering::Relaxed) {
            let rows = batch.iter().map(|entry| entry.num_logits).sum();
            (0..rows).for_each(|row| self.inner.logits_mut(row).fill(f32::NAN));
        }
        Ok(())
    }

    fn logits_mut(&mut self, row: usize) -> &mut [f32] {
        self.inner.logits_mut(row)
    }
}

impl PagedModel for FaultyRunner {
    fn copy_block(&mut self, from: u32, to: u32) {
        self.inner.copy_block(from, to);
    }

    fn block_size(&self) -> usize {
        self.inner.block_size()
    }

    fn num_blocks(&self) -> u32 {
        self.inner.num_blocks()
    }

    fn block_bytes(&self) -> usize {
        self.inner.block_bytes()
    }

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn max_model_len(&self) -> usize {
        self.inner.max_model_len()
    }

    fn max_scored_tokens(&self) -> usize {
        self.inner.max_scored_tokens()
    }
}

/// Token 1 is `a`, token 2 is `b`, and so on; a stop string ends the text that it completes.
fn letters() -> StopTexts {
    StopTexts::new(|params| {
        let (params, mut text) = (params.clone(), String::new());
        Box::new(move |token| {
            text.push(char::from(b'`' + token as u8));
            let stop = params.stop.iter().find(|stop| text.ends_with(stop.as_str()));
            stop.filter(|_| params.may_stop_at(text.len() as u32)).cloned()
        })
    })
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub fn fingerprint() -> Fingerprint {
    Fingerprint::new("5eed")
}

/// The limits and the speed of an engine.
#[derive(Clone, Debug)]
pub struct EngineSize {
    pub seats: usize,
    pub batched_tokens: usize,
    pub blocks: u32,
    pub step: Duration,
    /// The number of steps in flight.
    pub depth: usize,
}

/// The engine of one process.
#[derive(Clone)]
pub struct SimEngine {
    handle: EngineHandle,
    wake: Arc<Notify>,
    faults: Arc<Faults>,
    /// While this is true, the engine takes no step.
    stands_still: Arc<watch::Sender<bool>>,
    /// The factor on the usual duration of a step.
    slowness: Arc<AtomicU64>,
    crash: CancellationToken,
}

impl SimEngine {
    /// Starts an engine that runs until `death`.
    pub fn spawn(size: &EngineSize, death: CancellationToken) -> Self {
        let (handle, stepped, faults) = make(size, true);
        let engine = Self {
            handle,
            wake: Arc::default(),
            faults,
            stands_still: Arc::new(watch::Sender::new(false)),
            slowness: Arc::new(AtomicU64::new(1)),
            crash: CancellationToken::new(),
        };
        tokio::spawn({
            let (engine, step) = (engine.clone(), size.step);
            async move {
                death.run_until_cancelled(engine.drive(stepped, step)).await;
            }
        });
        engine
    }

    async fn drive(self, mut stepped: SteppedEngine, step: Duration) {
        let mut stands_still = self.stands_still.subscribe();
        let failure = loop {
            if stepped.is_idle() {
                tokio::select! {
                    biased;
                    () = self.crash.cancelled() => break engine_failed(),
                    () = self.wake.notified() => {}
                    // An idle engine steps from time to time to show that it is alive, like the real one.
                    () = sleep(IDLE_HEARTBEAT) => {}
                }
            }
            sleep(step * self.slowness.load(Ordering::Relaxed) as u32).await;
            // The sender lives in `self`.
            drop(stands_still.wait_for(|stands| !stands).await);
            if self.crash.is_cancelled() {
                break engine_failed();
            }
            if let Err(failure) = stepped.step() {
                break failure;
            }
        };
        loop {
            stepped.fail(&failure);
            self.wake.notified().await;
        }
    }

    /// Refuses new requests, and ends the remaining ones after the limit. Returns when all have ended.
    pub async fn drain(&self, limit: Duration) {
        let drained = self.handle.drain(now() + limit);
        tokio::pin!(drained);
        let mut is_asked = false;
        // Wakes the engine after the first poll has sent the request to drain.
        std::future::poll_fn(|context| {
            let poll = drained.as_mut().poll(context);
            if !std::mem::replace(&mut is_asked, true) {
                self.wake.notify_one();
            }
            poll
        })
        .await;
    }

    /// Ends every stream with the failure, unless it hangs.
    pub fn give_up(&self, failure: Failure) {
        self.handle.give_up(failure);
        self.wake.notify_one();
    }

    pub fn stand_still(&self, stands: bool) {
        self.stands_still.send_replace(stands);
    }

    pub fn set_slowness(&self, times: u64) {
        self.slowness.store(times, Ordering::Relaxed);
    }

    pub fn return_nan(&self) {
        self.faults.returns_nan.store(true, Ordering::Relaxed);
    }

    pub fn lack_memory(&self, lacks: bool) {
        self.faults.has_no_memory.store(lacks, Ordering::Relaxed);
    }

    /// Ends the engine as a panic of its thread or a lost device would.
    pub fn crash(&self) {
        self.crash.cancel();
        self.wake.notify_one();
    }
}

impl Backend for SimEngine {
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure> {
        let envelope = &request.envelope;
        let trace = (!request.is_probe).then(|| plan::trace(&envelope.prompt, envelope.sampling.seed));
        assert_eq!(envelope.trace, trace, "{} has lost its trace", envelope.id);
        let stream = self.handle.generate(request)?;
        self.wake.notify_one();
        Ok(stream.guarded_by(WakeOnDrop(self.wake.clone())))
    }

    fn status(&self) -> EngineStatus {
        self.handle.status()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.handle.fingerprint()
    }

    fn pace(&self) -> Option<Pace> {
        self.handle.pace()
    }
}

/// Wakes the engine when a stream is dropped.
struct WakeOnDrop(Arc<Notify>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

fn engine_failed() -> Failure {
    Failure::new(FailureKind::EngineFailed, "the simulated engine crashed")
}

fn make(size: &EngineSize, caches: bool) -> (EngineHandle, SteppedEngine, Arc<Faults>) {
    let faults: Arc<Faults> = Arc::default();
    let model = FakeModel {
        num_blocks: size.blocks,
        vocab_size: VOCABULARY as usize,
        max_model_len: MAX_MODEL_LEN,
        ..FakeModel::default()
    };
    let runner = runner(FakeRunner::new(model), &faults, size.depth);
    let parts = EngineParts {
        config: Config {
            max_num_seqs: size.seats,
            max_num_batched_tokens: size.batched_tokens,
            probe_tokens: 16,
            enable_prefix_caching: caches,
            ..Config::default()
        },
        fingerprint: fingerprint(),
        eos_token_ids: vec![EOS],
        stop_texts: letters(),
        on_step: None,
        on_failure: None,
    };
    let (handle, stepped) = SteppedEngine::new(parts, runner, now).expect("the pool is large enough");
    (handle, stepped, faults)
}

fn runner(inner: FakeRunner, faults: &Arc<Faults>, depth: usize) -> Box<dyn ModelRunner> {
    let is_device = depth > 1;
    let runner = FaultyRunner { inner, faults: faults.clone(), is_device };
    let faults = faults.clone();
    let has_memory = move |_: usize| !faults.has_no_memory.load(Ordering::Relaxed);
    match is_device {
        true => Box::new(FakeDevice::new(runner, Box::new(has_memory))),
        false => Box::new(HostSampling::new(runner)),
    }
}

/// Computes a request alone in a separate engine. The result is the reference for every other run.
pub fn compute_alone(request: GenerateRequest) -> GenerationStream {
    let size = EngineSize { seats: 8, batched_tokens: 256, blocks: 128, step: Duration::ZERO, depth: 1 };
    let (handle, mut stepped, _) = make(&size, false);
    let stream = handle.generate(request).expect("a valid request");
    stepped.step().expect("nothing fails");
    while !stepped.is_idle() {
        stepped.step().expect("nothing fails");
    }
    stream
}
