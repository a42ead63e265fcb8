//! Chooses the next token from one row of logits.
//!
//! A token and its log-probabilities are a function of (logits, parameters, seed, emitted tokens) alone, bit for bit: sums
//! are integers or in a fixed order, exp and ln are our own, and randomness comes from (seed, position). The sampler knows
//! no batch, no scheduler and no text.

mod mass;
mod philox;
mod sequence;

use outrigger_kernels::vocab;
use thiserror::Error;

use crate::types::{TokenId, TokenLogprobs};

pub use mass::MAX_VOCAB_SIZE;
use mass::{Masses, Truncation};
pub use sequence::SequenceSampler;

/// Below this temperature the most likely token is taken, as vLLM does.
const GREEDY_BELOW: f32 = 1e-5;

/// The model returned logits that are no numbers, or ruled out every token: the weights or the device cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the logits at position {position} hold NaN or +inf, or no finite value at all")]
pub struct NumericsInvalid {
    /// Generated tokens before this one.
    pub position: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// Scratch memory for sampling from rows of one vocabulary. One per engine; what belongs to a sequence is in
/// [`SequenceSampler`].
pub struct Sampler {
    vocab_size: usize,
    masses: Masses,
    /// The row as the model gave it, when log-probabilities are wanted of a row that processing changes.
    raw: Vec<f32>,
    top: Vec<TokenId>,
}

impl Sampler {
    /// `vocab_size` is at most [`MAX_VOCAB_SIZE`].
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, masses: Masses::new(vocab_size), raw: Vec::new(), top: Vec::new() }
    }

    /// Samples the token after `position` generated ones. `logits` are the model's, `vocab_size` of them, and are changed.
    /// `state` is as after pushing exactly those generated tokens.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        state: &SequenceSampler,
        position: usize,
    ) -> Result<Sampled, NumericsInvalid> {
        assert_eq!(logits.len(), self.vocab_size, "one logit per token of the vocabulary");
        let params = state.params();
        let greedy = params.temperature < GREEDY_BELOW;
        let changed = state.changes_logits(position);
        let invalid = NumericsInvalid { position };
        let raw_max = vocab::max(logits).filter(|max| max.is_finite()).ok_or(invalid)?;
        if changed {
            if params.logprobs.is_some() {
                self.raw.clear();
                self.raw.extend_from_slice(logits);
            }
            state.process(logits, position);
        }
        let max = if changed { vocab::max(logits).filter(|max| max.is_finite()).ok_or(invalid)? } else { raw_max };
        let token = if greedy {
            first_equal(logits, max)
        } else {
            let truncation = Truncation { top_k: params.top_k, min_p: params.min_p, top_p: params.top_p };
            self.masses.draw(logits, max, 1.0 / params.temperature, truncation, state.bits_at(position))
        };
        let logprobs = params.logprobs.map(|count| {
            let raw = if changed { &self.raw } else { &*logits };
            logprobs(&mut self.masses, &mut self.top, raw, raw_max, token, count)
        });
        Ok(Sampled { token, logprobs })
    }
}

/// The index of the first logit equal to `max`, which is in the row. Looks at groups first, because their comparison is
/// vector code and an early exit is not.
fn first_equal(logits: &[f32], max: f32) -> TokenId {
    const GROUP: usize = 256;
    let holds_max = |group: &[f32]| group.iter().fold(false, |any, &logit| any | (logit == max));
    let group = logits.chunks(GROUP).position(holds_max).expect("the maximum is in the row");
    let within = logits[group * GROUP..].iter().position(|&logit| logit == max).expect("the maximum is in the group");
    (group * GROUP + within) as TokenId
}

/// Log-probabilities of the unprocessed row.
fn logprobs(
    masses: &mut Masses,
    top: &mut Vec<TokenId>,
    raw: &[f32],
    max: f32,
    token: TokenId,
    count: u32,
) -> TokenLogprobs {
    let ln_sum = masses.ln_sum_exp(raw, max);
    let logprob = |id: TokenId| (f64::from(raw[id as usize]) - f64::from(max) - ln_sum) as f32;
    masses.top(raw, count as usize, top);
    TokenLogprobs {
        logprob: logprob(token),
        rank: rank(raw, token),
        top: top.iter().map(|&id| (id, logprob(id))).collect(),
    }
}

/// The token's place when the row is sorted by descending logit, ties by lower id, from 1.
fn rank(raw: &[f32], token: TokenId) -> u32 {
    let (before, rest) = raw.split_at(token as usize);
    let own = rest[0];
    let ahead =
        before.iter().filter(|logit| **logit >= own).count() + rest.iter().filter(|logit| **logit > own).count();
    ahead as u32 + 1
}

#[cfg(test)]
mod tests;
