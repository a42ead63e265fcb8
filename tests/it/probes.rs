//! The three probes under each trouble, in both directions: they change when they must, and stay when they must. Real
//! processes; the faults come through fault injection.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Server, fixture};

const MODEL: &str = "llama-gqa-tied-bf16";

/// A server that watches itself closely, and stays to be asked after its engine has failed.
async fn watchful(arguments: &[&str]) -> Server {
    let model = fixture(MODEL);
    let model = model.to_str().expect("a UTF-8 path");
    let watchful = ["--model", model, "--fault-injection", "--probe-interval", "200ms", "--failure-linger", "10m"];
    Server::ready(&[&watchful, arguments].concat()).await
}

async fn inject(server: &Server, fault: Value) {
    let answer = reqwest::Client::new().post(server.url("/debug/fault")).json(&fault).send().await.expect("an answer");
    assert_eq!(answer.status(), 202);
}

/// The status and the codes of the reasons.
async fn ask(server: &Server, probe: &str) -> (u16, Vec<String>) {
    let answer = reqwest::get(server.url(probe)).await.expect("the front answers");
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.expect("a body");
    let reasons = body["reasons"].as_array().expect("reasons");
    (status, reasons.iter().map(|reason| reason["code"].as_str().expect("a code").to_owned()).collect())
}

/// Waits until `probe` refuses for the reason; returns how long that took.
async fn wait_for_reason(server: &Server, probe: &str, code: &str) -> Duration {
    let start = Instant::now();
    server
        .wait_until(code, async |server: &Server| {
            let (status, reasons) = ask(server, probe).await;
            status == 503 && reasons.iter().any(|reason| reason == code)
        })
        .await;
    start.elapsed()
}

fn completion(server: &Server, body: &Value) -> reqwest::RequestBuilder {
    reqwest::Client::new().post(server.url("/v1/completions")).json(body)
}

#[tokio::test]
async fn a_hung_engine_is_unready_first_and_then_dead() {
    let server = watchful(&["--stall-timeout", "1s", "--liveness-timeout", "6s"]).await;
    inject(&server, json!({"fault": "hang"})).await;
    let unready_after = wait_for_reason(&server, "/readyz", "engine_stalled").await;
    assert_eq!(ask(&server, "/livez").await.0, 200, "stalled for less than liveness_timeout is no reason to restart");
    let dead_after = unready_after + wait_for_reason(&server, "/livez", "engine_stalled").await;
    assert!(dead_after >= Duration::from_secs(5), "{dead_after:?}");
    server
        .wait_until("failed", async |server: &Server| ask(server, "/readyz").await.1.contains(&"failed".into()))
        .await;
}

#[tokio::test]
async fn an_engine_that_stands_still_for_a_while_comes_back() {
    let server = watchful(&["--stall-timeout", "500ms", "--liveness-timeout", "1m", "--probe-recovery", "1"]).await;
    inject(&server, json!({"fault": "hang", "seconds": 3})).await;
    wait_for_reason(&server, "/readyz", "engine_stalled").await;
    server.wait_until("ready again", async |server: &Server| server.status("/readyz").await == Some(200)).await;
    assert_eq!(ask(&server, "/livez").await.0, 200);
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 2});
    assert_eq!(completion(&server, &body).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_panic_fails_the_node_and_ends_its_streams_while_the_front_stays() {
    let server = watchful(&[]).await;
    let hang = json!({"fault": "hang", "seconds": 1});
    inject(&server, hang).await;
    let stream =
        tokio::spawn(completion(&server, &json!({"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": true})).send());
    inject(&server, json!({"fault": "panic"})).await;
    wait_for_reason(&server, "/livez", "engine_dead").await;
    assert_eq!(ask(&server, "/readyz").await.0, 503);
    let ended = stream.await.unwrap().expect("an answer, not a broken connection");
    assert!(ended.status().is_server_error(), "{ended:?}");
    let refused = completion(&server, &json!({"prompt": [5], "max_tokens": 1})).send().await.unwrap();
    assert_eq!(refused.status(), 503);
}

#[tokio::test]
async fn corrupt_weights_make_the_node_unready_and_not_dead() {
    let server = watchful(&[]).await;
    inject(&server, json!({"fault": "corrupt_weights"})).await;
    let after = wait_for_reason(&server, "/readyz", "probe_failed").await;
    assert!(after < Duration::from_secs(30), "{after:?}");
    assert_eq!(ask(&server, "/livez").await.0, 200);
}

#[tokio::test]
async fn overload_is_answered_with_429_and_leaves_the_node_ready() {
    let server =
        watchful(&["--max-num-seqs", "1", "--max-num-batched-tokens", "64", "--max-num-queued-requests", "2"]).await;
    // One that takes long enough for the others to meet a full queue.
    inject(&server, json!({"fault": "hang", "seconds": 2})).await;
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": true});
    let requests: Vec<_> = (0..20).map(|_| tokio::spawn(completion(&server, &body).send())).collect();
    let mut statuses = Vec::new();
    for request in requests {
        let answer = request.await.unwrap().expect("an answer");
        if answer.status() == 429 {
            let seconds: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().expect("whole seconds");
            assert!((1..=60).contains(&seconds), "{seconds}");
            let (ready, reasons) = ask(&server, "/readyz").await;
            assert_eq!(ready, 200, "{reasons:?}");
        }
        statuses.push(answer.status().as_u16());
    }
    assert!(statuses.iter().all(|status| matches!(status, 200 | 429)), "{statuses:?}");
    assert!(statuses.contains(&429) && statuses.contains(&200), "{statuses:?}");
    assert_eq!(ask(&server, "/livez").await.0, 200);
}

/// Random weights of a model so deep that one step over a long prompt takes seconds, and one layer a fraction of one.
fn deep_model() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let fixture = fixture(MODEL);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), directory.path().join(name)).unwrap();
    }
    let config = std::fs::read_to_string(fixture.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let changes = json!({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 32768});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

/// Prefills so many tokens in one step; asks both probes all the while. Returns how long it took.
async fn prefill(server: &Server, tokens: u32) -> Duration {
    let prompt: Vec<u32> = (0..tokens).map(|index| 3 + index % 200).collect();
    let request = tokio::spawn(completion(server, &json!({"prompt": prompt, "max_tokens": 1})).send());
    let start = Instant::now();
    while !request.is_finished() {
        for probe in ["/livez", "/readyz"] {
            let (status, reasons) = ask(server, probe).await;
            assert_eq!(status, 200, "{probe} after {:?} of {tokens} tokens: {reasons:?}", start.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(request.await.unwrap().unwrap().status(), 200);
    start.elapsed()
}

#[tokio::test]
async fn a_long_prefill_in_one_step_is_no_hang() {
    const STALL: Duration = Duration::from_secs(1);
    let model = deep_model();
    let server = Server::ready(&[
        "--model",
        model.path().to_str().unwrap(),
        "--load-format",
        "dummy",
        "--max-num-batched-tokens",
        "32768",
        "--no-enable-prefix-caching",
        "--stall-timeout",
        "1s",
        "--liveness-timeout",
        "1s",
        "--probe-interval",
        "200ms",
        "--probe-soft-limit",
        "2m",
        "--probe-hard-limit",
        "2m",
    ])
    .await;
    // As long as this machine needs for a step that would count as a hang if only its end were progress.
    let mut longest = Duration::ZERO;
    for tokens in [1000, 2000, 4000, 8000, 16000, 32000] {
        longest = prefill(&server, tokens).await;
        if longest > 3 * STALL {
            break;
        }
    }
    assert!(longest > 3 * STALL, "one step of {longest:?} does not test a stall_timeout of {STALL:?}");
}

#[tokio::test]
async fn while_the_model_is_obtained_the_front_tells_so_and_refuses_work() {
    // A hub that takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    let mut server = Server::start(&["--model", "nobody/nothing", "--hub-endpoint", &endpoint, "--home", home]);
    let startup: Value = reqwest::get(server.url("/startupz")).await.unwrap().json().await.unwrap();
    assert_eq!((&startup["started"], &startup["phase"]), (&json!(false), &json!("downloading")), "{startup}");
    assert_eq!(server.status("/startupz").await, Some(503));
    assert_eq!(server.status("/readyz").await, Some(503));
    assert_eq!(server.status("/livez").await, Some(200));
    let refused = completion(&server, &json!({"prompt": "x"})).send().await.unwrap();
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(0));
}
