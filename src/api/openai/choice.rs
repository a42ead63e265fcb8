//! The text of one choice: takes token ids, returns the text that can no longer change.

use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};
use crate::types::{SamplingParams, StopCause, TokenId};

/// To restore it, feed the same tokens into a new one: the text after k tokens depends on those k tokens alone.
pub struct ChoiceText {
    detokenizer: Detokenizer,
    /// None if the request has no stop strings; then no text is held back for them.
    matcher: Option<StopMatcher>,
    shows_stop_token: bool,
    /// Characters of the text so far, including those held back.
    characters: usize,
}

/// The effect of one token.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Addition {
    /// Text that can be sent now.
    pub text: String,
    /// Where the token's own text begins, in characters from the start of the choice. A token that continues an incomplete
    /// character begins where that character begins.
    pub offset: usize,
    /// The token completed a stop string.
    pub completes_stop: bool,
}

impl ChoiceText {
    pub fn new(tokenizer: &Tokenizer, params: &SamplingParams) -> Self {
        Self {
            detokenizer: tokenizer.detokenizer(params.skip_special_tokens),
            matcher: (!params.stop.is_empty())
                .then(|| StopMatcher::new(&params.stop, params.include_stop_str_in_output)),
            shows_stop_token: params.include_stop_str_in_output,
            characters: 0,
        }
    }

    /// Adds the next token. `may_end` says whether a stop string that it completes counts. `is_stop_token` says that the token
    /// itself ends the choice; it then has no text, unless the client asked for stops to be included.
    pub fn push(&mut self, token: TokenId, may_end: bool, is_stop_token: bool) -> Addition {
        let offset = self.characters;
        if is_stop_token && !self.shows_stop_token {
            return Addition { offset, ..Addition::default() };
        }
        let text = self.detokenizer.push(token);
        self.characters += text.chars().count();
        match &mut self.matcher {
            None => Addition { text, offset, completes_stop: false },
            Some(matcher) => {
                let outcome = matcher.push(&text, may_end);
                Addition { text: outcome.released, offset, completes_stop: outcome.matched.is_some() }
            }
        }
    }

    /// Ends the choice. Returns the text that was held back for a possible stop string, and an incomplete character.
    pub fn finish(&mut self, cause: Option<&StopCause>) -> String {
        if matches!(cause, Some(StopCause::String(_))) {
            return String::new();
        }
        let rest = self.detokenizer.finish();
        match &mut self.matcher {
            None => rest,
            Some(matcher) => matcher.push(&rest, false).released + &matcher.finish(),
        }
    }
}
