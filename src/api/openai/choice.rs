//! The text of one choice: token ids in, text that is certain out.

use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};
use crate::types::{SamplingParams, StopCause, TokenId};

/// Rebuilt by feeding the same tokens into a fresh one: the text after k tokens depends on those k alone.
pub struct ChoiceText {
    detokenizer: Detokenizer,
    /// None when the request has no stop strings: nothing is ever held back for them.
    matcher: Option<StopMatcher>,
    shows_stop_token: bool,
    /// Characters of the text so far, those included that are held back.
    characters: usize,
}

/// What one token adds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Addition {
    /// The text that the token makes certain.
    pub text: String,
    /// Where the token's own text begins, in characters from the start of the choice. A token that goes on with an
    /// unfinished character begins where that character does.
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

    /// Takes the next token. `may_end` says whether a stop string that it completes counts; `is_stop_token` that the token
    /// itself ends the choice: it has no text then, unless the client asked for stops to be shown.
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

    /// The choice ended: what was held back for a stop string that did not come, and an unfinished character.
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
