//! Pipelines the engine's steps: a step is launched while the previous one still runs, so that a device never waits for the
//! host. With a runner of depth 1, each step is collected at once and this is a plain loop.
//!
//! # Why tokens do not depend on the depth
//! A token is a function of the tokens before it, the parameters and the position. A pending token enters the next step on
//! the device with the value that the host will learn, and the penalties with it; which sequences share a batch, and how
//! many steps later a sequence is noticed to have ended, changes no row of any other.
//!
//! # Why blocks may be freed under a running step
//! Steps and copies run in the order of their launches. A sequence that ends, is cancelled or fails while a later step
//! computes it leaves that step writing to one block, at the position of its last token. The block was private when the step
//! was planned, and stays out of the prefix cache: only blocks are published whose positions all come before a token that
//! was sampled and collected, and this position comes after it. Whoever gets the block next writes to it in a step, or by a
//! copy, that is launched later and so runs later; whoever is handed a cached block instead of its own reads the same bits
//! in either. Nobody is preempted while a step is in flight, so no sequence goes back to the queue with a token unknown.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tracing::field::display;
use tracing::{error, warn};

use super::batch::{BatchEntry, RowResult, RunnerError, SampleSpec, ScoreSpec};
use super::counters::{add, add_time};
use super::engine::{Engine, engine_failed};
use super::sampler::{NumericsInvalid, Sampled};
use super::scheduler::{Plan, Scheduled};
use crate::types::{Failure, FailureKind, FinishReason, GenerationEvent};

/// Steps that must succeed before a token budget that was halved for lack of memory is doubled again.
const STEPS_BEFORE_GROWTH: u64 = 256;

/// More would need pending tokens that come from a step before the last one.
const MAX_DEPTH: usize = 2;

/// A step that was launched and not collected.
struct Flight {
    plan: Plan,
    begin: Instant,
}

pub(super) struct Pipeline {
    depth: usize,
    /// The oldest first.
    flights: VecDeque<Flight>,
    last_collected: Option<Instant>,
    /// Memory for plans, and for the rows of a step.
    spare: Vec<Plan>,
    rows: Vec<RowResult>,
}

impl Pipeline {
    pub(super) fn new(depth: usize) -> Self {
        assert!((1..=MAX_DEPTH).contains(&depth), "a runner has 1 or {MAX_DEPTH} steps in flight");
        Self { depth, flights: VecDeque::new(), last_collected: None, spare: Vec::new(), rows: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Nobody will collect what is in flight.
    pub(super) fn abandon(&mut self) {
        self.flights.clear();
    }
}

impl Engine {
    /// Launches the next step, and collects the oldest as soon as the pipeline is full, or nothing more can be launched.
    pub(super) fn compute(&mut self) -> Result<(), Failure> {
        let begin = self.board.now();
        let reuse = self.pipeline.spare.pop().unwrap_or_default();
        let plan = self.scheduler.schedule(reuse, !self.pipeline.is_empty());
        add(&self.board.counters.preemptions, plan.num_preempted);
        self.announce(&plan);
        // Before a step that may take long: an engine that computes must not look idle.
        self.publish_status();
        let stays_filled = !plan.entries.is_empty() && !plan.is_starved;
        if !plan.entries.is_empty() {
            let attended = plan.entries.iter().map(|entry| entry.len * (2 * entry.start + entry.len + 1) / 2).sum();
            self.board.pace_meter.lock().launch(plan.num_tokens, attended);
        }
        match self.timed(|engine| engine.launch(&plan)) {
            Ok(()) => self.take_off(Flight { plan, begin }),
            Err(RunnerError::OutOfMemory { tokens }) => return self.shrink(plan, tokens),
            Err(error @ RunnerError::Device(_)) => return Err(engine_failed().with_source(error)),
        }
        self.collect_down_to(if stays_filled { self.pipeline.depth - 1 } else { 0 })
    }

    /// Counts the time as the runner's.
    fn timed<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let begin = self.board.now();
        let result = work(self);
        add_time(&self.board.counters.forward_nanoseconds, self.board.now().saturating_duration_since(begin));
        result
    }

    fn launch(&mut self, plan: &Plan) -> Result<(), RunnerError> {
        for &(from, to) in &plan.copies {
            self.runner.copy_block(from, to);
        }
        if plan.entries.is_empty() {
            return Ok(());
        }
        let (scheduler, choices, requests) = (&self.scheduler, &self.choices, &self.requests);
        let entry = |scheduled: &Scheduled| {
            let sequence = scheduler.sequence(scheduled.id);
            let choice = choices[scheduled.id.index()].as_ref().expect("a sequence has a choice");
            let generation = choice.generation.as_ref().expect("made when the sequence started");
            let end = scheduled.start + scheduled.len;
            BatchEntry {
                tokens: &sequence.tokens()[scheduled.start..end],
                start: scheduled.start,
                block_table: sequence.block_table(),
                pending_row: (sequence.num_pending() > 0).then_some(choice.row),
                scoring: (scheduled.num_scored > 0).then(|| {
                    let request = &requests[&choice.serial].request;
                    let num_logprobs =
                        request.envelope.extensions.prompt_logprobs.expect("a prompt is scored when it is asked for");
                    // Each row tells of the token after it.
                    ScoreSpec { tokens: &request.envelope.prompt[end + 1 - scheduled.num_scored..=end], num_logprobs }
                }),
                sampling: scheduled.wants_logits.then(|| SampleSpec {
                    state: generation.sampler(),
                    position: generation.generated() + sequence.num_pending(),
                }),
            }
        };
        let batch: Vec<BatchEntry<'_>> = plan.entries.iter().map(entry).collect();
        let board = &self.board;
        self.runner.launch(&batch, &|| board.advance())
    }

    /// The launch has succeeded: everything planned from now on comes after it.
    fn take_off(&mut self, flight: Flight) {
        let mut rows = 0;
        for &entry in &flight.plan.entries {
            let choice = self.choices[entry.id.index()].as_mut().expect("a sequence has a choice");
            let generation = choice.generation.as_ref().expect("made when the sequence started");
            choice.row = rows;
            rows += entry.num_rows();
            let is_last = generation.ends_after(self.scheduler.sequence(entry.id).num_pending());
            self.scheduler.launched(entry, is_last);
        }
        match flight.plan.entries.is_empty() {
            true => self.pipeline.spare.push(flight.plan),
            false => {
                self.board.advance();
                self.pipeline.flights.push_back(flight);
            }
        }
    }

    fn collect_down_to(&mut self, most: usize) -> Result<(), Failure> {
        while self.pipeline.flights.len() > most {
            let mut rows = std::mem::take(&mut self.pipeline.rows);
            self.timed(|engine| engine.runner.collect(&mut rows, &|| engine.board.advance()))
                .map_err(|error| engine_failed().with_source(error))?;
            let flight = self.pipeline.flights.pop_front().expect("a step is in flight");
            self.board.advance();
            self.publish_rows(&flight.plan.entries, &mut rows);
            self.pipeline.rows = rows;
            self.account(&flight);
            self.pipeline.spare.push(flight.plan);
        }
        Ok(())
    }

    /// Publishes the tokens, in the order of the batch.
    fn publish_rows(&mut self, entries: &[Scheduled], rows: &mut Vec<RowResult>) {
        let asked: usize = entries.iter().map(Scheduled::num_rows).sum();
        assert_eq!(asked, rows.len(), "a row for every token that asks");
        let mut rows = rows.drain(..);
        for &entry in entries {
            let of_entry: SmallVec<[RowResult; 1]> = rows.by_ref().take(entry.num_rows()).collect();
            // Gone when it ended after the launch, or when another choice of its request failed in this very step.
            if self.scheduler.get(entry.id).is_none() {
                continue;
            }
            match of_entry.into_iter().collect::<Result<SmallVec<[Sampled; 1]>, _>>() {
                Ok(sampled) if entry.num_scored > 0 => self.publish_scores(entry, sampled),
                Ok(sampled) => sampled.into_iter().for_each(|sampled| self.publish_token(entry, sampled)),
                Err(invalid) => self.fail_numerics(entry, invalid),
            }
        }
    }

    /// Publishes what a stretch of a prompt was worth; the request may have asked for nothing else.
    fn publish_scores(&mut self, entry: Scheduled, scored: SmallVec<[Sampled; 1]>) {
        let serial = self.choices[entry.id.index()].as_ref().expect("a sequence has a choice").serial;
        let end = entry.start + entry.len;
        let logprobs = scored.into_iter().filter_map(|scored| scored.logprobs).collect();
        self.send(serial, GenerationEvent::PromptLogprobs { start: (end - entry.num_scored) as u32, logprobs });
        let request = &self.requests[&serial].request;
        if request.envelope.sampling.max_tokens == 0 && end + 1 == request.envelope.prompt.len() {
            self.finish_all_choices(serial, &FinishReason::Length);
        }
    }

    fn publish_token(&mut self, entry: Scheduled, sampled: Sampled) {
        let choice = self.choices[entry.id.index()].as_mut().expect("a sequence has a choice");
        let (serial, index) = (choice.serial, choice.index);
        let reason = choice.generation.as_mut().expect("made when the sequence started").accept(sampled.token);
        self.scheduler.sampled(entry, sampled.token);
        add(&self.board.counters.generation_tokens, 1);
        let logprobs = sampled.logprobs.map(Box::new);
        self.send(serial, GenerationEvent::Token { choice: index, token: sampled.token, logprobs });
        if let Some(reason) = reason {
            self.finish(entry.id, reason);
        }
    }

    fn fail_numerics(&mut self, entry: Scheduled, invalid: NumericsInvalid) {
        let serial = self.choices[entry.id.index()].as_ref().expect("a sequence has a choice").serial;
        add(&self.board.counters.numerics_invalid, 1);
        let envelope = &self.requests[&serial].request.envelope;
        let trace_id = envelope.trace_id().map(display);
        error!(request = %envelope.id, trace_id, %invalid, "the model computed NaN or infinity");
        let failure = Failure::new(FailureKind::NumericsInvalid, "The model computed NaN or infinity.");
        self.fail(serial, failure.with_source(invalid));
    }

    /// Steps overlap in the pipeline; each is counted from the end of the one before, so that times add up.
    fn account(&mut self, flight: &Flight) {
        let now = self.board.now();
        let begin = self.pipeline.last_collected.replace(now).map_or(flight.begin, |last| last.max(flight.begin));
        let took = now.saturating_duration_since(begin);
        self.count_step(&flight.plan, took);
        self.steps_since_shrink += 1;
        if self.steps_since_shrink.is_multiple_of(STEPS_BEFORE_GROWTH) {
            self.scheduler.set_token_budget(self.scheduler.token_budget().saturating_mul(2));
        }
    }

    fn count_step(&mut self, plan: &Plan, took: Duration) {
        let counters = &self.board.counters;
        add(&counters.steps, 1);
        add_time(&counters.step_nanoseconds, took);
        add(&counters.batch_sequences, plan.entries.len());
        add(&counters.batch_tokens, plan.num_tokens);
        self.drain_meter.record(plan.num_tokens, took);
        self.board.pace_meter.lock().step(self.board.now());
        if let Some(on_step) = &mut self.on_step {
            on_step(took, plan.num_tokens);
        }
    }

    /// The batch did not fit into memory, and was not started: halves the next ones, and gives up on a request that does
    /// not fit alone. What is in flight comes down first, because fewer slots may mean preemption.
    fn shrink(&mut self, plan: Plan, tokens: usize) -> Result<(), Failure> {
        add(&self.board.counters.out_of_memory, 1);
        self.board.pace_meter.lock().cancel();
        self.steps_since_shrink = 0;
        let budget = (plan.num_tokens / 2).max(1);
        warn!(tokens, budget, "out of memory; continuing with smaller batches");
        self.scheduler.set_token_budget(budget);
        if plan.num_tokens == 1 && self.pipeline.is_empty() {
            let choice = self.choices[plan.entries[0].id.index()].as_ref().expect("a sequence has a choice");
            let failure =
                Failure::new(FailureKind::OutOfMemory, "The device ran out of memory while computing this request.");
            self.fail(choice.serial, failure);
        }
        self.pipeline.spare.push(plan);
        self.collect_down_to(0)
    }
}
