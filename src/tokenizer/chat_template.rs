//! Chat templates: render messages to the text format that the model was trained on. They are Jinja templates as in Hugging
//! Face's transformers, including its extensions, run by minijinja.
//!
//! Templates come with models, never with requests. They are still limited in steps, depth, output and time, because a request
//! determines how much work they do. Memory cannot be limited in minijinja: a template that doubles a string forty times
//! allocates a terabyte. So load models from trusted sources only.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State};
use serde_json::Map;

use super::python::{self, JsonStyle};
use super::strftime::strftime;
use super::template_traits::{Render, TemplateTraits, probe_tool};
use crate::types::{Failure, FailureKind};

/// The longest templates in use have about 20 kB.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Instructions per rendering. Each message of a long conversation takes some tens.
const MAX_STEPS: u64 = 4_000_000;
/// Nesting of statements and calls; a macro call counts several times. This is minijinja's maximum.
const MAX_RECURSION: usize = 500;
/// Far longer than any context.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Checked on every write.
const MAX_TIME: Duration = Duration::from_secs(5);
/// A template can build values nested as deeply as it has steps, and freeing them recurses; so do macros. Templates that can do
/// neither are rendered on the caller's stack.
const DEEP_STACK_BYTES: usize = 512 << 20;
const MAX_SHALLOW_TEMPLATE_BYTES: usize = 16 << 10;
/// Words without which a template can neither nest values nor recurse: a namespace carries values between loop iterations, the
/// others recurse.
const SIGNS_OF_DEPTH: [&str; 4] = ["namespace", "macro", "recursive", "include"];

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error("the model has no chat template")]
    Missing,
    #[error("the model has a chat template only for requests with tools")]
    OnlyForTools,
    #[error("the chat template has {0} bytes, more than {MAX_TEMPLATE_BYTES}")]
    TemplateTooLarge(usize),
    #[error("the chat template cannot be read")]
    Syntax(#[source] minijinja::Error),
    /// The template called `raise_exception`, because it does not support these messages.
    #[error("the chat template refuses the messages: {0}")]
    Raised(String),
    #[error("the rendered chat template is longer than {MAX_OUTPUT_BYTES} bytes")]
    OutputTooLarge,
    #[error("rendering the chat template takes too long")]
    TooExpensive,
    #[error("the chat template cannot be rendered")]
    Render(#[source] minijinja::Error),
    /// A bug in the template engine, triggered by this input.
    #[error("the template engine failed on the chat template")]
    EnginePanicked,
    #[error("no thread to render the chat template on")]
    Thread(#[source] io::Error),
}

impl From<ChatTemplateError> for Failure {
    fn from(error: ChatTemplateError) -> Self {
        let message = match &error {
            ChatTemplateError::Missing => {
                "This model has no chat template; use /v1/completions with a prompt of your own.".to_owned()
            }
            ChatTemplateError::OnlyForTools => {
                "This model has a chat template for requests with `tools` only (tool_use), and this request has none."
                    .to_owned()
            }
            ChatTemplateError::Raised(reason) => format!("The model's chat template refuses these messages: {reason}"),
            ChatTemplateError::OutputTooLarge | ChatTemplateError::TooExpensive => {
                "These messages are too long for the model's chat template.".to_owned()
            }
            ChatTemplateError::Render(_) | ChatTemplateError::EnginePanicked => {
                "The model's chat template cannot be applied to these messages; they may lack a field that it needs, or \
                 have one of an unexpected type."
                    .to_owned()
            }
            ChatTemplateError::TemplateTooLarge(_) | ChatTemplateError::Syntax(_) | ChatTemplateError::Thread(_) => {
                return Failure::new(FailureKind::Internal, "The chat template cannot be used.").with_source(error);
            }
        };
        Failure::invalid("messages", message).with_source(error)
    }
}

/// The templates as they are in the model's files.
#[derive(Clone, Debug, Default)]
pub(super) struct TemplateSources {
    pub default: Option<String>,
    /// Used instead of the default when the request has tools.
    pub tool_use: Option<String>,
}

/// A compiled template. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: Arc<BTreeMap<String, String>>,
    needs_deep_stack: bool,
    /// Without and with tools. Determined when first used.
    traits: Arc<[OnceLock<TemplateTraits>; 2]>,
}

impl ChatTemplate {
    /// `special_tokens` become template variables: `bos_token`, `eos_token` and so on.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, ChatTemplateError> {
        let sources = TemplateSources { default: Some(source.to_owned()), tool_use: None };
        Self::from_sources(&sources, special_tokens)
    }

    pub(super) fn from_sources(
        sources: &TemplateSources,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, ChatTemplateError> {
        // Compiling recurses with the nesting of the template, which is not limited: chains of filters nest, too.
        let environment = on_deep_stack(|| {
            let mut environment = environment();
            for (name, source) in [(DEFAULT, &sources.default), (TOOL_USE, &sources.tool_use)] {
                let Some(source) = source else { continue };
                if source.len() > MAX_TEMPLATE_BYTES {
                    return Err(ChatTemplateError::TemplateTooLarge(source.len()));
                }
                environment
                    .add_template_owned(name, without_generation_tags(source))
                    .map_err(ChatTemplateError::Syntax)?;
            }
            Ok(environment)
        })?;
        let is_deep = |source: &String| {
            SIGNS_OF_DEPTH.iter().any(|sign| source.contains(sign)) || source.len() > MAX_SHALLOW_TEMPLATE_BYTES
        };
        let needs_deep_stack = [&sources.default, &sources.tool_use].into_iter().flatten().any(is_deep);
        Ok(Self {
            environment: Arc::new(environment),
            special_tokens: Arc::new(special_tokens.clone()),
            needs_deep_stack,
            traits: Arc::default(),
        })
    }

    /// Whether the model has a template.
    pub fn exists(&self) -> bool {
        self.template(false).or_else(|_| self.template(true)).is_ok()
    }

    /// The form of messages that the template expects. The first call renders test messages, so call it before serving
    /// requests.
    pub fn traits(&self, has_tools: bool) -> &TemplateTraits {
        self.traits[usize::from(has_tools)].get_or_init(|| {
            let render = |tools: Option<&serde_json::Value>, messages: &serde_json::Value| {
                self.render(messages, tools, true, &Map::new()).map_err(|error| match error {
                    // If it takes too long once, it will every time, so this is not tried again.
                    ChatTemplateError::TooExpensive
                    | ChatTemplateError::OutputTooLarge
                    | ChatTemplateError::Missing => true,
                    _ => false,
                })
            };
            let tool = probe_tool();
            let tools = has_tools.then_some(&tool);
            if render(tools, &serde_json::json!([{"role": "user", "content": "q"}])) == Err(true) {
                return TemplateTraits::default();
            }
            let without = |messages: &serde_json::Value| render(None, messages).ok();
            let without = has_tools.then_some(&without as &Render<'_>);
            TemplateTraits::find(&|messages| render(tools, messages).ok(), self.names(has_tools, "developer"), without)
        })
    }

    /// Whether the template's source contains this word as a quoted string, as it does for the roles that it knows.
    pub fn names(&self, has_tools: bool, word: &str) -> bool {
        self.template(has_tools).is_ok_and(|template| {
            let source = template.source();
            ['\'', '"'].iter().any(|quote| source.contains(&format!("{quote}{word}{quote}")))
        })
    }

    /// The template for tools, if there is one and the request has tools; else the default.
    fn template(&self, has_tools: bool) -> Result<minijinja::Template<'_, '_>, ChatTemplateError> {
        if has_tools && let Ok(template) = self.environment.get_template(TOOL_USE) {
            return Ok(template);
        }
        self.environment.get_template(DEFAULT).map_err(|_| match self.environment.get_template(TOOL_USE) {
            Ok(_) => ChatTemplateError::OnlyForTools,
            Err(_) => ChatTemplateError::Missing,
        })
    }

    /// Renders the prompt. `messages` is a list in the form that the traits describe, `tools` a list of tool definitions.
    /// `extra` holds further variables (`documents`, `enable_thinking`, …), which may override special tokens but not the
    /// arguments.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, ChatTemplateError> {
        let template = self.template(tools.is_some())?;
        let variables = || {
            let mut variables = BTreeMap::from([("documents", Value::from(()))]);
            variables.extend(self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text))));
            variables.extend(extra.iter().map(|(name, value)| (name.as_str(), Value::from_serialize(value))));
            variables.extend([
                ("messages", Value::from_serialize(messages)),
                ("tools", Value::from_serialize(tools)),
                ("add_generation_prompt", Value::from(add_generation_prompt)),
            ]);
            Value::from_iter(variables)
        };
        if self.needs_deep_stack {
            on_deep_stack(|| render(&template, variables()))
        } else {
            render(&template, variables())
        }
    }
}

fn render(template: &minijinja::Template<'_, '_>, variables: Value) -> Result<String, ChatTemplateError> {
    let mut output = BoundedOutput::default();
    DEADLINE.set(Instant::now().checked_add(MAX_TIME));
    // minijinja 2.24 panics on `[][::-1]`, which Qwen's template reaches for a request without messages.
    let result = catch_unwind(AssertUnwindSafe(|| template.render_captured_to(variables, &mut output).map(drop)));
    DEADLINE.set(None);
    match result {
        Err(_) => Err(ChatTemplateError::EnginePanicked),
        Ok(Ok(())) => Ok(output.text()),
        Ok(Err(_)) if output.overflowed => Err(ChatTemplateError::OutputTooLarge),
        Ok(Err(error)) => Err(classify(error)),
    }
}

/// Runs the work on a thread with a large stack, including the destruction of everything it creates.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, ChatTemplateError> + Send) -> Result<T, ChatTemplateError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(DEEP_STACK_BYTES);
        let thread = thread.spawn_scoped(scope, work).map_err(ChatTemplateError::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

thread_local! {
    /// The deadline of the rendering that runs on this thread.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The message of the template's `raise_exception`, carried inside minijinja's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

#[derive(Debug, thiserror::Error)]
#[error("the time for one rendering is over")]
struct Overdue;

fn classify(error: minijinja::Error) -> ChatTemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return ChatTemplateError::Raised(message.clone());
        }
        let out_of_fuel =
            inner.downcast_ref().is_some_and(|error: &minijinja::Error| error.kind() == ErrorKind::OutOfFuel);
        if out_of_fuel || inner.is::<Overdue>() {
            return ChatTemplateError::TooExpensive;
        }
        cause = inner.source();
    }
    ChatTemplateError::Render(error)
}

/// Settings, functions and filters as in transformers' `apply_chat_template`.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // Debug errors would contain the variables, and with them the client's text.
    environment.set_debug(false);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(write_value);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python::str(value));
    environment.add_filter("trim", trim);
    environment.add_test("iterable", is_iterable);
    environment
}

/// `{{ value }}`
fn write_value(output: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    if DEADLINE.get().is_some_and(|deadline| Instant::now() > deadline) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "out of time").with_source(Overdue));
    }
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            Ok(output.write_str(&python::str(value)?)?)
        }
        _ => minijinja::escape_formatter(output, state, value),
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

#[expect(clippy::disallowed_methods, reason = "the time of day is what templates ask for")]
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    strftime(format, SystemTime::now()).ok_or_else(|| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know all of {format:?}"))
    })
}

/// Unlike minijinja, Jinja does not treat `none` as iterable.
fn is_iterable(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => true,
        _ => value.as_object().is_some(),
    }
}

/// Converts values that are not strings to strings first.
fn trim(value: &Value, characters: Option<Cow<'_, str>>) -> Result<String, minijinja::Error> {
    let text = python::str(value)?;
    let trimmed = match &characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)),
        None => text.trim(),
    };
    Ok(trimmed.to_owned())
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    arguments: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => arguments.get::<Option<Value>>("indent")?,
    };
    let separators = match arguments.get::<Option<Value>>("separators")?.filter(|value| !value.is_none()) {
        None => None,
        Some(pair) => Some((python::str(&pair.get_item_by_index(0)?)?, python::str(&pair.get_item_by_index(1)?)?)),
    };
    let style = JsonStyle {
        indent: indent.filter(|indent| !indent.is_none()).map(indentation).transpose()?,
        separators,
        ensure_ascii: ensure_ascii.or(arguments.get("ensure_ascii")?).unwrap_or(false),
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    python::json_dumps(value, &style)
}

/// The indentation: a number of spaces, or a string.
fn indentation(indent: Value) -> Result<String, minijinja::Error> {
    const MAX_INDENT: usize = 64;
    match indent.as_str() {
        Some(text) if text.len() <= MAX_INDENT => Ok(text.to_owned()),
        Some(_) => Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the indent is too long")),
        None => Ok(" ".repeat(usize::try_from(indent)?.min(MAX_INDENT))),
    }
}

/// `{% generation %}` marks the assistant's text for training. It does not affect the output, so it is replaced by a block
/// without effect.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let inside = &tag[2..];
        let end = inside.find("%}").unwrap_or(inside.len());
        let replaced = match inside[..end].trim_matches(['-', '+']).trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replaced {
            Some(statement) => {
                let control = |character: Option<char>| character.filter(|character| "-+".contains(*character));
                result.push_str("{%");
                result.extend(control(inside[..end].chars().next()));
                result.push_str(&format!(" {statement} "));
                result.extend(control(inside[..end].chars().next_back()));
            }
            None => result.push_str(&tag[..2 + end]),
        }
        rest = &inside[end..];
    }
    result.push_str(rest);
    result
}

#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl BoundedOutput {
    fn text(self) -> String {
        String::from_utf8(self.bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;
