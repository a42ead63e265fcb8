//! Byte-level byte-pair encoding (GPT-2 and its successors): a word's bytes are tokens, and adjacent pairs are merged in the
//! order of the merge list.

use std::cell::RefCell;
use std::collections::HashMap;

use super::byte_level;
use super::error::TokenizerError;
use super::merge::{Joined, Merger};
use crate::types::TokenId;

/// Shorter words are merged by searching for the best pair repeatedly, longer ones with a heap.
const MAX_SCANNED_BYTES: usize = 32;

#[derive(Debug)]
pub(super) struct BytePairEncoder {
    byte_tokens: Box<[Option<TokenId>; 256]>,
    merges: HashMap<(TokenId, TokenId), Joined, ahash::RandomState>,
    /// Words that are single tokens regardless of the merges. Empty if only the merges decide.
    words: HashMap<Box<[u8]>, TokenId, ahash::RandomState>,
}

thread_local! {
    static MERGER: RefCell<Merger> = RefCell::default();
}

impl BytePairEncoder {
    /// `tokens` gives the id of each token, written in the byte-level alphabet. `merges` are pairs of such tokens, separated by
    /// a space, in the order of priority.
    pub fn new<'a>(
        tokens: &HashMap<&str, TokenId, ahash::RandomState>,
        merges: impl ExactSizeIterator<Item = Option<&'a str>>,
    ) -> Result<Self, TokenizerError> {
        let mut encoder = Self {
            byte_tokens: Box::new(std::array::from_fn(|byte| {
                let mut buffer = [0; 4];
                tokens.get(&*byte_level::char_of(byte as u8).encode_utf8(&mut buffer)).copied()
            })),
            merges: HashMap::with_capacity_and_hasher(merges.len(), Default::default()),
            words: HashMap::default(),
        };
        let mut joined = String::new();
        for (index, merge) in merges.enumerate() {
            let merge = merge.unwrap_or("");
            let (pair, token) = resolve(tokens, merge, &mut joined)
                .ok_or_else(|| TokenizerError::InvalidMerge { index, merge: merge.to_owned() })?;
            // If a pair is listed twice, the first entry counts.
            encoder.merges.entry(pair).or_insert(Joined { priority: index as u32, token });
        }
        Ok(encoder)
    }

    /// Adds words that become one token regardless of the merges. If a word has several tokens, the first counts.
    pub fn with_whole_words<'a>(mut self, words: impl Iterator<Item = (&'a str, TokenId)>) -> Self {
        let mut bytes = Vec::new();
        for (text, token) in words.filter(|(text, _)| byte_level::spells(text)) {
            bytes.clear();
            byte_level::decode(text, &mut bytes);
            self.words.entry(bytes.as_slice().into()).or_insert(token);
        }
        self
    }

    /// Appends the tokens of a word. Bytes that are not in the vocabulary are dropped, as by Hugging Face's library.
    pub fn encode_word(&self, word: &[u8], tokens: &mut Vec<TokenId>) {
        if let Some(&token) = self.words.get(word) {
            tokens.push(token);
        } else if word.len() <= MAX_SCANNED_BYTES {
            self.merge_by_scanning(word, tokens);
        } else {
            self.merge_by_heap(word, tokens);
        }
    }

    fn join(&self, left: TokenId, right: TokenId) -> Option<Joined> {
        self.merges.get(&(left, right)).copied()
    }

    fn merge_by_scanning(&self, word: &[u8], tokens: &mut Vec<TokenId>) {
        let mut symbols: smallvec::SmallVec<[TokenId; MAX_SCANNED_BYTES]> =
            word.iter().filter_map(|&byte| self.byte_tokens[usize::from(byte)]).collect();
        let mut pairs: smallvec::SmallVec<[Option<Joined>; MAX_SCANNED_BYTES]> =
            symbols.windows(2).map(|pair| self.join(pair[0], pair[1])).collect();
        // The lowest priority value; of equals, the leftmost.
        while let Some((place, best)) = pairs
            .iter()
            .enumerate()
            .filter_map(|(place, pair)| Some((place, (*pair)?)))
            .min_by_key(|(_, pair)| pair.priority)
        {
            symbols[place] = best.token;
            symbols.remove(place + 1);
            pairs.remove(place);
            if place > 0 {
                pairs[place - 1] = self.join(symbols[place - 1], symbols[place]);
            }
            if place < pairs.len() {
                pairs[place] = self.join(symbols[place], symbols[place + 1]);
            }
        }
        tokens.extend_from_slice(&symbols);
    }

    fn merge_by_heap(&self, word: &[u8], tokens: &mut Vec<TokenId>) {
        MERGER.with_borrow_mut(|merger| {
            merger.clear();
            for (start, &byte) in word.iter().enumerate() {
                if let Some(token) = self.byte_tokens[usize::from(byte)] {
                    merger.push(start, 1, token);
                }
            }
            tokens.extend(merger.merge(|left, right| self.join(left.token, right.token)).map(|symbol| symbol.token));
        });
    }
}

/// The pair of tokens that a merge joins, and the resulting token.
fn resolve(
    tokens: &HashMap<&str, TokenId, ahash::RandomState>,
    merge: &str,
    joined: &mut String,
) -> Option<((TokenId, TokenId), TokenId)> {
    let (left, right) = merge.split_once(' ')?;
    joined.clear();
    joined.push_str(left);
    joined.push_str(right);
    Some(((*tokens.get(left)?, *tokens.get(right)?), *tokens.get(joined.as_str())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoder(merges: &[&str], ignore_merges: bool) -> Result<(BytePairEncoder, Vec<String>), TokenizerError> {
        let mut texts: Vec<String> = "abcd".chars().map(String::from).collect();
        texts.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        texts.sort();
        texts.dedup();
        texts.push("dcba".to_owned());
        let tokens: HashMap<_, _, _> =
            texts.iter().enumerate().map(|(id, text)| (text.as_str(), id as TokenId)).collect();
        let encoder = BytePairEncoder::new(&tokens, merges.iter().map(|merge| Some(*merge)))?;
        let words = tokens.iter().map(|(text, &token)| (*text, token)).filter(|_| ignore_merges);
        let encoder = encoder.with_whole_words(words);
        Ok((encoder, texts))
    }

    fn encode(merges: &[&str], ignore_merges: bool, word: &str) -> Vec<String> {
        let (encoder, texts) = encoder(merges, ignore_merges).unwrap();
        let mut tokens = Vec::new();
        encoder.encode_word(word.as_bytes(), &mut tokens);
        tokens.into_iter().map(|token| texts[token as usize].clone()).collect()
    }

    #[test]
    fn the_earliest_merge_is_applied_first() {
        assert_eq!(encode(&["b c", "a b", "ab c"], false, "abc"), ["a", "bc"]);
        assert_eq!(encode(&["a b", "b c", "ab c"], false, "abc"), ["abc"]);
        assert_eq!(encode(&["a a"], false, "aaaaa"), ["aa", "aa", "a"]);
    }

    #[test]
    fn a_whole_word_ignores_merges_only_when_told_to() {
        assert_eq!(encode(&["d c"], true, "dcba"), ["dcba"]);
        assert_eq!(encode(&["d c"], false, "dcba"), ["dc", "b", "a"]);
    }

    #[test]
    fn bytes_outside_of_the_vocabulary_are_left_out() {
        assert_eq!(encode(&["a b"], false, "a!b"), ["ab"]);
    }

    #[test]
    fn a_merge_of_strangers_is_refused() {
        let tokens = [("a", 0), ("b", 1)].into_iter().collect();
        for merge in ["a b", "a x", "ab", ""] {
            let error = BytePairEncoder::new(&tokens, [Some(merge)].into_iter()).unwrap_err();
            assert!(matches!(error, TokenizerError::InvalidMerge { index: 0, .. }), "{merge:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn both_ways_of_merging_agree(
            merges in prop::collection::vec(("[abcd]{1,2}", "[abcd]{1,2}"), 0..12),
            word in "[abcd]{0,60}",
        ) {
            // Add every part as a token too.
            let mut closed: Vec<String> = Vec::new();
            for (left, right) in &merges {
                for part in [left, right].into_iter().filter(|part| part.len() == 2) {
                    closed.push(format!("{} {}", &part[..1], &part[1..]));
                }
                closed.push(format!("{left} {right}"));
            }
            let closed: Vec<&str> = closed.iter().map(String::as_str).collect();
            let (encoder, _) = encoder(&closed, false).unwrap();
            let (mut scanned, mut heaped) = (Vec::new(), Vec::new());
            encoder.merge_by_scanning(word.as_bytes(), &mut scanned);
            encoder.merge_by_heap(word.as_bytes(), &mut heaped);
            prop_assert_eq!(scanned, heaped);
        }
    }
}
