//! Streams over time: silence, deadlines, failures half-way.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use super::*;
use crate::types::FailureKind;

const PATH: &str = "/v1/completions";
/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node that hands out the sender of each request.
fn by_hand() -> (Node, Arc<Mutex<Vec<Events>>>) {
    by_hand_with(Config::default())
}

fn by_hand_with(config: Config) -> (Node, Arc<Mutex<Vec<Events>>>) {
    let senders: Arc<Mutex<Vec<Events>>> = Arc::default();
    let kept = senders.clone();
    let node = Node::with_config(config, admission::Config::default(), move |_, events| {
        kept.lock().push(events);
        Ok(())
    });
    (node, senders)
}

fn token(text: &str) -> GenerationEvent {
    GenerationEvent::Token { choice: 0, token: ids(text)[0], logprobs: None }
}

/// The pieces of a streamed body, as they are written.
struct Pieces(Body);

impl Pieces {
    async fn of(node: &Node, body: serde_json::Value, timeout: Option<&str>) -> (StatusCode, Self) {
        let mut request = Request::post(PATH);
        if let Some(timeout) = timeout {
            request = request.header("x-request-timeout-ms", timeout);
        }
        let request = request.body(Body::from(body.to_string())).expect("a request");
        let response = node.router().oneshot(request).await.expect("infallible");
        (response.status(), Self(response.into_body()))
    }

    async fn next(&mut self) -> Option<Bytes> {
        let frame = tokio::time::timeout(PATIENCE, self.0.frame()).await.expect("something is written");
        let frame = frame?.expect("the body does not break");
        frame.into_data().ok()
    }

    async fn rest(mut self) -> String {
        let mut text = String::new();
        while let Some(piece) = self.next().await {
            text += std::str::from_utf8(&piece).expect("UTF-8");
        }
        text
    }
}

fn streamed() -> serde_json::Value {
    json!({"prompt": [5], "stream": true})
}

#[tokio::test]
async fn silence_is_broken_by_comments() {
    let interval = Duration::from_millis(40);
    let (node, senders) = by_hand_with(Config { stream_keep_alive: interval, ..Config::default() });
    let began = Instant::now();
    // The head waits for the first event, and no longer than the interval.
    let (status, mut pieces) = Pieces::of(&node, streamed(), None).await;
    assert_eq!(status, StatusCode::OK);
    assert!(began.elapsed() >= interval);
    let events = senders.lock()[0].clone();
    assert_eq!(pieces.next().await.as_deref(), Some(&b": keep-alive\n\n"[..]));
    assert_eq!(pieces.next().await.as_deref(), Some(&b": keep-alive\n\n"[..]));
    assert!(began.elapsed() >= 2 * interval);
    events.send(token("a")).expect("somebody listens");
    let piece = pieces.next().await.expect("the token");
    assert!(piece.starts_with(b"data: {"), "{piece:?}");
    assert_eq!(pieces.next().await.as_deref(), Some(&b": keep-alive\n\n"[..]));
    events.send(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length }).expect("somebody listens");
    assert!(pieces.rest().await.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn events_that_are_ready_together_share_a_write() {
    let (node, senders) = by_hand();
    let feed = async {
        while senders.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let events = senders.lock()[0].clone();
        for text in ["a", "b", "c"] {
            events.send(token(text)).expect("somebody listens");
        }
        events
    };
    let (events, (_, mut pieces)) = tokio::join!(feed, Pieces::of(&node, streamed(), None));
    let piece = pieces.next().await.expect("three tokens");
    assert_eq!(piece.windows(6).filter(|window| window == b"data: ").count(), 3);
    // Nothing more is ready, and nothing is held back.
    events.send(token("d")).expect("somebody listens");
    let piece = pieces.next().await.expect("one token");
    assert_eq!(piece.windows(6).filter(|window| window == b"data: ").count(), 1);
}

#[tokio::test]
async fn a_failure_half_way_is_an_event_and_the_end() {
    let (node, senders) = by_hand();
    let feed = async {
        while senders.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let events = senders.lock()[0].clone();
        events.send(token("a")).expect("somebody listens");
        let failure = Failure::new(FailureKind::NumericsInvalid, "The numbers went wrong.");
        events.send(GenerationEvent::Failed(failure)).expect("somebody listens");
    };
    let ((), (status, pieces)) = tokio::join!(feed, Pieces::of(&node, streamed(), None));
    assert_eq!(status, StatusCode::OK);
    let text = pieces.rest().await;
    let last = text.trim_end().rsplit("\n\n").next().expect("an event");
    let error: serde_json::Value = serde_json::from_str(last.strip_prefix("data: ").expect("data")).expect("JSON");
    assert_eq!(error["error"]["message"], "The numbers went wrong.");
    assert!(!text.contains("[DONE]"), "{text}");
    assert!(node.state.metrics.prometheus_text().contains("failures_total{kind=\"numerics_invalid\"} 1\n"));
}

#[tokio::test]
async fn a_hanging_backend_does_not_outlive_the_deadline() {
    let (node, senders) = by_hand();
    // Without a token there is nothing to show: a failure.
    let (status, pieces) = Pieces::of(&node, streamed(), Some("100")).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    assert!(pieces.rest().await.contains("deadline_exceeded"));
    // With tokens the answer ends honestly.
    let feed = async {
        while senders.lock().len() < 2 {
            tokio::task::yield_now().await;
        }
        let events = senders.lock()[1].clone();
        events.send(token("a")).expect("somebody listens");
        events
    };
    let (_events, (status, pieces)) = tokio::join!(feed, Pieces::of(&node, streamed(), Some("100")));
    assert_eq!(status, StatusCode::OK);
    let text = pieces.rest().await;
    assert!(text.contains("\"finish_reason\":\"deadline\"") && text.ends_with("[DONE]\n\n"), "{text}");
}

#[tokio::test]
async fn a_failed_node_ends_its_streams() {
    let (node, senders) = by_hand();
    let health = node.state.health.clone();
    let fail = async {
        while senders.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        health.lifecycle().fail("the engine hangs").expect("a step of the diagram");
    };
    let ((), (status, pieces)) = tokio::join!(fail, Pieces::of(&node, streamed(), None));
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(pieces.rest().await.contains("engine_failed"));
}

#[tokio::test]
async fn dropping_the_response_cancels_and_counts() {
    let (node, senders) = by_hand();
    let feed = async {
        while senders.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let events = senders.lock()[0].clone();
        events.send(GenerationEvent::Scheduled { cached_tokens: 0 }).expect("somebody listens");
        events.send(token("a")).expect("somebody listens");
        events
    };
    let (events, (_, mut pieces)) = tokio::join!(feed, Pieces::of(&node, streamed(), None));
    assert!(pieces.next().await.is_some());
    assert!(!events.is_closed());
    assert_eq!(node.state.admission.status().admitted_requests, 1);
    drop(pieces);
    tokio::time::timeout(PATIENCE, events.closed()).await.expect("it is cancelled");
    assert_eq!(node.state.admission.status().admitted_requests, 0);
    assert!(node.state.metrics.prometheus_text().contains("finished_reason=\"abort\"} 1\n"));
}

#[tokio::test]
async fn what_the_request_used_is_measured() {
    let node = Node::saying("the wave");
    let generated = ids("the wave").len() + 1;
    let answer = node.post_json(PATH, json!({"prompt": [5, 6, 7]})).await;
    assert_eq!(answer.status, StatusCode::OK);
    let text = node.state.metrics.prometheus_text();
    let labels = "{model_name=\"tiny\",engine=\"0\"}";
    for (name, value) in [
        ("vllm:prompt_tokens_total", 3),
        ("vllm:generation_tokens_total", generated),
        ("vllm:prefix_cache_queries_total", 3),
        ("vllm:prefix_cache_hits_total", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", generated - 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:request_decode_time_seconds_count", 1),
        ("vllm:request_max_num_generation_tokens_count", 1),
    ] {
        let line = format!("{name}{labels} {value}");
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    for (name, value) in [
        ("prompt_tokens_total", 3),
        ("generation_tokens_total", generated),
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", generated - 1),
        ("request_duration_seconds_count", 1),
        ("choices_total{finished_reason=\"stop\"}", 1),
    ] {
        let line = format!("outrigger_client_{name} {value}");
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}
