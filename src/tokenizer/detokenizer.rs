//! Converts token ids to text, one token at a time. The text after k tokens depends on those k tokens alone, so to restore a
//! detokenizer, feed the same tokens into a new one.

use std::sync::Arc;

use super::pieces::Pieces;
use crate::types::TokenId;

/// Emits complete characters only. Bytes of an incomplete character are held back until it is complete, or is known to be
/// invalid and replaced by U+FFFD. What `push` and `finish` return together equals the text of decoding everything at once. A
/// push takes time proportional to the token's length.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special_tokens: bool,
    /// Drop a space at the beginning of the text: the tokenizer has put it there.
    strip_leading_space: bool,
    /// The beginning of a valid character; at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub(super) fn new(pieces: Arc<Pieces>, skip_special_tokens: bool, at_start_of_text: bool) -> Self {
        let strip_leading_space = at_start_of_text && pieces.strips_leading_space();
        Self { pieces, skip_special_tokens, strip_leading_space, pending: Vec::new() }
    }

    /// Returns the text that this token completes, often empty. Ids outside the vocabulary have no text.
    pub fn push(&mut self, token: TokenId) -> String {
        let mut text = String::new();
        self.push_to(token, &mut text);
        text
    }

    /// Like `push`, but appends to `text`.
    pub fn push_to(&mut self, token: TokenId, text: &mut String) {
        if self.skip_special_tokens && self.pieces.is_special(token) {
            return;
        }
        let mut bytes = self.pieces.bytes(token);
        if self.strip_leading_space && !bytes.is_empty() {
            self.strip_leading_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        if self.pending.is_empty() {
            self.pending.extend_from_slice(decode_complete(bytes, self.pieces.replaces_bytewise(), text));
        } else {
            let mut joined = std::mem::take(&mut self.pending);
            joined.extend_from_slice(bytes);
            self.pending.extend_from_slice(decode_complete(&joined, self.pieces.replaces_bytewise(), text));
        }
    }

    /// Ends the text. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        let count = if self.pieces.replaces_bytewise() { pending.len() } else { pending.len().min(1) };
        char::REPLACEMENT_CHARACTER.to_string().repeat(count)
    }
}

/// Appends all complete characters, and returns the remaining bytes: the beginning of a valid character. An invalid sequence
/// becomes one U+FFFD, as in `String::from_utf8_lossy`, or one per byte if `bytewise`.
fn decode_complete<'a>(mut bytes: &'a [u8], bytewise: bool, text: &mut String) -> &'a [u8] {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid));
        let Some(invalid) = error.error_len() else { return rest };
        let count = if bytewise { invalid } else { 1 };
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
        bytes = &rest[invalid..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::pieces::PieceKind;
    use proptest::prelude::*;

    /// One token per byte, some words, and a special token.
    fn pieces(sentence_piece: bool) -> Arc<Pieces> {
        let mut pieces = Pieces::builder(sentence_piece, sentence_piece);
        for byte in 0..=255u8 {
            pieces.push("", &[byte], PieceKind::Text);
        }
        for word in [" the", "日本", "é", " ", ""] {
            pieces.push(word, word.as_bytes(), PieceKind::Text);
        }
        pieces.push("<|end|>", b"<|end|>", PieceKind::Special);
        Arc::new(pieces.build())
    }

    fn stream(pieces: &Arc<Pieces>, tokens: &[TokenId], skip: bool, start: bool) -> String {
        let mut detokenizer = Detokenizer::new(pieces.clone(), skip, start);
        let mut text: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    fn whole(pieces: &Pieces, tokens: &[TokenId], skip: bool) -> Vec<u8> {
        let shown = tokens.iter().filter(|&&token| !(skip && pieces.is_special(token)));
        shown.flat_map(|&token| pieces.bytes(token).to_vec()).collect()
    }

    #[test]
    fn a_character_is_emitted_when_its_last_byte_arrives() {
        let pieces = pieces(false);
        let mut detokenizer = Detokenizer::new(pieces, false, false);
        let deltas: Vec<String> = "日!".bytes().map(|byte| detokenizer.push(byte.into())).collect();
        assert_eq!(deltas, ["", "", "日", "!"]);
    }

    #[test]
    fn a_broken_character_is_replaced_once_or_bytewise() {
        let broken = [0xE6, 0x97, u32::from(b'a'), 0xE6, 0x97];
        assert_eq!(stream(&pieces(false), &broken, false, false), "\u{FFFD}a\u{FFFD}");
        assert_eq!(stream(&pieces(true), &broken, false, false), "\u{FFFD}\u{FFFD}a\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn the_prefix_space_is_dropped_only_where_the_text_begins() {
        let pieces = pieces(true);
        let the = 256;
        let end = 261;
        assert_eq!(stream(&pieces, &[the, the], false, true), "the the");
        assert_eq!(stream(&pieces, &[the, the], false, false), " the the");
        assert_eq!(stream(&pieces, &[end, the], true, true), "the");
        assert_eq!(stream(&pieces, &[end, the], false, true), "<|end|> the");
        assert_eq!(stream(&pieces, &[u32::MAX, the], false, true), "the");
    }

    proptest! {
        #[test]
        fn deltas_join_to_the_lossy_decoding_of_all_bytes(
            tokens in prop::collection::vec(0u32..270, 0..40),
            skip in any::<bool>(),
        ) {
            let pieces = pieces(false);
            let expected = whole(&pieces, &tokens, skip);
            let expected = String::from_utf8_lossy(&expected);
            prop_assert_eq!(stream(&pieces, &tokens, skip, true), expected);
        }

        #[test]
        fn text_after_k_tokens_depends_on_those_alone(
            tokens in prop::collection::vec(200u32..262, 0..20),
            more in prop::collection::vec(0u32..262, 0..5),
        ) {
            let pieces = pieces(true);
            let mut first = Detokenizer::new(pieces.clone(), false, true);
            let mut second = first.clone();
            let head: String = tokens.iter().map(|&token| first.push(token)).collect();
            let longer: Vec<String> = tokens.iter().chain(&more).map(|&token| second.push(token)).collect();
            prop_assert_eq!(head, longer[..tokens.len()].concat());
            prop_assert!(first.pending.len() <= 3);
        }
    }
}
