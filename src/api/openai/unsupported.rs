//! Fields of OpenAI, vLLM, SGLang, llama.cpp, Ollama and TGI that change the output and are not supported. Each is refused by
//! name, unless its value has no effect.
//!
//! A field belongs here if ignoring it would change the output. Fields that only concern speed, accounting or logs are ignored,
//! and so are unknown fields, as in vLLM.

use serde_json::{Map, Value};

use crate::types::Failure;

/// Values that have no effect and are accepted. Null always is.
#[derive(Clone, Copy, Debug)]
enum Neutral {
    /// Only null.
    Null,
    /// False and empty values, which some clients send as defaults.
    Empty,
    /// This number, and empty values.
    Number(f64),
    /// Numbers up to this one, and empty values.
    AtMost(f64),
    /// Only true.
    True,
    /// These words, and empty values.
    Words(&'static [&'static str]),
}

use Neutral::{AtMost, Empty, Null, Number, True, Words};

/// Name, accepted values, and what to use instead.
type Field = (&'static str, Neutral, Option<&'static str>);

/// Fields that constrain the text.
const CONSTRAINTS: &[Field] = &[
    ("allowed_token_ids", Null, Some("logit_bias")),
    ("bad_words", Empty, Some("logit_bias")),
    ("ban_eos_token", Empty, Some("ignore_eos")),
    ("banned_tokens", Empty, Some("logit_bias")),
    ("custom_logit_processor", Empty, None),
    ("custom_token_bans", Empty, Some("logit_bias")),
    ("ebnf", Empty, None),
    ("format", Empty, None),
    ("grammar", Empty, None),
    ("grammar_triggers", Empty, None),
    ("guided_choice", Empty, None),
    ("guided_decoding", Empty, None),
    ("guided_grammar", Empty, None),
    ("guided_json", Empty, None),
    ("guided_json_object", Empty, None),
    ("guided_regex", Empty, None),
    ("guideline", Empty, None),
    ("json_schema", Empty, None),
    ("logits_processors", Empty, Some("logit_bias")),
    ("regex", Empty, None),
    ("repetition_detection", Null, None),
    ("stop_regex", Empty, Some("stop")),
    ("stop_sequences", Empty, Some("stop")),
    ("structural_tag", Empty, None),
    ("structured_outputs", Empty, None),
    ("watermark", Empty, None),
    ("watermarking", Empty, None),
];

/// Sampling methods, and length limits under other names.
const SAMPLING: &[Field] = &[
    ("cfg_scale", Number(1.0), None),
    ("do_sample", True, Some("temperature")),
    ("dry_multiplier", Number(0.0), None),
    ("dynamic_temperature", Empty, None),
    ("dynatemp_range", Number(0.0), None),
    ("early_stopping", Empty, None),
    ("encoder_repetition_penalty", Number(1.0), None),
    ("epsilon_cutoff", Number(0.0), None),
    ("eta_cutoff", Number(0.0), None),
    ("guidance_scale", Number(1.0), None),
    ("length_penalty", Number(1.0), None),
    ("max_length", Null, Some("max_tokens")),
    ("max_new_tokens", Null, Some("max_tokens")),
    ("min_keep", AtMost(0.0), None),
    ("min_length", AtMost(0.0), Some("min_tokens")),
    ("min_new_tokens", AtMost(0.0), Some("min_tokens")),
    ("mirostat", Number(0.0), None),
    ("mirostat_mode", Number(0.0), None),
    ("n_predict", AtMost(-1.0), Some("max_tokens")),
    ("negative_prompt", Empty, None),
    ("no_repeat_ngram_size", Number(0.0), None),
    ("num_beams", Number(1.0), None),
    ("num_predict", AtMost(-1.0), Some("max_tokens")),
    ("options", Empty, Some("fields beside `model`")),
    ("parameters", Empty, Some("fields beside `model`")),
    ("penalty_alpha", Number(0.0), None),
    ("repeat_penalty", Number(1.0), Some("repetition_penalty")),
    ("sampler_order", Empty, None),
    ("sampler_priority", Empty, None),
    ("samplers", Empty, None),
    ("sampling_params", Empty, Some("fields beside `model`")),
    ("smoothing_factor", Number(0.0), None),
    ("t_max_predict_ms", AtMost(0.0), Some("the header x-request-timeout-ms")),
    ("temperature_last", Empty, None),
    ("tfs", Number(1.0), None),
    ("tfs_z", Number(1.0), None),
    ("top_a", Number(0.0), None),
    ("top_n_sigma", AtMost(0.0), None),
    ("typical", Number(1.0), None),
    ("typical_p", Number(1.0), None),
    ("use_beam_search", Empty, None),
    ("xtc_probability", Number(0.0), None),
];

/// Fields that change the prompt or the model.
const PROMPT: &[Field] = &[
    ("adapter_id", Empty, None),
    ("chat_template", Empty, None),
    ("context", Empty, Some("prompt")),
    ("control_vectors", Empty, None),
    ("documents", Empty, None),
    ("enable_thinking", Null, Some("chat_template_kwargs")),
    ("function_call", Empty, Some("tool_choice")),
    ("functions", Empty, Some("tools")),
    ("image_data", Empty, None),
    ("images", Empty, None),
    ("images_config", Empty, None),
    ("input_extra", Empty, None),
    ("input_ids", Empty, Some("prompt")),
    ("input_prefix", Empty, None),
    ("input_suffix", Empty, None),
    ("inputs", Empty, Some("prompt")),
    ("lora", Empty, None),
    ("lora_path", Empty, None),
    ("lora_request", Empty, None),
    ("multi_modal_data", Empty, None),
    ("prompt_embeds", Empty, None),
    ("raw", Empty, None),
    ("reasoning", Empty, Some("chat_template_kwargs")),
    ("session_params", Empty, None),
    ("suffix", Empty, None),
    ("system", Empty, Some("a message")),
    ("task", Empty, None),
    ("template", Empty, None),
    ("think", Null, Some("chat_template_kwargs")),
    ("thinking", Null, Some("chat_template_kwargs")),
    ("thinking_budget", AtMost(-1.0), None),
    ("thinking_budget_tokens", AtMost(-1.0), None),
    ("thinking_token_budget", AtMost(-1.0), None),
    ("tool_prompt", Empty, None),
    ("truncate", Null, None),
    ("truncate_prompt_tokens", Null, None),
    ("verbosity", Words(&["medium"]), None),
    ("web_search_options", Null, None),
];

/// Fields that change the content of the response.
const ANSWER: &[Field] = &[
    ("audio", Empty, None),
    ("decoder_input_details", Empty, Some("prompt_logprobs")),
    ("ec_transfer_params", Empty, None),
    ("extra_key", Empty, Some("cache_salt")),
    ("include_reasoning", True, None),
    ("kv_transfer_params", Empty, None),
    ("logprob_token_ids", Empty, None),
    ("n_probs", AtMost(0.0), Some("logprobs")),
    ("no_stop_trim", Empty, Some("include_stop_str_in_output")),
    ("post_sampling_probs", Empty, Some("logprobs")),
    ("reasoning_format", Words(&["auto", "none"]), None),
    ("return_full_text", Empty, Some("echo")),
    ("return_hidden_states", Empty, None),
    ("return_logprob", Empty, Some("logprobs")),
    ("return_prompt_text", Empty, None),
    ("return_prompt_token_ids", Empty, Some("return_token_ids")),
    ("return_routed_experts", Empty, None),
    ("return_tokens", Empty, Some("return_token_ids")),
    ("return_tokens_as_token_ids", Empty, Some("return_token_ids")),
    ("top_n_tokens", AtMost(0.0), Some("logprobs")),
    ("vllm_xargs", Empty, None),
];

/// All tables, each with its title.
const TABLES: [(&str, &[Field]); 4] = [
    ("Constraints", CONSTRAINTS),
    ("Sampling and length", SAMPLING),
    ("Prompt and model", PROMPT),
    ("Response", ANSWER),
];

/// The refused fields as Markdown, for docs/api.md.
pub fn markdown_tables() -> String {
    let mut text = String::new();
    for (title, table) in TABLES {
        text += &format!("\n{title}:\n\n| refused | accepted value | use instead |\n|---|---|---|\n");
        for (name, neutral, instead) in table {
            let accepted = match neutral {
                Null => "none".to_owned(),
                Empty => "empty".to_owned(),
                Number(number) => format!("`{number}`"),
                AtMost(number) => format!("`{number}` or less"),
                True => "`true`".to_owned(),
                Words(words) => words.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", "),
            };
            let instead = instead.map_or_else(String::new, quoted);
            text += &format!("| `{name}` | {accepted} | {instead} |\n");
        }
    }
    text + "\n"
}

/// Field names are put in backticks, phrases are not.
fn quoted(instead: &str) -> String {
    if instead.contains(' ') { instead.to_owned() } else { format!("`{instead}`") }
}

/// Refuses the first field that would change the output. `fields` are the fields of the body that `RequestBody` does not have.
pub fn refuse(fields: &Map<String, Value>) -> Result<(), Failure> {
    for (name, neutral, instead) in TABLES.iter().flat_map(|(_, table)| *table) {
        if let Some(value) = fields.get(*name)
            && !neutral.holds(value)
        {
            return Err(refusal(name, *neutral, *instead));
        }
    }
    Ok(())
}

fn refusal(name: &'static str, neutral: Neutral, instead: Option<&str>) -> Failure {
    let mut message = format!("`{name}` is not supported");
    match neutral {
        Null | Empty => message += ".",
        Number(number) => message += &format!("; leave it out, or set it to {number}."),
        AtMost(number) => message += &format!("; leave it out, or set it to {number} at most."),
        True => message += " unless it is true.",
        Words(words) => message += &format!("; leave it out, or set it to {}.", words.join(" or ")),
    }
    if let Some(instead) = instead {
        message += &format!(" Use {} instead.", quoted(instead));
    }
    Failure::invalid(name, message).with_code("unsupported_parameter")
}

impl Neutral {
    fn holds(self, value: &Value) -> bool {
        if value.is_null() {
            return true;
        }
        let is_empty = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(members) => members.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Bool(true) | Value::Number(_) => false,
        };
        match self {
            Null => false,
            Empty => is_empty,
            Number(number) => is_empty || value.as_f64() == Some(number),
            AtMost(most) => is_empty || value.as_f64().is_some_and(|number| number <= most),
            True => *value == Value::Bool(true),
            Words(words) => is_empty || value.as_str().is_some_and(|text| words.contains(&text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn refused(fields: Value) -> Option<Failure> {
        let Value::Object(fields) = fields else { panic!("a body is an object") };
        refuse(&fields).err()
    }

    #[test]
    fn whatever_would_change_the_answer_is_refused_by_name() {
        for (name, value) in [
            ("grammar", json!("root ::= \"a\"")),
            ("json_schema", json!({"type": "object"})),
            ("regex", json!("a+")),
            ("ebnf", json!("root ::= \"a\"")),
            ("structural_tag", json!({"type": "structural_tag"})),
            ("stop_regex", json!("a+")),
            ("format", json!("json")),
            ("format", json!({"type": "object"})),
            ("options", json!({"temperature": 0})),
            ("typical_p", json!(0.9)),
            ("mirostat", json!(2)),
            ("dry_multiplier", json!(0.8)),
            ("xtc_probability", json!(0.5)),
            ("length_penalty", json!(0.5)),
            ("lora_path", json!("adapter")),
            ("lora", json!([{"id": 0, "scale": 1}])),
            ("use_beam_search", json!(true)),
            ("bad_words", json!(["sea"])),
            ("min_new_tokens", json!(4)),
            ("truncate_prompt_tokens", json!(-1)),
            ("truncate_prompt_tokens", json!(8)),
            ("n_predict", json!(8)),
            ("max_new_tokens", json!(0)),
            ("repeat_penalty", json!(1.1)),
            ("do_sample", json!(false)),
            ("think", json!(false)),
            ("verbosity", json!("low")),
            ("allowed_token_ids", json!([])),
        ] {
            let failure = refused(json!({ name: value })).unwrap_or_else(|| panic!("{name} passed"));
            assert_eq!((failure.param.as_deref(), failure.code), (Some(name), Some("unsupported_parameter")));
            assert!(failure.message.starts_with(&format!("`{name}` is not supported")), "{}", failure.message);
        }
    }

    #[test]
    fn what_asks_for_nothing_passes() {
        let harmless = json!({
            "grammar": "", "json_schema": null, "options": {}, "lora": [], "use_beam_search": false, "typical_p": 1,
            "mirostat": 0, "mirostat_tau": 5.0, "dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0,
            "xtc_threshold": 0.1, "length_penalty": 1.0, "n_predict": -1, "top_n_sigma": -1.0, "min_new_tokens": 0,
            "do_sample": true, "verbosity": "medium", "thinking_token_budget": -1, "include_reasoning": true,
            "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": true, "cache_prompt": true,
            "prediction": {"type": "content", "content": "x"}, "keep_alive": "5m", "no_such_field": 7
        });
        assert_eq!(refused(harmless), None);
    }

    #[test]
    fn a_refusal_says_what_to_use() {
        let message = |fields| refused(fields).expect("refused").message;
        assert_eq!(message(json!({"typical_p": 0.5})), "`typical_p` is not supported; leave it out, or set it to 1.");
        assert_eq!(
            message(json!({"n_probs": 3})),
            "`n_probs` is not supported; leave it out, or set it to 0 at most. Use `logprobs` instead."
        );
        assert_eq!(message(json!({"system": "x"})), "`system` is not supported. Use a message instead.");
    }

    #[test]
    fn every_name_stands_once_in_order() {
        let tables = [CONSTRAINTS, SAMPLING, PROMPT, ANSWER];
        let names: Vec<&str> = tables.into_iter().flatten().map(|(name, ..)| *name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        assert!(tables.iter().all(|table| table.is_sorted_by_key(|(name, ..)| *name)));
    }
}
