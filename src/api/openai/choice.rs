//! The text of one choice: token ids in, text that is certain out.

use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};
use crate::types::{SamplingParams, StopCause, TokenId};

/// Rebuilt by feeding the same tokens into a fresh one: the text after k tokens depends on those k alone.
pub struct ChoiceText {
    detokenizer: Detokenizer,
    /// None when the request has no stop strings: nothing is ever held back for them.
    matcher: Option<StopMatcher>,
    shows_stop_token: bool,
}

impl ChoiceText {
    pub fn new(tokenizer: &Tokenizer, params: &SamplingParams) -> Self {
        Self {
            detokenizer: tokenizer.detokenizer(params.skip_special_tokens),
            matcher: (!params.stop.is_empty())
                .then(|| StopMatcher::new(&params.stop, params.include_stop_str_in_output)),
            shows_stop_token: params.include_stop_str_in_output,
        }
    }

    /// The text that this token makes certain. `stops` says that the token itself ends the choice: it has no text then,
    /// unless the client asked for stops to be shown.
    pub fn push(&mut self, token: TokenId, stops: bool) -> String {
        if stops && !self.shows_stop_token {
            return String::new();
        }
        let text = self.detokenizer.push(token);
        self.release(text)
    }

    /// The choice ended: what was held back for a stop string that did not come, and an unfinished character.
    pub fn finish(&mut self, cause: Option<&StopCause>) -> String {
        if matches!(cause, Some(StopCause::String(_))) {
            return String::new();
        }
        let rest = self.detokenizer.finish();
        let mut text = self.release(rest);
        if let Some(matcher) = &mut self.matcher {
            text += &matcher.finish();
        }
        text
    }

    fn release(&mut self, text: String) -> String {
        match &mut self.matcher {
            Some(matcher) => matcher.push(&text).released,
            None => text,
        }
    }
}
