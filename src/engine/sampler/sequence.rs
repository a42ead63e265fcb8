//! What sampling remembers of one sequence, and how it changes the sequence's logits. Rebuilt by pushing the emitted tokens
//! into fresh state, in the same order; nothing is ever rolled back.
//!
//! The order of changes is vLLM's (V1): logit bias, the ban on stop tokens before `min_tokens`, then repetition, frequency
//! and presence penalties.

use std::collections::HashMap;
use std::sync::Arc;

use crate::types::{SamplingParams, TokenId};

use super::philox;

/// Per-sequence sampling state. Sparse: it grows with the distinct tokens of the sequence, and only if a penalty needs them.
#[derive(Clone, Debug)]
pub struct SequenceSampler {
    params: Arc<SamplingParams>,
    /// The choice's own seed.
    seed: u64,
    /// Tokens that may not come before `min_tokens`; empty when there is no such bound.
    barred: Vec<TokenId>,
    /// How often each token was emitted; prompt tokens are listed with 0 when the repetition penalty needs them.
    occurrences: HashMap<TokenId, u32>,
}

impl SequenceSampler {
    /// `stop_ids` are the model's end-of-sequence ids; the request's own stop ids come from `params`. Ids outside the
    /// vocabulary have no effect.
    pub fn new(
        params: Arc<SamplingParams>,
        choice: u32,
        prompt: &[TokenId],
        stop_ids: &[TokenId],
        vocab_size: usize,
    ) -> Self {
        let mut barred = Vec::new();
        if params.min_tokens > 0 {
            barred.extend(stop_ids.iter().chain(&params.stop_token_ids).filter(|id| (**id as usize) < vocab_size));
            barred.sort_unstable();
            barred.dedup();
            // A ban on every token cannot be kept, and must not look like a row without finite logits.
            if barred.len() == vocab_size {
                barred.clear();
            }
        }
        let mut occurrences = HashMap::new();
        if params.repetition_penalty != 1.0 {
            let known = prompt.iter().filter(|id| (**id as usize) < vocab_size);
            occurrences.extend(known.map(|&id| (id, 0)));
        }
        let seed = philox::choice_seed(params.seed, choice);
        Self { params, seed, barred, occurrences }
    }

    /// Takes note of an emitted token, sampled or replayed.
    pub fn push(&mut self, token: TokenId) {
        if self.has_penalties() {
            let count = self.occurrences.entry(token).or_default();
            *count = count.saturating_add(1);
        }
    }

    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The uniform bits of the token at `position`.
    pub(super) fn bits_at(&self, position: usize) -> u64 {
        philox::bits_at(self.seed, position as u64)
    }

    /// Whether [`Self::process`] would change a row.
    pub(super) fn changes_logits(&self, position: usize) -> bool {
        !self.params.logit_bias.is_empty() || self.bars_stop_tokens(position) || self.has_penalties()
    }

    /// Applies bias, ban and penalties to a row without NaN or +inf, and leaves it so: what a request asks for can never
    /// look like broken weights.
    pub(super) fn process(&self, logits: &mut [f32], position: usize) {
        for &(token, bias) in &self.params.logit_bias {
            change(logits, token, |logit| logit + bias);
        }
        if self.bars_stop_tokens(position) {
            for &token in &self.barred {
                change(logits, token, |_| f32::NEG_INFINITY);
            }
        }
        if self.has_penalties() {
            self.penalise(logits);
        }
    }

    fn penalise(&self, logits: &mut [f32]) {
        let repetition = self.params.repetition_penalty;
        for (&token, &count) in &self.occurrences {
            change(logits, token, |logit| {
                let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
                if count == 0 {
                    return logit;
                }
                logit - self.params.frequency_penalty * count as f32 - self.params.presence_penalty
            });
        }
    }

    fn bars_stop_tokens(&self, position: usize) -> bool {
        position < self.params.min_tokens as usize && !self.barred.is_empty()
    }

    fn has_penalties(&self) -> bool {
        self.params.repetition_penalty != 1.0
            || self.params.frequency_penalty != 0.0
            || self.params.presence_penalty != 0.0
    }
}

/// Changes one logit. A result too large for f32 becomes the largest; a NaN (only from parameters that are none) the least.
fn change(logits: &mut [f32], token: TokenId, f: impl Fn(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        let changed = f(*logit);
        *logit = if changed.is_nan() { f32::NEG_INFINITY } else { changed.min(f32::MAX) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(params: SamplingParams, prompt: &[TokenId], eos: &[TokenId]) -> SequenceSampler {
        SequenceSampler::new(Arc::new(params), 0, prompt, eos, 8)
    }

    fn processed(state: &SequenceSampler, position: usize) -> Vec<f32> {
        let mut row = vec![2.0, -2.0, 4.0, 0.0, 1.0, 1.0, 1.0, 1.0];
        state.process(&mut row, position);
        row
    }

    #[test]
    fn repetition_counts_prompt_and_output_once_each() {
        let mut state = state(SamplingParams { repetition_penalty: 2.0, ..Default::default() }, &[0, 1, 0, 99], &[]);
        state.push(2);
        state.push(2);
        assert!(state.changes_logits(0));
        assert_eq!(processed(&state, 0), [1.0, -4.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn presence_and_frequency_count_output_only() {
        let params = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..Default::default() };
        let mut state = state(params, &[0, 1], &[]);
        assert_eq!(processed(&state, 0), [2.0, -2.0, 4.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        state.push(2);
        state.push(2);
        state.push(4);
        assert_eq!(processed(&state, 3), [2.0, -2.0, 3.0, 0.0, 0.25, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn repetition_comes_before_frequency_and_after_bias() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            logit_bias: vec![(4, 5.0), (99, 1.0)],
            ..Default::default()
        };
        let mut state = state(params, &[], &[]);
        state.push(4);
        assert_eq!(processed(&state, 1)[4], (1.0 + 5.0) / 2.0 - 1.0);
    }

    #[test]
    fn stop_tokens_are_barred_until_min_tokens_even_when_biased() {
        let params = SamplingParams {
            min_tokens: 2,
            stop_token_ids: vec![3, 5],
            logit_bias: vec![(5, 100.0)],
            ..Default::default()
        };
        let state = state(params, &[], &[5, 7]);
        for position in [0, 1] {
            let row = processed(&state, position);
            let barred: Vec<usize> = (0..8).filter(|&id| row[id] == f32::NEG_INFINITY).collect();
            assert_eq!(barred, [3, 5, 7]);
        }
        assert_eq!(processed(&state, 2), [2.0, -2.0, 4.0, 0.0, 1.0, 101.0, 1.0, 1.0]);
    }

    #[test]
    fn parameters_cannot_make_invalid_numbers() {
        let params = SamplingParams {
            repetition_penalty: 1e-38,
            logit_bias: vec![(0, f32::MAX), (1, f32::NAN)],
            ..Default::default()
        };
        let row = processed(&state(params, &[0, 1, 2, 3], &[]), 0);
        assert!(row.iter().all(|logit| *logit < f32::INFINITY), "{row:?}");
        assert_eq!(row[0], f32::MAX);
    }

    #[test]
    fn a_ban_on_every_token_is_dropped() {
        let everything = SamplingParams { min_tokens: 2, stop_token_ids: (0..8).collect(), ..Default::default() };
        assert!(!state(everything, &[], &[]).changes_logits(0));
    }

    #[test]
    fn without_need_nothing_is_kept() {
        let mut state = state(SamplingParams::default(), &[0, 1, 2], &[7]);
        state.push(3);
        assert!(state.occurrences.is_empty() && state.barred.is_empty());
        assert!(!state.changes_logits(0));
    }
}
