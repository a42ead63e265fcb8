//! The content of a stream, by choice, and the comparison of two streams. Pure.

use serde_json::Value;

/// Everything that a client sees of one choice, apart from how the text was split into chunks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChoiceTranscript {
    pub tokens: Vec<u32>,
    pub text: String,
    /// The log-probabilities of each chunk that has any.
    pub logprobs: Vec<Value>,
    pub finish_reason: Option<String>,
    pub stop_reason: Value,
    /// The number of opening chunks: one in chat, none in completions.
    pub openings: u32,
}

/// Everything that a client received of one stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transcript {
    pub choices: Vec<ChoiceTranscript>,
    pub prompt: Vec<u32>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a chunk has an unexpected shape: {0}")]
pub struct MalformedChunk(String);

/// The maximum number of choices of one request. A higher index is an error of the server.
const MAX_CHOICES: usize = 128;

impl Transcript {
    /// Adds a chunk of a chat or completion, and returns how many tokens it had.
    pub fn take(&mut self, chunk: &Value) -> Result<usize, MalformedChunk> {
        let malformed = || MalformedChunk(chunk.to_string().chars().take(200).collect());
        let mut brought = 0;
        if let Some(prompt) = ids(&chunk["prompt_token_ids"]) {
            self.prompt = prompt;
        }
        for choice in chunk["choices"].as_array().ok_or_else(malformed)? {
            let index = choice["index"].as_u64().filter(|index| *index < MAX_CHOICES as u64).ok_or_else(malformed)?;
            if let Some(prompt) = ids(&choice["prompt_token_ids"]) {
                self.prompt = prompt;
            }
            brought += self.choice(index as usize).take(choice);
        }
        Ok(brought)
    }

    fn choice(&mut self, index: usize) -> &mut ChoiceTranscript {
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, ChoiceTranscript::default);
        }
        &mut self.choices[index]
    }

    pub fn is_finished(&self) -> bool {
        !self.choices.is_empty() && self.choices.iter().all(|choice| choice.finish_reason.is_some())
    }

    pub fn tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).sum()
    }

    /// The number of positions at which the tokens differ from `reference`. If all tokens of a choice agree but something else
    /// differs (text, log-probabilities, finish reason, a repeated opening chunk), that counts as one.
    pub fn wrong_tokens(&self, reference: &Self) -> u64 {
        let choices = self.choices.len().max(reference.choices.len());
        let nothing = ChoiceTranscript::default();
        let of =
            |transcript: &'_ Self, index| transcript.choices.get(index).cloned().unwrap_or_else(|| nothing.clone());
        (0..choices).map(|index| of(self, index).wrong_tokens(&of(reference, index))).sum()
    }

    /// The first difference, in words. `None` if there is none.
    pub fn difference(&self, reference: &Self) -> Option<String> {
        if self.choices.len() != reference.choices.len() {
            return Some(format!("{} choices instead of {}", self.choices.len(), reference.choices.len()));
        }
        let pairs = self.choices.iter().zip(&reference.choices).enumerate();
        pairs.into_iter().find_map(|(index, (ours, theirs))| {
            ours.difference(theirs).map(|difference| format!("choice {index}: {difference}"))
        })
    }
}

impl ChoiceTranscript {
    fn take(&mut self, choice: &Value) -> usize {
        let delta = &choice["delta"];
        if delta["role"].is_string() {
            self.openings += 1;
        }
        self.text += choice["text"].as_str().or_else(|| delta["content"].as_str()).unwrap_or_default();
        if !choice["logprobs"].is_null() {
            self.logprobs.push(choice["logprobs"].clone());
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = Some(reason.to_owned());
            self.stop_reason = choice["stop_reason"].clone();
        }
        let tokens = ids(&choice["token_ids"]).unwrap_or_default();
        self.tokens.extend(&tokens);
        tokens.len()
    }

    fn wrong_tokens(&self, reference: &Self) -> u64 {
        let length = self.tokens.len().max(reference.tokens.len());
        let wrong = (0..length).filter(|&at| self.tokens.get(at) != reference.tokens.get(at)).count() as u64;
        if wrong == 0 && self != reference { 1 } else { wrong }
    }

    fn difference(&self, reference: &Self) -> Option<String> {
        let length = self.tokens.len().max(reference.tokens.len());
        if let Some(at) = (0..length).find(|&at| self.tokens.get(at) != reference.tokens.get(at)) {
            let shown = |tokens: &[u32]| tokens.get(at).map_or("nothing".into(), ToString::to_string);
            return Some(format!("token {at} is {} instead of {}", shown(&self.tokens), shown(&reference.tokens)));
        }
        let parts = [
            ("text", self.text != reference.text),
            ("logprobs", self.logprobs != reference.logprobs),
            ("finish_reason", self.finish_reason != reference.finish_reason),
            ("stop_reason", self.stop_reason != reference.stop_reason),
            ("opening chunks", self.openings != reference.openings),
        ];
        parts.iter().find(|(_, differs)| *differs).map(|(part, _)| format!("the tokens agree, but not the {part}"))
    }
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn transcript(chunks: &[Value]) -> Transcript {
        let mut transcript = Transcript::default();
        for chunk in chunks {
            transcript.take(chunk).expect("a chunk");
        }
        transcript
    }

    fn chat() -> Vec<Value> {
        vec![
            json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1, 2]}),
            json!({"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [5], "logprobs": {"content": [0.5]}}]}),
            json!({"choices": [{"index": 0, "delta": {"content": "b"}, "token_ids": [6]}]}),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "b"}]}),
        ]
    }

    #[test]
    fn chat_and_completions_are_read() {
        let read = transcript(&chat());
        assert_eq!((read.prompt.as_slice(), read.tokens(), read.is_finished()), (&[1, 2][..], 2, true));
        let choice = &read.choices[0];
        assert_eq!((choice.text.as_str(), choice.openings, choice.logprobs.len()), ("ab", 1, 1));
        let completion = json!({"choices": [{"index": 1, "text": "x", "token_ids": [9], "prompt_token_ids": [3]}]});
        let mut read = Transcript::default();
        assert_eq!(read.take(&completion), Ok(1));
        assert_eq!((read.choices.len(), read.is_finished(), read.prompt.as_slice()), (2, false, &[3][..]));
    }

    #[test]
    fn what_is_no_chunk_is_an_error() {
        for chunk in [json!({}), json!({"choices": [{}]}), json!({"choices": [{"index": 1_000_000}]})] {
            assert!(Transcript::default().take(&chunk).is_err(), "{chunk}");
        }
    }

    #[test]
    fn every_difference_counts_and_is_told() {
        let reference = transcript(&chat());
        assert_eq!((reference.wrong_tokens(&reference), reference.difference(&reference)), (0, None));
        let altered = |alter: &dyn Fn(&mut Vec<Value>)| {
            let mut chunks = chat();
            alter(&mut chunks);
            let altered = transcript(&chunks);
            (altered.wrong_tokens(&reference), altered.difference(&reference).unwrap_or_default())
        };
        let (wrong, told) = altered(&|chunks| chunks[1]["choices"][0]["token_ids"] = json!([7]));
        assert_eq!((wrong, told.as_str()), (1, "choice 0: token 0 is 7 instead of 5"));
        // One token is repeated, so it and the next token are at wrong positions.
        let (wrong, told) = altered(&|chunks| chunks.insert(1, chunks[1].clone()));
        assert_eq!((wrong, told.as_str()), (2, "choice 0: token 1 is 5 instead of 6"));
        type Alter = dyn Fn(&mut Vec<Value>);
        let others: [(&Alter, &str); 4] = [
            (&|chunks| chunks[2]["choices"][0]["delta"]["content"] = json!("c"), "text"),
            (&|chunks| chunks.insert(0, chunks[0].clone()), "opening"),
            (&|chunks| chunks[3]["choices"][0]["finish_reason"] = json!("length"), "finish_reason"),
            (&|chunks| chunks[1]["choices"][0]["logprobs"] = json!({"content": [0.25]}), "logprobs"),
        ];
        for (alter, part) in others {
            let (wrong, told) = altered(alter);
            assert!(wrong == 1 && told.contains(part), "{wrong} {told}");
        }
        assert_eq!(Transcript::default().wrong_tokens(&reference), 2);
    }
}
