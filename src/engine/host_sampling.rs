//! Turns a runner that returns logits into a [`ModelRunner`]: each launch computes its step and samples on the host. So at
//! most one step is in flight, and no token is ever pending.

use super::batch::{BatchEntry, LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RowResult, RunnerError};
use super::sampler::Sampler;

pub struct HostSampling<R> {
    runner: R,
    sampler: Sampler,
    /// Of the step that was launched and not collected.
    sampled: Option<Vec<RowResult>>,
    /// Memory for the rows of the next step.
    spare: Vec<RowResult>,
}

impl<R: LogitsRunner> HostSampling<R> {
    pub fn new(runner: R) -> Self {
        let sampler = Sampler::new(runner.vocab_size());
        Self { runner, sampler, sampled: None, spare: Vec::new() }
    }
}

impl<R: LogitsRunner> ModelRunner for HostSampling<R> {
    fn launch(&mut self, batch: &[BatchEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        assert!(self.sampled.is_none(), "a step is collected before the next is launched");
        let entries: Vec<LogitsEntry<'_>> = batch.iter().map(without_sampling).collect();
        self.runner.forward(&entries, progress)?;
        let mut rows = std::mem::take(&mut self.spare);
        let vocab_size = self.runner.vocab_size();
        for entry in batch {
            for token in entry.scored_tokens(vocab_size) {
                rows.push(self.sampler.score(self.runner.logits_mut(rows.len()), &token));
            }
            if let Some(spec) = entry.sampling {
                rows.push(self.sampler.sample(self.runner.logits_mut(rows.len()), spec.state, spec.position));
            }
        }
        self.sampled = Some(rows);
        Ok(())
    }

    fn collect(&mut self, rows: &mut Vec<RowResult>, _progress: &dyn Fn()) -> Result<(), RunnerError> {
        let mut sampled = self.sampled.take().expect("a step was launched");
        std::mem::swap(rows, &mut sampled);
        sampled.clear();
        self.spare = sampled;
        Ok(())
    }

    fn depth(&self) -> usize {
        1
    }
}

fn without_sampling<'a>(entry: &BatchEntry<'a>) -> LogitsEntry<'a> {
    assert!(entry.pending_row.is_none(), "every token is known on the host");
    LogitsEntry {
        tokens: entry.tokens,
        start: entry.start,
        block_table: entry.block_table,
        num_logits: entry.num_logits(),
    }
}

impl<R: PagedModel> PagedModel for HostSampling<R> {
    fn copy_block(&mut self, from: u32, to: u32) {
        self.runner.copy_block(from, to);
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
