//! The JSON of a generation request, as clients send it: OpenAI's fields for chat and completions, and vLLM's extensions.
//!
//! One struct serves both endpoints, for all but the prompt means the same in both. Unknown fields are ignored, as vLLM
//! does. Known fields that would change the output and are not supported are refused by name.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Number, Value};

use crate::types::{Failure, TokenId};

/// Every field is optional here; what is required is checked where it is used, with a better message.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct RequestBody {
    pub model: Option<String>,

    // What to continue.
    pub messages: Option<Vec<Value>>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub add_generation_prompt: Option<bool>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub prompt: Option<PromptInput>,
    pub echo: Option<bool>,
    pub add_special_tokens: Option<bool>,

    // How much.
    pub n: Option<i64>,
    pub max_tokens: Option<u32>,
    pub max_completion_tokens: Option<u32>,
    pub min_tokens: Option<u32>,
    pub stop: Option<StopInput>,
    pub stop_token_ids: Option<Vec<TokenId>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,

    // How tokens are chosen.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<HashMap<String, f32>>,
    pub seed: Option<Number>,
    pub priority: Option<i32>,

    // What to tell.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub logprobs: Option<LogprobsInput>,
    pub top_logprobs: Option<i64>,
    pub return_token_ids: Option<bool>,
    pub skip_special_tokens: Option<bool>,

    // Understood only to be refused.
    pub allowed_token_ids: Option<Value>,
    pub audio: Option<Value>,
    pub bad_words: Option<Value>,
    pub best_of: Option<i64>,
    pub cache_salt: Option<Value>,
    pub chat_template: Option<Value>,
    pub continue_final_message: Option<Value>,
    pub documents: Option<Value>,
    pub function_call: Option<Value>,
    pub functions: Option<Value>,
    pub guided_choice: Option<Value>,
    pub guided_grammar: Option<Value>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<Value>,
    pub logits_processors: Option<Value>,
    pub modalities: Option<Vec<String>>,
    pub prompt_embeds: Option<Value>,
    pub prompt_logprobs: Option<Value>,
    pub response_format: Option<ResponseFormat>,
    pub return_tokens_as_token_ids: Option<Value>,
    pub structured_outputs: Option<Value>,
    pub suffix: Option<Value>,
    pub thinking_token_budget: Option<Value>,
    pub truncate_prompt_tokens: Option<Value>,
    pub use_beam_search: Option<Value>,
    pub web_search_options: Option<Value>,
}

/// `prompt` of a completion.
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

/// Chat asks with a boolean, completions with a number.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a boolean (chat) or a whole number from 0 (completions)")]
pub enum LogprobsInput {
    Wanted(bool),
    Top(u32),
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    /// vLLM's: the usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub struct ResponseFormat {
    pub r#type: String,
}

impl RequestBody {
    /// Refuses what would silently change the output if it were ignored.
    pub fn refuse_unsupported(&self) -> Result<(), Failure> {
        for (name, value) in self.unsupported() {
            if value.as_ref().is_some_and(|value| !asks_for_nothing(value)) {
                return Err(
                    Failure::invalid(name, format!("`{name}` is not supported.")).with_code("unsupported_parameter")
                );
            }
        }
        if let Some(format) = self.response_format.as_ref().filter(|format| format.r#type != "text") {
            let message = format!("`response_format` of type {:?} is not supported; only \"text\" is.", format.r#type);
            return Err(Failure::invalid("response_format", message).with_code("unsupported_parameter"));
        }
        if let Some(other) = self.modalities.iter().flatten().find(|modality| *modality != "text") {
            let message = format!("`modalities` may hold only \"text\", not {other:?}.");
            return Err(Failure::invalid("modalities", message).with_code("unsupported_parameter"));
        }
        if self.best_of.is_some_and(|best_of| best_of != self.n.unwrap_or(1)) {
            let message = "`best_of` is not supported beyond `n`.";
            return Err(Failure::invalid("best_of", message).with_code("unsupported_parameter"));
        }
        Ok(())
    }

    fn unsupported(&self) -> [(&'static str, &Option<Value>); 23] {
        [
            ("allowed_token_ids", &self.allowed_token_ids),
            ("audio", &self.audio),
            ("bad_words", &self.bad_words),
            ("cache_salt", &self.cache_salt),
            ("chat_template", &self.chat_template),
            ("continue_final_message", &self.continue_final_message),
            ("documents", &self.documents),
            ("function_call", &self.function_call),
            ("functions", &self.functions),
            ("guided_choice", &self.guided_choice),
            ("guided_grammar", &self.guided_grammar),
            ("guided_json", &self.guided_json),
            ("guided_regex", &self.guided_regex),
            ("logits_processors", &self.logits_processors),
            ("prompt_embeds", &self.prompt_embeds),
            ("prompt_logprobs", &self.prompt_logprobs),
            ("return_tokens_as_token_ids", &self.return_tokens_as_token_ids),
            ("structured_outputs", &self.structured_outputs),
            ("suffix", &self.suffix),
            ("thinking_token_budget", &self.thinking_token_budget),
            ("truncate_prompt_tokens", &self.truncate_prompt_tokens),
            ("use_beam_search", &self.use_beam_search),
            ("web_search_options", &self.web_search_options),
        ]
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

/// Clients write out defaults: `false`, an empty list, an empty string.
fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
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
    fn unsupported_fields_are_refused_by_name_unless_they_ask_for_nothing() {
        for json in [
            r#"{"suffix": "end"}"#,
            r#"{"use_beam_search": true}"#,
            r#"{"guided_json": {"type": "object"}}"#,
            r#"{"response_format": {"type": "json_object"}}"#,
            r#"{"best_of": 2}"#,
            r#"{"modalities": ["text", "audio"]}"#,
            r#"{"prompt_logprobs": 1}"#,
        ] {
            let failure = body(json).refuse_unsupported().expect_err(json);
            let param = failure.param.expect("a field");
            assert!(json.contains(&format!("\"{param}\"")), "{json}: {param}");
            assert_eq!(failure.code, Some("unsupported_parameter"));
        }
        let harmless = r#"{"suffix": null, "use_beam_search": false, "functions": [], "best_of": 1, "user": "u",
            "response_format": {"type": "text"}, "metadata": {"a": "b"}, "modalities": ["text"], "no_such_field": 7}"#;
        assert!(body(harmless).refuse_unsupported().is_ok());
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let body = body(r#"{"n": null, "stop": null, "stream": null, "messages": null, "logit_bias": null}"#);
        assert!(body.n.is_none() && body.stop_strings().is_empty() && !body.is_stream());
    }
}
