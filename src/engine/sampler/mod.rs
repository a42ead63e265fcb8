//! Chooses the next token of a sequence from one row of logits.
//!
//! The arithmetic is the kernels' (`outrigger_kernels::sample`); here stands what a sequence brings to it. A token and its
//! log-probabilities are a function of (logits, parameters, seed, emitted tokens) alone, bit for bit. The sampler knows no
//! batch, no scheduler and no text.

mod sequence;

use outrigger_kernels::sample::{Changes, InvalidRow, RowParams, RowSampler, SampledRow};
use thiserror::Error;

use crate::types::{TokenId, TokenLogprobs};

pub use outrigger_kernels::sample::MAX_VOCAB_SIZE;
pub use sequence::SequenceSampler;

/// The logits hold NaN or infinity, or exclude every token: the weights or the device cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the logits at position {position} hold NaN or +inf, or no finite value at all")]
pub struct NumericsInvalid {
    /// Generated tokens before this one; 0 for a token of the prompt.
    pub position: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

impl From<SampledRow> for Sampled {
    fn from(row: SampledRow) -> Self {
        let logprobs = row.logprobs.map(|row| TokenLogprobs { logprob: row.logprob, rank: row.rank, top: row.top });
        Self { token: row.token, logprobs }
    }
}

/// Asks for the log-probability of a token that is known already: no other is allowed, so the row "samples" this one, and
/// its log-probabilities are those of the row as the model gave it.
#[derive(Clone, Debug)]
pub struct ScoredToken {
    /// One bit a token.
    only: Vec<u32>,
    num_logprobs: u32,
}

impl ScoredToken {
    /// `token` is one of the vocabulary.
    pub fn new(token: TokenId, num_logprobs: u32, vocab_size: usize) -> Self {
        let mut only = vec![0; vocab_size.div_ceil(u32::BITS as usize)];
        only[token as usize / u32::BITS as usize] = 1 << (token % u32::BITS);
        Self { only, num_logprobs }
    }

    pub fn row_params(&self) -> RowParams<'_> {
        let changes = Changes { allowed: Some(&self.only), ..Changes::NONE };
        RowParams { logprobs: Some(self.num_logprobs), changes, ..RowParams::GREEDY }
    }
}

/// Scratch memory for sampling from rows of one vocabulary. One per engine; what belongs to a sequence is in
/// [`SequenceSampler`].
pub struct Sampler {
    rows: RowSampler,
}

impl Sampler {
    /// `vocab_size` is at most [`MAX_VOCAB_SIZE`].
    pub fn new(vocab_size: usize) -> Self {
        Self { rows: RowSampler::new(vocab_size) }
    }

    /// Samples the token after `position` generated ones. `logits` are the model's, `vocab_size` of them, and are changed.
    /// `state` is as after pushing exactly those generated tokens.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        state: &SequenceSampler,
        position: usize,
    ) -> Result<Sampled, NumericsInvalid> {
        let row = self.rows.sample(logits, &state.row_params(position));
        row.map(Sampled::from).map_err(|InvalidRow| NumericsInvalid { position })
    }

    /// Scores a token of the prompt. `logits` are the model's after the tokens before it, and are changed.
    pub fn score(&mut self, logits: &mut [f32], token: &ScoredToken) -> Result<Sampled, NumericsInvalid> {
        let row = self.rows.sample(logits, &token.row_params());
        row.map(Sampled::from).map_err(|InvalidRow| NumericsInvalid { position: 0 })
    }
}

#[cfg(test)]
mod tests;
