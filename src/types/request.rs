//! A request to a backend: token ids and an explicit seed, never text.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::envelope::Envelope;
use super::ids::TokenId;

/// One generation, as a backend takes it: the envelope, and where its choices begin.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub envelope: Arc<Envelope>,
    /// The choices to generate. A fresh request has `ChoiceStart::fresh(0..n)`; a continuation lists the unfinished
    /// choices with the tokens that were already emitted for each.
    pub choices: Vec<ChoiceStart>,
    /// Neither reads nor fills the prefix cache (synthetic inference).
    pub bypass_prefix_cache: bool,
    /// A reserved slot outside `max_num_seqs` and the queue caps (synthetic inference).
    pub is_probe: bool,
}

impl GenerateRequest {
    pub fn new(envelope: Arc<Envelope>, choices: Vec<ChoiceStart>) -> Self {
        Self { envelope, choices, bypass_prefix_cache: false, is_probe: false }
    }

    /// All choices from their beginning.
    pub fn fresh(envelope: Arc<Envelope>) -> Self {
        let choices = ChoiceStart::fresh(envelope.sampling.n);
        Self::new(envelope, choices)
    }
}

/// Where one choice begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceStart {
    /// Index of the choice in the client's response, `0..n`.
    pub index: u32,
    /// Tokens already emitted; they are prefilled, not sampled or published again.
    pub emitted: Vec<TokenId>,
}

impl ChoiceStart {
    pub fn fresh(n: u32) -> Vec<Self> {
        (0..n).map(|index| Self { index, emitted: Vec::new() }).collect()
    }
}

/// How tokens are chosen. Ranges are validated at the API; the engine relies on them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Number of choices, at least 1.
    pub n: u32,
    /// Drawn by the entry node when the client gave none. Choice `i > 0` uses a hash of (seed, i).
    pub seed: u64,
    /// Bound on generated tokens per choice, counted from the prompt's end (emitted ones included). With 0 nothing is
    /// generated: what is asked for are the prompt's log-probabilities.
    pub max_tokens: u32,
    /// Nothing but a limit ends a choice with these tokens: no end-of-sequence token, stop token or stop string.
    pub min_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In [0, 1]; 1 is off, 0 leaves the most likely token.
    pub top_p: f32,
    /// In [0, 1]; 0 is off. Relative to the most likely token.
    pub min_p: f32,
    /// Over prompt and output; 1 is off (CTRL, arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Over output only; 0 is off.
    pub presence_penalty: f32,
    /// Over output only; 0 is off.
    pub frequency_penalty: f32,
    /// Added to raw logits; each token at most once.
    pub logit_bias: Vec<(TokenId, f32)>,
    pub ignore_eos: bool,
    /// Stop strings, none empty.
    pub stop: Vec<String>,
    pub include_stop_str_in_output: bool,
    /// Leave out the text of control tokens. Stop strings are searched for in the resulting text.
    pub skip_special_tokens: bool,
    pub stop_token_ids: Vec<TokenId>,
    /// `Some(k)`: report the sampled token's log-probability and the `k` most likely ones.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Whether the generated token of this number, counted from 1, may end its choice by what it is or by the text that it
    /// completes.
    pub fn may_stop_at(&self, number: u32) -> bool {
        number > self.min_tokens
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            ignore_eos: false,
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            stop_token_ids: Vec::new(),
            logprobs: None,
        }
    }
}

/// What the authors of a model recommend for requests that say nothing themselves. `None` leaves the server's own default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// Bound on generated tokens, at least 1.
    pub max_new_tokens: Option<u32>,
}

impl SamplingDefaults {
    /// Whether nothing is recommended.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
