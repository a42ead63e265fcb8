//! The interface between the engine's bookkeeping and the computation: batches are launched, and the sampled tokens are
//! collected. Knows no scheduler and no text.
//!
//! A runner on a device samples there, and computes one step while the engine plans the next; a runner on the host gives
//! rows of logits ([`LogitsRunner`]), from which `host_sampling` samples.

use std::time::Duration;

use super::sampler::{NumericsInvalid, Sampled, ScoredToken, SequenceSampler};
use crate::types::TokenId;

/// A stretch of one sequence's tokens, to be computed into that sequence's blocks.
#[derive(Clone, Copy, Debug)]
pub struct BatchEntry<'a> {
    /// Never empty. One token in decode, a chunk in prefill; the numbers do not depend on which.
    pub tokens: &'a [TokenId],
    /// Absolute position of `tokens[0]`; everything before it is in the blocks already, or will be when the steps that
    /// were launched before have run.
    pub start: usize,
    /// Physical block of each stretch of `block_size` positions; covers at least `start + tokens.len()` positions.
    pub block_table: &'a [u32],
    /// The entry's only token is not known on the host yet: the step launched just before, which was not collected, samples
    /// it as its row of this index. `tokens[0]` is a placeholder, which is no token of the vocabulary.
    pub pending_row: Option<usize>,
    /// Asks for the log-probabilities of the tokens that follow the last `scoring.tokens.len()` tokens of this entry.
    /// An entry that is scored samples nothing.
    pub scoring: Option<ScoreSpec<'a>>,
    /// Asks for a token sampled from the logits after the last token.
    pub sampling: Option<SampleSpec<'a>>,
}

impl<'a> BatchEntry<'a> {
    /// Rows of logits that it needs, after so many of its last tokens.
    pub fn num_logits(&self) -> usize {
        self.scoring.map_or(usize::from(self.sampling.is_some()), |scoring| scoring.tokens.len())
    }

    /// What is asked of its rows that are scored, in their order.
    pub fn scored_tokens(&self, vocab_size: usize) -> impl Iterator<Item = ScoredToken> + use<'a> {
        let scored = self.scoring.into_iter();
        scored.flat_map(move |spec| {
            spec.tokens.iter().map(move |&token| ScoredToken::new(token, spec.num_logprobs, vocab_size))
        })
    }
}

/// Which tokens of a prompt are scored.
#[derive(Clone, Copy, Debug)]
pub struct ScoreSpec<'a> {
    /// What follows each of the entry's last tokens. Never empty.
    pub tokens: &'a [TokenId],
    /// The most likely tokens to report at each place.
    pub num_logprobs: u32,
}

/// How the next token of a sequence is sampled.
#[derive(Clone, Copy, Debug)]
pub struct SampleSpec<'a> {
    /// As after all generated tokens that the host knows: all `position` of them, or, when the entry's own token is
    /// pending, one fewer. Then the runner adds that token's occurrence to the penalties itself.
    pub state: &'a SequenceSampler,
    /// Generated tokens before the sampled one, the pending one included.
    pub position: usize,
}

/// The token of a row, sampled or the one that was to be scored, or why there is none.
pub type RowResult = Result<Sampled, NumericsInvalid>;

/// What every runner has: a model over a fixed pool of KV blocks. Used by one thread only.
pub trait PagedModel: Send {
    /// Copies the whole content of a block (copy-on-write): after the steps launched before, and before those launched
    /// after.
    fn copy_block(&mut self, from: u32, to: u32);

    /// Positions in a block.
    fn block_size(&self) -> usize;

    /// Blocks in the pool, numbered from 0.
    fn num_blocks(&self) -> u32;

    /// Bytes of one block, over all layers.
    fn block_bytes(&self) -> usize;

    fn vocab_size(&self) -> usize;

    /// Longest sequence, prompt and output together, that the runner can compute.
    fn max_model_len(&self) -> usize;

    /// Rows of a step that may be scored, at least one, beside a row for each sequence: what there is memory for.
    fn max_scored_tokens(&self) -> usize {
        64
    }

    /// Corrupts the weights in memory. Reachable only through fault injection. A runner without weights ignores it.
    fn corrupt(&mut self) {}

    /// Makes every logit NaN from now on. Reachable only through fault injection, as `corrupt` is.
    fn spoil(&mut self) {}
}

/// Computes batches and samples from them.
///
/// Steps run in the order of their launches, and so do copies of blocks between them: a block that one step writes may be
/// read, freed, and written anew by a later one without anybody waiting.
pub trait ModelRunner: PagedModel {
    /// Starts a step, or computes it at once: writes the keys and values of every entry's tokens, and samples where that is
    /// asked. The blocks that two entries of one batch write are disjoint. At most [`Self::depth`] steps are launched and
    /// not collected. Fails with `OutOfMemory` only if nothing was started; the steps in flight go on.
    ///
    /// `progress` is called whenever the computation is seen to advance, never while it is merely waited for: so a long
    /// step is not taken for a hang, and a hang is noticed.
    fn launch(&mut self, batch: &[BatchEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError>;

    /// Waits for the oldest step in flight, and replaces `rows` by what it sampled and scored, in the order of its asking
    /// entries and of their tokens. A row without a valid token stands for an arbitrary token of the vocabulary where it is
    /// pending in a later step. Any error is final.
    fn collect(&mut self, rows: &mut Vec<RowResult>, progress: &dyn Fn()) -> Result<(), RunnerError>;

    /// Device time of the collected steps; zero for a runner that computes on the host.
    fn device_time(&self) -> Duration {
        Duration::ZERO
    }

    /// The most steps in flight: 1 if the launch computes the step, 2 if the next step can be planned meanwhile.
    fn depth(&self) -> usize;
}

/// Like [`BatchEntry`], for a runner that returns logits. All tokens are known.
#[derive(Clone, Copy, Debug)]
pub struct LogitsEntry<'a> {
    pub tokens: &'a [TokenId],
    pub start: usize,
    pub block_table: &'a [u32],
    /// Asks for the logits after so many of the last tokens.
    pub num_logits: usize,
}

/// Computes batches synchronously, one row of logits for each token that asks.
pub trait LogitsRunner: PagedModel {
    /// Computes every entry: writes the keys and values of its tokens, and its logits where they are wanted. Calls
    /// `progress` as `launch` does. The blocks that two entries of one batch write are disjoint.
    fn forward(&mut self, batch: &[LogitsEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError>;

    /// Logits `[vocab_size]` of the `row`-th token that asked for them in the last `forward`. The sampler changes them.
    fn logits_mut(&mut self, row: usize) -> &mut [f32];
}

/// Why a batch could not be computed. The content of the positions that it should have written is undefined afterwards.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The batch needs more memory than is available. A smaller one may succeed.
    #[error("out of memory while computing a batch of {tokens} tokens")]
    OutOfMemory { tokens: usize },
    /// The device or the model is broken; no later batch is expected to succeed.
    #[error("the device failed: {0}")]
    Device(String),
}
