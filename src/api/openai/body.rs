//! The JSON body of a generation request: OpenAI's fields for chat and completions, and vLLM's extensions.
//!
//! One struct serves both endpoints, since all fields but the prompt mean the same in both. Unknown fields are ignored, as in
//! vLLM. Known fields that would change the output and are not supported are refused by name (see `unsupported`).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

use super::numbers::{self, whole};
use super::unsupported;
use crate::types::{Failure, TokenId};

/// All fields are optional here. Required fields are checked where they are used, with a better error message.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RequestBody {
    pub model: Option<String>,

    // Input.
    pub messages: Option<Vec<Value>>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub prompt: Option<PromptInput>,
    pub echo: Option<bool>,
    pub cache_salt: Option<String>,
    pub add_special_tokens: Option<bool>,

    // Length and stops.
    #[serde(deserialize_with = "whole")]
    pub n: Option<i64>,
    #[serde(deserialize_with = "whole")]
    pub max_tokens: Option<u32>,
    #[serde(deserialize_with = "whole")]
    pub max_completion_tokens: Option<u32>,
    #[serde(deserialize_with = "whole")]
    pub min_tokens: Option<u32>,
    pub stop: Option<StopInput>,
    pub stop_token_ids: Option<Vec<TokenId>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,

    // Sampling.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    #[serde(deserialize_with = "whole")]
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<BTreeMap<String, f32>>,
    pub seed: Option<Number>,
    #[serde(deserialize_with = "whole")]
    pub priority: Option<i32>,

    // Output.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub logprobs: Option<LogprobsInput>,
    #[serde(deserialize_with = "whole")]
    pub top_logprobs: Option<i64>,
    #[serde(deserialize_with = "whole")]
    pub prompt_logprobs: Option<i64>,
    pub return_token_ids: Option<bool>,
    /// Only for `/tokenize`, which takes the same body.
    pub return_token_strs: Option<bool>,
    pub skip_special_tokens: Option<bool>,

    // Accepted with a value that changes nothing; others are refused.
    #[serde(deserialize_with = "whole")]
    pub best_of: Option<i64>,
    pub modalities: Option<Vec<String>>,
    pub parallel_tool_calls: Option<bool>,
    pub response_format: Option<ResponseFormat>,

    /// All other fields.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// The `prompt` of a completion.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids or an array of arrays of token ids"
)]
pub enum PromptInput {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub enum StopInput {
    One(String),
    Many(Vec<String>),
}

/// A boolean in chat, a number in completions.
#[derive(Clone, Copy, Debug)]
pub enum LogprobsInput {
    Wanted(bool),
    Top(u32),
}

impl<'de> Deserialize<'de> for LogprobsInput {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LogprobsVisitor)
    }
}

struct LogprobsVisitor;

impl Visitor<'_> for LogprobsVisitor {
    type Value = LogprobsInput;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a boolean (chat) or a whole number from 0 (completions)")
    }

    fn visit_bool<E: Error>(self, is_wanted: bool) -> Result<Self::Value, E> {
        Ok(LogprobsInput::Wanted(is_wanted))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        let top = u32::try_from(number).map(LogprobsInput::Top);
        top.map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Self::Value, E> {
        let top = numbers::of_float(number).and_then(|number| u32::try_from(number).ok());
        top.map(LogprobsInput::Top).ok_or_else(|| E::invalid_value(Unexpected::Float(number), &self))
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    /// vLLM's extension: the usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub struct ResponseFormat {
    pub r#type: String,
}

impl RequestBody {
    /// Refuses fields that would silently change the output if they were ignored.
    pub fn refuse_unsupported(&self) -> Result<(), Failure> {
        let unsupported =
            |param, message: String| Err(Failure::invalid(param, message).with_code("unsupported_parameter"));
        unsupported::refuse(&self.other)?;
        if let Some(format) = self.response_format.as_ref().filter(|format| format.r#type != "text") {
            let message = format!("`response_format` of type {:?} is not supported; only \"text\" is.", format.r#type);
            return unsupported("response_format", message);
        }
        if let Some(other) = self.modalities.iter().flatten().find(|modality| *modality != "text") {
            return unsupported("modalities", format!("`modalities` may hold only \"text\", not {other:?}."));
        }
        if self.best_of.is_some_and(|best_of| best_of != self.n.unwrap_or(1)) {
            return unsupported(
                "best_of",
                "`best_of` is not supported; leave it out, or set it to the value of `n`.".into(),
            );
        }
        if self.parallel_tool_calls == Some(false) && self.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
            let message = "`parallel_tool_calls` must not be false: the number of tool calls cannot be limited.";
            return unsupported("parallel_tool_calls", message.into());
        }
        self.check_stream_options()
    }

    fn check_stream_options(&self) -> Result<(), Failure> {
        let is_asked = |options: &StreamOptions| options.include_usage.or(options.continuous_usage_stats).is_some();
        if !self.is_stream() && self.stream_options.as_ref().is_some_and(is_asked) {
            return Err(Failure::invalid("stream_options", "`stream_options` needs `stream` to be true."));
        }
        if self.is_stream() && self.prompt_logprobs.is_some() {
            let message =
                "`prompt_logprobs` is not supported in streams. Use `echo` with `logprobs` on /v1/completions instead.";
            return Err(Failure::invalid("prompt_logprobs", message).with_code("unsupported_parameter"));
        }
        Ok(())
    }

    pub fn is_stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub fn stop_strings(&self) -> &[String] {
        match &self.stop {
            None => &[],
            Some(StopInput::One(stop)) => std::slice::from_ref(stop),
            Some(StopInput::Many(stops)) => stops,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::json::parse;

    fn body(json: &str) -> RequestBody {
        parse(json.as_bytes()).expect(json)
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        assert!(matches!(body(r#"{"prompt": "a"}"#).prompt, Some(PromptInput::Text(_))));
        assert!(
            matches!(body(r#"{"prompt": ["a", "b"]}"#).prompt, Some(PromptInput::Texts(texts)) if texts.len() == 2)
        );
        assert!(matches!(body(r#"{"prompt": [1, 2]}"#).prompt, Some(PromptInput::Tokens(ids)) if ids == [1, 2]));
        assert!(
            matches!(body(r#"{"prompt": [[1], [2]]}"#).prompt, Some(PromptInput::TokenLists(lists)) if lists.len() == 2)
        );
        let failure = parse::<RequestBody>(br#"{"prompt": [1, "a"]}"#).expect_err("mixed");
        assert_eq!(failure.param.as_deref(), Some("prompt"));
        assert!(failure.message.contains("array of arrays of token ids"), "{}", failure.message);
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for json in [
            r#"{"suffix": "end"}"#,
            r#"{"guided_json": {"type": "object"}}"#,
            r#"{"response_format": {"type": "json_object"}}"#,
            r#"{"response_format": {"type": "structural_tag"}}"#,
            r#"{"best_of": 2}"#,
            r#"{"modalities": ["text", "audio"]}"#,
            r#"{"parallel_tool_calls": false, "tools": [{}]}"#,
        ] {
            let failure = body(json).refuse_unsupported().expect_err(json);
            let param = failure.param.expect("a field");
            assert!(json.contains(&format!("\"{param}\"")), "{json}: {param}");
            assert_eq!(failure.code, Some("unsupported_parameter"));
        }
        let harmless = r#"{"suffix": null, "use_beam_search": false, "functions": [], "best_of": 1, "user": "u",
            "response_format": {"type": "text"}, "metadata": {"a": "b"}, "modalities": ["text"], "no_such_field": 7,
            "parallel_tool_calls": false, "tools": []}"#;
        assert_eq!(body(harmless).refuse_unsupported(), Ok(()));
    }

    #[test]
    fn stream_options_are_for_streams() {
        for json in [
            r#"{"stream_options": {"include_usage": true}}"#,
            r#"{"stream_options": {"include_usage": false}, "stream": false}"#,
            r#"{"stream_options": {"continuous_usage_stats": true}}"#,
        ] {
            assert_eq!(body(json).refuse_unsupported().expect_err(json).param.as_deref(), Some("stream_options"));
        }
        for json in [
            r#"{"stream_options": {"include_usage": true}, "stream": true}"#,
            r#"{"stream_options": {}}"#,
            r#"{"stream_options": null, "stream": false}"#,
        ] {
            assert_eq!(body(json).refuse_unsupported(), Ok(()), "{json}");
        }
    }

    #[test]
    fn whole_numbers_may_have_a_fraction_of_zero_and_no_quotes() {
        let floats = body(r#"{"max_tokens": 8.0, "n": 2.0, "top_k": -1.0, "logprobs": 3.0, "priority": -2.0}"#);
        assert_eq!(
            (floats.max_tokens, floats.n, floats.top_k, floats.priority),
            (Some(8), Some(2), Some(-1), Some(-2))
        );
        assert!(matches!(floats.logprobs, Some(LogprobsInput::Top(3))));
        for json in [
            r#"{"max_tokens": "8"}"#,
            r#"{"max_tokens": 8.5}"#,
            r#"{"max_completion_tokens": true}"#,
            r#"{"temperature": "0.5"}"#,
            r#"{"logprobs": "1"}"#,
            r#"{"logprobs": -1}"#,
            r#"{"n": "2"}"#,
        ] {
            let failure = parse::<RequestBody>(json.as_bytes()).expect_err(json);
            assert!(json.contains(failure.param.as_deref().expect("a field")), "{json}: {failure}");
            assert!(failure.message.contains("expected a"), "{json}: {failure}");
        }
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let body = body(r#"{"n": null, "stop": null, "stream": null, "messages": null, "logit_bias": null}"#);
        assert!(body.n.is_none() && body.stop_strings().is_empty() && !body.is_stream());
    }
}
