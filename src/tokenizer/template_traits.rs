//! Determines what form of messages a chat template expects, by rendering small test conversations. Templates are programs, so
//! only their output shows, for example, whether they support developer messages.

use serde_json::{Value, json};

/// Words that no template writes by itself.
const FIRST: &str = "zqoutriggeronezq";
const SECOND: &str = "zqoutriggertwozq";

/// The type of `content` that a template expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A string.
    Text,
    /// A list of parts. Such a template writes strings letter by letter or not at all.
    Parts,
    /// Both are supported.
    Any,
}

/// The type of a call's `arguments` that a template expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arguments {
    /// An object.
    Object,
    /// A string with the object's JSON.
    Text,
}

/// The traits of one template, for requests with or without tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateTraits {
    pub content: Content,
    pub arguments: Arguments,
    /// Calls are written only if the content beside them is null, not if it is empty.
    pub calls_need_null: bool,
    /// The template knows the role `developer`, and writes such a message at the beginning.
    pub has_developer_role: bool,
    /// The template silently drops instructions at the beginning, whatever their role.
    pub loses_instructions: bool,
    /// The template writes both a system message and a developer message that follows it.
    pub keeps_system_and_developer: bool,
    /// The role of instructions in the middle of a conversation. None if these, or those at the beginning, would be dropped.
    pub later_instructions: Option<&'static str>,
    /// The template writes the tools. Determined only for requests with tools.
    pub takes_tools: bool,
}

impl Default for TemplateTraits {
    /// The traits of a template that cannot be tried: messages are passed unchanged, and rendering reports the error.
    fn default() -> Self {
        Self {
            content: Content::Text,
            arguments: Arguments::Object,
            calls_need_null: false,
            has_developer_role: false,
            loses_instructions: false,
            keeps_system_and_developer: false,
            later_instructions: Some("system"),
            takes_tools: true,
        }
    }
}

/// Renders messages; `None` if rendering fails.
pub(super) type Render<'a> = dyn Fn(&Value) -> Option<String> + 'a;

/// A tool definition as in requests; its name is the first word.
pub(super) fn probe_tool() -> Value {
    json!([{"type": "function", "function": {
        "name": FIRST, "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}
    }}])
}

impl TemplateTraits {
    /// `render` is the template with or without the tool of `probe_tool`. With the tool, `without_tools` is the template
    /// without it.
    pub(super) fn find(render: &Render<'_>, names_developer: bool, without_tools: Option<&Render<'_>>) -> Self {
        let content = content(render);
        let said = |role: &str, text: &str| {
            let content = match content {
                Content::Parts => json!([{"type": "text", "text": text}]),
                Content::Text | Content::Any => json!(text),
            };
            json!({"role": role, "content": content})
        };
        let writes = |messages: Value, words: &[&str]| {
            render(&messages).is_some_and(|text| words.iter().all(|word| text.contains(word)))
        };
        let has_developer_role =
            names_developer && writes(json!([said("developer", SECOND), said("user", "q")]), &[SECOND]);
        let as_system = render(&json!([said("system", SECOND), said("user", "q")]));
        let loses_instructions = !has_developer_role && as_system.is_some_and(|text| !text.contains(SECOND));
        let keeps_system_and_developer = has_developer_role
            && writes(json!([said("system", "s"), said("developer", SECOND), said("user", "q")]), &[SECOND])
            && writes(json!([said("system", SECOND), said("developer", "d"), said("user", "q")]), &[SECOND]);
        let later = |role: &&str| {
            let rest = [said("user", "q"), said("assistant", "a"), said(role, SECOND), said("user", "q")];
            let with_first: Vec<Value> = [said("system", FIRST)].into_iter().chain(rest.clone()).collect();
            writes(rest.to_vec().into(), &[SECOND]) && writes(with_first.into(), &[FIRST, SECOND])
        };
        let roles = if has_developer_role { &["developer", "system"][..] } else { &["system"] };
        let (arguments, calls_need_null) = calls(render, &said("user", "q"), &said("assistant", "")["content"]);
        Self {
            content,
            arguments,
            calls_need_null,
            has_developer_role,
            loses_instructions,
            keeps_system_and_developer,
            later_instructions: roles.iter().copied().find(later),
            takes_tools: without_tools.is_none_or(|without| takes_tools(render, without, &json!([said("user", "q")]))),
        }
    }
}

fn content(render: &Render<'_>) -> Content {
    let as_text = render(&json!([{"role": "user", "content": FIRST}]));
    let takes_text = as_text.is_some_and(|text| text.contains(FIRST));
    let parts = json!([{"type": "text", "text": FIRST}, {"type": "text", "text": SECOND}]);
    let as_parts = render(&json!([{"role": "user", "content": parts}]));
    // A list written without a loop would show its keys.
    let takes_parts = as_parts.is_some_and(|text| {
        let words = [FIRST, SECOND].iter().all(|word| text.contains(word));
        words && !text.contains("'type'") && !text.contains("\"type\": \"text\"")
    });
    match (takes_text, takes_parts) {
        (_, false) => Content::Text,
        (false, true) => Content::Parts,
        (true, true) => Content::Any,
    }
}

/// The type of the arguments, and whether the content beside a call must be null.
fn calls(render: &Render<'_>, question: &Value, nothing: &Value) -> (Arguments, bool) {
    let object = json!({"a": SECOND});
    let text = Value::String(object.to_string());
    let writes = |arguments: &Value, content: &Value| {
        let call = json!({"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}});
        let messages = json!([
            question,
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "name": "f", "content": "r"},
        ]);
        render(&messages).is_some_and(|text| text.contains(SECOND))
    };
    let forms = [(&object, Arguments::Object), (&text, Arguments::Text)];
    let ways = [(nothing, false), (&Value::Null, true)];
    let mut ways =
        ways.iter().flat_map(|(content, null)| forms.map(|(arguments, form)| (arguments, form, *content, *null)));
    let way = ways.find(|(arguments, _, content, _)| writes(arguments, content));
    way.map_or((Arguments::Object, false), |(_, form, _, null)| (form, null))
}

/// If the template fails with tools, rendering the request reports that, so this counts as supported.
fn takes_tools(render: &Render<'_>, without: &Render<'_>, messages: &Value) -> bool {
    match (render(messages), without(messages)) {
        (Some(with), Some(without)) => with != without,
        (Some(with), None) => with.contains(FIRST),
        (None, _) => true,
    }
}
