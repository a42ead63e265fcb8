//! The engine itself: who asked for what, and what became of it. One step is expire, schedule, launch, collect, publish; the
//! middle is in `pipeline`. Synchronous, and time is passed in; the thread that drives it is in `handle`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use smallvec::SmallVec;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::batch::ModelRunner;
use super::block_manager::BlockManager;
use super::config::Config;
use super::counters::add;
use super::drain_meter::DrainMeter;
use super::generation::{EndRules, Generation, Replayed};
use super::handle::OnStep;
use super::pipeline::Pipeline;
use super::scheduler::{Limits, Plan, Scheduler};
use super::sequence::{NewSequence, Rank, SequenceId};
use super::status_board::{RequestSlot, StatusBoard};
use crate::types::{EngineStatus, Envelope, Failure, FailureKind, FinishReason, GenerateRequest, GenerationEvent};

/// Numbers requests in order of arrival.
pub(super) type Serial = u64;

/// A request on its way from the handle to the engine.
pub(super) struct Submission {
    pub(super) serial: Serial,
    pub(super) request: GenerateRequest,
    pub(super) events: mpsc::UnboundedSender<GenerationEvent>,
    pub(super) slot: RequestSlot,
}

pub(super) struct RunningRequest {
    pub(super) request: GenerateRequest,
    events: mpsc::UnboundedSender<GenerationEvent>,
    /// Of the choices that are not finished.
    sequences: SmallVec<[SequenceId; 1]>,
    /// Choices without a sequence, which end when the prompt is scored: nothing is generated for them.
    ends_with_prompt: SmallVec<[u32; 1]>,
    has_left_queue: bool,
    /// Some choice has a token, perhaps from before it came here.
    has_tokens: bool,
    _slot: RequestSlot,
}

/// The choice behind a sequence.
pub(super) struct RunningChoice {
    pub(super) serial: Serial,
    pub(super) index: u32,
    /// Made when the choice is first computed, or when it is resumed.
    pub(super) generation: Option<Generation>,
    /// The row that samples its next token, among those of the step that was launched last.
    pub(super) row: usize,
}

pub(super) struct Engine {
    pub(super) scheduler: Scheduler,
    pub(super) runner: Box<dyn ModelRunner>,
    rules: EndRules,
    uses_prefix_cache: bool,
    /// In order of arrival.
    pub(super) requests: BTreeMap<Serial, RunningRequest>,
    /// By the index of the sequence.
    pub(super) choices: Vec<Option<RunningChoice>>,
    deadlines: BTreeSet<(Instant, Serial)>,
    drain: Option<Drain>,
    pub(super) drain_meter: DrainMeter,
    pub(super) steps_since_shrink: u64,
    pub(super) pipeline: Pipeline,
    pub(super) board: Arc<StatusBoard>,
    pub(super) on_step: Option<OnStep>,
    /// Why no step may be taken any more.
    given_up: Option<Failure>,
}

struct Drain {
    deadline: Instant,
    /// Dropped when the last request is gone.
    waiters: Vec<oneshot::Sender<()>>,
}

impl Engine {
    pub(super) fn new(
        config: &Config,
        runner: Box<dyn ModelRunner>,
        rules: EndRules,
        num_reserved: u32,
        board: Arc<StatusBoard>,
        on_step: Option<OnStep>,
    ) -> Self {
        let limits = Limits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_scored_tokens: runner.max_scored_tokens(),
        };
        let block_size = runner.block_size();
        let blocks = BlockManager::new(runner.num_blocks(), num_reserved, block_size);
        Self {
            scheduler: Scheduler::new(limits, blocks, block_size),
            pipeline: Pipeline::new(runner.depth()),
            runner,
            rules,
            uses_prefix_cache: config.enable_prefix_caching,
            requests: BTreeMap::new(),
            choices: Vec::new(),
            deadlines: BTreeSet::new(),
            drain: None,
            drain_meter: DrainMeter::default(),
            steps_since_shrink: 0,
            board,
            on_step,
            given_up: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.pipeline.is_empty()
    }

    /// Takes a request into the queue, or ends it at once. The handle has checked it against every limit.
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission { serial, request, events, slot } = submission;
        if self.drain.is_some() {
            // Nobody may be listening any more; that is no concern of the engine.
            let _ = events.send(GenerationEvent::Failed(draining()));
            return;
        }
        if let Some(deadline) = request.envelope.deadline {
            self.deadlines.insert((deadline, serial));
        }
        let has_tokens = request.choices.iter().any(|choice| !choice.emitted.is_empty());
        let request = RunningRequest {
            request,
            events,
            sequences: SmallVec::new(),
            ends_with_prompt: SmallVec::new(),
            has_left_queue: false,
            has_tokens,
            _slot: slot,
        };
        self.requests.insert(serial, request);
        if let Err(failure) = self.add_choices(serial) {
            self.fail(serial, failure);
        } else if self.requests[&serial].sequences.is_empty() {
            self.forget(serial);
        }
    }

    /// Nobody listens to the request any more, if it is still here.
    pub(super) fn cancel(&mut self, serial: Serial) {
        if self.requests.contains_key(&serial) {
            add(&self.board.counters.requests_cancelled, 1);
            self.forget(serial);
        }
    }

    /// Accepts nothing more. What is here may go on until `deadline`; `done` is dropped or answered when all is gone.
    pub(super) fn drain(&mut self, deadline: Instant, done: oneshot::Sender<()>) {
        let drain = self.drain.get_or_insert_with(|| Drain { deadline, waiters: Vec::new() });
        drain.deadline = drain.deadline.min(deadline);
        drain.waiters.push(done);
        self.finish_drain();
    }

    pub(super) fn corrupt_weights(&mut self) {
        warn!("fault injection: corrupting the weights");
        self.runner.corrupt();
    }

    pub(super) fn spoil_logits(&mut self) {
        warn!("fault injection: making every logit NaN");
        self.runner.spoil();
    }

    /// What it computes cannot be trusted any more, as somebody else has seen: the next step fails so.
    pub(super) fn give_up(&mut self, failure: Failure) {
        self.given_up = Some(failure);
    }

    /// One step. An error is final: the engine has failed.
    pub(super) fn step(&mut self, now: Instant) -> Result<(), Failure> {
        if let Some(failure) = self.given_up.take() {
            return Err(failure);
        }
        self.expire(now);
        self.drop_disconnected();
        if !self.is_idle() {
            self.board.pace_meter.lock().begin(now);
            self.compute()?;
        }
        if self.is_idle() {
            self.board.pace_meter.lock().rest();
        }
        self.finish_drain();
        self.publish_status();
        Ok(())
    }

    /// Ends every request; the engine is not used for computing after this.
    pub(super) fn fail_all(&mut self, failure: &Failure) {
        for request in std::mem::take(&mut self.requests).into_values() {
            let _ = request.events.send(GenerationEvent::Failed(failure.clone()));
        }
        self.pipeline.abandon();
        self.drain = None;
    }

    pub(super) fn publish_status(&mut self) {
        let scheduler = &self.scheduler;
        let (running, waiting) = (scheduler.running().len() as u32, scheduler.num_waiting() as u32);
        let (waiting_tokens, kv_blocks_used) = (scheduler.waiting_tokens(), scheduler.blocks().num_used());
        let device_time = self.runner.device_time();
        let preemptions = self.board.counters.preemptions.load(Ordering::Relaxed);
        let drain_tokens_per_second = self.drain_meter.tokens_per_second();
        // Nothing is computed under the lock: whoever asks for the status must never wait for a step.
        self.board.update(|status| {
            *status = EngineStatus {
                running,
                waiting,
                waiting_tokens,
                preemptions,
                device_time,
                kv_blocks_used,
                drain_tokens_per_second,
                ..status.clone()
            };
        });
    }

    fn add_choices(&mut self, serial: Serial) -> Result<(), Failure> {
        let request = &mut self.requests.get_mut(&serial).expect("the request is known").request;
        // The emitted tokens move into the sequences; the request is done with them.
        let choices = std::mem::take(&mut request.choices);
        let request = request.clone();
        let envelope = &request.envelope;
        let generates = envelope.sampling.max_tokens > 0;
        // The first choice that is computed scores the prompt, for all.
        let mut left_to_score = if envelope.scores_prompt() { envelope.prompt.len() - 1 } else { 0 };
        let mut sibling = None;
        for start in &choices {
            if !generates && left_to_score == 0 {
                self.end_with_prompt(serial, start.index);
                continue;
            }
            let generation = match start.emitted.is_empty() {
                true => None,
                false => match self.new_generation(envelope, start.index).replay(&start.emitted) {
                    Replayed::Unfinished(generation) => Some(generation),
                    Replayed::Finished(reason) => {
                        self.send(serial, GenerationEvent::Finished { choice: start.index, reason });
                        continue;
                    }
                    Replayed::Overrun(index) => return Err(overrun(start.index, index)),
                },
            };
            let num_scored = std::mem::take(&mut left_to_score);
            // The last token is computed only for what comes after it.
            let prompt = if generates { &envelope.prompt[..] } else { &envelope.prompt[..num_scored] };
            let new = NewSequence {
                rank: Rank { priority: envelope.priority, arrival: serial, choice: start.index },
                tokens: [prompt, start.emitted.as_slice()].concat(),
                prompt_len: prompt.len(),
                uses_prefix_cache: self.uses_prefix_cache && uses_prefix_cache(&request),
                cache_salt: envelope.extensions.cache_salt,
                num_scored,
                sibling,
            };
            let id = match request.is_probe {
                true => self.scheduler.add_probe(new).ok_or_else(probe_is_running)?,
                false => self.scheduler.add(new),
            };
            sibling = sibling.or(Some(id));
            self.add_choice(id, RunningChoice { serial, index: start.index, generation, row: 0 });
        }
        Ok(())
    }

    /// Nothing is generated for the choice: it ends with the choice that scores the prompt, or at once when none does.
    fn end_with_prompt(&mut self, serial: Serial, choice: u32) {
        let request = self.requests.get_mut(&serial).expect("the request is known");
        match request.sequences.is_empty() {
            true => self.send(serial, GenerationEvent::Finished { choice, reason: FinishReason::Length }),
            false => request.ends_with_prompt.push(choice),
        }
    }

    fn add_choice(&mut self, id: SequenceId, choice: RunningChoice) {
        if self.choices.len() <= id.index() {
            self.choices.resize_with(id.index() + 1, || None);
        }
        self.requests.get_mut(&choice.serial).expect("the request is known").sequences.push(id);
        self.choices[id.index()] = Some(choice);
    }

    fn new_generation(&self, envelope: &Envelope, choice: u32) -> Generation {
        Generation::new(&self.rules, &envelope.sampling, choice, &envelope.prompt)
    }

    pub(super) fn send(&mut self, serial: Serial, event: GenerationEvent) {
        let request = self.requests.get_mut(&serial).expect("the request is known");
        request.has_tokens |= matches!(event, GenerationEvent::Token { .. });
        // A closed channel is noticed at the next step.
        let _ = request.events.send(event);
    }

    /// Ends what is past its deadline.
    fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, serial)) = self.deadlines.first()
            && deadline <= now
        {
            add(&self.board.counters.requests_deadline_exceeded, 1);
            match self.requests[&serial].has_tokens {
                true => self.finish_all_choices(serial, &FinishReason::Deadline),
                false => self.fail(serial, Failure::deadline_passed()),
            }
        }
        if self.drain.as_ref().is_some_and(|drain| drain.deadline <= now) {
            let serials: Vec<Serial> = self.requests.keys().copied().collect();
            serials.into_iter().for_each(|serial| self.finish_all_choices(serial, &FinishReason::Shutdown));
        }
    }

    pub(super) fn finish_all_choices(&mut self, serial: Serial, reason: &FinishReason) {
        let request = &self.requests[&serial];
        let index = |id: &SequenceId| self.choices[id.index()].as_ref().expect("a sequence has a choice").index;
        let computed = request.sequences.iter().map(index);
        let choices: SmallVec<[u32; 1]> = computed.chain(request.ends_with_prompt.iter().copied()).collect();
        for choice in choices {
            self.send(serial, GenerationEvent::Finished { choice, reason: reason.clone() });
        }
        self.forget(serial);
    }

    /// Running requests are asked whether somebody listens; waiting ones are cancelled by a command.
    fn drop_disconnected(&mut self) {
        let mut index = 0;
        while let Some(&id) = self.scheduler.running().get(index) {
            let serial = self.choices[id.index()].as_ref().expect("a sequence has a choice").serial;
            if self.requests[&serial].events.is_closed() {
                self.cancel(serial);
            } else {
                index += 1;
            }
        }
    }

    pub(super) fn fail(&mut self, serial: Serial, failure: Failure) {
        self.send(serial, GenerationEvent::Failed(failure));
        self.forget(serial);
    }

    /// Removes the request and frees what it holds.
    fn forget(&mut self, serial: Serial) {
        let request = self.requests.remove(&serial).expect("the request is known");
        for id in request.sequences {
            self.scheduler.remove(id);
            self.choices[id.index()] = None;
        }
        if let Some(deadline) = request.request.envelope.deadline {
            self.deadlines.remove(&(deadline, serial));
        }
    }

    fn finish_drain(&mut self) {
        if self.is_idle()
            && let Some(drain) = &mut self.drain
        {
            drain.waiters.drain(..).for_each(|done| {
                // Whoever waited may have given up.
                let _ = done.send(());
            });
        }
    }

    /// Tells the requests that leave the queue, and prepares the state of choices that are computed for the first time.
    pub(super) fn announce(&mut self, plan: &Plan) {
        for &(id, cached) in &plan.started {
            let choice = self.choices[id.index()].as_mut().expect("a sequence has a choice");
            let request = self.requests.get_mut(&choice.serial).expect("the request is known");
            let envelope = &request.request.envelope;
            choice.generation.get_or_insert_with(|| {
                Generation::new(&self.rules, &envelope.sampling, choice.index, &envelope.prompt)
            });
            let counters = &self.board.counters;
            if self.uses_prefix_cache && uses_prefix_cache(&request.request) {
                add(&counters.prefix_cache_queries, self.scheduler.sequence(id).tokens().len());
                add(&counters.prefix_cache_hits, cached);
            }
            if !std::mem::replace(&mut request.has_left_queue, true) {
                add(&counters.prompt_tokens, envelope.prompt.len());
                let cached_tokens = cached.min(envelope.prompt.len()) as u32;
                let _ = request.events.send(GenerationEvent::Scheduled { cached_tokens });
            }
        }
    }

    /// One choice has ended; with the last one its request has.
    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let RunningChoice { serial, index, .. } = self.choices[id.index()].take().expect("a sequence has a choice");
        self.scheduler.remove(id);
        self.send(serial, GenerationEvent::Finished { choice: index, reason });
        let request = self.requests.get_mut(&serial).expect("the request is known");
        request.sequences.retain(|other| *other != id);
        if request.sequences.is_empty() {
            self.forget(serial);
        }
    }

    #[cfg(test)]
    pub(super) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}

/// The cache holds no logits, which are what a prompt is scored by.
fn uses_prefix_cache(request: &GenerateRequest) -> bool {
    !request.bypass_prefix_cache && !request.envelope.scores_prompt()
}

pub(super) fn engine_failed() -> Failure {
    Failure::new(FailureKind::EngineFailed, "the inference engine has failed")
}

pub(super) fn draining() -> Failure {
    Failure::shutting_down("this server is shutting down")
}

fn probe_is_running() -> Failure {
    Failure::new(FailureKind::Overloaded, "another synthetic inference is running")
}

fn overrun(choice: u32, index: usize) -> Failure {
    let message = format!("the emitted tokens of choice {choice} go on after the choice has ended at token {index}");
    Failure::invalid("choices", message)
}
