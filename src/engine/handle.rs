//! The engine's thread, and the handle through which everyone else reaches it.
//!
//! The thread is named `engine`. A panic in it, or a broken device, ends every stream with `EngineFailed` and leaves the
//! thread refusing whatever still arrives; the process goes on.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::batch::ModelRunner;
use super::config::Config;
use super::counters::{EngineCountersSnapshot, add};
use super::engine::{Serial, Submission, draining, engine_failed};
use super::generation::StopTexts;
use super::stepped::{EngineCommand, Inbox, SteppedEngine};
use crate::types::{
    Backend, EngineStatus, Failure, FailureKind, Fingerprint, GenerateRequest, GenerationStream, Pace, TokenId,
    panic_message, with_causes,
};

/// An idle engine wakes this often to show that it lives.
const IDLE_HEARTBEAT: Duration = Duration::from_millis(500);

/// Makes the runner on the engine's own thread, where all work on its device stays.
pub type MakeRunner = Box<dyn FnOnce() -> Result<Box<dyn ModelRunner>, Box<dyn Error + Send + Sync>> + Send>;

/// What an engine is made of, beside its runner.
pub struct EngineParts {
    pub config: Config,
    pub fingerprint: Fingerprint,
    pub eos_token_ids: Vec<TokenId>,
    pub stop_texts: StopTexts,
    pub on_step: Option<OnStep>,
    /// Called when the engine has failed, on its thread, before its streams are told.
    pub on_failure: Option<OnFailure>,
}

/// Called with the duration of every step that had work, and the tokens that it computed, on the engine's thread.
pub type OnStep = Box<dyn FnMut(Duration, usize) + Send>;

pub type OnFailure = Box<dyn FnOnce(&Failure) + Send>;

/// Limits that follow from the configuration, the model and the pool together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest prompt and output together.
    pub max_model_len: usize,
    /// Longest prompt and output of the synthetic inference.
    pub max_probe_len: usize,
    pub vocab_size: usize,
    pub block_size: usize,
    /// Blocks that requests share; the synthetic inference has its own.
    pub num_blocks: u32,
}

#[derive(Debug, Error)]
pub enum SpawnError {
    #[error("the engine's thread cannot be started")]
    Thread(#[source] std::io::Error),
    #[error("the model cannot be loaded")]
    Runner(#[source] Box<dyn Error + Send + Sync>),
    #[error("loading the model panicked")]
    Panicked,
    #[error(
        "the KV cache has {num_blocks} blocks of {block_size} tokens: too few for the {reserved} that the synthetic \
         inference keeps and a request besides"
    )]
    PoolTooSmall { num_blocks: u32, block_size: usize, reserved: u32 },
    #[error("{0}")]
    Config(String),
}

/// A fault to inject, for tests and drills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The engine's thread stands still.
    Hang(Duration),
    Panic,
    /// Wrong numbers, which look like right ones.
    CorruptWeights,
    /// Numbers that are none.
    NanLogits,
    /// The device reports an error that it does not recover from.
    Device,
}

/// Reaches the engine; cheap to clone. The engine ends when the last handle and the last stream are gone.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: Inbox,
    next_serial: Arc<AtomicU64>,
    limits: EngineLimits,
    max_num_requests: usize,
    fingerprint: Fingerprint,
}

/// Starts the engine's thread and waits until the runner is made. Blocks: call it where blocking is allowed.
pub fn spawn(parts: EngineParts, make_runner: MakeRunner) -> Result<EngineHandle, SpawnError> {
    let mut problems = Vec::new();
    parts.config.validate(&mut problems);
    if !problems.is_empty() {
        return Err(SpawnError::Config(problems.join("; ")));
    }
    let (started_sender, started) = sync_channel(1);
    thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            let made = make_runner().map_err(SpawnError::Runner);
            match made.and_then(|runner| SteppedEngine::new(parts, runner, Instant::now)) {
                Ok((handle, mut engine)) => {
                    // Nobody waits only if `spawn` itself was abandoned; then the handle is dropped, which ends the thread.
                    let _ = started_sender.send(Ok(handle));
                    drive(&mut engine);
                }
                Err(error) => {
                    let _ = started_sender.send(Err(error));
                }
            }
        })
        .map_err(SpawnError::Thread)?;
    started.recv().map_err(|_| SpawnError::Panicked)?
}

impl EngineLimits {
    pub(super) fn new(config: &Config, runner: &dyn ModelRunner) -> Result<Self, SpawnError> {
        let (block_size, num_blocks) = (runner.block_size(), runner.num_blocks());
        let reserved = u32::try_from(config.probe_tokens.div_ceil(block_size)).unwrap_or(u32::MAX);
        if num_blocks <= reserved {
            return Err(SpawnError::PoolTooSmall { num_blocks, block_size, reserved });
        }
        let num_blocks = num_blocks - reserved;
        let wanted = config.max_model_len.unwrap_or(usize::MAX).min(runner.max_model_len());
        let max_model_len = wanted.min(num_blocks as usize * block_size);
        if max_model_len < wanted {
            warn!(
                max_model_len,
                wanted,
                "the KV cache is too small for the model's full context; sequences are limited to what it holds"
            );
        }
        let max_probe_len = config.probe_tokens.min(max_model_len);
        Ok(Self { max_model_len, max_probe_len, vocab_size: runner.vocab_size(), block_size, num_blocks })
    }

    /// Refuses what can never be computed.
    fn check(&self, request: &GenerateRequest) -> Result<(), Failure> {
        let num_prompt = request.envelope.prompt.len();
        if num_prompt == 0 {
            return Err(Failure::invalid("prompt", "`prompt` must have at least one token."));
        }
        let emitted = || request.choices.iter().flat_map(|choice| &choice.emitted);
        if let Some(token) = request.envelope.prompt.iter().chain(emitted()).find(|&&id| id as usize >= self.vocab_size)
        {
            let message = format!("token id {token} is out of range; the model's vocabulary has {}", self.vocab_size);
            return Err(Failure::invalid("prompt", message));
        }
        let longest = request.choices.iter().map(|choice| choice.emitted.len()).max().unwrap_or(0);
        let least = longest.max(request.envelope.sampling.max_tokens.min(1) as usize);
        if num_prompt + least > self.max_model_len {
            let message = format!(
                "This model's maximum context length is {} tokens (max_model_len). However, the prompt has {num_prompt} \
                 tokens, which leaves no room for output.",
                self.max_model_len
            );
            return Err(Failure::invalid("prompt", message).with_code("context_length_exceeded"));
        }
        self.check_choices(request)?;
        let probe_len = num_prompt + request.envelope.sampling.max_tokens as usize;
        if request.is_probe && (probe_len > self.max_probe_len || request.choices.len() > 1) {
            let message = format!(
                "a synthetic inference has one choice and at most {} tokens (probe_tokens), not {probe_len}",
                self.max_probe_len
            );
            return Err(Failure::invalid("max_tokens", message));
        }
        Ok(())
    }

    fn check_choices(&self, request: &GenerateRequest) -> Result<(), Failure> {
        let mut indices: Vec<u32> = request.choices.iter().map(|choice| choice.index).collect();
        indices.sort_unstable();
        indices.dedup();
        let are_distinct = indices.len() == request.choices.len();
        let are_known = indices.last().is_some_and(|&index| index < request.envelope.sampling.n);
        match are_distinct && are_known {
            true => Ok(()),
            false => Err(Failure::invalid("n", "the choices must be distinct, and at least one, of 0 to n - 1")),
        }
    }
}

impl EngineHandle {
    pub(super) fn new(inbox: Inbox, limits: EngineLimits, max_num_requests: usize, fingerprint: Fingerprint) -> Self {
        Self { inbox, next_serial: Arc::default(), limits, max_num_requests, fingerprint }
    }

    pub fn limits(&self) -> EngineLimits {
        self.limits
    }

    pub fn counters(&self) -> EngineCountersSnapshot {
        self.inbox.board.counters.snapshot()
    }

    /// Accepts nothing more, lets what is here go on until `deadline`, then ends the rest with `FinishReason::Shutdown`.
    /// Returns when all is gone, or the engine is.
    pub async fn drain(&self, deadline: Instant) {
        self.inbox.board.is_draining.store(true, Ordering::Release);
        let (done, drained) = oneshot::channel();
        if self.inbox.hand_over(EngineCommand::Drain { deadline, done }).is_ok() {
            // An engine that failed meanwhile drops the sender.
            let _ = drained.await;
        }
    }

    /// Ends every stream with `failure`, as if a step had failed so: what it computes cannot be trusted any more. Returns at
    /// once; an engine that hangs does not listen.
    pub fn give_up(&self, failure: Failure) {
        // An engine that is gone has ended its streams already.
        let _ = self.inbox.hand_over(EngineCommand::GiveUp(failure));
    }

    /// For tests and drills; the caller decides who may.
    pub fn inject_fault(&self, fault: Fault) {
        // An engine that is gone cannot be harmed further.
        let _ = self.inbox.hand_over(EngineCommand::InjectFault(fault));
    }
}

impl Backend for EngineHandle {
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure> {
        self.limits.check(&request)?;
        if !self.inbox.board.is_alive() {
            return Err(engine_failed());
        }
        if self.inbox.board.is_draining.load(Ordering::Acquire) {
            return Err(draining());
        }
        let limit = match request.is_probe {
            true => usize::MAX,
            false => self.max_num_requests,
        };
        let slot = self.inbox.board.take_slot(limit).ok_or_else(|| {
            let message = format!("the server holds as many requests as it may (max_num_requests, {limit})");
            Failure::new(FailureKind::Overloaded, message)
        })?;
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        let (events, stream) = GenerationStream::channel();
        let submission = Submission { serial, request, events, slot };
        self.inbox.hand_over(EngineCommand::Submit(submission)).map_err(|_| engine_failed())?;
        add(&self.inbox.board.counters.requests_accepted, 1);
        Ok(stream.guarded_by(CancelOnDrop { serial, inbox: self.inbox.clone() }))
    }

    fn status(&self) -> EngineStatus {
        self.inbox.board.status()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.clone()
    }

    fn pace(&self) -> Option<Pace> {
        self.inbox.board.pace()
    }
}

/// Lives in a stream, and tells the engine when the stream is dropped.
struct CancelOnDrop {
    serial: Serial,
    inbox: Inbox,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // A finished request is unknown to the engine; then there is nothing to cancel.
        let _ = self.inbox.hand_over(EngineCommand::Cancel(self.serial));
    }
}

#[derive(Debug, Error)]
#[error("the engine's thread panicked")]
struct EnginePanicked;

/// The life of the thread: serve until nobody is left to serve, or until the engine fails; then refuse.
fn drive(engine: &mut SteppedEngine) {
    let failure = match catch_unwind(AssertUnwindSafe(|| serve(engine))) {
        Ok(Ok(())) => {
            info!("the engine ends: its last handle was dropped");
            return;
        }
        Ok(Err(failure)) => {
            let cause = failure.source.as_deref().map(|source| with_causes(source).to_string());
            error!(cause, "the engine failed");
            failure
        }
        Err(panic) => {
            error!(cause = panic_message(panic.as_ref()), "the engine panicked");
            engine_failed().with_source(EnginePanicked)
        }
    };
    engine.fail(&failure);
    engine.refuse_forever(&failure);
}

fn serve(engine: &mut SteppedEngine) -> Result<(), Failure> {
    loop {
        if engine.is_idle() && !engine.wait(IDLE_HEARTBEAT) {
            return Ok(());
        }
        engine.step()?;
    }
}
