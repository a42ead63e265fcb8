//! Chat messages, checked and brought into one normal form, which is the one that the model's template expects.
//!
//! Clients send messages as they got them, with fields that are null or empty, and templates ask whether a field is there.
//! So what says nothing is left out, `content` is there, and calls have the shape that templates were written for. Fields
//! that only some templates know pass through.

use serde_json::{Map, Value, json};

use crate::tokenizer::{Arguments, ChatTemplate, Content, TemplateTraits};
use crate::types::Failure;

/// OpenAI's. Others are taken where the model's template names them.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Between instructions that become one message.
const PARAGRAPH: &str = "\n\n";

type Message = Map<String, Value>;

/// Checks the conversation and gives it the form that the template expects.
pub fn normalise(messages: Vec<Value>, template: &ChatTemplate, has_tools: bool) -> Result<Vec<Value>, Failure> {
    if messages.is_empty() {
        return Err(Failure::invalid("messages", "`messages` must hold at least one message."));
    }
    let form = Form { template, has_tools, traits: template.traits(has_tools) };
    let messages = messages.into_iter().enumerate().map(|(index, message)| form.message(index, message));
    let messages = place_instructions(messages.collect::<Result<_, _>>()?, form.traits)?;
    Ok(messages.into_iter().map(|message| form.with_content(message)).collect())
}

/// What the template expects.
struct Form<'a> {
    template: &'a ChatTemplate,
    has_tools: bool,
    traits: &'a TemplateTraits,
}

impl Form<'_> {
    /// With a content of text, or of parts where a user gave several.
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
            // What an assistant has not said is no text; of others it is missing.
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
        Err(invalid(&path, &format!("is {shown:?}; this model knows {}", ROLES.join(", "))))
    }

    fn assistant(&self, path: &str, message: &mut Message) -> Result<(), Failure> {
        // The field that `tool_calls` replaced.
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
            return Err(unsupported(&format!("{path}.audio"), "is not supported; this model takes text only"));
        }
        // What was refused is what was said.
        if let Some(refusal) = message.shift_remove("refusal").filter(|refusal| *refusal != "") {
            let text = refusal.as_str().ok_or_else(|| invalid(&format!("{path}.refusal"), "must be a string"))?;
            message.entry("content").or_insert_with(|| text.into());
        }
        // Templates know it by either name.
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

    /// Clients send them as JSON in a string, empty where the function takes none.
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
            // As the client wrote it.
            (Arguments::Text, Value::String(text)) if !object.is_empty() => text.into(),
            (Arguments::Text, _) => serde_json::to_string(&object).expect("JSON serializes").into(),
        })
    }

    /// The content as the template wants it.
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

/// Only assistants call.
fn refuse_calls(path: &str, message: &mut Message) -> Result<(), Failure> {
    for field in ["tool_calls", "function_call"] {
        match message.get(field) {
            None => {}
            Some(Value::Array(calls)) if calls.is_empty() => drop(message.shift_remove(field)),
            Some(_) => return Err(invalid(&format!("{path}.{field}"), "belongs to messages of the role assistant")),
        }
    }
    Ok(())
}

/// A string, or text parts joined by line breaks as vLLM joins them; with `keeps_parts`, several stay parts.
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

/// `None` for a part without text.
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
        Some(other) => Err(format!("is of type {other:?}; this model takes text only")),
        None => Err("must be an object with a `type`".to_string()),
    }
}

/// Gives the messages of the role `developer` the role and the place in which the template writes them. Most templates leave
/// out a role that they do not know, without a word.
fn place_instructions(messages: Vec<Message>, traits: &TemplateTraits) -> Result<Vec<Message>, Failure> {
    let Some(developer) = messages.iter().position(is_from_developer) else { return Ok(messages) };
    if traits.loses_instructions {
        let reason = "is \"developer\", but this model's chat template leaves out such instructions; put them into a user message";
        return Err(invalid(&format!("messages[{developer}].role"), reason));
    }
    let leading = messages.iter().take_while(|message| is_instruction(message)).count();
    let (mut instructions, mut rest) = (Vec::new(), Vec::new());
    for (index, mut message) in messages.into_iter().enumerate() {
        match traits.later_instructions {
            _ if index < leading => instructions.push(message),
            // The beginning is the only place that the template has.
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

/// The first message, with the contents of all. Instructions are strings.
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
