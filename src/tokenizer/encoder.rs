//! Converts text to token ids, for each kind of tokenizer.

use std::borrow::Cow;

use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::added_tokens::{AddedTokens, Fragment};
use super::bpe::BytePairEncoder;
use super::error::TokenizerError;
use super::pre_tokenizer::PreTokenizer;
use super::spm::SentencePieceEncoder;
use crate::types::TokenId;

#[derive(Debug)]
pub(super) struct Encoder {
    pub kind: EncoderKind,
    /// Special tokens added before and after the text, if requested.
    pub prefix: Option<TokenId>,
    pub suffix: Option<TokenId>,
}

#[derive(Debug)]
pub(super) enum EncoderKind {
    ByteLevel {
        added: AddedTokens,
        pre_tokenizer: PreTokenizer,
        bpe: BytePairEncoder,
    },
    SentencePiece {
        added: AddedTokens,
        spm: SentencePieceEncoder,
    },
    /// A `tokenizer.json`. It adds special tokens by its own rule if `frames` is set.
    Json {
        tokenizer: Box<tokenizers::Tokenizer>,
        frames: bool,
    },
}

impl Encoder {
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + 2);
        tokens.extend(self.prefix.filter(|_| add_special_tokens));
        match &self.kind {
            EncoderKind::ByteLevel { added, pre_tokenizer, bpe } => {
                encode_byte_level(text, added, pre_tokenizer, bpe, &mut tokens)?;
            }
            EncoderKind::SentencePiece { added, spm } => {
                for fragment in added.split(text) {
                    match fragment {
                        Fragment::Token(token) => tokens.push(token),
                        Fragment::Text(text) => spm.encode(text, &mut tokens),
                    }
                }
            }
            EncoderKind::Json { tokenizer, frames } => {
                let encoding = tokenizer.encode_fast(text, add_special_tokens && *frames);
                let encoding = encoding.map_err(|error| TokenizerError::Library(error.to_string()))?;
                tokens.extend_from_slice(encoding.get_ids());
            }
        }
        tokens.extend(self.suffix.filter(|_| add_special_tokens));
        Ok(tokens)
    }
}

fn encode_byte_level(
    text: &str,
    added: &AddedTokens,
    pre_tokenizer: &PreTokenizer,
    bpe: &BytePairEncoder,
    tokens: &mut Vec<TokenId>,
) -> Result<(), TokenizerError> {
    for fragment in added.split(text) {
        match fragment {
            Fragment::Token(token) => tokens.push(token),
            Fragment::Text(text) => {
                let text = if pre_tokenizer.normalizes { compose(text) } else { Cow::Borrowed(text) };
                pre_tokenizer.split(&text, &mut |word| bpe.encode_word(word.as_bytes(), tokens))?;
            }
        }
    }
    Ok(())
}

/// Applies Unicode normalization form C.
fn compose(text: &str) -> Cow<'_, str> {
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => Cow::Borrowed(text),
        _ => Cow::Owned(text.nfc().map(|(character, _)| character).collect()),
    }
}
