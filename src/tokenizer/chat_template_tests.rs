//! Tests of what templates can access, of their errors, and of their limits.

use super::*;
use crate::tokenizer::template_traits::{Arguments, Content};
use serde_json::json;

fn render_with(source: &str, extra: serde_json::Value) -> Result<String, ChatTemplateError> {
    let template = ChatTemplate::new(source, &BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]))?;
    template.render(&json!([{"role": "user", "content": "Hi"}]), None, true, extra.as_object().unwrap())
}

fn render(source: &str) -> Result<String, ChatTemplateError> {
    render_with(source, json!({}))
}

#[test]
fn variables_may_replace_special_tokens_but_not_the_messages() {
    let source = "{{ bos_token }}{{ messages[0].content }}{{ more }}{{ tools is none }}{{ documents is none }}";
    assert_eq!(render(source).unwrap(), "<s>HiTrueTrue");
    let extra = json!({"bos_token": "B", "messages": [], "more": 1, "documents": []});
    assert_eq!(render_with(source, extra).unwrap(), "BHi1TrueFalse");
}

#[test]
fn what_the_template_raises_reaches_the_client() {
    let error = render("{{ raise_exception('Only ' ~ messages[0].role ~ ' may speak') }}").unwrap_err();
    let failure = Failure::from(error);
    assert_eq!((failure.kind, failure.param.as_deref()), (FailureKind::InvalidRequest, Some("messages")));
    assert!(failure.message.ends_with("Only user may speak"), "{}", failure.message);
    // From inside a macro, too.
    let error = render("{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}").unwrap_err();
    assert!(matches!(error, ChatTemplateError::Raised(message) if message == "no"));
}

#[test]
fn a_model_without_a_template_says_so_when_asked() {
    let template = ChatTemplate::from_sources(&TemplateSources::default(), &BTreeMap::new()).unwrap();
    assert!(!template.exists());
    let error = template.render(&json!([]), None, true, &Map::new()).unwrap_err();
    assert!(Failure::from(error).message.contains("no chat template"));
}

#[test]
fn a_template_for_tools_alone_serves_requests_with_tools() {
    let sources = TemplateSources { default: None, tool_use: Some("T{{ tools | tojson }}".to_owned()) };
    let template = ChatTemplate::from_sources(&sources, &BTreeMap::new()).unwrap();
    assert!(template.exists() && template.traits(true).takes_tools);
    let render = |tools| template.render(&json!([]), tools, true, &Map::new());
    let tools = json!([1]);
    assert_eq!(render(Some(&tools)).unwrap(), "T[1]");
    let failure = Failure::from(render(None).unwrap_err());
    assert!(failure.message.contains("with `tools` only"), "{}", failure.message);
}

#[test]
fn traits_are_found_by_trying() {
    let traits =
        |source: &str, has_tools| ChatTemplate::new(source, &BTreeMap::new()).unwrap().traits(has_tools).clone();
    let text = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}";
    let expected = TemplateTraits {
        content: Content::Text,
        arguments: Arguments::Object,
        calls_need_null: false,
        has_developer_role: false,
        loses_instructions: false,
        keeps_system_and_developer: false,
        later_instructions: Some("system"),
        takes_tools: true,
    };
    assert_eq!(traits(text, false), expected);
    assert_eq!(traits(text, true), TemplateTraits { takes_tools: false, ..expected.clone() });
    let list = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
    assert_eq!(traits(list, false).content, Content::Parts);
    // A list written without a loop would show its Python form.
    assert_eq!(traits("{{ messages[0].content }}", false).content, Content::Text);
    // The template must both name the role and write it.
    assert!(!traits("{{ messages[-1].content }}{# 'developer' #}", false).has_developer_role);
    assert!(!traits(text, false).has_developer_role);
    assert!(traits(&format!("{text}{{# 'developer' #}}"), false).has_developer_role);
    assert!(traits("{{ messages[-1].content }}", false).loses_instructions);
    // A template that cannot be tried keeps the default traits.
    assert_eq!(traits("{{ raise_exception('no') }}", true), TemplateTraits { later_instructions: None, ..expected });
    let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert_eq!(traits(endless, true), TemplateTraits::default());
}

#[test]
fn errors_do_not_tell_what_the_client_wrote() {
    let error = render("{% set secret = messages[0].content %}{{ messages[0].content.nothing.at_all }}").unwrap_err();
    assert!(matches!(error, ChatTemplateError::Render(_)));
    assert!(!format!("{error} {error:?}").contains("Hi"), "{error:?}");
    assert!(matches!(ChatTemplate::new("{% if %}", &BTreeMap::new()), Err(ChatTemplateError::Syntax(_))));
}

#[test]
fn a_bug_of_the_engine_is_an_error_and_not_a_crash() {
    // If this renders, the bug is fixed and `catch_unwind` can be removed.
    assert!(matches!(render("{% for m in [][::-1] %}{% endfor %}"), Err(ChatTemplateError::EnginePanicked)));
}

#[test]
fn generation_blocks_leave_no_trace() {
    assert_eq!(without_generation_tags("a{% generation %}b{%- endgeneration -%}c"), "a{% if true %}b{%- endif -%}c");
    assert_eq!(
        without_generation_tags("{%+ generation +%}{% generations %}{% x"),
        "{%+ if true +%}{% generations %}{% x"
    );
    assert_eq!(render("a\n{% generation %}\n b {%- endgeneration %} c").unwrap(), "a\n b c");
}

#[test]
fn the_clock_is_there() {
    let year: u32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2025);
    assert!(matches!(render("{{ strftime_now('%Q') }}"), Err(ChatTemplateError::Render(_))));
}

/// Tool definitions are JSON schemas, which templates write with recursive macros.
#[test]
fn macros_follow_a_nested_schema() {
    let source = "{% macro show(s) %}{% if s.inner is defined %}{% for key, value in s.items() %}\
                  <{{ show(value) }}>{% endfor %}{% else %}{{ s.leaf }}{% endif %}{% endmacro %}{{ show(schema) }}";
    let depth = 24;
    let mut schema = json!({"leaf": "x"});
    for _ in 0..depth {
        schema = json!({"inner": schema});
    }
    let expected = format!("{}x{}", "<".repeat(depth), ">".repeat(depth));
    assert_eq!(render_with(source, json!({"schema": schema})).unwrap(), expected);
}

#[test]
fn endless_work_ends() {
    let loops = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(loops), Err(ChatTemplateError::TooExpensive)));
    let inside = format!("{{% set x %}}{loops}{{% endset %}}{{{{ x }}}}");
    assert!(matches!(render(&inside), Err(ChatTemplateError::TooExpensive)));
    let text = "x".repeat(10_000);
    let output = format!("{{% for a in range(100000) %}}{text}{{% endfor %}}");
    assert!(matches!(render(&output), Err(ChatTemplateError::OutputTooLarge)));
    let macros = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(matches!(render(macros), Err(ChatTemplateError::Render(_))));
    assert!(matches!(render("{% include 'default' %}"), Err(ChatTemplateError::Render(_))));
    let recursive = "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}";
    assert!(matches!(render(recursive), Err(ChatTemplateError::Render(_))));
    let huge = "x".repeat(MAX_TEMPLATE_BYTES + 1);
    assert!(matches!(ChatTemplate::new(&huge, &BTreeMap::new()), Err(ChatTemplateError::TemplateTooLarge(_))));
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let nest = |open: &str, middle: &str, close: &str, depth: usize| {
        render(&format!("{}{middle}{}", open.repeat(depth), close.repeat(depth)))
    };
    assert!(matches!(nest("{% if true %}", "x", "{% endif %}", 5_000), Err(ChatTemplateError::Syntax(_))));
    let depth = MAX_TEMPLATE_BYTES / 4;
    // Whether these render does not matter; they must return.
    for (open, close) in [("(", ")"), ("[", "]"), ("not ", ""), ("-", ""), ("{1:", "}")] {
        let source = format!("{{{{ {}1{} }}}}", open.repeat(depth / open.len()), close.repeat(depth / open.len()));
        let _ = render(&source);
    }
    for link in ["|e", ".a", "[0]", "()", "+1", "~1", " and 1", " if 1", " is odd"] {
        let source = format!("{{{{ 1{} }}}}", link.repeat(depth / link.len()));
        let _ = render(&source);
    }
    let values = "{% set n = namespace(x=1) %}{% for a in range(100000) %}{% set n.x = [n.x] %}{% endfor %}done";
    assert_eq!(render(values).unwrap(), "done");
    let written = values.replace("done", "{{ n.x }}");
    assert!(matches!(render(&written), Err(ChatTemplateError::Render(_))));
    let dumped = values.replace("done", "{{ n.x | tojson }}");
    assert!(matches!(render(&dumped), Err(ChatTemplateError::Render(_))));
}
