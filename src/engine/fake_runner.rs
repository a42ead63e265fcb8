//! A fake model runner for tests. Deterministic, and strict about blocks.
//!
//! Its "keys and values" are a hash of the token and of everything before it, read back through the block table; its logits
//! are derived from all entries of the sequence up to the position. So a wrong table, a missed copy-on-write, a stale
//! cache hit or a reused block shows as different tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::batch::{LogitsEntry, LogitsRunner, ModelRunner, PagedModel, RunnerError};
use super::fake_device::FakeDevice;
use super::host_sampling::HostSampling;
use super::sequence::PLACEHOLDER;

/// Content of a position that was never written.
const UNWRITTEN: u64 = 0xdead_dead_dead_dead;

#[derive(Clone, Debug)]
pub struct FakeModel {
    pub block_size: usize,
    pub num_blocks: u32,
    pub vocab_size: usize,
    pub max_model_len: usize,
    /// Time that a forward takes, whatever the batch.
    pub forward_time: Duration,
    /// Batches of more tokens than this run out of memory.
    pub memory_tokens: usize,
    /// The forward that fails like a broken device, counted from 0.
    pub breaks_at: Option<u64>,
    /// Rows of a sequence that contains this token are not numbers.
    pub poison_token: Option<u32>,
    /// Steps that may be in flight: 1, or 2 as on a device.
    pub depth: usize,
    /// Rows of a step that may be scored.
    pub max_scored_tokens: usize,
}

impl Default for FakeModel {
    fn default() -> Self {
        Self {
            block_size: 4,
            num_blocks: 64,
            vocab_size: 32,
            max_model_len: 256,
            forward_time: Duration::ZERO,
            memory_tokens: usize::MAX,
            breaks_at: None,
            poison_token: None,
            depth: 1,
            max_scored_tokens: 5,
        }
    }
}

impl FakeModel {
    /// A runner of this depth, and its log.
    pub fn runner(self) -> (Box<dyn ModelRunner>, Arc<FakeRunnerLog>) {
        let (depth, memory_tokens) = (self.depth, self.memory_tokens);
        let runner = FakeRunner::new(self);
        let log = runner.log();
        let runner: Box<dyn ModelRunner> = match depth {
            1 => Box::new(HostSampling::new(runner)),
            _ => Box::new(FakeDevice::new(runner, Box::new(move |tokens| tokens <= memory_tokens))),
        };
        (runner, log)
    }
}

/// What the runner was asked to do, readable while the engine owns it.
#[derive(Debug, Default)]
pub struct FakeRunnerLog {
    forwards: AtomicU64,
    tokens: AtomicU64,
    copies: AtomicU64,
    largest_batch: AtomicUsize,
    most_rows: AtomicUsize,
}

impl FakeRunnerLog {
    pub fn forwards(&self) -> u64 {
        self.forwards.load(Ordering::Relaxed)
    }

    /// Tokens computed in all batches.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    pub fn copies(&self) -> u64 {
        self.copies.load(Ordering::Relaxed)
    }

    /// Most rows of logits of one batch.
    pub fn most_rows(&self) -> usize {
        self.most_rows.load(Ordering::Relaxed)
    }

    /// Most entries in one batch.
    pub fn largest_batch(&self) -> usize {
        self.largest_batch.load(Ordering::Relaxed)
    }
}

pub struct FakeRunner {
    model: FakeModel,
    /// `[num_blocks * block_size]`
    pool: Vec<u64>,
    /// `[rows, vocab_size]`
    logits: Vec<f32>,
    weights: u64,
    is_spoiled: bool,
    log: Arc<FakeRunnerLog>,
}

impl FakeRunner {
    pub fn new(model: FakeModel) -> Self {
        let pool = vec![UNWRITTEN; model.num_blocks as usize * model.block_size];
        Self { pool, logits: Vec::new(), weights: 1, is_spoiled: false, log: Arc::default(), model }
    }

    pub fn log(&self) -> Arc<FakeRunnerLog> {
        Arc::clone(&self.log)
    }

    fn index(&self, block_table: &[u32], position: usize) -> usize {
        block_table[position / self.model.block_size] as usize * self.model.block_size
            + position % self.model.block_size
    }

    fn write(&mut self, entry: &LogitsEntry<'_>) {
        for (offset, &token) in entry.tokens.iter().enumerate() {
            let position = entry.start + offset;
            let before = match position {
                0 => 0,
                _ => self.pool[self.index(entry.block_table, position - 1)],
            };
            let index = self.index(entry.block_table, position);
            self.pool[index] = mix(before ^ mix(u64::from(token) + 1).wrapping_add(position as u64));
        }
    }

    /// Reads the sequence back up to `end` and turns it into a row of logits.
    fn push_logits(&mut self, entry: &LogitsEntry<'_>, end: usize) {
        let state = (0..end)
            .fold(self.weights, |state, position| mix(state ^ self.pool[self.index(entry.block_table, position)]));
        let poisoned = self.is_spoiled || self.model.poison_token.is_some_and(|poison| entry.tokens.contains(&poison));
        for id in 0..self.model.vocab_size {
            let unit = (mix(state.wrapping_add(id as u64)) >> 40) as f32 / (1u64 << 24) as f32;
            self.logits.push(if poisoned { f32::NAN } else { unit * 8.0 - 4.0 });
        }
    }
}

impl LogitsRunner for FakeRunner {
    #[expect(clippy::disallowed_methods, reason = "it computes on the engine's thread")]
    fn forward(&mut self, batch: &[LogitsEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError> {
        let tokens: usize = batch.iter().map(|entry| entry.tokens.len()).sum();
        let index = self.log.forwards.fetch_add(1, Ordering::Relaxed);
        if tokens > self.model.memory_tokens {
            return Err(RunnerError::OutOfMemory { tokens });
        }
        if self.model.breaks_at == Some(index) {
            return Err(RunnerError::Device("the fake device broke as it was told to".to_owned()));
        }
        self.log.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        self.log.largest_batch.fetch_max(batch.len(), Ordering::Relaxed);
        if !self.model.forward_time.is_zero() {
            std::thread::sleep(self.model.forward_time);
        }
        self.logits.clear();
        for entry in batch {
            assert!(!entry.tokens.is_empty(), "an entry has tokens");
            assert!(!entry.tokens.contains(&PLACEHOLDER), "every token is known");
            assert!(entry.start + entry.tokens.len() <= self.model.max_model_len, "an entry fits into the model");
            self.write(entry);
        }
        for entry in batch {
            assert!(entry.num_logits <= entry.tokens.len(), "logits come after the entry's own tokens");
            let end = entry.start + entry.tokens.len();
            (end - entry.num_logits..end).for_each(|position| self.push_logits(entry, position + 1));
            progress();
        }
        let rows = self.logits.len() / self.model.vocab_size;
        self.log.most_rows.fetch_max(rows, Ordering::Relaxed);
        Ok(())
    }

    fn logits_mut(&mut self, row: usize) -> &mut [f32] {
        let start = row * self.model.vocab_size;
        &mut self.logits[start..start + self.model.vocab_size]
    }
}

impl PagedModel for FakeRunner {
    fn copy_block(&mut self, from: u32, to: u32) {
        self.log.copies.fetch_add(1, Ordering::Relaxed);
        let size = self.model.block_size;
        let from = from as usize * size;
        self.pool.copy_within(from..from + size, to as usize * size);
    }

    fn block_size(&self) -> usize {
        self.model.block_size
    }

    fn num_blocks(&self) -> u32 {
        self.model.num_blocks
    }

    fn block_bytes(&self) -> usize {
        self.model.block_size * size_of::<u64>()
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size
    }

    fn max_model_len(&self) -> usize {
        self.model.max_model_len
    }

    fn max_scored_tokens(&self) -> usize {
        self.model.max_scored_tokens
    }

    fn corrupt(&mut self) {
        self.weights = mix(self.weights);
    }

    fn spoil(&mut self) {
        self.is_spoiled = true;
    }
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(runner: &mut FakeRunner, tokens: &[u32], start: usize, block_table: &[u32]) -> Vec<f32> {
        let entry = LogitsEntry { tokens, start, block_table, num_logits: 1 };
        runner.forward(&[entry], &|| {}).expect("computes");
        runner.logits_mut(0).to_vec()
    }

    #[test]
    fn chunks_and_blocks_do_not_matter_but_every_token_does() {
        let mut runner = FakeRunner::new(FakeModel::default());
        let whole = logits(&mut runner, &[1, 2, 3, 4, 5, 6], 0, &[0, 1]);
        logits(&mut runner, &[1, 2, 3, 4, 5], 0, &[9, 4]);
        assert_eq!(logits(&mut runner, &[6], 5, &[9, 4]), whole);
        assert_ne!(logits(&mut runner, &[1, 7, 3, 4, 5, 6], 0, &[2, 3]), whole);
        assert_ne!(logits(&mut runner, &[6], 5, &[2, 4]), whole, "a block of another sequence");
        runner.corrupt();
        assert_ne!(logits(&mut runner, &[1, 2, 3, 4, 5, 6], 0, &[0, 1]), whole);
    }
}
