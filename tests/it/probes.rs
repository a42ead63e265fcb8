//! The three probes. Faults that a restart fixes must fail liveness, and states in which traffic should go elsewhere must fail
//! readiness. Neither a long prompt nor many clients may look like a fault.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::real_server::{CHAT, COMPLETIONS, Event, EventStream, RealServer, completion};

/// The codes of the reasons in a probe's answer.
async fn reasons(server: &RealServer, path: &str) -> Vec<String> {
    let body = server.get(path).await.body;
    let reasons = body["reasons"].as_array().unwrap_or_else(|| panic!("{path}: {body}"));
    reasons.iter().map(|reason| reason["code"].as_str().expect("a code").to_owned()).collect()
}

async fn probes(server: &RealServer, result: &str) -> f64 {
    server.metric("outrigger_probe_results_total", &format!("result=\"{result}\"")).await
}

/// Reads a stream that must fail to its end: the last event must be an error, without `[DONE]`.
async fn error_at_the_end(mut stream: EventStream) -> Value {
    let events = stream.rest().await;
    assert!(!events.contains(&Event::Done), "a failed stream sent [DONE]");
    match events.last() {
        Some(Event::Data(chunk)) if chunk.get("error").is_some() => chunk["error"].clone(),
        other => panic!("the stream ends with {other:?}"),
    }
}

#[tokio::test]
async fn a_hang_fails_readiness_then_liveness_and_ends_the_process() {
    const STALL: Duration = Duration::from_secs(1);
    const LIVENESS: Duration = Duration::from_secs(4);
    let mut server = RealServer::ready(&[
        "--fault-injection",
        "--probe-interval",
        "100ms",
        "--stall-timeout",
        "1s",
        "--liveness-timeout",
        "4s",
        "--failure-linger",
        "5s",
    ])
    .await;
    let mut stream = server.stream(COMPLETIONS, &completion(2000)).await;
    stream.chunks(2).await;
    assert_eq!((server.status("/livez").await, server.status("/readyz").await), (Some(200), Some(200)));

    let start = Instant::now();
    server.inject(&json!({"fault": "hang"})).await;
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    let unready_after = start.elapsed();
    assert_eq!(reasons(&server, "/readyz").await, ["engine_stalled"]);
    let live_while_unready = server.status("/livez").await == Some(200);
    assert!(live_while_unready || start.elapsed() >= LIVENESS, "liveness failed before its timeout");
    server.until("to be restarted", async |server| server.status("/livez").await == Some(503)).await;
    let dead_after = start.elapsed();

    // The last heartbeat may be a little older than the hang.
    let early = Duration::from_millis(500);
    assert!(unready_after >= STALL - early && dead_after >= LIVENESS - early, "{unready_after:?} {dead_after:?}");
    assert!(unready_after < dead_after);
    let slack = Duration::from_secs(15);
    assert!(unready_after < STALL + slack && dead_after < LIVENESS + slack, "{unready_after:?} {dead_after:?}");
    let failed = "failed".to_owned();
    server.until("failed", async |server| reasons(server, "/livez").await.contains(&failed)).await;
    assert_eq!(server.metric("outrigger_node_state", "state=\"failed\"").await, 1.0);
    // The front is alive: it ends streams and refuses new ones with an error message.
    let refused = server.post(COMPLETIONS, &completion(1)).await;
    assert_eq!((refused.status.as_u16(), refused.error("code")), (503, "engine_failed"), "{}", refused.body);
    assert_eq!(error_at_the_end(stream).await["code"], "engine_failed");
    assert!(server.exit().await.code().is_some_and(|code| code != 0));
}

#[tokio::test]
async fn a_short_hang_makes_unready_for_as_long_as_it_lasts() {
    let server = RealServer::ready(&[
        "--fault-injection",
        "--probe-interval",
        "100ms",
        "--stall-timeout",
        "500ms",
        "--liveness-timeout",
        "60s",
        "--probe-recovery",
        "1",
    ])
    .await;
    server.inject(&json!({"fault": "hang", "seconds": 3})).await;
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    server.until("ready again", async |server| server.status("/readyz").await == Some(200)).await;
    assert_eq!(server.status("/livez").await, Some(200));
    assert_eq!(server.post(COMPLETIONS, &completion(2)).await.status, 200);
}

#[tokio::test]
async fn a_panic_fails_every_probe_and_ends_streams_and_process() {
    let mut server = RealServer::ready(&["--fault-injection", "--failure-linger", "5s"]).await;
    let mut stream = server
        .stream(
            CHAT,
            &json!({
                "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "ignore_eos": true
            }),
        )
        .await;
    stream.chunks(3).await;
    let whole = tokio::spawn(reqwest::Client::new().post(server.url(COMPLETIONS)).json(&completion(2000)).send());
    server.until("busy", async |server| server.running().await == 2.0).await;
    server.inject(&json!({"fault": "panic"})).await;
    server.until("dead", async |server| server.status("/livez").await == Some(503)).await;
    assert_eq!(server.status("/readyz").await, Some(503));
    assert_eq!(server.status("/health").await, Some(503));
    for path in ["/livez", "/readyz"] {
        assert!(reasons(&server, path).await.contains(&"engine_dead".to_owned()), "{path}");
    }
    assert_eq!(server.metric("outrigger_engine_alive", "").await, 0.0);
    let error = error_at_the_end(stream).await;
    assert_eq!(error["type"], "engine_error", "{error}");
    assert_eq!(whole.await.expect("no panic").expect("an answer").status(), 503);
    assert!(server.exit().await.code().is_some_and(|code| code != 0));
}

#[tokio::test]
async fn a_broken_device_fails_the_node_at_once_with_its_reason_and_ends_the_process() {
    let mut server = RealServer::ready(&["--fault-injection", "--failure-linger", "5s"]).await;
    let mut stream = server.stream(COMPLETIONS, &completion(2000)).await;
    stream.chunks(3).await;
    server.inject(&json!({"fault": "device"})).await;
    assert_eq!(error_at_the_end(stream).await["code"], "engine_failed");
    // The node failed before its streams ended.
    assert_eq!((server.status("/livez").await, server.status("/readyz").await), (Some(503), Some(503)));
    assert_eq!(server.metric("outrigger_node_state", "state=\"failed\"").await, 1.0);
    let reasons = server.get("/livez").await.body["reasons"].to_string();
    assert!(reasons.contains("the engine failed: the device failed: as fault injection asks"), "{reasons}");
    assert!(server.exit().await.code().is_some_and(|code| code != 0));
}

#[tokio::test]
async fn damaged_weights_make_unready_with_the_reason_and_are_not_a_hang() {
    let server =
        RealServer::ready(&["--fault-injection", "--probe-interval", "500ms", "--probe-failure-threshold", "0"]).await;
    server.until("probed", async |server| probes(server, "ok").await >= 2.0).await;
    assert_eq!(server.status("/readyz").await, Some(200));
    let right_before = probes(&server, "ok").await;
    server.inject(&json!({"fault": "corrupt_weights"})).await;
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    // The first probe that started after the damage detects it. One that was already running may still pass.
    let right_after = probes(&server, "ok").await;
    assert!(right_after <= right_before + 2.0, "{right_before} {right_after}");
    assert_eq!(reasons(&server, "/readyz").await, ["probe_failed"]);
    let body = server.get("/readyz").await.body;
    assert!(body["reasons"][0]["message"].as_str().is_some_and(|text| text.contains("wrong numbers")), "{body}");
    // The node stays unready. With a threshold of 0, wrong numbers never fail liveness.
    server.until("probed again", async |server| probes(server, "wrong").await >= 3.0).await;
    assert_eq!(server.status("/readyz").await, Some(503));
    assert_eq!(server.status("/livez").await, Some(200));
    assert_eq!(probes(&server, "ok").await, right_after);
}

#[tokio::test]
async fn logits_that_are_no_numbers_end_the_stream_with_a_typed_error_then_make_unready_and_end_the_process() {
    let flags = ["--fault-injection", "--probe-interval=10m", "--probe-failure-threshold=3", "--failure-linger=5s"];
    let mut server = RealServer::ready(&flags).await;
    let mut stream = server.stream(COMPLETIONS, &completion(2000)).await;
    stream.chunks(2).await;
    server.inject(&json!({"fault": "nan_logits"})).await;
    assert_eq!(error_at_the_end(stream).await["code"], "numerics_invalid");
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    server.until("dead", async |server| server.status("/livez").await == Some(503)).await;
    assert_eq!(probes(&server, "wrong").await, 3.0);
    let reasons = server.get("/livez").await.body["reasons"].to_string();
    assert!(reasons.contains("wrong numbers") && reasons.contains("3 times"), "{reasons}");
    assert!(server.exit().await.code().is_some_and(|code| code != 0));
}

/// A prefill of the whole context in one step takes several times as long as the stall and liveness timeouts.
#[tokio::test]
async fn a_long_prefill_is_not_a_hang() {
    let plain = RealServer::ready(&["--max-num-batched-tokens", "8192"]).await;
    let context = plain.get("/v1/models").await.body["data"][0]["max_model_len"].as_u64().expect("a number");
    let prompt: Vec<u64> = (1..context).map(|id| 100 + id * 7 % 40_000).collect();
    let body = json!({"prompt": prompt, "max_tokens": 1});
    let start = Instant::now();
    assert_eq!(plain.post(COMPLETIONS, &body).await.status, 200);
    let bound = start.elapsed() / 4;
    drop(plain);

    let bound_flag = format!("{}ms", bound.as_millis().max(1));
    let server = RealServer::ready(&[
        "--max-num-batched-tokens",
        "8192",
        "--stall-timeout",
        &bound_flag,
        "--liveness-timeout",
        &bound_flag,
        "--probe-interval",
        "50ms",
        "--probe-hard-limit",
        "10m",
    ])
    .await;
    let start = Instant::now();
    let answer = tokio::spawn(reqwest::Client::new().post(server.url(COMPLETIONS)).json(&body).send());
    let (mut looks, mut was_running) = (0, false);
    while !answer.is_finished() {
        for path in ["/livez", "/readyz"] {
            let probe = server.get(path).await;
            assert_eq!(probe.status, 200, "{path} after {:?} of {bound:?}: {}", start.elapsed(), probe.body);
        }
        was_running |= server.running().await == 1.0;
        looks += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = start.elapsed();
    assert_eq!(answer.await.expect("no panic").expect("an answer").status(), 200);
    assert!(was_running, "the request never counted as running");
    assert!(
        took > bound && looks > 3,
        "{took:?} with a bound of {bound:?}, {looks} rounds of probes: too short to test anything"
    );
}

#[tokio::test]
async fn a_full_queue_is_refused_and_is_no_fault() {
    let server = RealServer::ready(&["--max-num-seqs", "1", "--max-num-queued-requests", "2"]).await;
    let mut occupant = server.stream(COMPLETIONS, &completion(8000)).await;
    occupant.chunks(1).await;
    let waiting: Vec<_> = (0..2)
        .map(|_| tokio::spawn(reqwest::Client::new().post(server.url(COMPLETIONS)).json(&completion(2)).send()))
        .collect();
    server.until("full", async |server| server.waiting().await == 2.0).await;
    for stream in [false, true] {
        let mut body = completion(2);
        body["stream"] = json!(stream);
        let refused = server.post(COMPLETIONS, &body).await;
        assert_eq!((refused.status.as_u16(), refused.error("type")), (429, "overloaded_error"), "{}", refused.body);
        assert!(refused.error("message").contains("max_num_queued_requests"), "{}", refused.body);
        assert!(refused.retry_after().is_some_and(|seconds| (1..=60).contains(&seconds)), "{:?}", refused.headers);
    }
    assert_eq!(server.status("/livez").await, Some(200));
    let readiness = server.get("/readyz").await;
    assert_eq!((readiness.status.as_u16(), readiness.body["queue_saturation"].as_f64()), (200, Some(1.0)));
    drop(occupant);
    for answer in waiting {
        assert_eq!(answer.await.expect("no panic").expect("an answer").status(), 200);
    }
    let readiness = server.get("/readyz").await;
    assert_eq!((readiness.status.as_u16(), readiness.body["queue_saturation"].as_f64()), (200, Some(0.0)));
    assert_eq!(server.post(COMPLETIONS, &completion(2)).await.status, 200);
}

#[tokio::test]
async fn startup_tells_its_phase_and_then_that_it_is_over() {
    let server = RealServer::start(&[]).await;
    let first = server.get("/startupz").await;
    assert_eq!((first.status.as_u16(), first.body["started"].as_bool()), (503, Some(false)), "{}", first.body);
    assert_eq!(server.status("/livez").await, Some(200));
    let phases = ["starting", "downloading", "loading_weights", "warming", "done"];
    let mut seen = vec![first.body];
    server.until("started", async |server| server.status("/startupz").await == Some(200)).await;
    seen.push(server.get("/startupz").await.body);
    for body in &seen {
        assert!(body["phase"].as_str().is_some_and(|phase| phases.contains(&phase)), "{body}");
        assert!(body["fraction"].as_f64().is_some_and(|fraction| (0.0..=1.0).contains(&fraction)), "{body}");
    }
    assert_eq!((&seen[1]["started"], &seen[1]["phase"]), (&json!(true), &json!("done")));
    server.until("ready", async |server| server.status("/readyz").await == Some(200)).await;
    assert_eq!(server.post(COMPLETIONS, &completion(1)).await.status, 200);
}

/// A hub that accepts the connection and does not answer keeps the node in its download phase.
#[tokio::test]
async fn a_node_that_downloads_is_alive_unready_and_says_so() {
    let hub = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", hub.local_addr().expect("an address"));
    let home = tempfile::tempdir().expect("a directory");
    let home = home.path().to_str().expect("UTF-8");
    let mut server = RealServer::start(&[
        "--model",
        "owner/name",
        "--hub-endpoint",
        &endpoint,
        "--home",
        home,
        "--failover-timeout",
        "200ms",
        "--drain-linger",
        "0s",
    ])
    .await;
    let (held, _) = hub.accept().await.expect("the node asks the hub");
    let startup = server.get("/startupz").await;
    assert_eq!((startup.status.as_u16(), &startup.body["phase"]), (503, &json!("downloading")), "{}", startup.body);
    assert_eq!(server.status("/livez").await, Some(200));
    assert_eq!((server.status("/readyz").await, server.status("/health").await), (Some(503), Some(503)));
    assert_eq!(reasons(&server, "/readyz").await[0], "starting");
    let early = server.post(COMPLETIONS, &completion(1)).await;
    assert_eq!((early.status.as_u16(), early.error("code")), (503, "model_loading"), "{}", early.body);
    assert!(early.retry_after().is_some(), "{:?}", early.headers);
    assert_eq!(server.get("/v1/models").await.body["data"], json!([]));
    // There is no work to finish.
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(0));
    drop(held);
}
