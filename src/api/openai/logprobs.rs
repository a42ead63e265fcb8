//! Log-probabilities in the shapes of the two endpoints.
//!
//! They are float32 and always printed with the shortest digits that identify a float32, so a client finds the same number
//! beside the token and among the alternatives.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::tokenizer::Tokenizer;
use crate::types::{TokenId, TokenLogprobs};

/// JSON has no minus infinity; vLLM writes this value instead.
const LEAST_LOGPROB: f32 = -9999.0;

/// The `logprobs` of a chat choice or chunk.
#[derive(Debug, Default, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatTokenLogprobs>,
}

#[derive(Debug, Serialize)]
struct ChatTokenLogprobs {
    #[serde(flatten)]
    sampled: TokenLogprob,
    top_logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Serialize)]
struct TokenLogprob {
    token: String,
    logprob: f32,
    /// The token's bytes, since it may be part of a character.
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs) {
        let describe = |token, logprob: f32| {
            let bytes = tokenizer.token_bytes(token);
            TokenLogprob { token: text_of(&bytes), logprob: logprob.max(LEAST_LOGPROB), bytes }
        };
        self.content.push(ChatTokenLogprobs {
            sampled: describe(token, logprobs.logprob),
            top_logprobs: logprobs.top.iter().map(|&(token, logprob)| describe(token, logprob)).collect(),
        });
    }
}

/// The `logprobs` of a completion choice or chunk, as parallel lists.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
}

impl CompletionLogprobs {
    /// Adds the prompt's tokens, for `echo`. The first token has no log-probability, since nothing precedes it. `logprobs` are
    /// those of the others; it is shorter if scoring was cut short.
    pub fn push_prompt(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[TokenId],
        logprobs: &[TokenLogprobs],
        num_top: usize,
        text: &str,
    ) {
        let length = text.chars().count();
        let offsets = tokenizer.offsets(tokens, true).into_iter().map(|offset| offset.min(length));
        let scored = std::iter::once(None).chain(logprobs.iter().map(Some)).chain(std::iter::repeat(None));
        for ((&token, offset), logprobs) in tokens.iter().zip(offsets).zip(scored) {
            self.text_offset.push(offset);
            self.token_logprobs.push(logprobs.map(|logprobs| logprobs.logprob.max(LEAST_LOGPROB)));
            self.tokens.push(text_of(&tokenizer.token_bytes(token)));
            self.top_logprobs.push(logprobs.map(|logprobs| TopLogprobs::new(tokenizer, token, logprobs, num_top)));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// `offset` is where the token's text begins, in characters.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs, offset: usize) {
        self.text_offset.push(offset);
        self.token_logprobs.push(Some(logprobs.logprob.max(LEAST_LOGPROB)));
        self.tokens.push(text_of(&tokenizer.token_bytes(token)));
        self.top_logprobs.push(Some(TopLogprobs::new(tokenizer, token, logprobs, logprobs.top.len())));
    }
}

/// A JSON object with the alternatives' texts as keys. If several tokens have the same text, the most likely one counts.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl TopLogprobs {
    /// As in vLLM, the token itself is always among its alternatives.
    fn new(tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs, num_top: usize) -> Self {
        let mut members: Vec<(String, f32)> = Vec::with_capacity(num_top + 1);
        // The list is sorted by probability, so a later entry with the same text is less likely or the same token.
        for (token, logprob) in logprobs.top.iter().take(num_top).copied().chain([(token, logprobs.logprob)]) {
            let text = text_of(&tokenizer.token_bytes(token));
            if !members.iter().any(|(known, _)| *known == text) {
                members.push((text, logprob.max(LEAST_LOGPROB)));
            }
        }
        Self(members)
    }
}

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

/// vLLM's `prompt_logprobs`: null for the first token; for each other token, the likely tokens at its position, by id.
#[derive(Debug)]
pub struct PromptLogprobs(Vec<Option<BTreeMap<TokenId, PromptTokenLogprob>>>);

#[derive(Debug, Serialize)]
struct PromptTokenLogprob {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl PromptLogprobs {
    /// Arguments as for `CompletionLogprobs::push_prompt`.
    pub fn new(tokenizer: &Tokenizer, tokens: &[TokenId], logprobs: &[TokenLogprobs], num_top: usize) -> Self {
        let describe = |token: TokenId, logprob: f32, rank: u32| {
            let decoded_token = text_of(&tokenizer.token_bytes(token));
            (token, PromptTokenLogprob { logprob: logprob.max(LEAST_LOGPROB), rank, decoded_token })
        };
        let of_token = |(&token, logprobs): (&TokenId, &TokenLogprobs)| {
            let top = logprobs.top.iter().take(num_top).zip(1..);
            let top = top.map(|(&(token, logprob), rank)| describe(token, logprob, rank));
            Some(top.chain([describe(token, logprobs.logprob, logprobs.rank)]).collect())
        };
        let mut list: Vec<_> = std::iter::once(None).chain(tokens[1..].iter().zip(logprobs).map(of_token)).collect();
        list.resize_with(tokens.len(), || None);
        Self(list)
    }
}

impl Serialize for PromptLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// The text of a single token, which may be part of a character.
fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
