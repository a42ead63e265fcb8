//! Turns a conversation into a prompt, for both `/v1/chat/completions` and `/tokenize`.

use serde_json::{Map, Value};

use super::body::RequestBody;
use super::messages;
use super::prepare::encode;
use crate::api::model::ServedModel;
use crate::types::{Failure, TokenId};

/// Appended to the message that is to be continued, and searched for in the template's output. The space shows whether the
/// template trims the message.
const MARK: &str = "OUTRIGGER_CONTINUES_HERE ";

/// The request fields that determine the prompt of a chat.
pub struct Conversation {
    messages: Vec<Value>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    /// The prompt ends inside the last message instead of after it.
    continue_final_message: bool,
    kwargs: Map<String, Value>,
    add_special_tokens: bool,
}

impl Conversation {
    /// Takes the fields out of the body, and checks what can be checked without the model.
    pub fn take(body: &mut RequestBody) -> Result<Self, Failure> {
        let messages = body.messages.take().ok_or_else(|| Failure::invalid("messages", "`messages` is required."))?;
        let continue_final_message = body.continue_final_message.unwrap_or(false);
        if continue_final_message && body.add_generation_prompt == Some(true) {
            let message = "`continue_final_message` and `add_generation_prompt` cannot both be true: either the last \
                           message goes on, or a new one begins.";
            return Err(Failure::invalid("continue_final_message", message));
        }
        Ok(Self {
            messages,
            tools: offered_tools(body)?,
            add_generation_prompt: body.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            kwargs: body.chat_template_kwargs.take().unwrap_or_default(),
            add_special_tokens: body.add_special_tokens.unwrap_or(false),
        })
    }

    /// Approximate size of the messages' text, in bytes.
    pub fn text_bytes(&self) -> usize {
        self.messages.iter().filter_map(|message| message.get("content")).map(text_bytes).sum()
    }

    /// Renders and tokenizes the prompt.
    pub fn encode(self, model: &ServedModel) -> Result<Vec<TokenId>, Failure> {
        let add_special_tokens = self.add_special_tokens;
        encode(model, &self.render(model)?, add_special_tokens, "messages")
    }

    fn render(self, model: &ServedModel) -> Result<String, Failure> {
        let template = &model.chat_template;
        if self.tools.is_some() && !template.traits(true).takes_tools {
            let message =
                format!("The model `{}` does not support tools: its chat template ignores them.", model.name());
            return Err(Failure::invalid("tools", message).with_code("unsupported_parameter"));
        }
        let mut messages = messages::normalise(self.messages, template, self.tools.is_some())?;
        let continued = match self.continue_final_message {
            true => Some(mark(&mut messages)?),
            false => None,
        };
        let messages = Value::Array(messages);
        let text = template.render(&messages, self.tools.as_ref(), self.add_generation_prompt, &self.kwargs)?;
        match continued {
            Some(continued) => cut(text, &continued),
            None => Ok(text),
        }
    }
}

/// Appends the mark to the last message, and returns its original text.
fn mark(messages: &mut [Value]) -> Result<String, Failure> {
    let path = format!("messages[{}]", messages.len() - 1);
    let nothing = |reason| Failure::invalid("continue_final_message", format!("`{path}` {reason}."));
    let last = messages.last_mut().expect("a conversation has a message");
    if last.get("tool_calls").is_some() {
        return Err(nothing("has tool calls, so `continue_final_message` cannot continue it"));
    }
    let text = match last.get_mut("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => match parts.last_mut().and_then(|part| part.get_mut("text")) {
            Some(Value::String(text)) => text,
            _ => return Err(nothing("has no text that `continue_final_message` could continue")),
        },
        _ => return Err(nothing("has no text that `continue_final_message` could continue")),
    };
    let before = text.clone();
    text.push_str(MARK);
    Ok(before)
}

/// The text up to the mark. If the template trimmed the message, the text is trimmed here as well.
fn cut(mut text: String, continued: &str) -> Result<String, Failure> {
    let end = text.rfind(MARK.trim_end()).filter(|_| text.contains(continued.trim()));
    let Some(end) = end else {
        let message = "The model's chat template does not write the last message as it is, so that \
                       `continue_final_message` cannot continue it.";
        return Err(Failure::invalid("continue_final_message", message));
    };
    let is_trimmed = !text[end..].starts_with(MARK);
    text.truncate(end);
    if is_trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// The tools to show to the model. The output cannot be constrained to a call, so a forced call is refused.
fn offered_tools(body: &mut RequestBody) -> Result<Option<Value>, Failure> {
    let tools = body.tools.take().filter(|tools| !tools.is_empty());
    let is_offered = match body.tool_choice.as_ref() {
        None | Some(Value::Null) => true,
        Some(Value::String(choice)) if choice == "auto" => true,
        Some(Value::String(choice)) if choice == "none" => false,
        Some(_) => {
            let message = "`tool_choice` may be \"auto\" or \"none\"; forcing a tool call is not supported.";
            return Err(Failure::invalid("tool_choice", message).with_code("unsupported_parameter"));
        }
    };
    for (index, tool) in tools.iter().flatten().enumerate() {
        let has_name = tool.pointer("/function/name").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        if tool.get("type").is_none_or(|ty| ty != "function") || !has_name {
            let path = format!("tools[{index}]");
            let message = format!("`{path}` must be of type \"function\" and hold a `function` that has a `name`.");
            return Err(Failure::invalid(path, message));
        }
    }
    Ok(tools.filter(|_| is_offered).map(Value::Array))
}

fn text_bytes(content: &Value) -> usize {
    match content {
        Value::String(text) => text.len(),
        Value::Array(parts) => parts.iter().filter_map(|part| part.get("text")).map(text_bytes).sum(),
        _ => 0,
    }
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
