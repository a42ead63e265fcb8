//! Chooses the next token from one row of logits.
//!
//! A token and its log-probabilities are a function of (logits, parameters, random bits) alone, bit for bit: sums are
//! integers or in a fixed order, exp and ln are our own, and randomness comes from a counter ([`philox`]). The device
//! sampler (`gpu::sample`) computes the same function. Nothing here knows sequences or requests; who remembers what a
//! sequence has emitted passes it in [`RowParams`].

mod change;
mod mass;
pub mod philox;

use crate::vocab;

pub use change::{Changes, Occurrence, Penalties};
pub use mass::{MAX_VOCAB_SIZE, Truncation};
use mass::{Masses, ln_sum_exp};

pub type TokenId = u32;

/// Below this temperature the most likely token is taken, as vLLM does.
const GREEDY_BELOW: f32 = 1e-5;

/// The logits are NaN or +inf, or every token is ruled out: the weights or the device cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits hold NaN or +inf, or no finite value at all")]
pub struct InvalidRow;

/// The parameters of one row.
#[derive(Clone, Copy, Debug)]
pub struct RowParams<'a> {
    /// Not NaN, not negative; 0 is greedy.
    pub temperature: f32,
    pub truncation: Truncation,
    /// Uniform bits that decide the draw.
    pub bits: u64,
    /// `Some(k)`: the token's log-probability and the `k` most likely ones, of the row as the model gave it.
    pub logprobs: Option<u32>,
    pub changes: Changes<'a>,
}

impl RowParams<'_> {
    /// Takes the most likely token of the unchanged row.
    pub const GREEDY: Self =
        Self { temperature: 0.0, truncation: Truncation::OFF, bits: 0, logprobs: None, changes: Changes::NONE };

    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// What logits are multiplied with; finite unless greedy.
    pub fn scale(&self) -> f32 {
        1.0 / self.temperature
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct SampledRow {
    pub token: TokenId,
    pub logprobs: Option<RowLogprobs>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RowLogprobs {
    pub logprob: f32,
    /// The token's place when the row is sorted by descending logit, ties by lower id, from 1.
    pub rank: u32,
    /// The most likely tokens, best first, ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// The sums over an unchanged row from which log-probabilities are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRow {
    max: f64,
    ln_sum_exp: f64,
}

impl RawRow {
    /// `total` is the row's mass at temperature 1.
    pub(crate) fn new(max: f32, total: u64) -> Self {
        Self { max: f64::from(positive_zero(max)), ln_sum_exp: ln_sum_exp(total) }
    }

    pub(crate) fn logprob(&self, logit: f32) -> f32 {
        (f64::from(positive_zero(logit)) - self.max - self.ln_sum_exp) as f32
    }
}

/// Which of two equal zeros is found as a row's maximum depends on how the row was searched, so their sign must not show.
fn positive_zero(logit: f32) -> f32 {
    logit + 0.0
}

/// Scratch memory for sampling from rows of one vocabulary.
pub struct RowSampler {
    vocab_size: usize,
    masses: Masses,
    /// The unchanged row, if log-probabilities of a changed row are requested.
    raw: Vec<f32>,
    top: Vec<TokenId>,
}

impl RowSampler {
    /// # Panics
    /// When the vocabulary is empty or larger than [`MAX_VOCAB_SIZE`].
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, masses: Masses::new(vocab_size), raw: Vec::new(), top: Vec::new() }
    }

    /// Samples from `logits`, `vocab_size` of them, and changes them as `params` say.
    pub fn sample(&mut self, logits: &mut [f32], params: &RowParams<'_>) -> Result<SampledRow, InvalidRow> {
        assert_eq!(logits.len(), self.vocab_size, "one logit per token of the vocabulary");
        let finite_max = |logits: &[f32]| vocab::max(logits).filter(|max| max.is_finite()).ok_or(InvalidRow);
        let raw_max = finite_max(logits)?;
        let is_changed = !params.changes.is_empty();
        if is_changed {
            if params.logprobs.is_some() {
                self.raw.clear();
                self.raw.extend_from_slice(logits);
            }
            params.changes.apply(logits);
        }
        let max = if is_changed { finite_max(logits)? } else { raw_max };
        let token = if params.is_greedy() {
            first_equal(logits, max)
        } else {
            self.masses.draw(logits, max, params.scale(), params.truncation, params.bits)
        };
        let logprobs = params.logprobs.map(|count| {
            let raw = if is_changed { &self.raw } else { &*logits };
            logprobs(&mut self.masses, &mut self.top, raw, raw_max, token, count)
        });
        Ok(SampledRow { token, logprobs })
    }
}

/// The index of the first logit equal to `max`, which must be in the row. Searches group by group, because a comparison of a
/// whole group is vector code and a loop with an early exit is not.
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
) -> RowLogprobs {
    let row = RawRow::new(max, masses.total(raw, max));
    let logprob = |id: TokenId| row.logprob(raw[id as usize]);
    masses.top(raw, count as usize, top);
    RowLogprobs {
        logprob: logprob(token),
        rank: rank(raw, token),
        top: top.iter().map(|&id| (id, logprob(id))).collect(),
    }
}

fn rank(raw: &[f32], token: TokenId) -> u32 {
    let (before, rest) = raw.split_at(token as usize);
    let own = rest[0];
    let ahead =
        before.iter().filter(|logit| **logit >= own).count() + rest.iter().filter(|logit| **logit > own).count();
    ahead as u32 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_rank_by_id() {
        assert_eq!(rank(&[0.0, 1.0, 0.0, -1.0, 0.0], 4), 4);
        assert_eq!(rank(&[0.0, 1.0, 0.0, -1.0, 0.0], 3), 5);
        assert_eq!(rank(&[0.0, 1.0, 0.0, -1.0, 0.0], 1), 1);
    }

    #[test]
    fn the_sign_of_a_zero_maximum_does_not_show() {
        let bits = |max: f32, logit: f32| RawRow::new(max, mass::UNIT).logprob(logit).to_bits();
        for logit in [0.0, -0.0, -1.0] {
            assert_eq!(bits(0.0, logit), bits(-0.0, logit));
        }
    }

    #[test]
    fn a_mask_without_any_token_is_an_invalid_row() {
        let allowed = [0];
        let changes = Changes { allowed: Some(&allowed), ..Changes::NONE };
        let params = RowParams { temperature: 1.0, bits: 7, changes, ..RowParams::GREEDY };
        assert_eq!(RowSampler::new(5).sample(&mut [1.0; 5], &params), Err(InvalidRow));
    }
}
