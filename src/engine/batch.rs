//! The seam between the engine's bookkeeping and the numbers: one batch in, one row of logits per asking entry out.
//! Knows no sequence and no scheduler.

use crate::types::TokenId;

/// A stretch of one sequence's tokens, to be computed into that sequence's blocks.
#[derive(Clone, Copy, Debug)]
pub struct BatchEntry<'a> {
    /// Never empty. One token when the sequence decodes, a chunk when it prefills; the numbers do not depend on which.
    pub tokens: &'a [TokenId],
    /// Absolute position of `tokens[0]`; everything before it is in the blocks already.
    pub start: usize,
    /// Physical block of each stretch of `block_size` positions; covers at least `start + tokens.len()` positions.
    pub block_table: &'a [u32],
    /// Asks for the logits after the last token.
    pub wants_logits: bool,
}

/// Computes batches over a fixed pool of KV blocks. Used by one thread only.
pub trait ModelRunner: Send {
    /// Computes every entry: writes the keys and values of its tokens, and its logits where they are wanted. Calls
    /// `progress` from time to time, so that a long step is not taken for a hang. The blocks that two entries of one
    /// batch write are disjoint.
    fn forward(&mut self, batch: &[BatchEntry<'_>], progress: &dyn Fn()) -> Result<(), RunnerError>;

    /// Logits `[vocab_size]` of the `row`-th entry that wanted them in the last `forward`. The sampler changes them.
    fn logits_mut(&mut self, row: usize) -> &mut [f32];

    /// Copies the whole content of a block (copy-on-write).
    fn copy_block(&mut self, from: u32, to: u32);

    /// Positions in a block.
    fn block_size(&self) -> usize;

    /// Blocks in the pool, numbered from 0.
    fn num_blocks(&self) -> u32;

    fn vocab_size(&self) -> usize;

    /// Longest sequence, prompt and output together, that the runner can compute.
    fn max_model_len(&self) -> usize;

    /// Damages the weights in memory. Reachable only through fault injection; a runner without weights ignores it.
    fn corrupt(&mut self) {}

    /// Makes every logit NaN from now on. Reachable only through fault injection, as `corrupt` is.
    fn spoil(&mut self) {}
}

/// Why a batch could not be computed. The positions it was to write are undefined afterwards; those before them are not.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The batch needs more memory than there is; a smaller one may succeed.
    #[error("out of memory while computing a batch of {tokens} tokens")]
    OutOfMemory { tokens: usize },
    /// The device or the model is broken; no later batch is expected to succeed.
    #[error("the device failed: {0}")]
    Device(String),
}
