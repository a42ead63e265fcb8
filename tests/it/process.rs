//! Tests the process as an operator sees it: exit codes, signals, output, and answers while it loads and shuts down.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;

use crate::cluster::slow_model;
use crate::server::{Server, fixture, outrigger};

const MODEL: &str = "llama-gqa-tied-bf16";

fn model() -> String {
    fixture(MODEL).to_str().expect("a UTF-8 path").to_owned()
}

/// A completion of exactly `tokens` tokens.
fn request(tokens: u32) -> serde_json::Value {
    json!({"model": "default", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": true, "temperature": 0,
           "return_token_ids": true})
}

async fn complete(server: &Server, tokens: u32) -> reqwest::Response {
    reqwest::Client::new().post(server.url("/v1/completions")).json(&request(tokens)).send().await.expect("an answer")
}

#[tokio::test]
async fn it_announces_itself_and_answers() {
    let mut server = Server::ready(&["--model", &model()]).await;
    let announcement: String = (0..3).map(|_| server.next_line()).collect();
    assert!(announcement.contains(&format!("curl {}", server.base_url)), "{announcement}");
    let answer = complete(&server, 4).await;
    assert_eq!(answer.status(), 200);
    let answer: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let healthy = outrigger().args(["healthcheck", "--port", server.base_url.rsplit(':').next().unwrap()]).status();
    assert!(healthy.unwrap().success());
}

#[tokio::test]
async fn a_first_signal_lets_running_work_end_and_exits_with_0() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut server = Server::ready(&["--model", &model()]).await;
        let body =
            json!({"model": "default", "prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": true, "stream": true});
        let client = reqwest::Client::new();
        let stream = client.post(server.url("/v1/completions")).json(&body).send().await.unwrap();
        let mut chunks = stream.bytes_stream();
        let mut text = chunks.next().await.unwrap().unwrap().to_vec();
        server.signal(signal);
        server.wait_until("unready", async |server: &Server| server.status("/readyz").await != Some(200)).await;
        while let Some(chunk) = chunks.next().await {
            text.extend(chunk.expect("the stream is not cut"));
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("\"finish_reason\":\"length\"") && text.trim_end().ends_with("data: [DONE]"), "{text}");
        assert_eq!(server.exit().await.code(), Some(0));
    }
}

#[tokio::test]
async fn what_outlasts_the_shutdown_timeout_ends_honestly() {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = slow_model(folder.path());
    arguments.push("--shutdown-timeout=200ms".to_owned());
    let mut server = Server::ready(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    // Too much work for any machine to finish within the timeout.
    let requests: Vec<_> = (0..100)
        .map(|_| tokio::spawn(reqwest::Client::new().post(server.url("/v1/completions")).json(&request(1500)).send()))
        .collect();
    server
        .wait_until("busy", async |server: &Server| {
            let metrics = reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
            metrics.lines().any(|line| line.starts_with("vllm:num_requests_waiting{") && !line.ends_with(" 0"))
        })
        .await;
    let start = Instant::now();
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let mut cut = 0;
    for request in requests {
        // A connection that was refused during the drain has no answer. An accepted one must have a correct answer.
        let Ok(Ok(answer)) = request.await else { continue };
        let status = answer.status().as_u16();
        let Ok(body) = answer.json::<serde_json::Value>().await else { continue };
        match status {
            200 => cut += usize::from(body["choices"][0]["finish_reason"] != "length"),
            503 => cut += usize::from(body["error"]["code"] == "stream_interrupted"),
            429 => {}
            other => panic!("{other}: {body}"),
        }
    }
    assert!(cut > 0, "no request was cut off, so the test tests nothing");
}

#[tokio::test]
async fn the_shortest_context_is_served() {
    let server = Server::ready(&["--model", &model(), "--max-model-len", "6"]).await;
    assert_eq!(complete(&server, 3).await.status(), 200);
}

#[tokio::test]
async fn a_hung_engine_does_not_hold_up_the_end() {
    let mut server = Server::ready(&["--model", &model(), "--shutdown-timeout", "300ms", "--fault-injection"]).await;
    let client = reqwest::Client::new();
    client.post(server.url("/debug/fault")).json(&json!({"fault": "hang"})).send().await.unwrap();
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(1));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let mut server = Server::ready(&["--model", &model(), "--shutdown-timeout", "1h", "--fault-injection"]).await;
    let client = reqwest::Client::new();
    let hang = client.post(server.url("/debug/fault")).json(&json!({"fault": "hang"})).send().await.unwrap();
    assert!(hang.status().is_success(), "{hang:?}");
    let stuck = tokio::spawn(client.post(server.url("/v1/completions")).json(&request(4)).send());
    server.signal(libc::SIGTERM);
    server.wait_until("unready", async |server: &Server| server.status("/readyz").await != Some(200)).await;
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(128 + libc::SIGTERM));
    stuck.abort();
}

#[tokio::test]
async fn a_dead_engine_ends_the_process_so_that_it_is_restarted() {
    let mut server = Server::ready(&["--model", &model(), "--fault-injection"]).await;
    let client = reqwest::Client::new();
    client.post(server.url("/debug/fault")).json(&json!({"fault": "panic"})).send().await.unwrap();
    let code = server.exit().await.code();
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
}

#[tokio::test]
async fn faults_cannot_be_injected_unless_configured() {
    let server = Server::ready(&["--model", &model()]).await;
    let client = reqwest::Client::new();
    let refused = client.post(server.url("/debug/fault")).json(&json!({"fault": "panic"})).send().await.unwrap();
    assert_eq!(refused.status(), 404);
    assert_eq!(complete(&server, 1).await.status(), 200);
}

#[test]
fn a_bad_configuration_is_told_whole_and_ends_with_2() {
    let output = outrigger().args(["--port", "high", "--max-num-seqs", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("port") && message.contains("max_num_seqs"), "{message}");
}

#[test]
fn a_model_that_is_not_there_ends_with_1_and_says_so() {
    let output = outrigger().args(["--port", "0", "--model", "/nonexistent/model.gguf"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("/nonexistent/model.gguf"), "{message}");
}

#[test]
fn a_taken_port_ends_with_1_and_says_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = outrigger().args(["--model", &model(), "--port", &port]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains(&port), "{message}");
}

#[test]
fn config_prints_what_serve_would_use() {
    let output = outrigger().args(["config", "some/model", "--max-num-seqs", "7"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let table: toml::Table = text.parse().unwrap();
    assert_eq!(table["model"].as_str(), Some("some/model"));
    assert_eq!(table["max_num_seqs"].as_integer(), Some(7));
}
