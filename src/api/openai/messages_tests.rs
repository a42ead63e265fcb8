//! One conversation in all the ways in which clients write it, through templates in the manner of the common model families.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::json;

use super::*;

/// Of Llama 4: strings, or lists of parts.
const LLAMA4: &str = r#"{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{%- set system = messages[0]['content'] | trim %}
    {%- else %}{%- set system = messages[0]['content'][0]['text'] | trim %}{%- endif %}
    {%- set messages = messages[1:] %}
    {{- '<|header_start|>system<|header_end|>\n\n' + system + '<|eot|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}
        {%- if message['content'] is string %}{{- message['content'] }}
        {%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}
        {{- '<|eot|>' }}
    {%- elif 'tool_calls' in message and message.tool_calls | length > 0 %}
        {{- '<|header_start|>assistant<|header_end|>\n\n' + message['content'] }}
        {%- for tool_call in message.tool_calls %}
            {{- '{"name": "' + tool_call.function.name + '", "parameters": ' + tool_call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- '<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|header_start|>ipython<|header_end|>\n\n' + message.content | tojson + '<|eot|>' }}
    {%- endif %}
{%- endfor %}"#;

/// Of Qwen3-Coder: arguments one by one.
const QWEN_CODER: &str = r#"{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is iterable and m.tool_calls | length > 0 %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content is defined and m.content is string and m.content | trim | length > 0 %}{{- '\n' + m.content }}{% endif %}
        {%- for c in m.tool_calls %}
            {{- '\n<function=' + c.function.name + '>\n' }}
            {%- if c.function.arguments is defined %}
                {%- for name, value in c.function.arguments | items %}{{- '<parameter=' + name + '>\n' ~ value }}{%- endfor %}
            {%- endif %}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'user' or m.role == 'system' or m.role == 'assistant' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}"#;

/// Of Phi: each role by its name.
const PHI: &str = "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
    {{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}\
    {{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}\
    {{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}";

/// Of DeepSeek V3: calls are written only where content is none.
const DEEPSEEK_V3: &str = r#"{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- message['content'] }}{%- endif %}
    {%- if message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for tool in message['tool_calls'] %}
            {{- '<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\n' + tool['function']['arguments'] + '\n' }}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {{- '<|Assistant|>' + message['content'] + '<|end|>' }}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{{- '<|output|>' + message['content'] }}{%- endif %}
{%- endfor %}"#;

/// Of DeepSeek R1: arguments are text, and the last system message is all instructions.
const DEEPSEEK: &str = r#"{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}{%- endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}
        {%- for tool in message['tool_calls'] %}
            {{- '<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\n' + tool['function']['arguments'] + '\n' }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}{{- '<|Assistant|>' + message['content'] + '<|end|>' }}{%- endif %}
    {%- if message['role'] == 'tool' %}{{- '<|output|>' + message['content'] }}{%- endif %}
{%- endfor %}"#;

/// Of Gemma: no system message at all.
const GEMMA: &str = r#"{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}"#;

/// Of gpt-oss: a developer of its own, at the beginning.
const HARMONY: &str = r#"{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {{- "<|start|>developer<|message|>" + messages[0].content + "<|end|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and "tool_calls" in message %}
        {{- "<|start|>assistant to=functions." + message.tool_calls[0].function.name + "<|message|>" }}
        {{- message.tool_calls[0].function.arguments | tojson + "<|call|>" }}
    {%- elif message.role == 'assistant' %}{{- "<|start|>assistant<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == 'tool' %}{{- "<|start|>functions<|message|>" + message.content | tojson + "<|end|>" }}
    {%- elif message.role == 'user' %}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}"#;

/// Of DeepSeek 3.2 and its like: developer messages anywhere, beside the system's.
const DEVELOPERS: &str = "{% for m in messages %}{% if m.role == 'developer' %}<dev>{{ m.content }}</dev>\
    {% elif m.role == 'system' %}<sys>{{ m.content }}</sys>{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}";

/// Of models for images: content is a list.
const PARTS: &str = "{% for message in messages %}{{ message.role }}:{% for part in message.content %}\
    {% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}";

fn template(source: &str) -> ChatTemplate {
    let tokens =
        BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())]);
    ChatTemplate::new(source, &tokens).expect("compiles")
}

/// By name: these, and those that transformers has rendered for `tests/it/chat_templates.rs`.
fn families() -> Vec<(String, ChatTemplate)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat_templates.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(file).expect("it is there")).expect("JSON");
    let golden = golden["templates"].as_object().expect("templates by name").clone();
    let own = [
        ("llama-4", LLAMA4),
        ("qwen-coder", QWEN_CODER),
        ("phi", PHI),
        ("deepseek", DEEPSEEK),
        ("deepseek-v3", DEEPSEEK_V3),
        ("gemma", GEMMA),
        ("harmony", HARMONY),
        ("developers", DEVELOPERS),
        ("parts", PARTS),
    ];
    let own = own.into_iter().map(|(name, source)| (name.to_owned(), source.to_owned()));
    let golden = golden.into_iter().map(|(name, source)| (name, source.as_str().expect("text").to_owned()));
    own.chain(golden).map(|(name, source)| (name, template(&source))).collect()
}

fn normal(messages: Value, template: &ChatTemplate) -> Result<Value, Failure> {
    normalise(messages.as_array().expect("an array").clone(), template, false).map(Value::Array)
}

fn render(messages: &Value, template: &ChatTemplate) -> Result<String, Failure> {
    Ok(template.render(&normal(messages.clone(), template)?, None, true, &Map::new())?)
}

/// Of a template that takes any message as it is.
fn plain(messages: Value) -> Result<Value, Failure> {
    normal(messages, &template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
}

#[test]
fn fields_without_a_value_are_as_good_as_absent() {
    let turn = |more: Value| {
        let mut answer = json!({"role": "assistant", "content": "it is 2"});
        answer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([{"role": "user", "content": "1+1?"}, answer, {"role": "user", "content": "and 3?"}])
    };
    let nothing = json!({
        "tool_calls": null, "function_call": null, "refusal": null, "audio": null, "name": null, "reasoning_content": null,
        "reasoning": null, "annotations": null
    });
    for (name, template) in families() {
        let expected = render(&turn(json!({})), &template).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(expected.contains("it is 2"), "{name}: {expected}");
        for more in [
            json!({"tool_calls": null}),
            json!({"tool_calls": []}),
            json!({"refusal": "", "name": "", "reasoning": "", "reasoning_content": ""}),
            nothing.clone(),
        ] {
            assert_eq!(render(&turn(more.clone()), &template).as_ref(), Ok(&expected), "{name}: {more}");
        }
    }
}

#[test]
fn calls_are_the_same_however_they_are_written() {
    let turn = |message: Value| json!([{"role": "user", "content": "t?"}, message, {"role": "tool", "tool_call_id": "call00001", "content": "12"}]);
    let call = |arguments: Value| {
        let function = match arguments {
            Value::Bool(_) => json!({"name": "now"}),
            arguments => json!({"name": "now", "arguments": arguments}),
        };
        json!([{"id": "call00001", "type": "function", "function": function}])
    };
    let mut with_calls = BTreeSet::new();
    for (name, template) in families() {
        let reference = turn(json!({"role": "assistant", "content": "", "tool_calls": call(json!("{}"))}));
        // Templates without calls may refuse a tool's message.
        let expected = render(&reference, &template);
        if expected.as_ref().is_ok_and(|text| text.contains("now")) {
            with_calls.insert(name.clone());
        }
        for arguments in [json!(""), json!(" "), json!("null"), Value::Null, json!(true), json!({})] {
            for content in [json!(""), Value::Null] {
                let message = json!({"role": "assistant", "content": content, "tool_calls": call(arguments.clone())});
                assert_eq!(render(&turn(message), &template), expected, "{name}: {arguments}");
            }
            let message = json!({"role": "assistant", "tool_calls": call(arguments.clone())});
            assert_eq!(render(&turn(message), &template), expected, "{name}: {arguments}");
        }
        let with =
            |arguments: Value| render(&turn(json!({"role": "assistant", "tool_calls": call(arguments)})), &template);
        assert_eq!(with(json!({"city": "Zürich"})), with(json!("{\"city\":\"Zürich\"}")), "{name}");
    }
    let expected = ["deepseek", "deepseek-v3", "harmony", "llama-3.1", "llama-4", "mistral", "qwen-2.5", "qwen-coder"];
    assert_eq!(with_calls.iter().map(String::as_str).collect::<Vec<_>>(), expected, "no call is lost");
}

#[test]
fn instructions_of_a_developer_are_never_lost() {
    let developer = json!({"role": "developer", "content": "Say BANANA."});
    let (system, user) = (json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "hi"}));
    let assistant = json!({"role": "assistant", "content": "hello"});
    let conversations = [
        json!([developer, user]),
        json!([system, developer, user]),
        json!([developer, system, user]),
        json!([developer, developer, user]),
        json!([user, assistant, developer, user]),
        json!([system, user, assistant, developer, user]),
    ];
    for (name, template) in families() {
        for messages in &conversations {
            match render(messages, &template) {
                Ok(text) => {
                    assert!(text.contains("Say BANANA."), "{name}, {messages}: {text}");
                    let has_system = messages.to_string().contains("brief");
                    assert_eq!(text.contains("Be brief."), has_system, "{name}, {messages}: {text}");
                }
                // The template has no place for instructions at all.
                Err(failure) => {
                    let is_told = ["refuses these messages", "drops such messages"];
                    assert!(is_told.iter().any(|words| failure.message.contains(words)), "{name}: {}", failure.message);
                }
            }
        }
    }
}

#[test]
fn a_developer_has_the_templates_own_role_or_the_systems() {
    let roles = |messages: Value, source: &str| {
        let normal = normal(messages, &template(source)).expect("placed");
        let of = |message: &Value| (message["role"].as_str().unwrap().to_owned(), message["content"].clone());
        normal.as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    let of = |role: &str, text: &str| (role.to_owned(), json!(text));
    let first = json!([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}]);
    let both = json!([
        {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, {"role": "user", "content": "u"}
    ]);
    assert_eq!(roles(first.clone(), PHI), [of("system", "d"), of("user", "u")]);
    assert_eq!(roles(first.clone(), HARMONY), [of("developer", "d"), of("user", "u")]);
    assert_eq!(roles(first, DEVELOPERS), [of("developer", "d"), of("user", "u")]);
    assert_eq!(roles(both.clone(), PHI), [of("system", "s\n\nd"), of("user", "u")]);
    assert_eq!(roles(both.clone(), HARMONY), [of("developer", "s\n\nd"), of("user", "u")]);
    assert_eq!(roles(both, DEVELOPERS), [of("system", "s"), of("developer", "d"), of("user", "u")]);
    let later = json!([
        {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "developer", "content": "d"},
        {"role": "user", "content": "v"}
    ]);
    assert_eq!(roles(later.clone(), PHI)[2], of("system", "d"));
    assert_eq!(roles(later.clone(), DEVELOPERS)[2], of("developer", "d"));
    // These two read instructions at the beginning only, or the last one alone.
    assert_eq!(
        roles(later.clone(), HARMONY),
        [of("developer", "d"), of("user", "u"), of("assistant", "a"), of("user", "v")]
    );
    assert_eq!(roles(later, DEEPSEEK)[0], of("system", "d"));
}

#[test]
fn roles_are_openais_or_the_templates_own() {
    let said = |role: &str| json!([{"role": role, "content": "x"}]);
    for role in ROLES {
        assert!(plain(said(role)).is_ok(), "{role}");
    }
    let failure = plain(said("wizard")).expect_err("unknown");
    assert_eq!(failure.param.as_deref(), Some("messages[0].role"));
    assert!(failure.message.contains("\"wizard\"") && failure.message.contains("assistant"), "{}", failure.message);
    // Llama's templates name it.
    assert!(normal(said("ipython"), &template(LLAMA4)).is_ok());
    assert!(plain(said("ipython")).is_err());
    assert_eq!(plain(said("function")).expect("known")[0]["role"], "tool");
}

#[test]
fn text_parts_become_one_string_and_other_fields_pass() {
    let messages = json!([
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [
            {"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}, {"type": "text", "text": null}
        ], "more": {"x": 1}},
    ]);
    let expected = json!([
        {"role": "system", "name": "n", "content": "s"},
        {"role": "user", "more": {"x": 1}, "content": "a\nb\nc"},
    ]);
    assert_eq!(plain(messages), Ok(expected));
}

#[test]
fn parts_stay_parts_where_the_template_writes_them() {
    let messages = json!([
        {"role": "system", "content": [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        {"role": "assistant", "content": "c"},
    ]);
    let expected = "<s><|header_start|>system<|header_end|>\n\ns\nt<|eot|><|header_start|>user<|header_end|>\n\nab<|eot|>\
                    <|header_start|>assistant<|header_end|>\n\nc<|eot|>";
    assert_eq!(render(&messages, &template(LLAMA4)).as_deref(), Ok(expected));
    assert_eq!(render(&messages, &template(PARTS)).as_deref(), Ok("system:s\nt;user:ab;assistant:c;"));
}

#[test]
fn what_clients_send_back_of_an_answer_is_understood() {
    let answer = |message: Value| plain(json!([message])).map(|messages| messages[0].clone());
    let refused =
        json!({"role": "assistant", "content": null, "refusal": "I cannot.", "audio": null, "annotations": []});
    assert_eq!(answer(refused), Ok(json!({"role": "assistant", "annotations": [], "content": "I cannot."})));
    let silent = json!({"role": "assistant", "content": null});
    assert_eq!(answer(silent), Ok(json!({"role": "assistant", "content": ""})));
    let thought = json!({"role": "assistant", "content": "2", "reasoning": "1 and 1"});
    let normal = answer(thought).expect("valid");
    assert_eq!((&normal["reasoning"], &normal["reasoning_content"]), (&json!("1 and 1"), &json!("1 and 1")));
    let old = json!({"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"x\": 1}"}});
    let calls = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
    assert_eq!(answer(old), Ok(json!({"role": "assistant", "tool_calls": calls, "content": ""})));
}

#[test]
fn arguments_stay_text_for_templates_that_join_them() {
    let messages = |arguments: Value| json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]);
    let normal = |arguments| normal(messages(arguments), &template(DEEPSEEK)).expect("valid");
    let of = |messages: Value| messages[0]["tool_calls"][0]["function"]["arguments"].clone();
    assert_eq!(of(normal(json!("{\"x\":  1}"))), "{\"x\":  1}", "as the client wrote it");
    assert_eq!(of(normal(json!({"x": 1}))), "{\"x\":1}");
    assert_eq!(of(normal(json!(""))), "{}");
}

#[test]
fn faults_are_named_by_their_path() {
    let call =
        |function: Value| json!([{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]);
    let cases = [
        (json!([]), "messages"),
        (json!([3]), "messages[0]"),
        (json!([{"role": "user", "content": "x"}, {"content": "x"}]), "messages[1].role"),
        (json!([{"role": 3, "content": "x"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "tool", "content": null}]), "messages[0].content"),
        (json!([{"role": "user", "content": 3}]), "messages[0].content"),
        (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages[0].content[0]"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0]"),
        (json!([{"role": "user", "content": "x", "name": 3}]), "messages[0].name"),
        (json!([{"role": "user", "content": "x", "tool_calls": [{}]}]), "messages[0].tool_calls"),
        (json!([{"role": "assistant", "content": "x", "audio": {"id": "a"}}]), "messages[0].audio"),
        (json!([{"role": "assistant", "content": "x", "refusal": 3}]), "messages[0].refusal"),
        (json!([{"role": "assistant", "content": "x", "reasoning": 3}]), "messages[0].reasoning"),
        (json!([{"role": "assistant", "tool_calls": "f"}]), "messages[0].tool_calls"),
        (json!([{"role": "assistant", "tool_calls": ["f"]}]), "messages[0].tool_calls[0]"),
        (json!([{"role": "assistant", "tool_calls": [{"type": "custom"}]}]), "messages[0].tool_calls[0].type"),
        (json!([{"role": "assistant", "tool_calls": [{"id": "1"}]}]), "messages[0].tool_calls[0].function"),
        (call(json!({"arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
        (call(json!({"name": "f", "arguments": "not json"})), "messages[0].tool_calls[0].function.arguments"),
        (call(json!({"name": "f", "arguments": "[1]"})), "messages[0].tool_calls[0].function.arguments"),
        (call(json!({"name": "f", "arguments": 3})), "messages[0].tool_calls[0].function.arguments"),
    ];
    for (messages, param) in cases {
        let failure = plain(messages.clone()).expect_err(param);
        assert_eq!(failure.param.as_deref(), Some(param), "{messages}");
    }
}
