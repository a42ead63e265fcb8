//! Chat messages, checked and brought into the shape that templates expect.

use serde_json::{Map, Value};

use crate::types::Failure;

/// Checks the conversation and makes each `content` a string. Fields that only templates know pass through.
pub fn normalise(messages: &[Value]) -> Result<Value, Failure> {
    if messages.is_empty() {
        return Err(Failure::invalid("messages", "`messages` must hold at least one message."));
    }
    let messages = messages.iter().enumerate().map(|(index, message)| normalise_message(index, message));
    Ok(Value::Array(messages.collect::<Result<_, _>>()?))
}

fn normalise_message(index: usize, message: &Value) -> Result<Value, Failure> {
    let path = format!("messages[{index}]");
    let Value::Object(message) = message else {
        return Err(Failure::invalid(path.clone(), format!("`{path}` must be an object.")));
    };
    if message.get("role").and_then(Value::as_str).is_none_or(str::is_empty) {
        let path = format!("{path}.role");
        return Err(Failure::invalid(path.clone(), format!("`{path}` must be a string such as \"user\".")));
    }
    let mut normal = Map::with_capacity(message.len());
    for (field, value) in message {
        let value = match field.as_str() {
            "content" => content(&path, value)?,
            "tool_calls" => tool_calls(value),
            _ => value.clone(),
        };
        normal.insert(field.clone(), value);
    }
    let has_calls = normal.get("tool_calls").is_some_and(|calls| !calls.is_null());
    if !has_calls && normal.get("content").is_none_or(Value::is_null) {
        let path = format!("{path}.content");
        return Err(Failure::invalid(path.clone(), format!("`{path}` must be a string or an array of text parts.")));
    }
    Ok(Value::Object(normal))
}

/// A string, or text parts joined by line breaks as vLLM joins them.
fn content(path: &str, content: &Value) -> Result<Value, Failure> {
    let parts = match content {
        Value::String(_) | Value::Null => return Ok(content.clone()),
        Value::Array(parts) => parts,
        _ => {
            let path = format!("{path}.content");
            return Err(Failure::invalid(
                path.clone(),
                format!("`{path}` must be a string or an array of text parts."),
            ));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        texts.push(part_text(part).map_err(|reason| {
            let path = format!("{path}.content[{index}]");
            Failure::invalid(path.clone(), format!("`{path}` {reason}."))
        })?);
    }
    Ok(Value::String(texts.join("\n")))
}

fn part_text(part: &Value) -> Result<&str, String> {
    if let Value::String(text) = part {
        return Ok(text);
    }
    match part.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text") => {
            part.get("text").and_then(Value::as_str).ok_or_else(|| "must have a string `text`".to_string())
        }
        Some("refusal") => {
            part.get("refusal").and_then(Value::as_str).ok_or_else(|| "must have a string `refusal`".to_string())
        }
        Some(other) => Err(format!("is of type {other:?}; this model takes text only")),
        None => Err("must be an object with a `type`".to_string()),
    }
}

/// Templates want a call's arguments as an object; clients send them as JSON in a string.
fn tool_calls(calls: &Value) -> Value {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
        if let Some(object) = parsed {
            *arguments = Value::Object(object);
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn normal(messages: Value) -> Result<Value, Failure> {
        normalise(messages.as_array().expect("an array"))
    }

    #[test]
    fn text_parts_become_one_string_and_other_fields_pass() {
        let messages = json!([
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]},
        ]);
        let expected = json!([
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": "a\nb\nc"},
        ]);
        assert_eq!(normal(messages), Ok(expected));
    }

    #[test]
    fn arguments_of_earlier_calls_become_objects() {
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "not json"}},
        ]}]);
        let normal = normal(messages).expect("valid");
        assert_eq!(normal.pointer("/0/tool_calls/0/function/arguments"), Some(&json!({"x": 1})));
        assert_eq!(normal.pointer("/0/tool_calls/1/function/arguments"), Some(&json!("not json")));
    }

    #[test]
    fn faults_are_named_by_their_path() {
        let cases = [
            (json!([]), "messages"),
            (json!([3]), "messages[0]"),
            (json!([{"role": "user", "content": "x"}, {"content": "x"}]), "messages[1].role"),
            (json!([{"role": 3, "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages[0].content[0]"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0]"),
        ];
        for (messages, param) in cases {
            let failure = normal(messages.clone()).expect_err(param);
            assert_eq!(failure.param.as_deref(), Some(param), "{messages}");
        }
    }
}
