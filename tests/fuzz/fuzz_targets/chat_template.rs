//! Renders an arbitrary template with arbitrary messages: the result must be text or a typed error, within the limits on steps,
//! depth, time and output. The input is the template, optionally followed by a zero byte and the messages as JSON.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use outrigger::tokenizer::ChatTemplate;
use serde_json::{Map, Value, json};

fuzz_target!(|input: &str| {
    let (source, messages) = input.split_once('\0').unwrap_or((input, ""));
    let special_tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    let Ok(template) = ChatTemplate::new(source, &special_tokens) else { return };
    let messages: Value = serde_json::from_str(messages).unwrap_or_else(|_| {
        json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the float?\n"}])
    });
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]);
    let extra = Map::from_iter([("enable_thinking".to_owned(), json!(true))]);
    let first = template.render(&messages, None, true, &extra);
    let again = template.render(&messages, None, true, &extra);
    // A prompt is a function of the request; only the clock may show.
    if let (Ok(first), Ok(again)) = (first, again)
        && !source.contains("strftime_now")
    {
        assert_eq!(first, again);
    }
    let _ = template.render(&messages, Some(&tools), false, &Map::new());
});
