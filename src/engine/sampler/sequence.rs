//! The sampling state of one sequence. Rebuilt by pushing the emitted tokens into fresh state, in the same order; never rolled
//! back.

use std::collections::HashMap;
use std::sync::Arc;

use outrigger_kernels::sample::{Changes, Occurrence, Penalties, RowParams, Truncation, philox};

use crate::types::{SamplingParams, TokenId};

/// Per-sequence sampling state. Sparse: it grows with the distinct tokens of the sequence, and only if a penalty needs them.
#[derive(Clone, Debug)]
pub struct SequenceSampler {
    params: Arc<SamplingParams>,
    /// The choice's own seed.
    seed: u64,
    /// Tokens that may not come before `min_tokens`; empty when there is no such bound.
    barred: Vec<TokenId>,
    /// How often each token was emitted; prompt tokens are listed with 0 when the repetition penalty needs them.
    occurrences: Vec<Occurrence>,
    /// Where each token stands in `occurrences`.
    places: HashMap<TokenId, u32>,
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
        let seed = philox::choice_seed(params.seed, choice);
        let mut state = Self { params, seed, barred, occurrences: Vec::new(), places: HashMap::new() };
        if state.params.repetition_penalty != 1.0 {
            prompt.iter().filter(|id| (**id as usize) < vocab_size).for_each(|&id| {
                state.occurrence(id);
            });
        }
        state
    }

    /// Takes note of an emitted token, sampled or replayed.
    pub fn push(&mut self, token: TokenId) {
        if !self.penalties().is_off() {
            let occurrence = self.occurrence(token);
            occurrence.count = occurrence.count.saturating_add(1);
        }
    }

    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// All that decides the token at `position`, besides the logits. The state is as after pushing exactly the generated
    /// tokens before it. Only the random bits and the ban on stop tokens depend on the position, so the parameters of the
    /// next position may be asked for one token early; what they lack then is that token among the occurrences.
    pub fn row_params(&self, position: usize) -> RowParams<'_> {
        let params = &*self.params;
        let bars_stop_tokens = position < params.min_tokens as usize;
        RowParams {
            temperature: params.temperature,
            truncation: Truncation { top_k: params.top_k, min_p: params.min_p, top_p: params.top_p },
            bits: philox::bits_at(self.seed, position as u64),
            logprobs: params.logprobs,
            changes: Changes {
                bias: &params.logit_bias,
                barred: if bars_stop_tokens { &self.barred } else { &[] },
                penalties: self.penalties(),
                occurrences: &self.occurrences,
                allowed: None,
            },
        }
    }

    fn penalties(&self) -> Penalties {
        Penalties {
            repetition: self.params.repetition_penalty,
            frequency: self.params.frequency_penalty,
            presence: self.params.presence_penalty,
        }
    }

    /// The token's place among the occurrences, a new one if it has none.
    fn occurrence(&mut self, token: TokenId) -> &mut Occurrence {
        let occurrences = &mut self.occurrences;
        let place = *self.places.entry(token).or_insert_with(|| {
            occurrences.push(Occurrence { token, count: 0 });
            (occurrences.len() - 1) as u32
        });
        &mut self.occurrences[place as usize]
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
        state.row_params(position).changes.apply(&mut row);
        row
    }

    #[test]
    fn repetition_counts_prompt_and_output_once_each() {
        let mut state = state(SamplingParams { repetition_penalty: 2.0, ..Default::default() }, &[0, 1, 0, 99], &[]);
        state.push(2);
        state.push(2);
        assert!(!state.row_params(0).changes.is_empty());
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
        assert!(state(everything, &[], &[]).row_params(0).changes.is_empty());
    }

    #[test]
    fn without_need_nothing_is_kept() {
        let mut state = state(SamplingParams::default(), &[0, 1, 2], &[7]);
        state.push(3);
        assert!(state.occurrences.is_empty() && state.barred.is_empty());
        assert!(state.row_params(0).changes.is_empty());
    }
}
