//! Finds the tokens that begin and end a text, and the names of special tokens for chat templates.

use std::collections::BTreeMap;

use crate::types::TokenId;

/// Tokens that end an assistant's turn in known model families. Many files name only one end token, often the one that ends a
/// document.
const TURN_ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"];

/// Further texts that end a generation (llama.cpp's list): ends of turns, messages, calls and documents.
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

/// End tokens whose text also occurs in ordinary text, such as HTML. They count only if the file marks them as control tokens.
const AMBIGUOUS_ENDS: [&str; 6] = ["</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]", "[e~["];

/// Whether a token ends a turn. `exists` says whether the vocabulary has a text: in gpt-oss's format, `<|end|>` ends a message
/// but not the turn.
pub(super) fn is_turn_end(text: &str, exists: impl Fn(&str) -> bool) -> bool {
    let goes_on = || text == "<|end|>" && (exists("<|return|>") || exists("<|flush|>"));
    TURN_ENDS.contains(&text) && !goes_on()
}

/// Whether a text can only be an end token, whatever type a GGUF file gives it. Converters often write such tokens as
/// user-defined or normal.
pub(super) fn is_unmistakable_end(text: &str, exists: impl Fn(&str) -> bool) -> bool {
    OTHER_ENDS.contains(&text) || is_turn_end(text, exists)
}

/// Whether a control token with this text ends a generation. Gemma 4 uses `</s>` as a tag.
pub(super) fn is_control_end(text: &str, exists: impl Fn(&str) -> bool + Copy) -> bool {
    let is_tag = || text == "</s>" && exists("<|tool_response>");
    is_unmistakable_end(text, exists) || (AMBIGUOUS_ENDS.contains(&text) && !is_tag())
}

#[derive(Clone, Debug, Default)]
pub(super) struct SpecialTokens {
    pub bos: Option<TokenId>,
    /// End tokens; those of the model's configuration come first. No duplicates.
    pub eos: Vec<TokenId>,
    /// Texts by the names that chat templates use: `bos_token`, `eos_token`, …
    pub texts: BTreeMap<String, String>,
}

impl SpecialTokens {
    pub fn add_eos(&mut self, token: TokenId) {
        if !self.eos.contains(&token) {
            self.eos.push(token);
        }
    }
}
