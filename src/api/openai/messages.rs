//! Validates chat messages and normalizes them into the form that the model's template expects.
//!
//! Clients send messages back as they received them, with fields that are null or empty, while templates test whether a field
//! exists. So empty fields are removed, `content` is always present, and tool calls get the shape that templates expect. Fields
//! that only some templates know are passed through.

use serde_json::{Map, Value, json};

use crate::tokenizer::{Arguments, ChatTemplate, Content, TemplateTraits};
use crate::types::Failure;

/// OpenAI's roles. Others are accepted if the model's template names them.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Separates instructions that are merged into one message.
const PARAGRAPH: &str = "\n\n";

type Message = Map<String, Value>;

/// Validates the conversation and brings it into the form that the template expects.
pub fn normalise(messages: Vec<Value>, template: &ChatTemplate, has_tools: bool) -> Result<Vec<Value>, Failure> {
    if messages.is_empty() {
        return Err(Failure::invalid("messages", "`messages` must hold at least one message."));
    }
    let form = Form { template, has_tools, traits: template.traits(has_tools) };
    let messages = messages.into_iter().enumerate().map(|(index, message)| form.message(index, message));
    let messages = place_instructions(messages.collect::<Result<_, _>>()?, form.traits)?;
    Ok(messages.into_iter().map(|message| form.with_content(message)).collect())
}

/// The form that the template expects.
struct Form<'a> {
    template: &'a ChatTemplate,
    has_tools: bool,
    traits: &'a TemplateTraits,
}

impl Form<'_> {
    /// One message, with its content as text, or as parts if a user message has several.
    fn message(&self, index: usize, message: Value) -> Result<Message, Failure> {
        let path = format!("messages[{index}]");
        let Value::Object(mut message) = message else {
            return Err(invalid(&path, "must be an object"));
        };
        message.retain(|_, value| !value.is_null());
        let role = self.role(&path, &message)?;
        match role.as_str() {
            "assistant" => self.assistant(&path, &mut message)?,
            _ => refuse_calls(&path, &mut message)?,
        }
        if role == "function" {
            message.insert("role".into(), "tool".into());
        }
        if let Some(name) = message.get("name") {
            match name.as_str() {
                Some("") => drop(message.shift_remove("name")),
                Some(_) => {}
                None => return Err(invalid(&format!("{path}.name"), "must be a string")),
            }
        }
        let content = match message.shift_remove("content") {
            Some(content) => content,
            // An assistant message without content is an empty text. For other roles the content is required.
            None if role == "assistant" => json!(""),
            None => Value::Null,
        };
        let content = content_of(&path, content, role == "user" && self.traits.content != Content::Text)?;
        message.insert("content".into(), content);
        Ok(message)
    }

    fn role(&self, path: &str, message: &Message) -> Result<String, Failure> {
        let path = format!("{path}.role");
        let Some(role) = message.get("role").and_then(Value::as_str).filter(|role| !role.is_empty()) else {
            return Err(invalid(&path, "must be a string such as \"user\""));
        };
        let is_word = role.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if ROLES.contains(&role) || (is_word && self.template.names(self.has_tools, role)) {
            return Ok(role.to_owned());
        }
        let shown: String = role.chars().take(40).collect();
        Err(invalid(&path, &format!("is {shown:?}, which this model does not know. Use one of {}", ROLES.join(", "))))
    }

    fn assistant(&self, path: &str, message: &mut Message) -> Result<(), Failure> {
        // The old field that `tool_calls` replaced.
        if let Some(call) = message.shift_remove("function_call") {
            let calls = json!([{"type": "function", "function": call}]);
            message.entry("tool_calls").or_insert(calls);
        }
        match message.shift_remove("tool_calls") {
            None => {}
            Some(Value::Array(calls)) if calls.is_empty() => {}
            Some(Value::Array(calls)) => {
                let calls = calls.into_iter().enumerate();
                let calls = calls.map(|(index, call)| self.call(&format!("{path}.tool_calls[{index}]"), call));
                message.insert("tool_calls".into(), calls.collect::<Result<Vec<_>, _>>()?.into());
            }
            Some(_) => return Err(invalid(&format!("{path}.tool_calls"), "must be an array")),
        }
        if message.contains_key("audio") {
            return Err(unsupported(&format!("{path}.audio"), "is not supported; this model supports text only"));
        }
        // A refusal is the text of the message.
        if let Some(refusal) = message.shift_remove("refusal").filter(|refusal| *refusal != "") {
            let text = refusal.as_str().ok_or_else(|| invalid(&format!("{path}.refusal"), "must be a string"))?;
            message.entry("content").or_insert_with(|| text.into());
        }
        // Templates use either name, so the message gets both.
        for (name, other) in [("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")] {
            match message.get(name) {
                None => {}
                Some(Value::String(text)) if text.is_empty() => drop(message.shift_remove(name)),
                Some(text @ Value::String(_)) => {
                    let text = text.clone();
                    message.entry(other).or_insert(text);
                }
                Some(_) => return Err(invalid(&format!("{path}.{name}"), "must be a string")),
            }
        }
        Ok(())
    }

    fn call(&self, path: &str, call: Value) -> Result<Value, Failure> {
        let Value::Object(mut call) = call else {
            return Err(invalid(path, "must be an object"));
        };
        call.retain(|_, value| !value.is_null());
        match call.get("type").map(|ty| ty.as_str()) {
            None => drop(call.insert("type".into(), "function".into())),
            Some(Some("function")) => {}
            Some(_) => return Err(unsupported(&format!("{path}.type"), "must be \"function\"")),
        }
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(invalid(&format!("{path}.function"), "must be an object"));
        };
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(invalid(&format!("{path}.function.name"), "must be the name of a function"));
        }
        let arguments = function.shift_remove("arguments").unwrap_or(Value::Null);
        function.insert("arguments".into(), self.arguments(&format!("{path}.function.arguments"), arguments)?);
        Ok(call.into())
    }

    /// Parses the arguments of a call. Clients send them as JSON in a string, which is empty if the function takes none.
    fn arguments(&self, path: &str, arguments: Value) -> Result<Value, Failure> {
        let object = match &arguments {
            Value::Null => Map::new(),
            Value::Object(object) => object.clone(),
            Value::String(text) if text.trim().is_empty() => Map::new(),
            Value::String(text) => match serde_json::from_str::<Option<Map<String, Value>>>(text) {
                Ok(object) => object.unwrap_or_default(),
                Err(error) => return Err(invalid(path, &format!("must be a JSON object in a string: {error}"))),
            },
            _ => return Err(invalid(path, "must be a JSON object in a string")),
        };
        Ok(match (self.traits.arguments, arguments) {
            (Arguments::Object, _) => object.into(),
            // This template expects the string as the client wrote it.
            (Arguments::Text, Value::String(text)) if !object.is_empty() => text.into(),
            (Arguments::Text, _) => serde_json::to_string(&object).expect("JSON serializes").into(),
        })
    }

    /// Gives the content the type that the template expects.
    fn with_content(&self, mut message: Message) -> Value {
        if self.traits.calls_need_null && message.contains_key("tool_calls") && message["content"] == "" {
            message.insert("content".into(), Value::Null);
        }
        if self.traits.content == Content::Parts
            && let Some(Value::String(text)) = message.get("content")
        {
            let parts = if text.is_empty() { json!([]) } else { json!([{"type": "text", "text": text}]) };
            message.insert("content".into(), parts);
        }
        message.into()
    }
}

/// Only assistant messages may have tool calls.
fn refuse_calls(path: &str, message: &mut Message) -> Result<(), Failure> {
    for field in ["tool_calls", "function_call"] {
        match message.get(field) {
            None => {}
            Some(Value::Array(calls)) if calls.is_empty() => drop(message.shift_remove(field)),
            Some(_) => {
                return Err(invalid(
                    &format!("{path}.{field}"),
                    "is only allowed in messages with the role \"assistant\"",
                ));
            }
        }
    }
    Ok(())
}

/// The content as a string. Text parts are joined by line breaks, as in vLLM; with `keeps_parts`, several parts stay separate.
fn content_of(path: &str, content: Value, keeps_parts: bool) -> Result<Value, Failure> {
    let path = format!("{path}.content");
    let parts = match content {
        Value::String(_) => return Ok(content),
        Value::Array(parts) => parts,
        _ => return Err(invalid(&path, "must be a string or an array of text parts")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let text = part_text(part).map_err(|reason| invalid(&format!("{path}[{index}]"), &reason))?;
        texts.extend(text);
    }
    if keeps_parts && texts.len() > 1 {
        return Ok(texts.into_iter().map(|text| json!({"type": "text", "text": text})).collect());
    }
    Ok(Value::String(texts.join("\n")))
}

/// The text of a part, or `None` if it has none.
fn part_text(part: &Value) -> Result<Option<&str>, String> {
    if let Value::String(text) = part {
        return Ok(Some(text));
    }
    let of = |field| match part.get(field) {
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(Value::Null) => Ok(None),
        _ => Err(format!("must have a string `{field}`")),
    };
    match part.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text") => of("text"),
        Some("refusal") => of("refusal"),
        Some(other) => Err(format!("is of type {other:?}; this model supports text only")),
        None => Err("must be an object with a `type`".to_string()),
    }
}

/// Gives `developer` messages the role and position that the template supports. Most templates silently drop roles that they do
/// not know.
fn place_instructions(messages: Vec<Message>, traits: &TemplateTraits) -> Result<Vec<Message>, Failure> {
    let Some(developer) = messages.iter().position(is_from_developer) else { return Ok(messages) };
    if traits.loses_instructions {
        let reason = "is \"developer\", but this model's chat template drops such messages; put the instructions into a user message";
        return Err(invalid(&format!("messages[{developer}].role"), reason));
    }
    let leading = messages.iter().take_while(|message| is_instruction(message)).count();
    let (mut instructions, mut rest) = (Vec::new(), Vec::new());
    for (index, mut message) in messages.into_iter().enumerate() {
        match traits.later_instructions {
            _ if index < leading => instructions.push(message),
            // The template has a place for instructions only at the beginning.
            None if is_from_developer(&message) => instructions.push(message),
            Some(role) if is_from_developer(&message) => {
                message.insert("role".into(), role.into());
                rest.push(message);
            }
            _ => rest.push(message),
        }
    }
    let is_pair =
        matches!(&instructions[..], [first, second] if first["role"] == "system" && is_from_developer(second));
    if instructions.iter().any(is_from_developer) && !(is_pair && traits.keeps_system_and_developer) {
        let mut first = merged(instructions);
        let role = if traits.has_developer_role { "developer" } else { "system" };
        first.insert("role".into(), role.into());
        instructions = vec![first];
    }
    instructions.extend(rest);
    Ok(instructions)
}

fn is_from_developer(message: &Message) -> bool {
    message["role"] == "developer"
}

fn is_instruction(message: &Message) -> bool {
    message["role"] == "system" || is_from_developer(message)
}

/// Merges these messages into one, joining their text. Expects string contents.
fn merged(messages: Vec<Message>) -> Message {
    let texts: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
    let content = texts.join(PARAGRAPH);
    let mut first = messages.into_iter().next().expect("there are instructions");
    first.insert("content".into(), content.into());
    first
}

fn invalid(path: &str, reason: &str) -> Failure {
    Failure::invalid(path.to_owned(), format!("`{path}` {reason}."))
}

fn unsupported(path: &str, reason: &str) -> Failure {
    invalid(path, reason).with_code("unsupported_parameter")
}

#[cfg(test)]
#[path = "messages_tests.rs"]
mod tests;
