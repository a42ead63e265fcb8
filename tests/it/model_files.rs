//! Tests, with real processes, the effect of settings in a model's files: sampling defaults, templates and added tokens, at
//! the node that has the files and at a node that relays requests for the model to it.

use std::path::{Path, PathBuf};

use outrigger::drill::arena::NodeAction;
use serde_json::{Value, json};

use crate::cluster::{Cluster, FIXTURE, post};
use crate::real_server::{CHAT, COMPLETIONS, RealServer};
use crate::server::{Server, fixture};

/// Copies the fixture and adds these files.
fn model(folder: &Path, files: &[(&str, Value)]) -> PathBuf {
    let directory = folder.join("model");
    std::fs::create_dir_all(directory.join("additional_chat_templates")).expect("a folder");
    for file in std::fs::read_dir(fixture(FIXTURE)).expect("the fixture").map(|file| file.expect("a file").path()) {
        std::fs::copy(&file, directory.join(file.file_name().expect("a name"))).expect("copied");
    }
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(directory.join(name), text).expect("written");
    }
    directory
}

async fn ask(server: &Server, body: Value) -> Value {
    post(&server.base_url, COMPLETIONS, &body, &[]).await.json().await.expect("JSON")
}

/// The number of different texts from eight seeds. It is 1 if the most likely token is always chosen.
async fn draws(server: &Server, more: Value) -> usize {
    let mut texts = std::collections::BTreeSet::new();
    for seed in 0..8 {
        let mut body = json!({"prompt": "The sea", "max_tokens": 4, "seed": seed});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        texts.insert(ask(server, body).await["choices"][0]["text"].to_string());
    }
    texts.len()
}

const SMALL: [&str; 8] = [
    "--threads=1",
    "--kv-cache-memory=64MiB",
    "--memory-warn-mark=1",
    "--memory-shrink-mark=1",
    "--memory-removal-mark=1",
    "--probe-interval=60s",
    "--log-format=text",
    "--log-level=info",
];

async fn start(directory: &Path, more: &[&str]) -> Server {
    let model = format!("--model={}", directory.display());
    let arguments: Vec<&str> = SMALL.into_iter().chain([model.as_str()]).chain(more.iter().copied()).collect();
    Server::ready(&arguments).await
}

#[tokio::test]
async fn recommended_sampling_is_said_at_the_start_and_may_be_turned_off() {
    let folder = tempfile::tempdir().expect("a folder");
    for (recommended, said) in [
        (json!({"top_k": 1}), "top_k=\"1\""),
        (json!({"do_sample": false, "temperature": 2.0}), "temperature=\"0\""),
        (json!({"top_p": 0.001}), "top_p=\"0.001\""),
    ] {
        let directory = model(folder.path(), &[("generation_config.json", recommended.clone())]);
        let server = start(&directory, &[]).await;
        assert_eq!(draws(&server, json!({})).await, 1, "{recommended}");
        let own = json!({"temperature": 1, "top_k": -1, "top_p": 1});
        assert!(draws(&server, own).await > 1, "{recommended}: the request's own values win");
        let log = server.log();
        let lines: Vec<_> = log.lines().filter(|line| line.contains("as the model's authors recommend")).collect();
        assert!(lines.len() == 1 && lines[0].contains(said), "{log}");
    }
    let directory = model(folder.path(), &[("generation_config.json", json!({"top_k": 1}))]);
    let server = start(&directory, &["--generation-config=vllm"]).await;
    assert!(draws(&server, json!({})).await > 1);
    assert!(!server.log().contains("as the model's authors recommend"));
}

#[tokio::test]
async fn a_chat_template_of_the_operators_replaces_the_models() {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = model(folder.path(), &[("additional_chat_templates/tool_use.jinja", json!("tools"))]);
    let file = folder.path().join("own.jinja");
    std::fs::write(&file, "own {{ messages[0].content }}{% if tools %} {{ tools[0].function.name }}{% endif %}")
        .unwrap();
    let server = start(&directory, &[&format!("--chat-template={}", file.display())]).await;
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    let body = json!({"messages": [{"role": "user", "content": "x"}], "tools": tools});
    let tokens: Value = post(&server.base_url, "/tokenize", &body, &[]).await.json().await.expect("JSON");
    let body = json!({"tokens": tokens["tokens"]});
    let text: Value = post(&server.base_url, "/detokenize", &body, &[]).await.json().await.expect("JSON");
    assert_eq!(text["prompt"], "own x look");

    std::fs::write(&file, "{% if %}").unwrap();
    let model = format!("--model={}", directory.display());
    let mut server = Server::start(&[&model, &format!("--chat-template={}", file.display())]);
    assert!(!server.exit().await.success());
    assert!(server.log().contains("chat_template"), "{}", server.log());
}

#[tokio::test]
async fn the_default_model_answers_as_its_authors_recommend() {
    let server = RealServer::shared(&[]).await;
    let messages = json!([{"role": "user", "content": "Name a colour."}]);
    let answer = async |more: Value| {
        let mut body = json!({"messages": messages, "max_tokens": 24, "seed": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post(CHAT, &body).await.body["choices"][0]["message"]["content"].clone()
    };
    let default = answer(json!({})).await;
    assert_eq!(default, answer(json!({"temperature": 0.2, "top_p": 0.9})).await);
    assert_ne!(default, answer(json!({"temperature": 1, "top_p": 1})).await);
}

#[tokio::test]
async fn what_the_files_say_holds_at_every_node() {
    let mut cluster = Cluster::start(1, &["--served-model-name=alpha"]).await;
    // Token 1 is only defined in `added_tokens.json`.
    let tokenizer = std::fs::read(fixture(FIXTURE).join("tokenizer.json")).expect("the fixture has one");
    let mut tokenizer: Value = serde_json::from_slice(&tokenizer).expect("JSON");
    tokenizer["model"]["vocab"].as_object_mut().expect("a map").shift_remove("<|im_start|>");
    tokenizer["added_tokens"].as_array_mut().expect("a list").retain(|token| token["id"] != 1);
    let files = [
        ("tokenizer.json", tokenizer),
        ("added_tokens.json", json!({"<|im_start|>": 1})),
        ("generation_config.json", json!({"eos_token_id": 2, "top_k": 1, "max_new_tokens": 6})),
        ("chat_template.json", json!({"chat_template": "json {{ messages[0].content }}"})),
        ("additional_chat_templates/tool_use.jinja", json!("tools {{ tools | tojson }}")),
    ];
    let directory = model(cluster.folder(), &files);
    let flags = [format!("--model={}", directory.display()), "--served-model-name=beta".to_owned()];
    let mut node = cluster.newcomer("n1", &flags);
    node.act(NodeAction::Restart).await.expect("it starts");
    cluster.nodes.push(node);
    cluster.wait_until_whole().await.expect("it joins");

    let tool = json!([{"type": "function", "function": {"name": "look"}}]);
    let messages = json!([{"role": "user", "content": "x<|im_start|>"}]);
    let chat = json!({"model": "beta", "messages": messages, "return_token_ids": true, "ignore_eos": true, "seed": 7});
    for tools in [Value::Null, tool] {
        let mut body = chat.clone();
        body["tools"] = tools;
        let mut answers = Vec::new();
        for node in 0..2 {
            let answer: Value = post(cluster.url(node), CHAT, &body, &[]).await.json().await.expect("JSON");
            let prompt = answer["prompt_token_ids"].as_array().expect("a prompt").clone();
            let choice = answer["choices"][0].clone();
            assert_eq!(choice["token_ids"].as_array().map(Vec::len), Some(6), "max_new_tokens: {answer}");
            answers.push((prompt, choice["token_ids"].clone()));
            body["seed"] = json!(8);
        }
        assert_eq!(answers[0], answers[1], "top_k is 1, so the seed has no effect");
        assert_eq!(
            answers[0].0.contains(&json!(1)),
            body["tools"].is_null(),
            "only the template without tools shows the added token"
        );
    }
}
