//! Renders templates like those of the common model families, and compares the results with those of transformers
//! (`tests/golden/chat_templates.py`).

use std::collections::BTreeMap;
use std::path::Path;

use outrigger::tokenizer::{ChatTemplate, ChatTemplateError};
use serde_json::Value;

#[test]
fn templates_render_as_in_transformers() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat_templates.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let tokens: BTreeMap<String, String> = serde_json::from_value(golden["tokens"].clone()).unwrap();
    let rendered = golden["rendered"].as_array().unwrap();
    assert!(!rendered.is_empty());
    for case in rendered {
        let name = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(golden["templates"][name].as_str().unwrap(), &tokens).unwrap();
        let variant = &golden["variants"][case["variant"].as_u64().unwrap() as usize];
        let tools = variant["tools"].as_bool().unwrap().then_some(&golden["tools"]);
        let result = template.render(
            &golden["conversations"][case["conversation"].as_str().unwrap()],
            tools,
            variant["add_generation_prompt"].as_bool().unwrap(),
            variant["extra"].as_object().unwrap(),
        );
        let label = format!("{name}, {}, variant {}", case["conversation"], case["variant"]);
        match (result, &case["text"], &case["raised"]) {
            (Ok(text), Value::String(expected), _) => assert_eq!(&text, expected, "{label}"),
            (Err(ChatTemplateError::Raised(message)), _, Value::String(expected)) => {
                assert_eq!(&message, expected, "{label}");
            }
            (Err(ChatTemplateError::Render(_)), Value::Null, Value::Null) => {}
            (result, ..) => panic!("{label}: {result:?} instead of {case}"),
        }
    }
}
