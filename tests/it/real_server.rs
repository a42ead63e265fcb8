//! The real binary with the real model, and a client that exposes all of HTTP. At most two such servers run at a time, so
//! that tests do not starve each other.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::BytesMut;
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::real_model;
use crate::server::{PATIENCE, Server};

const SERVERS_AT_A_TIME: usize = 2;

static PLACES: Semaphore = Semaphore::const_new(SERVERS_AT_A_TIME);
/// The shared servers, by their arguments.
static SHARED: Mutex<BTreeMap<Vec<String>, Weak<RealServer>>> = Mutex::const_new(BTreeMap::new());

/// Takes one of the places for servers, for a test that starts its own.
pub async fn a_place() -> SemaphorePermit<'static> {
    PLACES.acquire().await.expect("never closed")
}

/// Takes all places for servers, for a test that needs the whole machine.
pub async fn every_place() -> SemaphorePermit<'static> {
    PLACES.acquire_many(SERVERS_AT_A_TIME as u32).await.expect("never closed")
}

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";

pub struct RealServer {
    // Declared before the place, so that the server ends before its place is free.
    server: Server,
    _place: SemaphorePermit<'static>,
}

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Value,
}

impl RealServer {
    /// Starts a server and returns as soon as it listens.
    pub async fn start(arguments: &[&str]) -> Self {
        let place = PLACES.acquire().await.expect("never closed");
        // The tests must not depend on the machine's memory.
        let mut all = vec!["--memory-warn-mark", "1", "--memory-shrink-mark", "1", "--memory-removal-mark", "1"];
        let home = real_model::home();
        if !arguments.contains(&"--home") {
            tokio::task::spawn_blocking(real_model::path).await.expect("the model is there");
            all.extend(["--home", home.to_str().expect("a UTF-8 path")]);
        }
        all.extend(arguments);
        let server = Server::start(&all);
        Self { server, _place: place }
    }

    /// Starts a server and waits until it is ready.
    pub async fn ready(arguments: &[&str]) -> Self {
        let server = Self::start(arguments).await;
        server.until("ready", async |server| server.status("/readyz").await == Some(200)).await;
        server
    }

    /// As `ready`, but shared by tests that run at the same time and do not change the server.
    pub async fn shared(arguments: &[&str]) -> Arc<Self> {
        let key = arguments.iter().map(ToString::to_string).collect();
        let mut shared = SHARED.lock().await;
        if let Some(server) = shared.get(&key).and_then(Weak::upgrade) {
            return server;
        }
        let server = Arc::new(Self::ready(arguments).await);
        shared.insert(key, Arc::downgrade(&server));
        server
    }

    /// Polls until `holds` returns true.
    pub async fn until(&self, what: &str, holds: impl AsyncFn(&Self) -> bool) {
        within(what, async {
            while !holds(self).await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(reqwest::get(self.url(path)).await.expect("an answer")).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, body, &[]).await
    }

    pub async fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        Answer::of(self.send(path, body, headers).await).await
    }

    /// Opens a stream. Returns when the head of the answer has arrived; its status must be 200.
    pub async fn stream(&self, path: &str, body: &Value) -> EventStream {
        self.stream_with(path, body, &[]).await
    }

    pub async fn stream_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> EventStream {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let response = self.send(path, &body, headers).await;
        assert_eq!(response.status(), StatusCode::OK, "{body}");
        let bytes = response.bytes_stream().map(|piece| piece.map_err(|error| error.to_string()));
        EventStream { bytes: bytes.boxed(), buffer: BytesMut::new() }
    }

    async fn send(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> reqwest::Response {
        let request = reqwest::Client::new().post(self.url(path)).json(body);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        within("answered", request.send()).await.expect("an answer")
    }

    /// Sends these bytes over a new connection. Returns what the server sends until `is_enough` returns true or the server
    /// closes the connection.
    pub async fn raw(&self, bytes: &[u8], is_enough: impl Fn(&str) -> bool) -> String {
        let address = self.base_url.strip_prefix("http://").expect("a URL");
        let mut connection = TcpStream::connect(address).await.expect("a connection");
        connection.write_all(bytes).await.expect("sent");
        let mut answer = Vec::new();
        within("an end of the raw answer", async {
            while !is_enough(&String::from_utf8_lossy(&answer))
                && connection.read_buf(&mut answer).await.unwrap_or(0) > 0
            {}
        })
        .await;
        String::from_utf8(answer).expect("the answer is text")
    }

    /// The sum of a metric's series whose labels contain `label`; 0 if there is none.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let text = reqwest::get(self.url("/metrics")).await.expect("an answer").text().await.expect("text");
        let of_series = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let (series_name, labels) = series.split_once('{').unwrap_or((series, ""));
            (series_name == name && labels.contains(label)).then(|| value.parse::<f64>().expect("a number"))
        };
        text.lines().filter(|line| !line.starts_with('#')).filter_map(of_series).sum()
    }

    /// The number of running sequences.
    pub async fn running(&self) -> f64 {
        self.metric("vllm:num_requests_running", "").await
    }

    /// The number of waiting sequences.
    pub async fn waiting(&self) -> f64 {
        self.metric("vllm:num_requests_waiting", "").await
    }

    /// Injects a fault with `POST /debug/fault`. The server needs `--fault-injection`.
    pub async fn inject(&self, fault: &Value) {
        let answer = reqwest::Client::new().post(self.url("/debug/fault")).json(fault).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::ACCEPTED, "{fault}");
    }
}

impl Deref for RealServer {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl DerefMut for RealServer {
    fn deref_mut(&mut self) -> &mut Server {
        &mut self.server
    }
}

impl Answer {
    async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = within("a whole body", response.text()).await.expect("a body");
        // A body that is not JSON is kept as a string.
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Self { status, headers, body }
    }

    /// A string member of `error`; empty if it is missing.
    pub fn error(&self, member: &str) -> &str {
        self.body["error"][member].as_str().unwrap_or_default()
    }

    /// The seconds of `Retry-After`.
    pub fn retry_after(&self) -> Option<u64> {
        self.headers.get("retry-after")?.to_str().ok()?.parse().ok()
    }
}

/// A server-sent event.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Data(Value),
    Done,
    Comment(String),
}

/// A stream of events. Dropping it closes the connection.
pub struct EventStream {
    bytes: BoxStream<'static, Result<bytes::Bytes, String>>,
    buffer: BytesMut,
}

impl EventStream {
    /// The next event. `None` at the end; an error if the connection breaks.
    pub async fn next(&mut self) -> Option<Result<Event, String>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event = self.buffer.split_to(end + 2);
                return Some(Ok(Event::parse(std::str::from_utf8(&event).expect("text").trim_end())));
            }
            match within("a next event", self.bytes.next()).await {
                Some(Ok(piece)) => self.buffer.extend_from_slice(&piece),
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    assert!(self.buffer.is_empty(), "the stream ends inside an event");
                    return None;
                }
            }
        }
    }

    /// Reads until `count` chunks with data have come.
    pub async fn chunks(&mut self, count: usize) -> Vec<Value> {
        let mut chunks = Vec::new();
        while chunks.len() < count {
            match self.next().await.expect("more chunks").expect("the stream is not cut") {
                Event::Data(chunk) => chunks.push(chunk),
                Event::Comment(_) => {}
                Event::Done => panic!("done after {} chunks", chunks.len()),
            }
        }
        chunks
    }

    /// All remaining events.
    pub async fn rest(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event.expect("the stream is not cut"));
        }
        events
    }
}

impl Event {
    fn parse(text: &str) -> Self {
        if let Some(comment) = text.strip_prefix(':') {
            return Self::Comment(comment.trim().to_owned());
        }
        match text.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {text:?}")) {
            "[DONE]" => Self::Done,
            json => Self::Data(serde_json::from_str(json).expect("JSON")),
        }
    }
}

/// The chunks among the events.
pub fn data(events: &[Event]) -> impl Iterator<Item = &Value> {
    events.iter().filter_map(|event| match event {
        Event::Data(chunk) => Some(chunk),
        Event::Done | Event::Comment(_) => None,
    })
}

/// The body of a completion of exactly `tokens` tokens, which are always the same.
pub fn completion(tokens: u64) -> Value {
    json!({"model": "default", "prompt": "The sea is", "max_tokens": tokens, "ignore_eos": true, "temperature": 0})
}

/// Runs `work`. Panics if it takes longer than `PATIENCE`.
pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("not {what} after {PATIENCE:?}"))
}
