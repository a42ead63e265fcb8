//! The engine and its inbox without a thread: the owner decides when it takes a step. `handle` steps it on its own thread as
//! fast as it can; the simulator steps it by a simulated clock.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::warn;

use super::batch::{ModelRunner, RunnerError};
use super::engine::{Engine, Serial, Submission, engine_failed};
use super::generation::EndRules;
use super::handle::{EngineHandle, EngineLimits, EngineParts, Fault, OnFailure, SpawnError};
use super::status_board::{Clock, Owed, StatusBoard};
use crate::types::{EngineStatus, Failure, GenerationEvent};

/// Commands taken before a step; the others wait for the next.
const MAX_COMMANDS_PER_STEP: usize = 4096;

/// A command on its way to the engine.
pub(super) struct Order {
    command: EngineCommand,
    /// None of a request: its slot is owed already.
    owed: Option<Owed>,
}

pub(super) enum EngineCommand {
    Submit(Submission),
    /// The stream of this request was dropped.
    Cancel(Serial),
    Drain {
        deadline: Instant,
        done: oneshot::Sender<()>,
    },
    /// What the engine computes cannot be trusted any more.
    GiveUp(Failure),
    InjectFault(Fault),
}

/// Where commands are handed to the engine; cheap to clone.
#[derive(Clone)]
pub(super) struct Inbox {
    orders: Sender<Order>,
    pub(super) board: Arc<StatusBoard>,
}

/// The engine is gone.
pub(super) struct Gone;

impl Inbox {
    /// Hands a command over. The engine owes it until it is obeyed.
    pub(super) fn hand_over(&self, command: EngineCommand) -> Result<(), Gone> {
        let owed = match command {
            EngineCommand::Submit(_) => None,
            _ => Some(self.board.owe()),
        };
        self.orders.send(Order { command, owed }).map_err(|_| Gone)
    }
}

pub struct SteppedEngine {
    engine: Engine,
    board: Arc<StatusBoard>,
    orders: Receiver<Order>,
    on_failure: Option<OnFailure>,
}

impl SteppedEngine {
    /// The configuration is valid. `clock` tells the engine how long its steps take, and others when it last moved.
    #[expect(clippy::disallowed_methods, reason = "the handle lets in `max_num_requests`; other orders are few")]
    pub fn new(
        parts: EngineParts,
        runner: Box<dyn ModelRunner>,
        clock: Clock,
    ) -> Result<(EngineHandle, Self), SpawnError> {
        let limits = EngineLimits::new(&parts.config, runner.as_ref())?;
        let num_reserved = runner.num_blocks() - limits.num_blocks;
        let board = Arc::new(StatusBoard::new(clock, limits.num_blocks));
        let rules = EndRules {
            eos_token_ids: parts.eos_token_ids.into(),
            stop_texts: parts.stop_texts,
            vocab_size: limits.vocab_size,
            max_model_len: limits.max_model_len,
        };
        let engine = Engine::new(&parts.config, runner, rules, num_reserved, Arc::clone(&board), parts.on_step);
        let (sender, orders) = channel();
        let inbox = Inbox { orders: sender, board: Arc::clone(&board) };
        let handle = EngineHandle::new(inbox, limits, parts.config.max_num_requests, parts.fingerprint);
        Ok((handle, Self { engine, board, orders, on_failure: parts.on_failure }))
    }

    /// Nothing is here to compute; what has been asked for since the last step is not seen yet.
    pub fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    /// Takes what was asked for, and computes one step if there is anything to compute. An error is final.
    pub fn step(&mut self) -> Result<(), Failure> {
        let Self { engine, board, orders, .. } = self;
        orders.try_iter().take(MAX_COMMANDS_PER_STEP).for_each(|order| obey(engine, board, order));
        if self.engine.is_idle() {
            self.board.beat();
        }
        self.engine.step(self.board.now())
    }

    /// Waits for something to do, at most so long. False once nobody is left who could ask.
    pub(super) fn wait(&mut self, limit: Duration) -> bool {
        match self.orders.recv_timeout(limit) {
            Ok(order) => {
                obey(&mut self.engine, &self.board, order);
                true
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => false,
        }
    }

    /// The engine has failed: ends every stream, and the handle refuses from now on.
    pub fn fail(&mut self, failure: &Failure) {
        self.end();
        if let Some(on_failure) = self.on_failure.take() {
            on_failure(failure);
        }
        self.engine.fail_all(failure);
        self.orders.try_iter().for_each(|order| refuse(order, failure));
    }

    /// As a failed engine: answers whatever still arrives, until nobody is left who could ask.
    pub(super) fn refuse_forever(&mut self, failure: &Failure) {
        self.orders.iter().for_each(|order| refuse(order, failure));
    }

    /// Nothing runs any more.
    pub(super) fn end(&self) {
        self.board.update(|status| {
            *status = EngineStatus { alive: false, running: 0, waiting: 0, waiting_tokens: 0, ..status.clone() }
        });
    }
}

/// However the engine's thread ends, everybody sees that it has.
impl Drop for SteppedEngine {
    fn drop(&mut self) {
        self.end();
    }
}

#[expect(clippy::disallowed_methods, reason = "a hanging engine blocks its thread")]
fn obey(engine: &mut Engine, board: &StatusBoard, order: Order) {
    let Order { command, owed } = order;
    match command {
        EngineCommand::Submit(submission) => engine.submit(submission),
        EngineCommand::Cancel(serial) => engine.cancel(serial),
        EngineCommand::Drain { deadline, done } => engine.drain(deadline, done),
        EngineCommand::GiveUp(failure) => engine.give_up(failure),
        EngineCommand::InjectFault(Fault::Device) => {
            let error = RunnerError::Device("as fault injection asks".to_owned());
            engine.give_up(engine_failed().with_source(error));
        }
        EngineCommand::InjectFault(Fault::Hang(time)) => {
            warn!(?time, "fault injection: the engine hangs");
            // The command counts as done: from outside, it looks as if the thread hung by itself.
            drop(owed);
            board.advance();
            thread::sleep(time);
            return;
        }
        EngineCommand::InjectFault(Fault::Panic) => panic!("fault injection: panic"),
        EngineCommand::InjectFault(Fault::CorruptWeights) => engine.corrupt_weights(),
        EngineCommand::InjectFault(Fault::NanLogits) => engine.spoil_logits(),
    }
    drop(owed);
    board.advance();
}

fn refuse(order: Order, failure: &Failure) {
    if let EngineCommand::Submit(submission) = order.command {
        // Nobody may be listening any more.
        let _ = submission.events.send(GenerationEvent::Failed(failure.clone()));
    }
}
