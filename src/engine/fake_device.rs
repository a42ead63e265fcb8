//! A fake device for tests: a [`ModelRunner`] of depth 2 over any runner that returns logits. A step is computed as late as
//! possible, when it is collected, so that code which frees, overwrites or reads a block too early gets wrong tokens. It also
//! checks the use of pending tokens strictly.

use std::collections::VecDeque;

use super::batch::{BatchEntry, LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RowResult, RunnerError};
use super::sampler::{Sampler, ScoredToken, SequenceSampler};
use crate::types::TokenId;

const DEPTH: usize = 2;

/// Whether a batch of so many tokens finds memory when it is launched.
pub type HasMemory = Box<dyn Fn(usize) -> bool + Send>;

pub struct FakeDevice<R> {
    runner: R,
    has_memory: HasMemory,
    sampler: Sampler,
    /// Not run yet, in their order.
    queue: VecDeque<Command>,
    steps_in_flight: usize,
    /// Rows of the step that was launched last.
    rows_launched: usize,
    /// What the step that ran last has sampled; later steps find pending tokens here.
    sampled: Vec<TokenId>,
}

enum Command {
    Copy { from: u32, to: u32 },
    Step(Vec<OwnedEntry>),
}

struct OwnedEntry {
    tokens: Vec<TokenId>,
    start: usize,
    block_table: Vec<u32>,
    pending_row: Option<usize>,
    num_logits: usize,
    scored: Vec<ScoredToken>,
    sampling: Option<(SequenceSampler, usize)>,
}

impl<R: LogitsRunner> FakeDevice<R> {
    pub fn new(runner: R, has_memory: HasMemory) -> Self {
        let sampler = Sampler::new(runner.vocab_size());
        Self {
            runner,
            has_memory,
            sampler,
            queue: VecDeque::new(),
            steps_in_flight: 0,
            rows_launched: 0,
            sampled: Vec::new(),
        }
    }

    /// What the contract promises of an entry at its launch.
    fn check(&self, entry: &BatchEntry<'_>) {
        let is_known = |token: &TokenId| (*token as usize) < self.runner.vocab_size();
        match entry.pending_row {
            None => assert!(entry.tokens.iter().all(is_known), "a token that is not pending is known"),
            Some(row) => {
                assert!(self.steps_in_flight > 0, "a pending token comes from a step in flight");
                assert!(row < self.rows_launched, "a pending token comes from the step before");
                assert_eq!(entry.tokens.len(), 1, "the pending token is the entry's only one");
                assert!(!is_known(&entry.tokens[0]), "a pending token is not known");
            }
        }
    }

    fn own(&self, entry: &BatchEntry<'_>) -> OwnedEntry {
        OwnedEntry {
            num_logits: entry.num_logits(),
            scored: entry.scored_tokens(self.runner.vocab_size()).collect(),
            tokens: entry.tokens.to_vec(),
            start: entry.start,
            block_table: entry.block_table.to_vec(),
            pending_row: entry.pending_row,
            sampling: entry.sampling.map(|spec| (spec.state.clone(), spec.position)),
        }
    }

    fn run(
        &mut self,
        mut step: Vec<OwnedEntry>,
        rows: &mut Vec<RowResult>,
        progress: &dyn Fn(),
    ) -> Result<(), RunnerError> {
        for entry in &mut step {
            let Some(row) = entry.pending_row else { continue };
            entry.tokens[0] = self.sampled[row];
            if let Some((state, _)) = &mut entry.sampling {
                state.push(self.sampled[row]);
            }
        }
        let batch: Vec<LogitsEntry<'_>> = step
            .iter()
            .map(|entry| LogitsEntry {
                tokens: &entry.tokens,
                start: entry.start,
                block_table: &entry.block_table,
                num_logits: entry.num_logits,
            })
            .collect();
        self.runner.forward(&batch, progress)?;
        self.sampled.clear();
        for entry in &step {
            for token in &entry.scored {
                rows.push(self.sampler.score(self.runner.logits_mut(rows.len()), token));
            }
            if let Some((state, position)) = &entry.sampling {
                rows.push(self.sampler.sample(self.runner.logits_mut(rows.len()), state, *position));
            }
        }
        self.sampled.extend(rows.iter().map(|row| row.as_ref().map_or(0, |sampled| sampled.token)));
        Ok(())
    }
}

impl<R: LogitsRunner> ModelRunner for FakeDevice<R> {
    fn launch(&mut self, batch: &[BatchEntry<'_>], _progress: &dyn Fn()) -> Result<(), RunnerError> {
        assert!(self.steps_in_flight < DEPTH, "more steps in flight than there may be");
        let tokens = batch.iter().map(|entry| entry.tokens.len()).sum();
        if !(self.has_memory)(tokens) {
            return Err(RunnerError::OutOfMemory { tokens });
        }
        batch.iter().for_each(|entry| self.check(entry));
        self.rows_launched = batch.iter().map(BatchEntry::num_logits).sum();
        self.steps_in_flight += 1;
        let step = batch.iter().map(|entry| self.own(entry)).collect();
        self.queue.push_back(Command::Step(step));
        Ok(())
    }

    fn collect(&mut self, rows: &mut Vec<RowResult>, progress: &dyn Fn()) -> Result<(), RunnerError> {
        rows.clear();
        loop {
            match self.queue.pop_front().expect("a step was launched") {
                Command::Copy { from, to } => self.runner.copy_block(from, to),
                Command::Step(step) => {
                    self.steps_in_flight -= 1;
                    return self.run(step, rows, progress);
                }
            }
        }
    }

    fn depth(&self) -> usize {
        DEPTH
    }
}

impl<R: PagedModel> PagedModel for FakeDevice<R> {
    fn copy_block(&mut self, from: u32, to: u32) {
        self.queue.push_back(Command::Copy { from, to });
    }

    fn block_size(&self) -> usize {
        self.runner.block_size()
    }

    fn num_blocks(&self) -> u32 {
        self.runner.num_blocks()
    }

    fn block_bytes(&self) -> usize {
        self.runner.block_bytes()
    }

    fn vocab_size(&self) -> usize {
        self.runner.vocab_size()
    }

    fn max_model_len(&self) -> usize {
        self.runner.max_model_len()
    }

    fn max_scored_tokens(&self) -> usize {
        self.runner.max_scored_tokens()
    }

    fn corrupt(&mut self) {
        self.runner.corrupt();
    }

    fn spoil(&mut self) {
        self.runner.spoil();
    }
}
