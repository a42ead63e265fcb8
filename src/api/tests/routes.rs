//! What the routes share: paths and methods, web pages, bodies that are compressed.

use std::io::Write;

use axum::http::Method;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::*;
use crate::api::{admin, routes};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const PAGE: &str = "http://localhost:3000";

fn request(method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    let request = Request::builder().method(method).uri(path);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(body.into()).expect("a request")
}

fn preflight(path: &str, origin: &str) -> Request<Body> {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    request(Method::OPTIONS, path, &headers, Body::empty())
}

fn configured(config: Config) -> Node {
    Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing may get through"))
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

#[tokio::test]
async fn a_web_page_may_call_every_route_of_the_api_with_a_key() {
    let node = configured(Config { api_keys: vec!["secret".into()], ..Config::default() });
    for path in [CHAT, COMPLETIONS, "/v1/models", "/v1/models/tiny", "/tokenize", "/detokenize", "/v1/no-such-route"] {
        let answer = node.send(preflight(path, PAGE)).await;
        assert!(answer.status.is_success(), "{path}: {}", answer.status);
        assert_eq!(answer.header("access-control-allow-origin"), "*", "{path}");
        assert_eq!(answer.header("access-control-allow-methods"), "POST", "{path}");
        // A literal `*` would leave `authorization` out.
        assert_eq!(answer.header("access-control-allow-headers"), "authorization,content-type", "{path}");
    }
    // The page sees refusals as well, and what it needs of their headers.
    let refused = node.send(request(Method::GET, "/v1/models", &[("origin", PAGE)], Body::empty())).await;
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (StatusCode::UNAUTHORIZED, "*"));
    let exposed = refused.header("access-control-expose-headers");
    // With the last one the page can resume a stream.
    for header in ["x-request-id", "x-outrigger-node", "retry-after", "idempotency-key"] {
        assert!(exposed.split(',').any(|name| name == header), "{header} is hidden from web pages: {exposed}");
    }
    let failed = Node::new(|_, _| panic!("a mistake"));
    let body = json!({"prompt": [5]}).to_string();
    let answer = failed.send(request(Method::POST, COMPLETIONS, &[("origin", PAGE)], body)).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(answer.header("access-control-allow-origin"), "*");
}

#[tokio::test]
async fn pages_of_other_origins_than_the_configured_may_not() {
    let origins = vec![PAGE.to_owned(), "https://chat.example".to_owned()];
    let named = configured(Config { allowed_origins: origins, allow_credentials: true, ..Config::default() });
    for (origin, allowed) in
        [(PAGE, PAGE), ("https://chat.example", "https://chat.example"), ("https://evil.example", "")]
    {
        let answer = named.send(preflight(CHAT, origin)).await;
        assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origin}");
        assert_eq!(answer.header("access-control-allow-credentials"), "true");
        assert!(answer.header("vary").contains("origin"), "{:?}", answer.headers);
    }
    let none = configured(Config { allowed_origins: Vec::new(), ..Config::default() });
    let answer = none.send(preflight(CHAT, PAGE)).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (StatusCode::NO_CONTENT, ""));
}

#[tokio::test]
async fn probes_metrics_and_the_admin_address_are_not_for_web_pages() {
    let node = Node::saying("x");
    for path in ["/livez", "/readyz", "/startupz", "/health", "/metrics", "/version"] {
        let answer = node.send(preflight(path, PAGE)).await;
        assert_eq!(answer.header("access-control-allow-origin"), "", "{path}");
        let answer = node.send(request(Method::GET, path, &[("origin", PAGE)], Body::empty())).await;
        assert_eq!(answer.header("access-control-allow-origin"), "", "{path}");
        assert!(!answer.text.is_empty() || path == "/health", "{path}");
    }
    let overview = node.state.router.clone();
    let admin = admin::admin_router(node.state.clone(), Arc::new(move || overview.overview()));
    let response = admin.oneshot(preflight("/cluster", PAGE)).await.expect("infallible");
    assert!(!response.headers().contains_key("access-control-allow-origin"), "{:?}", response.headers());
}

#[tokio::test]
async fn where_all_connections_are_busy_a_page_sees_the_refusal() {
    let node = Node::saying("x");
    let overflow = routes::overflow_router(node.state.clone(), "All 1 connections are busy (max_connections).".into());
    let send = async |request| overflow.clone().oneshot(request).await.expect("infallible");
    assert!(send(preflight(CHAT, PAGE)).await.status().is_success());
    let refused = send(request(Method::POST, CHAT, &[("origin", PAGE)], "{}")).await;
    assert_eq!(
        (refused.status(), &refused.headers()["access-control-allow-origin"]),
        (StatusCode::SERVICE_UNAVAILABLE, &"*".parse().unwrap())
    );
    assert_eq!(
        (&refused.headers()["connection"], &refused.headers()["retry-after"]),
        (&"close".parse().unwrap(), &"1".parse().unwrap())
    );
    assert_eq!(send(request(Method::GET, "/livez/", &[], Body::empty())).await.status(), StatusCode::OK);
    assert_eq!(node.state.metrics.http_connections_refused.get(), 1);
}

#[tokio::test]
async fn a_wrong_method_is_told_which_are_right() {
    let node = Node::saying("x");
    for (method, path, allowed) in [
        (Method::GET, CHAT, "POST"),
        (Method::PUT, "/tokenize", "POST"),
        (Method::DELETE, "/v1/models", "GET,HEAD"),
        (Method::POST, "/v1/models/tiny", "GET,HEAD"),
        (Method::POST, "/livez", "GET,HEAD"),
        (Method::HEAD, CHAT, "POST"),
    ] {
        let answer = node.send(request(method.clone(), path, &[], Body::empty())).await;
        assert_eq!(
            (answer.status, answer.header("allow")),
            (StatusCode::METHOD_NOT_ALLOWED, allowed),
            "{method} {path}"
        );
        if method != Method::HEAD {
            assert_eq!(answer.error()["code"], "method_not_allowed", "{method} {path}");
            assert!(answer.error()["message"].as_str().expect("text").contains(path), "{}", answer.text);
        }
    }
    // To ask is not wrong.
    for (path, allowed) in [(CHAT, "POST"), ("/v1/models", "GET,HEAD"), ("/readyz", "GET,HEAD")] {
        let answer = node.send(request(Method::OPTIONS, path, &[], Body::empty())).await;
        assert_eq!((answer.status, answer.header("allow")), (StatusCode::NO_CONTENT, allowed), "{path}");
    }
    let unknown = node.send(request(Method::OPTIONS, "/v1/nothing", &[], Body::empty())).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn head_answers_like_get_without_a_body() {
    let node = Node::saying("x");
    for path in ["/v1/models", "/livez", "/metrics", "/version"] {
        let answer = node.send(request(Method::HEAD, path, &[], Body::empty())).await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, ""), "{path}");
        assert_eq!(answer.header("content-type"), node.get(path).await.header("content-type"), "{path}");
    }
}

#[tokio::test]
async fn slashes_at_the_end_of_a_path_change_nothing() {
    let node = Node::saying("x");
    for path in ["/v1/models/", "/v1/models///", "/v1/models/tiny/", "/v1/models/org/tiny/", "/livez/", "/version/?x=1"]
    {
        assert_eq!(node.get(path).await.status, StatusCode::OK, "{path}");
    }
    let answer = node.post_json("/v1/completions/", json!({"prompt": [5]})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    for path in ["/", "//", "/v1/", "/v1//models"] {
        let answer = node.get(path).await;
        assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::NOT_FOUND, &json!("not_found")), "{path}");
    }
    // A path is one label, however it is written.
    let metrics = node.state.metrics.prometheus_text();
    assert!(metrics.contains("{route=\"/v1/models\",status=\"200\"} 2\n"), "{metrics}");
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).and_then(|()| encoder.finish()).expect("memory takes everything")
}

#[tokio::test]
async fn a_compressed_body_is_read_and_bounded_as_a_plain_one() {
    let node = Node::with_config(
        Config { max_body_bytes: 1000, ..Config::default() },
        admission::Config::default(),
        |request, events| {
            play(&events, request, &ids("x"), FinishReason::Length);
            Ok(())
        },
    );
    let send = |path: &str, coding: &str, body: Vec<u8>| {
        node.send(request(Method::POST, path, &[("content-encoding", coding)], body))
    };
    let body = json!({"prompt": [5], "max_tokens": 1}).to_string();
    let answer = send(COMPLETIONS, "gzip", gzip(body.as_bytes())).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    assert_eq!(node.last_request().envelope.prompt.to_vec(), [5]);
    let tokenize = send("/tokenize", "zstd", zstd::encode_all(&br#"{"prompt": "a"}"#[..], 1).expect("encoded")).await;
    assert_eq!(tokenize.status, StatusCode::OK, "{}", tokenize.text);

    // Ten million bytes of spaces are 10 kB of gzip; a hundred thousand are a few hundred bytes.
    for spaces in [10_000_000, 100_000] {
        let answer = send(COMPLETIONS, "gzip", gzip(" ".repeat(spaces).as_bytes())).await;
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE, "{}", answer.text);
        assert!(answer.error()["message"].as_str().expect("text").contains("1000 bytes (max_body_bytes)"));
    }
    let broken = send(CHAT, "gzip", b"{\"messages\": []}".to_vec()).await;
    assert_eq!((broken.status, &broken.error()["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_encoding")));
    let unknown = send(CHAT, "br", body.into_bytes()).await;
    assert_eq!(unknown.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    assert_eq!(unknown.header("accept-encoding"), "gzip, deflate, zstd");
    assert_eq!(unknown.error()["param"], "content-encoding");
    assert!(unknown.error()["message"].as_str().expect("text").contains("br"), "{}", unknown.text);
}
