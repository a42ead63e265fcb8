//! Log-probabilities in the two shapes of the two endpoints.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::tokenizer::Tokenizer;
use crate::types::{TokenId, TokenLogprobs};

/// JSON has no minus infinity; vLLM writes this for it.
const LEAST_LOGPROB: f32 = -9999.0;

/// `logprobs` of a chat choice or chunk.
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
    /// The token may be a part of a character: its bytes say exactly what it is.
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs) {
        let describe = |token, logprob: f32| {
            let bytes = tokenizer.token_bytes(token).to_vec();
            TokenLogprob { token: text_of(&bytes), logprob: logprob.max(LEAST_LOGPROB), bytes }
        };
        self.content.push(ChatTokenLogprobs {
            sampled: describe(token, logprobs.logprob),
            top_logprobs: logprobs.top.iter().map(|&(token, logprob)| describe(token, logprob)).collect(),
        });
    }
}

/// `logprobs` of a completion choice or chunk: parallel lists.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f32>,
    tokens: Vec<String>,
    top_logprobs: Vec<Map<String, Value>>,
}

impl CompletionLogprobs {
    /// `offset` is where the token's text begins, in characters.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, logprobs: &TokenLogprobs, offset: usize) {
        let describe = |token| text_of(&tokenizer.token_bytes(token));
        // As vLLM has it, the sampled token is always among the alternatives.
        let top = logprobs.top.iter().copied().chain([(token, logprobs.logprob)]);
        self.top_logprobs
            .push(top.map(|(token, logprob)| (describe(token), logprob.max(LEAST_LOGPROB).into())).collect());
        self.token_logprobs.push(logprobs.logprob.max(LEAST_LOGPROB));
        self.text_offset.push(offset);
        self.tokens.push(describe(token));
    }
}

/// A token by itself; it may be a part of a character.
pub fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
