//! Edge cases: wrong requests, slow and vanishing clients, deadlines, overload, signals.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::real_server::{Answer, CHAT, COMPLETIONS, Event, RealServer, completion, data, within};

/// A complete HTTP/1.1 request that asks the server to close the connection afterwards.
fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

async fn send_bytes(server: &RealServer, path: &str, body: &[u8]) -> (u16, Value) {
    let answer = server.raw(&request("POST", path, body), |_| false).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("not HTTP: {answer:?}"));
    (status_of(head), serde_json::from_str(body).unwrap_or_else(|_| panic!("not JSON: {body:?}")))
}

fn status_of(head: &str) -> u16 {
    head.split_ascii_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{head:?}"))
}

fn hi(more: &Value) -> Value {
    let mut body = json!({"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

#[tokio::test]
async fn the_line_to_paste_is_answered() {
    let mut server = RealServer::ready(&[]).await;
    let line = (0..5).map(|_| server.next_line()).find(|line| line.starts_with("curl ")).expect("a line to paste");
    let url = line.split_whitespace().nth(1).and_then(|url| url.strip_prefix(server.base_url.as_str()));
    let body = line.split_once("-d '").and_then(|(_, rest)| rest.trim_end().strip_suffix('\''));
    let body: Value = serde_json::from_str(body.expect("a body")).expect("JSON");
    let answer = server.post(url.expect("a URL of this server"), &body).await;
    assert_eq!(answer.status, 200, "{line}{}", answer.body);
    let text = answer.body["choices"][0]["message"]["content"].as_str().expect("a message");
    // The answer is about the subject of the question.
    assert!(text.contains("outrigger canoe"), "{line}{text}");
}

#[tokio::test]
async fn malformed_bodies_are_refused_and_harm_nobody() {
    let server = RealServer::shared(&[]).await;
    let deep = |open: &str, close: &str| format!("{{\"messages\": {}{}}}", open.repeat(100_000), close.repeat(100_000));
    let (arrays, objects) = (deep("[", "]"), deep("[{\"a\":", "}]"));
    let bodies: [&[u8]; 8] = [
        b"",
        b"{\"messages\": [",
        b"{\"messages\": [}",
        b"hello",
        b"{\"temperature\": NaN}",
        b"{\"prompt\": \"\xff\xfe\"}",
        arrays.as_bytes(),
        objects.as_bytes(),
    ];
    for path in [CHAT, COMPLETIONS, "/tokenize"] {
        for body in bodies {
            let shown = String::from_utf8_lossy(&body[..body.len().min(40)]);
            let (status, answer) = send_bytes(&server, path, body).await;
            assert_eq!(status, 400, "{path} {shown}: {answer}");
            assert_eq!(answer["error"]["code"], "invalid_json", "{path} {shown}: {answer}");
            assert_eq!(answer["error"]["type"], "invalid_request_error", "{path} {shown}: {answer}");
        }
        let (_, answer) = send_bytes(&server, path, b"{\"messages\": [}").await;
        assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains("line 1, column 15")), "{answer}");
        let (_, answer) = send_bytes(&server, path, b"[]").await;
        assert_eq!(answer["error"]["type"], "invalid_request_error", "{answer}");
    }
    assert_eq!(server.post(CHAT, &hi(&json!({}))).await.status, 200);
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_unsupported_ones_are_not() {
    let server = RealServer::shared(&[]).await;
    let unknown =
        hi(&json!({"x_trace": {"deep": [[[1]]]}, "user": "somebody", "metadata": {"a": "b"}, "store": false}));
    assert_eq!(server.post(CHAT, &unknown).await.status, 200);
    let refused = server.post(CHAT, &hi(&json!({"guided_regex": "a+"}))).await;
    assert_eq!((refused.status.as_u16(), refused.error("param")), (400, "guided_regex"), "{}", refused.body);
}

#[tokio::test]
async fn unknown_routes_methods_and_models_are_named() {
    let server = RealServer::shared(&[]).await;
    let cases = [
        ("GET", "/v1/nothing", 404, "not_found", "/v1/nothing"),
        ("GET", CHAT, 405, "method_not_allowed", "GET"),
        ("DELETE", "/v1/models", 405, "method_not_allowed", "DELETE"),
        ("GET", "/v1/models/gpt-9", 404, "model_not_found", "gpt-9"),
        ("POST", "/debug/fault", 404, "not_found", "/debug/fault"),
    ];
    for (method, path, status, code, shown) in cases {
        let answer = server.raw(&request(method, path, b""), |_| false).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{method} {path}: {answer}"));
        assert_eq!((status_of(head), body["error"]["code"].as_str()), (status, Some(code)), "{method} {path}: {body}");
        assert!(body["error"]["message"].as_str().is_some_and(|text| text.contains(shown)), "{method} {path}: {body}");
    }
    let answer = server.post(CHAT, &hi(&json!({"model": "gpt-9"}))).await;
    assert_eq!((answer.status.as_u16(), answer.error("code")), (404, "model_not_found"));
}

#[tokio::test]
async fn parameters_out_of_range_name_the_field_and_the_limit() {
    let server = RealServer::shared(&[]).await;
    let both = [
        (json!({"temperature": 2.5}), "temperature", "2"),
        (json!({"temperature": -1}), "temperature", "0"),
        (json!({"top_p": -0.1}), "top_p", "0"),
        (json!({"top_p": 1.01}), "top_p", "1"),
        (json!({"top_k": -2}), "top_k", "-1"),
        (json!({"min_p": 2}), "min_p", "1"),
        (json!({"n": 0}), "n", "1"),
        (json!({"n": 1000}), "n", "128"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "0"),
        (json!({"presence_penalty": 2.1}), "presence_penalty", "2"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty", "-2"),
        (json!({"logit_bias": {"5": 200}}), "logit_bias", "100"),
        (json!({"logit_bias": {"49152": 1}}), "logit_bias", "49152"),
        (json!({"stop": [""]}), "stop", "empty"),
        (json!({"stop_token_ids": [49_152]}), "stop_token_ids", "49152"),
        (json!({"max_tokens": 3, "min_tokens": 4}), "min_tokens", "3"),
        (json!({"temperature": "warm"}), "temperature", "number"),
        (json!({"stream": "yes"}), "stream", "boolean"),
    ];
    let chat_only = [
        (json!({"max_tokens": 0}), "max_tokens", "1"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "20"),
        (json!({"messages": []}), "messages", "at least one"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "string"),
    ];
    let completions_only = [
        (json!({"logprobs": 21}), "logprobs", "20"),
        (json!({"prompt": []}), "prompt", "1"),
        (json!({"prompt": [49_152]}), "prompt", "49152"),
    ];
    let of_chat = both.iter().chain(&chat_only).map(|case| (CHAT, case));
    let of_completions = both.iter().chain(&completions_only).map(|case| (COMPLETIONS, case));
    for (path, (fields, param, limit)) in of_chat.chain(of_completions) {
        let mut body = if path == CHAT { hi(&json!({})) } else { completion(1) };
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path} {fields}: {}", answer.body);
        assert_eq!(answer.error("param"), *param, "{path} {fields}: {}", answer.body);
        assert!(answer.error("message").contains(limit), "{path} {fields}: {}", answer.body);
        assert_eq!(answer.error("type"), "invalid_request_error", "{path} {fields}: {}", answer.body);
    }
}

#[tokio::test]
async fn what_exceeds_the_context_is_told_with_the_numbers() {
    let server = RealServer::shared(&[]).await;
    let models = server.get("/v1/models").await.body;
    let context = models["data"][0]["max_model_len"].as_u64().expect("a number");
    assert!(context >= 2048, "{models}");
    let ids: Vec<u64> = (0..context).map(|id| 100 + id % 1000).collect();
    let words = "wave ".repeat(usize::try_from(context).expect("small"));
    let too_long = [
        (COMPLETIONS, json!({"prompt": ids, "max_tokens": 1}), "prompt"),
        (COMPLETIONS, json!({"prompt": words}), "prompt"),
        (COMPLETIONS, json!({"prompt": [5, 6, 7], "max_tokens": context - 2}), "max_tokens"),
        (CHAT, json!({"messages": [{"role": "user", "content": words}]}), "messages"),
        (CHAT, hi(&json!({"max_tokens": context})), "max_tokens"),
    ];
    for (path, body, param) in too_long {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert_eq!(
            (answer.error("code"), answer.error("param")),
            ("context_length_exceeded", param),
            "{}",
            answer.body
        );
        assert!(answer.error("message").contains(&context.to_string()), "{}", answer.body);
    }
    // The longest request that fits is not refused. The deadline avoids waiting for its end.
    let fits = json!({"prompt": [5, 6, 7], "max_tokens": context - 3, "ignore_eos": true});
    let answer = server.post_with(COMPLETIONS, &fits, &[("x-request-timeout-ms", "1000")]).await;
    assert!([200, 504].contains(&answer.status.as_u16()), "{}", answer.body);
}

#[tokio::test]
async fn bodies_and_heads_have_bounds() {
    let server = RealServer::ready(&[
        "--max-body-bytes",
        "2000",
        "--header-read-timeout",
        "500ms",
        "--body-read-timeout",
        "500ms",
        "--max-input-tokens",
        "20",
        "--max-output-tokens",
        "10",
    ])
    .await;
    let over = [
        // `content-length` announces the body, which is not sent.
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 2001\r\n\r\n"),
        // Nothing announces the length; the server finds it while it reads the body.
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n7d1\r\n{}\r\n",
            " ".repeat(0x7d1)
        ),
    ];
    for over in over {
        let answer = server.raw(over.as_bytes(), |answer| answer.contains("max_body_bytes")).await;
        assert_eq!(status_of(&answer), 413, "{answer}");
        assert!(answer.contains("2000 bytes (max_body_bytes)"), "{answer}");
    }
    let late = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{{");
    let answer = server.raw(late.as_bytes(), |answer| answer.contains("body_timeout")).await;
    assert_eq!(status_of(&answer), 408, "{answer}");
    for beginning in ["", "POST", "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"] {
        let start = Instant::now();
        let answer = server.raw(beginning.as_bytes(), |_| false).await;
        let took = start.elapsed();
        assert!(answer.is_empty() || status_of(&answer) == 408, "{beginning:?}: {answer}");
        assert!(took >= Duration::from_millis(400), "{beginning:?} was cut off after only {took:?}");
    }
    let long = server.post(COMPLETIONS, &json!({"prompt": vec![100; 21], "max_tokens": 1})).await;
    assert_eq!((long.status.as_u16(), long.error("code")), (400, "context_length_exceeded"), "{}", long.body);
    assert!(long.error("message").contains("max_input_tokens"), "{}", long.body);
    let much = server.post(COMPLETIONS, &completion(11)).await;
    assert_eq!((much.status.as_u16(), much.error("param")), (400, "max_tokens"), "{}", much.body);
    assert!(much.error("message").contains("max_output_tokens"), "{}", much.body);
    assert_eq!(server.post(COMPLETIONS, &completion(10)).await.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequences() {
    const TOKENS: u64 = 3000;
    let server = RealServer::ready(&[]).await;
    let mut body = completion(TOKENS);
    body["n"] = json!(2);
    let mut stream = server.stream(COMPLETIONS, &body).await;
    stream.chunks(4).await;
    let request = reqwest::Client::new().post(server.url(COMPLETIONS)).json(&completion(TOKENS));
    let whole = tokio::spawn(request.send());
    server.until("busy", async |server| server.running().await == 3.0).await;
    assert!(server.metric("vllm:kv_cache_usage_perc", "").await > 0.0);
    drop(stream);
    whole.abort();
    server.until("idle", async |server| server.running().await + server.waiting().await == 0.0).await;
    assert_eq!(server.metric("vllm:kv_cache_usage_perc", "").await, 0.0);
    assert_eq!(server.metric("vllm:request_success_total", "finished_reason=\"abort\"").await, 3.0);
    // The sequences were cancelled and did not run to their end: a step generates one token of each.
    let steps = server.metric("outrigger_engine_step_seconds_count", "").await;
    assert!(steps < TOKENS as f64, "{steps}");
    assert_eq!(server.post(COMPLETIONS, &completion(2)).await.status, 200);
}

/// A client that reads nothing is disconnected, so that its seats are free for others.
#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    const CHOICES: u64 = 32;
    const TOKENS: u64 = 2000;
    let seats = CHOICES.to_string();
    // A long model name makes every event long, so that a few hundred events exceed the kernel's buffers at both ends.
    let name = "long".repeat(1000);
    let server = RealServer::ready(&[
        "--max-num-seqs",
        &seats,
        "--max-num-queued-requests",
        "0",
        "--write-timeout",
        "1s",
        "--served-model-name",
        &name,
    ])
    .await;
    let mut body = completion(TOKENS);
    body["stream"] = json!(true);
    body["n"] = json!(CHOICES);
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let address = server.base_url.strip_prefix("http://").and_then(|address| address.parse().ok());
    let mut silent = socket.connect(address.expect("an address")).await.expect("a connection");
    silent.write_all(&request("POST", COMPLETIONS, body.to_string().as_bytes())).await.expect("sent");
    server.until("busy", async |server| server.running().await == CHOICES as f64).await;
    assert_eq!(server.post(COMPLETIONS, &completion(1)).await.status, 429);
    server.until("cut off", async |server| server.post(COMPLETIONS, &completion(1)).await.status == 200).await;
    let steps = server.metric("outrigger_engine_step_seconds_count", "").await;
    assert!(steps < TOKENS as f64, "the stream ended by itself, so the test tests nothing");
    drop(silent);
}

#[tokio::test]
async fn an_idle_stream_is_kept_open_by_comments() {
    /// Seconds of work, so that the hang comes before the end.
    const TOKENS: u64 = 1000;
    let server = RealServer::ready(&["--fault-injection"]).await;
    let mut stream = server.stream(COMPLETIONS, &completion(TOKENS)).await;
    stream.chunks(1).await;
    server.inject(&json!({"fault": "hang", "seconds": 8})).await;
    let events = stream.rest().await;
    let comment = events.iter().position(|event| matches!(event, Event::Comment(_))).expect("a comment in 8 s");
    // The stream continues after the comment, and nothing is missing.
    assert!(matches!(events[comment + 1], Event::Data(_) | Event::Comment(_)), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Done));
    assert_eq!(1 + data(&events).count() as u64, TOKENS);
    // A stream that starts while the engine hangs is opened and kept open as well.
    server.inject(&json!({"fault": "hang", "seconds": 7})).await;
    let events = server.stream(CHAT, &hi(&json!({"max_tokens": 2}))).await.rest().await;
    assert!(events.iter().any(|event| matches!(event, Event::Comment(_))), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Done));
}

#[tokio::test]
async fn a_deadline_that_runs_out_ends_honestly() {
    let server = RealServer::ready(&[]).await;
    let start = Instant::now();
    let whole = server.post_with(COMPLETIONS, &completion(8000), &[("x-request-timeout-ms", "1500")]).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    assert!(start.elapsed() >= Duration::from_millis(1500));
    assert_eq!(whole.body["choices"][0]["finish_reason"], "deadline", "{}", whole.body);
    let tokens = whole.body["usage"]["completion_tokens"].as_u64().expect("a number");
    assert!((1..8000).contains(&tokens), "{tokens}");
    let mut stream = server.stream_with(COMPLETIONS, &completion(8000), &[("x-request-timeout-ms", "1500")]).await;
    let events = stream.rest().await;
    let last = data(&events).last().expect("a chunk");
    assert_eq!(last["choices"][0]["finish_reason"], "deadline", "{last}");
    assert_eq!(events.last(), Some(&Event::Done));
    // A deadline that is far away changes nothing.
    let in_time = server.post_with(COMPLETIONS, &completion(3), &[("x-request-timeout-ms", "3600000")]).await;
    assert_eq!(in_time.body["choices"][0]["finish_reason"], "length", "{}", in_time.body);
    for bad in ["0", "-1", "soon"] {
        let refused = server.post_with(COMPLETIONS, &completion(3), &[("x-request-timeout-ms", bad)]).await;
        assert_eq!((refused.status.as_u16(), refused.error("param")), (400, "x-request-timeout-ms"), "{bad}");
    }
}

/// The server measures the rate at which the queue drains. It refuses a request at once if the wait in the queue would exceed
/// the deadline.
#[tokio::test]
async fn a_hopeless_deadline_is_refused_early() {
    let server = RealServer::ready(&["--max-num-seqs", "1"]).await;
    let measured = join_all((0..12).map(|_| async { server.post(COMPLETIONS, &completion(60)).await })).await;
    assert!(measured.iter().all(|answer| answer.status == 200));
    let occupants: Vec<_> = (0..8)
        .map(|_| tokio::spawn(reqwest::Client::new().post(server.url(COMPLETIONS)).json(&completion(500)).send()))
        .collect();
    server.until("queueing", async |server| server.waiting().await == 7.0).await;
    let start = Instant::now();
    let refused = server.post_with(COMPLETIONS, &completion(1), &[("x-request-timeout-ms", "20")]).await;
    assert_eq!((refused.status.as_u16(), refused.error("type")), (504, "timeout_error"), "{}", refused.body);
    assert!(refused.error("message").contains("cannot be met"), "{}", refused.body);
    assert!(refused.retry_after().is_some_and(|seconds| seconds >= 1), "{:?}", refused.headers);
    assert!(start.elapsed() < Duration::from_secs(5), "not early: {:?}", start.elapsed());
    let rejections = server.metric("outrigger_admission_rejections_total", "reason=\"deadline\"").await;
    assert_eq!(rejections, 1.0);
    occupants.iter().for_each(|occupant| occupant.abort());
    server.until("idle", async |server| server.running().await + server.waiting().await == 0.0).await;
    let met = server.post_with(COMPLETIONS, &completion(1), &[("x-request-timeout-ms", "60000")]).await;
    assert_eq!(met.status, 200, "{}", met.body);
}

#[tokio::test]
async fn texts_and_conversations_become_the_golden_ids_and_back() {
    let server = RealServer::shared(&[]).await;
    let golden: Value = serde_json::from_str(include_str!("../golden/smollm2.json")).expect("JSON");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 10);
    for case in cases {
        let ids = &case["prompt_ids"];
        let chat = server.post("/tokenize", &json!({"messages": case["messages"]})).await.body;
        assert_eq!(chat["tokens"], *ids, "{case}");
        let text = json!({"prompt": case["prompt_text"], "add_special_tokens": false});
        let tokenized = server.post("/tokenize", &text).await.body;
        assert_eq!(
            (&tokenized["tokens"], tokenized["count"].as_u64()),
            (ids, ids.as_array().map(|ids| ids.len() as u64))
        );
        let back = server.post("/detokenize", &json!({"tokens": ids})).await.body;
        assert_eq!(back["prompt"], case["prompt_text"]);
    }
    for text in ["", " ", "naïve – 日本語 🛶\n\ttabs", "a  b   c    d", "x = {\"y\": [1, 2]}\r\n"] {
        let tokens = server.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await.body;
        let back = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.body;
        assert_eq!(back["prompt"], text);
    }
    let unknown = server.post("/detokenize", &json!({"tokens": [49_152]})).await;
    assert_eq!((unknown.status.as_u16(), unknown.error("param")), (400, "tokens"), "{}", unknown.body);
}

/// The series that dashboards and gateways for vLLM read, with their types.
const VLLM_NAMES: &[(&str, &str)] = &[
    ("vllm:num_requests_running", "gauge"),
    ("vllm:num_requests_waiting", "gauge"),
    ("vllm:kv_cache_usage_perc", "gauge"),
    ("vllm:num_preemptions_total", "counter"),
    ("vllm:prefix_cache_queries_total", "counter"),
    ("vllm:prefix_cache_hits_total", "counter"),
    ("vllm:prompt_tokens_total", "counter"),
    ("vllm:generation_tokens_total", "counter"),
    ("vllm:request_success_total", "counter"),
    ("vllm:time_to_first_token_seconds", "histogram"),
    ("vllm:inter_token_latency_seconds", "histogram"),
    ("vllm:e2e_request_latency_seconds", "histogram"),
    ("vllm:request_queue_time_seconds", "histogram"),
    ("vllm:cache_config_info", "gauge"),
    ("vllm:lora_requests_info", "gauge"),
    ("vllm:iteration_tokens_total", "histogram"),
    ("vllm:request_max_num_generation_tokens", "histogram"),
    ("vllm:num_requests_waiting_by_reason", "gauge"),
    // Older names, which AIBrix and the production stack read.
    ("vllm:time_per_output_token_seconds", "histogram"),
    ("vllm:gpu_cache_usage_perc", "gauge"),
    ("vllm:gpu_prefix_cache_queries_total", "counter"),
    ("vllm:gpu_prefix_cache_hits_total", "counter"),
];

#[tokio::test]
async fn metrics_have_vllms_names_and_move() {
    let server = RealServer::ready(&[]).await;
    let text = reqwest::get(server.url("/metrics")).await.unwrap().text().await.unwrap();
    for (name, kind) in VLLM_NAMES.iter().copied() {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} {kind}");
        let series = text.lines().find(|line| !line.starts_with('#') && line.starts_with(name));
        let series = series.unwrap_or_else(|| panic!("no series of {name}"));
        assert!(series.contains("model_name=\"smollm2-135m-instruct\""), "{series}");
    }
    let prompt: Vec<u64> = (100..200).collect();
    let body = json!({"prompt": prompt, "max_tokens": 5, "ignore_eos": true, "temperature": 0});
    let first = server.post(COMPLETIONS, &body).await.body;
    let second = server.post(COMPLETIONS, &body).await.body;
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_f64().expect("a number");
    assert!(cached >= 64.0, "{second}");
    let expected = [
        ("vllm:prompt_tokens_total", 200.0),
        ("vllm:generation_tokens_total", 10.0),
        ("vllm:prefix_cache_queries_total", 200.0),
        ("vllm:prefix_cache_hits_total", cached),
        ("vllm:time_to_first_token_seconds_count", 2.0),
        ("vllm:inter_token_latency_seconds_count", 8.0),
        ("vllm:e2e_request_latency_seconds_count", 2.0),
        ("vllm:request_queue_time_seconds_count", 2.0),
        ("vllm:num_preemptions_total", 0.0),
    ];
    for (name, value) in expected {
        assert_eq!(server.metric(name, "").await, value, "{name}");
    }
    server.until("idle", async |server| server.running().await + server.waiting().await == 0.0).await;
    assert_eq!(server.metric("vllm:request_success_total", "finished_reason=\"length\"").await, 2.0);
    assert_eq!(server.metric("outrigger_http_requests_total", "/v1/completions\",status=\"200\"").await, 2.0);
    assert!(server.metric("vllm:e2e_request_latency_seconds_sum", "").await > 0.0);
    // Every prompt token that is not cached, and every generated token but the last, is computed in some step. Synthetic
    // inferences add to the sum.
    let computed = server.metric("vllm:iteration_tokens_total_sum", "").await;
    assert!(computed >= 200.0 - cached + 8.0, "{computed}");
}

#[tokio::test]
async fn keys_guard_the_api_and_are_kept_secret() {
    // The SHA-256 digest of "second".
    let hashed = "sha256:16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4";
    let server = RealServer::ready(&["--api-key", &format!("first-secret,{hashed}"), "--fault-injection"]).await;
    let with_key = async |key: &str| {
        let header = format!("Bearer {key}");
        server.post_with(COMPLETIONS, &completion(1), &[("authorization", header.as_str())]).await
    };
    for key in ["first-secret", "second"] {
        assert_eq!(with_key(key).await.status, 200, "{key}");
    }
    for key in ["third", "first-secre", "", hashed] {
        let refused = with_key(key).await;
        assert_eq!((refused.status.as_u16(), refused.error("code")), (401, "invalid_api_key"), "{key}");
    }
    for (path, body) in
        [(CHAT, hi(&json!({}))), ("/tokenize", json!({"prompt": "a"})), ("/debug/fault", json!({"fault": "panic"}))]
    {
        assert_eq!(server.post(path, &body).await.status, 401, "{path}");
    }
    assert_eq!(server.get("/v1/models").await.status, 401);
    for path in ["/livez", "/readyz", "/startupz", "/health", "/metrics", "/version"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert!(!server.log().contains("first-secret"), "a key is in the log");
}

#[tokio::test]
async fn a_crowd_gets_200_or_429_and_the_server_goes_on() {
    const CROWD: usize = 500;
    let server = RealServer::ready(&["--max-num-seqs", "32", "--max-num-queued-requests", "100"]).await;
    let client = reqwest::Client::new();
    let ask = async |index: usize| {
        let body = json!({"prompt": [100 + index, 7, 8], "max_tokens": 2, "stream": index.is_multiple_of(2)});
        let response = client.post(server.url(COMPLETIONS)).json(&body).send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("a whole body");
        match status {
            200 if index.is_multiple_of(2) => assert!(text.trim_end().ends_with("data: [DONE]"), "{text}"),
            200 => assert!(text.contains("\"completion_tokens\":"), "{text}"),
            429 => assert!(headers.contains_key("retry-after") && text.contains("max_num_queued_requests"), "{text}"),
            other => panic!("{other}: {text}"),
        }
        status
    };
    let statuses = within("answered", join_all((0..CROWD).map(ask))).await;
    let count = |wanted: u16| statuses.iter().filter(|&&status| status == wanted).count();
    assert!(count(200) >= 132, "{} of {CROWD} were served", count(200));
    assert!(count(429) > 0, "the queue never filled, so the test tests nothing");
    server.until("idle", async |server| server.running().await + server.waiting().await == 0.0).await;
    assert_eq!(server.get("/readyz").await.status, 200);
    assert_eq!(server.post(COMPLETIONS, &completion(2)).await.status, 200);
    assert_eq!(server.metric("outrigger_admission_rejections_total", "").await, count(429) as f64);
}

#[tokio::test]
async fn a_drain_finishes_streams_and_serves_who_does_not_know_yet() {
    const TOKENS: u64 = 1500;
    let mut server = RealServer::ready(&["--shutdown-timeout", "10m", "--drain-linger", "3s"]).await;
    let mut stream = server.stream(COMPLETIONS, &completion(TOKENS)).await;
    stream.chunks(2).await;
    server.signal(libc::SIGTERM);
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    let readiness = server.get("/readyz").await.body;
    assert_eq!(readiness["reasons"][0]["code"], "draining", "{readiness}");
    // The process must not be restarted while it drains, so liveness passes; a request that still arrives is served.
    assert_eq!(server.get("/livez").await.status, 200);
    let late = server.post(COMPLETIONS, &completion(1)).await;
    assert_eq!(late.status, 200, "{}", late.body);
    let events = stream.rest().await;
    let last = data(&events).last().expect("a chunk");
    assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
    assert_eq!(data(&events).count() as u64, TOKENS - 2);
    assert_eq!(events.last(), Some(&Event::Done));
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_signal_cuts_streams_and_ends_at_once() {
    let mut server = RealServer::ready(&["--shutdown-timeout", "10m"]).await;
    let mut stream = server.stream(COMPLETIONS, &completion(8000)).await;
    stream.chunks(2).await;
    server.signal(libc::SIGTERM);
    server.until("unready", async |server| server.status("/readyz").await == Some(503)).await;
    stream.chunks(2).await;
    server.signal(libc::SIGTERM);
    assert_eq!(server.exit().await.code(), Some(128 + libc::SIGTERM));
    let mut finished = false;
    while let Some(Ok(event)) = stream.next().await {
        finished |= event == Event::Done;
    }
    assert!(!finished, "the stream was complete before the second signal, so the test tests nothing");
}

#[tokio::test]
async fn a_connection_serves_pipelined_requests_in_order() {
    let server = RealServer::shared(&[]).await;
    let address = server.base_url.strip_prefix("http://").expect("a URL");
    let mut connection = TcpStream::connect(address).await.expect("a connection");
    let twice =
        "GET /version HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    connection.write_all(twice.as_bytes()).await.expect("sent");
    let mut answers = String::new();
    within("both answers", connection.read_to_string(&mut answers)).await.expect("text");
    let (first, second) =
        (answers.find("200 OK").expect("the first"), answers.find("404 Not Found").expect("the second"));
    assert!(first < second, "{answers}");
}

#[tokio::test]
async fn request_ids_are_echoed_and_seeds_repeat() {
    let server = RealServer::shared(&[]).await;
    let body = json!({"prompt": "The wind", "max_tokens": 12, "temperature": 1.5, "ignore_eos": true,
                      "return_token_ids": true});
    let ask = async |seed: u64| -> Answer {
        let mut body = body.clone();
        body["seed"] = json!(seed);
        server.post_with(COMPLETIONS, &body, &[("x-request-id", "mine")]).await
    };
    let answers = [ask(7).await, ask(7).await, ask(8).await];
    assert!(answers.iter().all(|answer| answer.headers["x-request-id"] == "mine"));
    let ids = |answer: &Answer| answer.body["choices"][0]["token_ids"].clone();
    assert_eq!(ids(&answers[0]).as_array().map(Vec::len), Some(12));
    assert_eq!(ids(&answers[0]), ids(&answers[1]));
    assert_ne!(ids(&answers[0]), ids(&answers[2]));
}
