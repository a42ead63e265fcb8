//! The sampling defaults in a model's files: `generation_config.json`, or `general.sampling.*` in a GGUF file.
//!
//! Values that a request could not ask for are ignored with a log line. `do_sample: false` means the same as in transformers:
//! always take the most likely token, whatever else the file says.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::formats::gguf;
use crate::types::SamplingDefaults;

/// The limits for requests (see `api::openai::sampling`).
const MAX_TEMPERATURE: f64 = 2.0;
const MAX_REPETITION_PENALTY: f64 = 10.0;
/// For values that must be greater than 0, also as `f32`.
const SMALLEST: f64 = f32::MIN_POSITIVE as f64;

/// Reads the content of a `generation_config.json`.
pub(super) fn of_generation_config(config: &Map<String, Value>) -> SamplingDefaults {
    let is_greedy = config.get("do_sample").and_then(Value::as_bool) == Some(false);
    let numbers = Numbers(&|name| {
        let value = config.get(name).filter(|value| !value.is_null())?;
        Some(value.as_f64().unwrap_or(f64::NAN))
    });
    SamplingDefaults {
        temperature: if is_greedy { Some(0.0) } else { numbers.temperature("temperature") },
        top_p: numbers.top_p("top_p"),
        top_k: numbers.top_k("top_k"),
        min_p: numbers.min_p("min_p"),
        repetition_penalty: numbers.repetition_penalty("repetition_penalty"),
        max_new_tokens: numbers.count("max_new_tokens", 1.0),
    }
}

/// Reads a GGUF file's metadata. The format has no key for the number of tokens.
pub(super) fn of_gguf(metadata: &BTreeMap<String, gguf::Value>) -> SamplingDefaults {
    let numbers = Numbers(&|name| Some(metadata.get(name)?.as_f64().unwrap_or(f64::NAN)));
    SamplingDefaults {
        temperature: numbers.temperature("general.sampling.temp"),
        top_p: numbers.top_p("general.sampling.top_p"),
        top_k: numbers.top_k("general.sampling.top_k"),
        min_p: numbers.min_p("general.sampling.min_p"),
        repetition_penalty: numbers.repetition_penalty("general.sampling.penalty_repeat"),
        max_new_tokens: None,
    }
}

/// Looks up a number by name; NaN if the value is not a number.
struct Numbers<'a>(&'a dyn Fn(&str) -> Option<f64>);

impl Numbers<'_> {
    fn temperature(&self, name: &str) -> Option<f32> {
        Some(self.within(name, 0.0, MAX_TEMPERATURE)? as f32)
    }

    fn top_p(&self, name: &str) -> Option<f32> {
        Some(self.within(name, 0.0, 1.0)? as f32)
    }

    fn min_p(&self, name: &str) -> Option<f32> {
        Some(self.within(name, 0.0, 1.0)? as f32)
    }

    fn repetition_penalty(&self, name: &str) -> Option<f32> {
        Some(self.within(name, SMALLEST, MAX_REPETITION_PENALTY)? as f32)
    }

    /// Both −1 and 0 mean no limit.
    fn top_k(&self, name: &str) -> Option<u32> {
        self.count(name, -1.0)
    }

    fn count(&self, name: &str, min: f64) -> Option<u32> {
        let number = self.within(name, min, u32::MAX.into())?;
        (number.fract() == 0.0).then_some(number as u32)
    }

    fn within(&self, name: &str, min: f64, max: f64) -> Option<f64> {
        let number = (self.0)(name)?;
        if (min..=max).contains(&number) {
            return Some(number);
        }
        tracing::warn!(name, number, "ignoring a sampling default of the model's files that is out of range");
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(config: Value) -> SamplingDefaults {
        of_generation_config(config.as_object().expect("an object"))
    }

    #[test]
    fn all_of_a_generation_config_is_read() {
        let config = json!({
            "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05,
            "max_new_tokens": 2048, "eos_token_id": [1, 2], "transformers_version": "5.0.0"
        });
        let expected = SamplingDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            min_p: Some(0.05),
            repetition_penalty: Some(1.05),
            max_new_tokens: Some(2048),
        };
        assert_eq!(of(config), expected);
        assert!(of(json!({"temperature": null, "eos_token_id": 3})).is_empty());
    }

    #[test]
    fn without_sampling_the_likeliest_token_is_taken() {
        assert_eq!(of(json!({"do_sample": false, "temperature": 0.9})).temperature, Some(0.0));
        assert_eq!(of(json!({"temperature": 0.9})).temperature, Some(0.9), "absent is not false");
        assert_eq!(of(json!({"do_sample": null, "temperature": 0.9})).temperature, Some(0.9));
    }

    #[test]
    fn values_that_no_request_could_have_are_left_out() {
        let strange = json!({
            "temperature": -1, "top_p": 1.5, "top_k": "many", "min_p": 2, "repetition_penalty": 0, "max_new_tokens": 0
        });
        assert!(of(strange).is_empty());
        assert_eq!(of(json!({"top_k": -1})).top_k, Some(0));
        assert_eq!(of(json!({"top_k": 1.5})).top_k, None);
    }

    #[test]
    fn gguf_files_carry_them_too() {
        let metadata = BTreeMap::from([
            ("general.sampling.temp".to_owned(), gguf::Value::F64(0.25)),
            ("general.sampling.top_k".to_owned(), gguf::Value::U64(40)),
            ("general.sampling.min_p".to_owned(), gguf::Value::String("x".into())),
        ]);
        let expected = SamplingDefaults { temperature: Some(0.25), top_k: Some(40), ..Default::default() };
        assert_eq!(of_gguf(&metadata), expected);
    }
}
