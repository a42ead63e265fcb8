//! SentencePiece's byte-pair model: pieces have scores, adjacent pieces are merged into the piece with the best score, and text
//! that is not in the vocabulary is written as byte tokens.

use std::cell::RefCell;
use std::collections::HashMap;

use super::merge::{Joined, Merger};
use crate::types::TokenId;

/// Replaces the space inside pieces: U+2581, lower one eighth block.
pub(super) const SPACE: char = '▁';

#[derive(Debug)]
pub(super) struct SentencePieceEncoder {
    pieces: HashMap<Box<str>, Piece, ahash::RandomState>,
    /// Used only if all 256 exist. Otherwise unknown characters become the unknown token.
    byte_tokens: Option<Box<[TokenId; 256]>>,
    unknown: Option<TokenId>,
    /// Whether a space is put before the text, so that its first word gets the same tokens as inside a sentence.
    add_space_prefix: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub token: TokenId,
    pub score: f32,
    /// Used only as an intermediate step to longer pieces.
    pub unused: bool,
}

/// Where unused pieces were joined: the length of the left part.
type Splits<'a> = HashMap<&'a str, usize, ahash::RandomState>;

#[derive(Default)]
struct Buffers {
    merger: Merger,
    escaped: String,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl SentencePieceEncoder {
    pub fn new(
        pieces: HashMap<Box<str>, Piece, ahash::RandomState>,
        byte_tokens: Option<Box<[TokenId; 256]>>,
        unknown: Option<TokenId>,
        add_space_prefix: bool,
    ) -> Self {
        Self { pieces, byte_tokens, unknown, add_space_prefix }
    }

    /// Appends the tokens of a text without special tokens. The space prefix is added wherever such a text begins: at the
    /// start, and after each special token.
    pub fn encode(&self, text: &str, tokens: &mut Vec<TokenId>) {
        if text.is_empty() {
            return;
        }
        BUFFERS.with_borrow_mut(|Buffers { merger, escaped }| {
            escaped.clear();
            if self.add_space_prefix {
                escaped.push(SPACE);
            }
            escaped.extend(text.chars().map(|character| if character == ' ' { SPACE } else { character }));
            self.encode_escaped(escaped, merger, tokens);
        });
    }

    fn encode_escaped(&self, text: &str, merger: &mut Merger, tokens: &mut Vec<TokenId>) {
        merger.clear();
        for (start, character) in text.char_indices() {
            merger.push(start, character.len_utf8(), 0);
        }
        let splits = RefCell::new(Splits::default());
        let merged = merger.merge(|left, right| {
            let start = left.start as usize;
            let joined = &text[start..start + (left.length + right.length) as usize];
            let piece = self.pieces.get(joined)?;
            if piece.unused {
                splits.borrow_mut().insert(joined, left.length as usize);
            }
            Some(Joined { priority: priority(piece.score), token: 0 })
        });
        for symbol in merged {
            let start = symbol.start as usize;
            self.emit(&text[start..start + symbol.length as usize], &splits.borrow(), tokens);
        }
    }

    /// Appends the tokens of one merged symbol. An unused piece is split into the parts from which it was joined.
    fn emit<'a>(&self, symbol: &'a str, splits: &Splits<'a>, tokens: &mut Vec<TokenId>) {
        let mut rest = vec![symbol];
        while let Some(symbol) = rest.pop() {
            match self.pieces.get(symbol) {
                None => self.emit_unknown(symbol, tokens),
                Some(piece) => match splits.get(symbol).filter(|_| piece.unused) {
                    None => tokens.push(piece.token),
                    Some(&middle) => rest.extend([&symbol[middle..], &symbol[..middle]]),
                },
            }
        }
    }

    fn emit_unknown(&self, symbol: &str, tokens: &mut Vec<TokenId>) {
        match (&self.byte_tokens, self.unknown) {
            (Some(bytes), _) => tokens.extend(symbol.bytes().map(|byte| bytes[usize::from(byte)])),
            (None, Some(unknown)) => tokens.push(unknown),
            (None, None) => {}
        }
    }
}

/// The byte of a byte token such as `<0x0A>`.
pub(super) fn parse_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Converts scores to integers so that the best score is the lowest integer.
fn priority(score: f32) -> u32 {
    // The bits of a float sort by sign and magnitude.
    let bits = score.to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    !ascending
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_better_score_comes_first() {
        let scores = [f32::MAX, 1.0, 0.5, 0.0, -0.5, -1.0, -1e6];
        assert!(scores.windows(2).all(|pair| priority(pair[0]) < priority(pair[1])));
    }

    fn encoder(pieces: &[(&str, f32, bool)], add_space_prefix: bool) -> SentencePieceEncoder {
        let pieces = (1000..).zip(pieces);
        let pieces =
            pieces.map(|(token, &(text, score, unused))| (text.into(), Piece { token, score, unused })).collect();
        let bytes = Box::new(std::array::from_fn(|byte| byte as TokenId));
        SentencePieceEncoder::new(pieces, Some(bytes), None, add_space_prefix)
    }

    fn encode(encoder: &SentencePieceEncoder, text: &str) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        encoder.encode(text, &mut tokens);
        tokens
    }

    #[test]
    fn merges_by_score_and_spells_strangers_in_bytes() {
        let pieces =
            [("a", -3.0, false), ("b", -4.0, false), ("ab", -2.0, false), ("bb", -1.0, false), ("▁a", -5.0, false)];
        let encoder = encoder(&pieces, false);
        assert_eq!(encode(&encoder, "abb"), [1000, 1003]);
        assert_eq!(encode(&encoder, "aab"), [1000, 1002]);
        assert_eq!(encode(&encoder, " aé"), [1004, 0xC3, 0xA9]);
        assert!(encode(&encoder, "").is_empty());
    }

    #[test]
    fn the_prefix_is_one_more_space() {
        let encoder = encoder(&[("▁", -1.0, false), ("▁a", -2.0, false), ("a", -3.0, false)], true);
        assert_eq!(encode(&encoder, "a"), [1001]);
        assert_eq!(encode(&encoder, " a"), [1000, 1001]);
        assert!(encode(&encoder, "").is_empty());
    }

    #[test]
    fn an_unused_piece_is_a_step_but_not_a_result() {
        let pieces =
            [("a", -5.0, false), ("b", -5.0, false), ("c", -5.0, false), ("ab", -1.0, true), ("abc", -2.0, false)];
        let encoder = encoder(&pieces, false);
        assert_eq!(encode(&encoder, "abc"), [1004]);
        assert_eq!(encode(&encoder, "abab"), [1000, 1001, 1000, 1001]);
    }
}
