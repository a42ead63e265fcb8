//! Which tokens begin and end a text, and what the special tokens are called in chat templates.

use std::collections::BTreeMap;

use crate::types::TokenId;

/// Tokens that end an assistant's turn in the model families that we know. Many files name only one end token, often
/// the one that ends a document.
const TURN_ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"];

/// Further texts that end a generation, as llama.cpp has them: ends of turns, of messages, of calls and of documents.
const OTHER_ENDS: [&str; 11] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<turn|>",
    "<|tool_response>",
    "_<EOT>",
];

/// Ends that could be text as well, HTML for example: they count only where the file calls them control tokens.
const AMBIGUOUS_ENDS: [&str; 6] = ["</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]", "[e~["];

/// Whether a token ends a turn. `exists` says whether the vocabulary has a text: in gpt-oss's format `<|end|>` ends a message
/// of a turn that goes on.
pub(super) fn is_turn_end(text: &str, exists: impl Fn(&str) -> bool) -> bool {
    let goes_on = || text == "<|end|>" && (exists("<|return|>") || exists("<|flush|>"));
    TURN_ENDS.contains(&text) && !goes_on()
}

/// Whether a text can only be meant as the end of a generation, whatever type a GGUF file gives it: converters write such
/// tokens as user-defined or normal ones.
pub(super) fn is_unmistakable_end(text: &str, exists: impl Fn(&str) -> bool) -> bool {
    OTHER_ENDS.contains(&text) || is_turn_end(text, exists)
}

/// Whether a control token of this text ends a generation. Gemma 4 has `</s>` as a tag.
pub(super) fn is_control_end(text: &str, exists: impl Fn(&str) -> bool + Copy) -> bool {
    let is_tag = || text == "</s>" && exists("<|tool_response>");
    is_unmistakable_end(text, exists) || (AMBIGUOUS_ENDS.contains(&text) && !is_tag())
}

#[derive(Clone, Debug, Default)]
pub(super) struct SpecialTokens {
    pub bos: Option<TokenId>,
    /// The model's own first. No token twice.
    pub eos: Vec<TokenId>,
    /// By the names that chat templates use: `bos_token`, `eos_token`, …
    pub texts: BTreeMap<String, String>,
}

impl SpecialTokens {
    pub fn add_eos(&mut self, token: TokenId) {
        if !self.eos.contains(&token) {
            self.eos.push(token);
        }
    }
}
