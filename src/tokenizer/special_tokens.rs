//! Which tokens begin and end a text, and what the special tokens are called in chat templates.

use std::collections::BTreeMap;

use crate::types::TokenId;

/// Tokens that end an assistant's turn in the model families that we know. Many files name only one end token, often
/// the one that ends a document.
pub(super) const TURN_ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"];

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
