//! Special and user-defined tokens. They are found in the raw text before any other processing.

use aho_corasick::{AhoCorasick, MatchKind};

use super::error::TokenizerError;
use crate::types::TokenId;

/// If several tokens begin at the same place, the longest wins.
#[derive(Debug)]
pub(super) struct AddedTokens {
    automaton: AhoCorasick,
    tokens: Vec<TokenId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragment<'a> {
    Text(&'a str),
    Token(TokenId),
}

impl AddedTokens {
    /// Empty texts are ignored.
    pub fn new<T: AsRef<str>>(tokens: impl IntoIterator<Item = (T, TokenId)>) -> Result<Self, TokenizerError> {
        let named = tokens.into_iter().filter(|(text, _)| !text.as_ref().is_empty());
        let (texts, tokens): (Vec<T>, Vec<TokenId>) = named.unzip();
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts.iter().map(|text| text.as_ref().as_bytes()))
            .map_err(|error| TokenizerError::Library(error.to_string()))?;
        Ok(Self { automaton, tokens })
    }

    /// The fragments of the text in order. Texts are not empty.
    pub fn split<'a>(&self, text: &'a str) -> Vec<Fragment<'a>> {
        let mut fragments = Vec::new();
        let mut end = 0;
        for found in self.automaton.find_iter(text) {
            push_text(&mut fragments, &text[end..found.start()]);
            fragments.push(Fragment::Token(self.tokens[found.pattern().as_usize()]));
            end = found.end();
        }
        push_text(&mut fragments, &text[end..]);
        fragments
    }
}

fn push_text<'a>(fragments: &mut Vec<Fragment<'a>>, text: &'a str) {
    if !text.is_empty() {
        fragments.push(Fragment::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<String> {
        let added = AddedTokens::new([("<a>", 7), ("<a>b", 8), ("", 9)]).unwrap();
        let show = |fragment| match fragment {
            Fragment::Text(text) => text.to_owned(),
            Fragment::Token(token) => token.to_string(),
        };
        added.split(text).into_iter().map(show).collect()
    }

    #[test]
    fn the_longest_token_is_taken_and_text_is_kept_between() {
        assert_eq!(split("x<a>y<a>b<a>"), ["x", "7", "y", "8", "7"]);
        assert_eq!(split("plain"), ["plain"]);
        assert_eq!(split("<a>b<a"), ["8", "<a"]);
        assert!(split("").is_empty());
    }

    #[test]
    fn no_tokens_at_all_leave_the_text_whole() {
        let added = AddedTokens::new::<&str>([]).unwrap();
        assert_eq!(added.split("<a>"), [Fragment::Text("<a>")]);
    }
}
