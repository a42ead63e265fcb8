//! Where a prompt ends that continues the last message, and what a template must do for it.

use serde_json::json;

use super::*;
use crate::api::json::parse;
use crate::cluster::ModelReport;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use crate::types::Fingerprint;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn model(template: &str) -> ServedModel {
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/llama-gqa-tied-bf16");
    let tokenizer = Tokenizer::from_dir(&fixture).expect("the fixture has a tokenizer");
    let template = ChatTemplate::new(template, tokenizer.special_tokens()).expect("compiles");
    let report = ModelReport {
        names: vec!["tiny".into()],
        fingerprint: Fingerprint::new("f00d"),
        tokenizer: "tokenizer".into(),
        max_model_len: 256,
        created: 1,
    };
    ServedModel::new(&report, tokenizer, template, vec![])
}

fn prompt(template: &str, body: Value) -> Result<String, Failure> {
    let mut body: RequestBody = parse(body.to_string().as_bytes())?;
    Conversation::take(&mut body)?.render(&model(template))
}

/// A request to continue `said`.
fn continuing(said: Value) -> Value {
    let messages = json!([{"role": "user", "content": "Count"}, {"role": "assistant", "content": said}]);
    json!({"messages": messages, "continue_final_message": true})
}

#[test]
fn the_prompt_ends_inside_the_last_message() {
    let expected = "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n1, 2,";
    assert_eq!(prompt(CHATML, continuing(json!("1, 2,"))).as_deref(), Ok(expected));
    let spaced = format!("{expected} ");
    assert_eq!(prompt(CHATML, continuing(json!("1, 2, "))).as_deref(), Ok(spaced.as_str()));
    let trimming = CHATML.replace("m.content", "m.content | trim");
    assert_eq!(prompt(&trimming, continuing(json!("1, 2,  "))).as_deref(), Ok(expected));
    // Part of the text, not of the mark.
    let marked = format!("a {MARK}b");
    assert!(prompt(CHATML, continuing(json!(marked))).is_ok_and(|text| text.ends_with(&marked)));
    let parts = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}";
    assert_eq!(prompt(parts, continuing(json!("1, 2,"))).as_deref(), Ok("[Count][1, 2,"));
}

#[test]
fn a_message_goes_on_or_a_new_one_begins() {
    let with = |add: Value, goes_on: Value| {
        let mut body = continuing(json!("1, 2,"));
        body["add_generation_prompt"] = add;
        body["continue_final_message"] = goes_on;
        prompt(CHATML, body)
    };
    let closed = "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n1, 2,<|im_end|>\n";
    assert_eq!(with(json!(false), json!(false)).as_deref(), Ok(closed));
    let opened = format!("{closed}<|im_start|>assistant\n");
    assert_eq!(with(Value::Null, Value::Null), Ok(opened.clone()));
    assert_eq!(with(json!(true), json!(false)), Ok(opened));
    assert!(with(json!(false), json!(true)).is_ok_and(|text| text.ends_with("1, 2,")));
    let failure = with(json!(true), json!(true)).expect_err("one or the other");
    assert_eq!(failure.param.as_deref(), Some("continue_final_message"));
    assert!(failure.message.contains("add_generation_prompt"), "{}", failure.message);
}

#[test]
fn what_cannot_be_continued_is_told() {
    let calls = json!([{"function": {"name": "f", "arguments": "{}"}}]);
    let messages =
        json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": calls}]);
    let body = json!({"messages": messages, "continue_final_message": true});
    for (template, body) in [
        (CHATML, body),
        ("{{ messages[0].content }}", continuing(json!("1, 2,"))),
        ("{% for m in messages %}{{ m.content | replace('2', 'two') }}{% endfor %}", continuing(json!("1, 2,"))),
    ] {
        let failure = prompt(template, body.clone()).expect_err("it is not in the prompt");
        assert_eq!(failure.param.as_deref(), Some("continue_final_message"), "{body}");
    }
}

#[test]
fn tools_are_checked_and_shown_where_the_template_has_a_place() {
    let with_tools = "{{ messages[0].content }}{% if tools %}{{ tools[0].function.name }}{% endif %}";
    let ask = |template: &str, tools: Value, choice: Value| {
        prompt(template, json!({"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": choice}))
    };
    let tool = json!([{"type": "function", "function": {"name": "look"}}]);
    assert_eq!(ask(with_tools, tool.clone(), Value::Null).as_deref(), Ok("xlook"));
    assert_eq!(ask(with_tools, tool.clone(), json!("auto")).as_deref(), Ok("xlook"));
    assert_eq!(ask(with_tools, tool.clone(), json!("none")).as_deref(), Ok("x"));
    assert_eq!(ask(with_tools, json!([]), Value::Null).as_deref(), Ok("x"));
    let refused = |tools: Value, choice: Value, param: &str| {
        let failure = ask(with_tools, tools, choice).expect_err(param);
        assert_eq!(failure.param.as_deref(), Some(param));
    };
    refused(json!([{"type": "web_search"}]), Value::Null, "tools[0]");
    refused(json!([{"type": "function", "function": {}}]), Value::Null, "tools[0]");
    refused(json!([3]), json!("none"), "tools[0]");
    refused(tool.clone(), json!("required"), "tool_choice");
    assert_eq!(ask(CHATML, tool, Value::Null).expect_err("ignored").param.as_deref(), Some("tools"));
}
