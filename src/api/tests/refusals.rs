//! What is refused, with which status, field and words.

use std::time::Duration;

use serde_json::json;

use super::*;
use crate::types::FailureKind;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn quiet() -> Node {
    Node::saying("x")
}

#[tokio::test]
async fn requests_at_fault_are_400_and_name_the_field() {
    let node = quiet();
    let hi = json!([{"role": "user", "content": "hi"}]);
    let cases = [
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"messages": []}), "messages"),
        (CHAT, json!({"messages": "hi"}), "messages"),
        (CHAT, json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (CHAT, json!({"messages": hi, "temperature": "hot"}), "temperature"),
        (CHAT, json!({"messages": hi, "temperature": 3}), "temperature"),
        (CHAT, json!({"messages": hi, "max_tokens": 0}), "max_tokens"),
        (CHAT, json!({"messages": hi, "max_tokens": -1}), "max_tokens"),
        (CHAT, json!({"messages": hi, "min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (CHAT, json!({"messages": hi, "stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (CHAT, json!({"messages": hi, "stream_options": {"include_usage": true}}), "stream_options"),
        (CHAT, json!({"messages": hi, "logit_bias": {"191222": -100}, "max_tokens": 2}), "logit_bias"),
        (
            CHAT,
            json!({"messages": hi, "stop_token_ids": [151_645], "min_tokens": 1, "max_tokens": 2}),
            "stop_token_ids",
        ),
        (CHAT, json!({"messages": hi, "grammar": "root ::= \"a\""}), "grammar"),
        (COMPLETIONS, json!({"prompt": "a", "typical_p": 0.5}), "typical_p"),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": "8"}), "max_tokens"),
        (CHAT, json!({"messages": hi, "response_format": {"type": "json_schema"}}), "response_format"),
        (CHAT, json!({"messages": hi, "tool_choice": "required", "tools": [{}]}), "tool_choice"),
        (CHAT, json!({"messages": hi, "tools": [{"type": "function", "function": {"name": "f"}}]}), "tools"),
        (CHAT, json!({"messages": hi, "echo": true}), "echo"),
        (COMPLETIONS, json!({}), "prompt"),
        (COMPLETIONS, json!({"prompt": {}}), "prompt"),
        (COMPLETIONS, json!({"prompt": []}), "prompt"),
        (COMPLETIONS, json!({"prompt": [[]]}), "prompt"),
        (COMPLETIONS, json!({"prompt": [999_999], "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": vec!["a"; 2049]}), "prompt"),
        (COMPLETIONS, json!({"prompt": ""}), "prompt"),
        (COMPLETIONS, json!({"prompt": "a", "suffix": "b"}), "suffix"),
        // One seat and 512 that may wait.
        (COMPLETIONS, json!({"prompt": vec!["a"; 172], "n": 3}), "n"),
    ];
    for (path, body, param) in cases {
        let answer = node.post_json(path, body.clone()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}: {}", answer.text);
        assert_eq!(answer.error()["param"], param, "{body}: {}", answer.text);
        assert_eq!(answer.error()["type"], "invalid_request_error");
    }
    assert!(node.requests.lock().is_empty());
    let metrics = node.state.metrics.prometheus_text();
    assert!(metrics.contains("outrigger_request_failures_total{kind=\"invalid_request\"} 29\n"), "{metrics}");
}

#[tokio::test]
async fn malformed_json_is_told_with_its_place() {
    let answer = quiet().post(CHAT, "{\"messages\": [}").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.error()["message"].as_str().expect("text").contains("line 1, column 15"), "{}", answer.text);
    // Half of a character, which no text holds.
    let surrogate = r#"{"messages":[{"role":"user","content":"hi \ud83d"}],"max_tokens":1}"#;
    let answer = quiet().post(CHAT, surrogate).await;
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_json")));
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(5000), "]".repeat(5000));
    assert_eq!(quiet().post(CHAT, deep).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_exceeds_the_context_is_told_with_the_numbers() {
    let node = quiet();
    let long = "wave ".repeat(400);
    let user = |content: &str| json!([{"role": "user", "content": content}]);
    for (path, body, param) in [
        (COMPLETIONS, json!({"prompt": long}), "prompt"),
        (COMPLETIONS, json!({"prompt": "wave", "max_tokens": MAX_MODEL_LEN}), "max_tokens"),
        (COMPLETIONS, json!({"prompt": vec![5; MAX_MODEL_LEN]}), "prompt"),
        (CHAT, json!({"messages": user(&long)}), "messages"),
        (CHAT, json!({"messages": user("wave"), "max_completion_tokens": MAX_MODEL_LEN}), "max_completion_tokens"),
    ] {
        let answer = node.post_json(path, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(
            (&answer.error()["code"], &answer.error()["param"]),
            (&json!("context_length_exceeded"), &json!(param))
        );
        // litellm and langchain look for these words.
        let message = answer.error()["message"].as_str().expect("text").to_owned();
        assert!(message.starts_with("This model's maximum context length is 256 tokens"), "{message}");
        assert!(message.contains("Please reduce the length of the"), "{message}");
    }
    let both = node.post_json(COMPLETIONS, json!({"prompt": [5, 5], "max_tokens": MAX_MODEL_LEN})).await;
    let words = "However, you requested 258 tokens (2 in the prompt, 256 in the completion";
    assert!(both.error()["message"].as_str().expect("text").contains(words), "{}", both.text);
    // One token less fits.
    let fits = node.post_json(COMPLETIONS, json!({"prompt": vec![5; MAX_MODEL_LEN - 1], "max_tokens": 1})).await;
    assert_eq!(fits.status, StatusCode::OK, "{}", fits.text);
}

#[tokio::test]
async fn configured_limits_are_named() {
    let config = Config { max_input_tokens: Some(3), max_output_tokens: Some(5), ..Config::default() };
    let node = Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing may get through"));
    let long = node.post_json(COMPLETIONS, json!({"prompt": [5, 5, 5, 5]})).await;
    let message = long.error()["message"].as_str().expect("text").to_owned();
    assert!(
        message.contains("max_input_tokens") && message.contains("input tokens exceed the configured limit"),
        "{message}"
    );
    let greedy = node.post_json(COMPLETIONS, json!({"prompt": [5], "max_tokens": 6})).await;
    assert!(greedy.error()["message"].as_str().expect("text").contains("max_output_tokens"));
    assert_eq!(greedy.error()["param"], "max_tokens");
}

#[tokio::test]
async fn large_bodies_are_413() {
    let config = Config { max_body_bytes: 100, ..Config::default() };
    let node = Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing may get through"));
    let answer = node.post(CHAT, "x".repeat(101)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(answer.error()["message"].as_str().expect("text").contains("100 bytes (max_body_bytes)"));
    // Announced by no header, so found while reading.
    let pieces = futures::stream::iter((0..2).map(|_| Ok::<_, std::io::Error>("x".repeat(60))));
    assert_eq!(node.post(CHAT, Body::from_stream(pieces)).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn bodies_that_do_not_arrive_are_408() {
    let never = futures::stream::pending::<Result<&'static str, std::io::Error>>();
    let config = Config { body_read_timeout: Duration::from_millis(30), ..Config::default() };
    let node = Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing may get through"));
    let answer = node.post(CHAT, Body::from_stream(never)).await;
    assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(answer.error()["code"], "body_timeout");
}

#[tokio::test]
async fn unknown_routes_models_and_methods() {
    let node = quiet();
    let answer = node.get("/v1/nothing").await;
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let answer = node.get(CHAT).await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(answer.error()["code"], "method_not_allowed");
    let answer = node.post_json(CHAT, json!({"model": "gpt-9", "messages": []})).await;
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    assert_eq!(answer.error()["param"], "model");
}

#[tokio::test]
async fn keys_guard_the_api_and_not_the_probes() {
    let config = Config { api_keys: vec!["secret".into()], ..Config::default() };
    let node = Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing may get through"));
    for path in ["/v1/models", "/v1/models/tiny"] {
        let answer = node.get(path).await;
        assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::UNAUTHORIZED, &json!("invalid_api_key")));
    }
    assert_eq!(node.post_json(CHAT, json!({})).await.status, StatusCode::UNAUTHORIZED);
    let with_key = Request::get("/v1/models").header("authorization", "Bearer secret").body(Body::empty());
    assert_eq!(node.send(with_key.expect("a request")).await.status, StatusCode::OK);
    for path in ["/health", "/livez", "/metrics", "/version"] {
        assert_eq!(node.get(path).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let admission = admission::Config { max_num_queued_requests: 0, ..Default::default() };
    let (node, occupant) = occupied(admission).await;
    let refused = node.post_json(COMPLETIONS, json!({"prompt": [5]})).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{}", refused.text);
    let seconds: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=60).contains(&seconds));
    assert!(
        node.state
            .metrics
            .prometheus_text()
            .contains("outrigger_admission_rejections_total{reason=\"queued_requests\",step=\"entry\"} 1")
    );
    // Dropping the first request frees its place.
    occupant.abort();
    assert!(occupant.await.is_err());
    assert_eq!(node.state.admission.status().admitted_requests, 0);
}

/// A node whose only place is taken by a request that never ends.
async fn occupied(admission: admission::Config) -> (Node, tokio::task::JoinHandle<()>) {
    let config = Config { max_output_tokens: Some(999), ..Config::default() };
    let node = Node::with_config(config, admission, |_, events| {
        tokio::spawn(async move { events.closed().await });
        Ok(())
    });
    let router = node.router();
    let occupant = tokio::spawn(async move {
        let body = json!({"prompt": [5]}).to_string();
        drop(router.oneshot(Request::post(COMPLETIONS).body(Body::from(body)).expect("a request")).await);
    });
    while node.requests.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    (node, occupant)
}

/// Each of these prompts is at fault, which is found out when it is rendered or tokenized.
#[tokio::test]
async fn a_request_for_which_there_is_no_room_is_not_tokenized() {
    let faulty = [
        (CHAT, json!({"messages": []})),
        (CHAT, json!({"messages": [{"role": "nobody", "content": "hi"}]})),
        (CHAT, json!({"messages": [{"role": "user", "content": "wave ".repeat(400)}], "stream": true})),
        (COMPLETIONS, json!({"prompt": ""})),
        (COMPLETIONS, json!({"prompt": ["a", ""], "n": 2})),
        (COMPLETIONS, json!({"prompt": [999_999]})),
    ];
    let full = admission::Config { max_num_queued_requests: 0, ..Default::default() };
    let (node, occupant) = occupied(full).await;
    let send = async |path: &str, body: &Value, key: Option<&str>| {
        let mut request = Request::post(path);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        node.send(request.body(Body::from(body.to_string())).expect("a request")).await
    };
    for (path, body) in &faulty {
        let refused = send(path, body, None).await;
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{body}: {}", refused.text);
        // It may belong to a stream that runs already.
        assert_eq!(send(path, body, Some("mine")).await.status, StatusCode::BAD_REQUEST, "{body}");
    }
    // What is at fault whatever the prompt says is told at once, so that the client does not come back with it.
    for body in [
        json!({}),
        json!({"prompt": []}),
        json!({"prompt": "", "max_tokens": -1}),
        json!({"prompt": "", "n": 129}),
        json!({"prompt": "", "max_tokens": 1000}),
        json!({"prompt": "", "max_tokens": 2, "min_tokens": 3}),
    ] {
        assert_eq!(send(COMPLETIONS, &body, None).await.status, StatusCode::BAD_REQUEST, "{body}");
    }
    occupant.abort();
    assert!(occupant.await.is_err());
    for (path, body) in &faulty {
        assert_eq!(send(path, body, None).await.status, StatusCode::BAD_REQUEST, "{body}");
    }
    assert_eq!(node.requests.lock().len(), 1);
}

/// Many long prompts may arrive at once, and each waits for its turn to be tokenized.
#[tokio::test]
async fn a_long_prompt_is_refused_when_its_turn_has_come_and_there_is_no_room_any_more() {
    let full = admission::Config { max_num_queued_requests: 0, ..Default::default() };
    let (node, occupant) = occupied(full).await;
    occupant.abort();
    assert!(occupant.await.is_err());
    let turns = [node.state.worker(true).await, node.state.worker(true).await];
    let router = node.router();
    let body = json!({"prompt": "wave ".repeat(10_000)}).to_string();
    let long = Request::post(COMPLETIONS).body(Body::from(body)).expect("a request");
    let waiting = tokio::spawn(router.oneshot(long));
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let _place = node.state.admission.try_admit(admission::Demand::least(1, 0, None), 0.0).expect("there is room");
    assert!(!waiting.is_finished());
    drop(turns);
    let refused = waiting.await.expect("no panic").expect("a response");
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let counted = "outrigger_admission_rejections_total{reason=\"queued_requests\",step=\"entry\"} 1\n";
    assert!(node.state.metrics.prometheus_text().contains(counted));
}

/// A queue that lets a request through every four seconds, for four minutes so far, and nine wait.
#[tokio::test(start_paused = true)]
async fn a_hopeless_deadline_is_refused_early_unless_the_request_overtakes_the_queue() {
    const TURN: Duration = Duration::from_secs(4);
    const TURNS: u32 = 60;
    let node = quiet();
    let demand = admission::Demand::least(1, 0, None);
    let enter = || node.state.admission.try_admit(demand, 0.0).expect("there is room");
    let mut waiting: std::collections::VecDeque<_> = (0..10).map(|_| enter()).collect();
    let mut running = None;
    for _ in 0..TURNS {
        tokio::time::advance(TURN).await;
        let mut next = waiting.pop_front().expect("ten wait");
        next.scheduled();
        drop(running.replace(next));
        waiting.push_back(enter());
    }
    drop(waiting.pop_back());
    let ask = async |priority: i32, left: Duration| {
        let body = json!({"prompt": [5], "priority": priority}).to_string();
        // The API reads the machine's clock, which has not advanced.
        let timeout = (TURN * TURNS + left).as_millis().to_string();
        let request = Request::post(COMPLETIONS).header("x-request-timeout-ms", timeout);
        node.send(request.body(Body::from(body)).expect("a request")).await
    };
    let refused = ask(0, Duration::from_secs(10)).await;
    assert_eq!(refused.status, StatusCode::GATEWAY_TIMEOUT, "{}", refused.text);
    assert!(refused.headers.contains_key("retry-after"));
    for (priority, left) in [(-1, Duration::from_secs(10)), (0, Duration::from_secs(3600))] {
        let served = ask(priority, left).await;
        assert_eq!(served.status, StatusCode::OK, "{}", served.text);
    }
    let counted = "outrigger_admission_rejections_total{reason=\"deadline\",step=\"entry\"} 1\n";
    assert!(node.state.metrics.prometheus_text().contains(counted));
}

#[tokio::test]
async fn the_backends_failures_have_their_status() {
    for (kind, status) in [
        (FailureKind::EngineFailed, StatusCode::SERVICE_UNAVAILABLE),
        (FailureKind::NumericsInvalid, StatusCode::INTERNAL_SERVER_ERROR),
        (FailureKind::DeadlineExceeded, StatusCode::GATEWAY_TIMEOUT),
    ] {
        let at_once = Node::new(move |_, _| Err(Failure::new(kind, "no")));
        let later = Node::new(move |_, events| {
            events.send(GenerationEvent::Failed(Failure::new(kind, "no"))).expect("somebody listens");
            Ok(())
        });
        for node in [at_once, later] {
            for stream in [false, true] {
                let answer = node.post_json(COMPLETIONS, json!({"prompt": [5], "stream": stream})).await;
                assert_eq!((answer.status, &answer.error()["message"]), (status, &json!("no")));
            }
            let counted = format!("outrigger_request_failures_total{{kind=\"{}\"}} 2\n", kind.label());
            assert!(node.state.metrics.prometheus_text().contains(&counted));
        }
    }
}

#[tokio::test]
async fn a_backend_that_vanishes_is_an_engine_failure() {
    let node = Node::new(|_, events| {
        drop(events);
        Ok(())
    });
    let answer = node.post_json(COMPLETIONS, json!({"prompt": [5]})).await;
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("engine_failed")));
}

#[tokio::test]
async fn a_panic_in_a_handler_is_500_and_the_node_goes_on() {
    let node = Node::new(|_, _| panic!("a mistake"));
    let answer = node.post_json(COMPLETIONS, json!({"prompt": [5]})).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(answer.error()["type"], "internal_error");
    assert_eq!(node.get("/livez").await.status, StatusCode::OK);
}

#[tokio::test]
async fn bad_deadlines_are_refused_and_good_ones_passed_on() {
    let node = quiet();
    let request = |timeout: &str| {
        let body = json!({"prompt": [5]}).to_string();
        Request::post(COMPLETIONS).header("x-request-timeout-ms", timeout).body(Body::from(body)).expect("a request")
    };
    for timeout in ["0", "-5", "soon", "1.5", "99999999999999999999"] {
        let answer = node.send(request(timeout)).await;
        assert_eq!(answer.error()["param"], "x-request-timeout-ms", "{timeout}");
    }
    assert_eq!(node.send(request("5000")).await.status, StatusCode::OK);
    let deadline = node.last_request().envelope.deadline.expect("a deadline");
    let left = deadline - Instant::now();
    assert!(left > Duration::from_secs(3) && left <= Duration::from_secs(5), "{left:?}");
}

#[tokio::test]
async fn a_header_is_true_or_false() {
    let node = quiet();
    for (value, status) in [("maybe", StatusCode::BAD_REQUEST), ("true", StatusCode::OK), ("false", StatusCode::OK)] {
        let body = json!({"prompt": [5]}).to_string();
        let request = Request::post(COMPLETIONS).header("x-outrigger-allow-other-fingerprint", value);
        assert_eq!(node.send(request.body(Body::from(body)).expect("a request")).await.status, status, "{value}");
    }
}

#[tokio::test]
async fn a_node_that_loads_has_ended_or_failed_is_503_and_one_that_drains_serves() {
    let loading = Node::loading(Config::default(), admission::Config::default());
    let begin = std::time::Instant::now();
    let answer = loading.post_json(CHAT, json!({})).await;
    assert!(begin.elapsed() >= Duration::from_millis(100), "it was held as long as it may be");
    let metrics = loading.get("/metrics").await.text;
    assert!(metrics.contains("outrigger_held_requests_total{outcome=\"refused\"} 1\n"), "{metrics}");
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("model_loading")));
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(loading.get("/startupz").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(loading.get("/livez").await.status, StatusCode::OK);
    assert_eq!(loading.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(loading.get("/v1/models").await.json()["data"], json!([]));

    let draining = quiet();
    assert_eq!(draining.get("/startupz").await.status, StatusCode::OK);
    assert_eq!(draining.get("/health").await.status, StatusCode::OK);
    draining.state.health.lifecycle().drain("told to").expect("a step of the diagram");
    assert_eq!(
        draining.post_json(COMPLETIONS, json!({"prompt": [5]})).await.status,
        StatusCode::OK,
        "nobody else could"
    );
    assert_eq!(draining.get("/health").await.status, StatusCode::OK);
    let unready = draining.get("/readyz").await;
    assert_eq!(unready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(unready.json()["state"], "draining");
    draining.state.router.cut();
    let late = draining.post_json(COMPLETIONS, json!({"prompt": [5]})).await;
    assert_eq!((late.status, &late.error()["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("shutting_down")));
    assert!(late.headers.contains_key("retry-after"));

    let failed = quiet();
    failed.state.health.lifecycle().fail("broken").expect("a step of the diagram");
    assert_eq!(failed.post_json(CHAT, json!({})).await.error()["code"], "engine_failed");
    assert_eq!(failed.get("/livez").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(failed.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

/// A client that is early waits for the model, and one that has a deadline no longer than that.
#[tokio::test]
async fn a_request_that_comes_while_the_model_loads_is_held_and_served() {
    let patience = Duration::from_secs(60);
    let node = Arc::new(Node::loading_and_holding(Config::default(), admission::Config::default(), patience));
    let early = tokio::spawn({
        let node = node.clone();
        async move { node.post_json(COMPLETIONS, json!({"prompt": [5]})).await }
    });
    let impatient = Request::post(COMPLETIONS).header("x-request-timeout-ms", "50").body(Body::from("{}"));
    let refused = node.send(impatient.expect("a request")).await;
    assert_eq!(refused.status, StatusCode::GATEWAY_TIMEOUT, "{}", refused.text);
    assert!(!early.is_finished());
    assert!(node.get("/metrics").await.text.contains("outrigger_requests_held 1\n"));
    let script = |request: &GenerateRequest, events: Events| {
        play(&events, request, &ids("x"), FinishReason::Stop(StopCause::EndOfSequence(EOS)));
        Ok(())
    };
    node.load(ScriptedBackend { script: Box::new(script), requests: node.requests.clone() });
    let answer = early.await.expect("no panic");
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let metrics = node.get("/metrics").await.text;
    assert!(metrics.contains("outrigger_requests_held 0\n"), "{metrics}");
    assert!(metrics.contains("outrigger_held_requests_total{outcome=\"served\"} 1\n"), "{metrics}");
}

#[tokio::test]
async fn ids_are_echoed_and_metrics_scraped_in_both_formats() {
    let node = quiet();
    let request = Request::get("/v1/models").header("x-request-id", "mine").body(Body::empty()).expect("a request");
    assert_eq!(node.send(request).await.headers["x-request-id"], "mine");
    let classic = node.get("/metrics").await;
    assert!(classic.headers["content-type"].to_str().expect("text").starts_with("text/plain; version=0.0.4"));
    assert!(classic.text.contains("vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} 1\n"));
    assert!(classic.text.contains("outrigger_http_requests_total{route=\"/v1/models\",status=\"200\"} 1\n"));
    let accept = Request::get("/metrics").header("accept", "application/openmetrics-text;version=1.0.0");
    let open = node.send(accept.body(Body::empty()).expect("a request")).await;
    assert!(open.text.ends_with("# EOF\n"));
}
