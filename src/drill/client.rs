//! The drill's client, written as a careful user would write one. It streams, records when each token arrived, and (if
//! allowed) reconnects to another node with its idempotency key and the last event id.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use super::sse::SseParser;
use super::transcript::Transcript;
use super::workload::PlannedStream;
use crate::router::ClusterOverview;
use crate::types::with_causes;

/// Places each stream on the replica with the fewest requests. With the default strategy, an entry node with free seats would
/// compute every stream itself.
const PLACEMENT: (&str, &str) = ("x-outrigger-placement", "least-request");
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time limit for short requests.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// The client gives up a connection that sends nothing for this long, not even a comment. More than twice the default
/// `stream_keep_alive`.
const SILENCE: Duration = Duration::from_secs(12);
/// Time limit for a whole stream.
const STREAM_PATIENCE: Duration = Duration::from_secs(180);
/// Pause each time after all nodes have been tried.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);

/// An HTTP client for the nodes of a drill. Cheap to clone.
#[derive(Clone)]
pub struct DrillClient {
    http: reqwest::Client,
    key: Option<Arc<str>>,
}

/// The record of a stream, during and after it.
#[derive(Clone, Debug)]
pub struct StreamRecord {
    pub transcript: Transcript,
    pub began: Instant,
    /// When each event with tokens arrived.
    pub token_times: Vec<Instant>,
    pub reconnects: u32,
    pub end: Option<StreamEnd>,
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamEnd {
    Done,
    /// An ordinary client would see an error. Holds the reason.
    Failed(String),
}

/// A record that is shared between the stream and its observers.
pub type SharedRecord = Arc<Mutex<StreamRecord>>;

impl StreamRecord {
    pub fn new() -> Self {
        Self {
            transcript: Transcript::default(),
            began: Instant::now(),
            token_times: Vec::new(),
            reconnects: 0,
            end: None,
        }
    }

    pub fn failure(&self) -> Option<&str> {
        match &self.end {
            Some(StreamEnd::Failed(why)) => Some(why),
            Some(StreamEnd::Done) | None => None,
        }
    }
}

impl Default for StreamRecord {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a connection ended before the stream did.
enum Broken {
    /// Another node may succeed.
    Connection(String),
    /// The request itself is refused; every node would refuse it.
    Refused(String),
}

impl DrillClient {
    pub fn new(key: Option<&str>) -> Result<Self, reqwest::Error> {
        // A pooled connection may have died with its node, so every stream gets its own.
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Self { http, key: key.map(Into::into) })
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Runs one stream to its end, starting at the first URL. When a connection breaks, it continues at the next URL if
    /// `may_reconnect` is true, and fails otherwise.
    pub async fn play(&self, stream: &PlannedStream, urls: &[String], may_reconnect: bool, record: &SharedRecord) {
        let end = match timeout(STREAM_PATIENCE, self.play_on(stream, urls, may_reconnect, record)).await {
            Ok(Ok(())) => StreamEnd::Done,
            Ok(Err(why)) => StreamEnd::Failed(why),
            Err(_) => StreamEnd::Failed(format!("the stream has not ended after {STREAM_PATIENCE:?}")),
        };
        record.lock().end = Some(end);
    }

    async fn play_on(
        &self,
        stream: &PlannedStream,
        urls: &[String],
        may_reconnect: bool,
        record: &SharedRecord,
    ) -> Result<(), String> {
        let key = Uuid::new_v4().to_string();
        let mut last_id = None;
        for url in urls.iter().cycle() {
            match self.connection(url, stream, &key, &mut last_id, record).await {
                Ok(()) => return Ok(()),
                Err(Broken::Connection(why)) if !may_reconnect => return Err(why),
                Err(Broken::Refused(why)) => return Err(why),
                Err(Broken::Connection(_)) => record.lock().reconnects += 1,
            }
            if Some(url) == urls.last() {
                sleep(RECONNECT_PAUSE).await;
            }
        }
        Err("the drill has no nodes".into())
    }

    /// Runs one connection until it breaks or the stream ends.
    async fn connection(
        &self,
        url: &str,
        stream: &PlannedStream,
        key: &str,
        last_id: &mut Option<String>,
        record: &SharedRecord,
    ) -> Result<(), Broken> {
        let broken = |error: reqwest::Error| Broken::Connection(format!("{url}: {}", with_causes(&error)));
        let mut request = self.http.post(format!("{url}{}", stream.path)).json(&stream.body);
        request = self.authorized(request).header("idempotency-key", key).header(PLACEMENT.0, PLACEMENT.1);
        match last_id {
            Some(id) => request = request.header("last-event-id", id.as_str()),
            // Without an id, the server sends the stream from its beginning.
            None => record.lock().transcript = Transcript::default(),
        }
        let response = timeout(SILENCE, request.send()).await.map_err(|_| silent(url))?.map_err(broken)?;
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_default();
            let why = format!("{url}: {status}: {}", text.trim());
            let is_final = status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS;
            return Err(if is_final { Broken::Refused(why) } else { Broken::Connection(why) });
        }
        let (mut pieces, mut parser) = (response.bytes_stream(), SseParser::default());
        loop {
            let piece = timeout(SILENCE, pieces.next()).await.map_err(|_| silent(url))?;
            let Some(piece) = piece else {
                return Err(Broken::Connection(format!("{url}: the stream was cut")));
            };
            let events = parser.push(&piece.map_err(broken)?).map_err(|error| Broken::Refused(error.to_string()))?;
            for event in events {
                if event.data == "[DONE]" {
                    return self.check_end(url, record);
                }
                take(&event.data, record)?;
                *last_id = event.id.or(last_id.take());
            }
        }
    }

    fn check_end(&self, url: &str, record: &SharedRecord) -> Result<(), Broken> {
        match record.lock().transcript.is_finished() {
            true => Ok(()),
            false => Err(Broken::Connection(format!("{url}: [DONE] was sent, but the stream is not complete"))),
        }
    }

    /// The cluster as the node with this admin address sees it. `None` if the node does not answer.
    pub async fn overview(&self, admin: &str) -> Option<ClusterOverview> {
        let request = self.authorized(self.http.get(format!("http://{admin}/cluster"))).timeout(ASK_TIMEOUT);
        let answer = request.send().await.ok()?.error_for_status().ok()?;
        answer.json().await.ok()
    }

    pub async fn is_ready(&self, url: &str) -> bool {
        let request = self.http.get(format!("{url}/readyz")).timeout(ASK_TIMEOUT);
        request.send().await.is_ok_and(|answer| answer.status().is_success())
    }

    /// Sends a GET and returns the JSON of the response.
    pub async fn get(&self, url: &str, path: &str) -> Result<Value, String> {
        self.answer(self.http.get(format!("{url}{path}")).timeout(ASK_TIMEOUT)).await
    }

    /// Sends a POST and returns the JSON of the response. The time limit is that of a stream.
    pub async fn post(&self, url: &str, path: &str, body: &Value) -> Result<Value, String> {
        self.answer(self.http.post(format!("{url}{path}")).timeout(STREAM_PATIENCE).json(body)).await
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Value, String> {
        let answer = self.authorized(request).send().await.map_err(|error| with_causes(&error).to_string())?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| with_causes(&error).to_string())?;
        match status.is_success() {
            true => Ok(serde_json::from_str(&text).unwrap_or(Value::Null)),
            false => Err(format!("{status}: {}", text.trim())),
        }
    }

    /// Injects a fault into the engine of a node that was started with `--fault-injection`.
    pub async fn inject(&self, url: &str, fault: &str) -> Result<(), String> {
        self.post(url, "/debug/fault", &json!({ "fault": fault })).await.map(drop)
    }

    /// Polls until `holds` returns true. Returns false if the deadline comes first.
    pub async fn until(deadline: Instant, pause: Duration, mut holds: impl AsyncFnMut() -> bool) -> bool {
        loop {
            match timeout_at(deadline, holds()).await {
                Ok(true) => return true,
                Ok(false) => sleep(pause).await,
                Err(_) => return false,
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }
}

fn silent(url: &str) -> Broken {
    Broken::Connection(format!("{url}: no data for {SILENCE:?}"))
}

/// Adds the data of an event to the record.
fn take(data: &str, record: &SharedRecord) -> Result<(), Broken> {
    let chunk: Value = serde_json::from_str(data).map_err(|_| Broken::Refused(format!("not JSON: {data}")))?;
    if !chunk["error"].is_null() {
        return Err(Broken::Connection(chunk["error"].to_string()));
    }
    let mut record = record.lock();
    let brought = record.transcript.take(&chunk).map_err(|error| Broken::Refused(error.to_string()))?;
    if brought > 0 {
        record.token_times.push(Instant::now());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::drill::workload::{COMPLETIONS, RequestKind};

    fn chunk(id: &str, token: u32, finish: Option<&str>) -> String {
        let tokens = if finish.is_some() { json!([]) } else { json!([token]) };
        let choice = json!({"index": 0, "text": token.to_string(), "token_ids": tokens, "finish_reason": finish});
        format!("id: {id}\ndata: {}\n\n", json!({"choices": [choice]}))
    }

    /// Answers each connection with the next script. Returns the requests in lower case.
    async fn node(scripts: Vec<String>) -> (String, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let mut scripts = VecDeque::from(scripts);
        let served = tokio::spawn(async move {
            let mut requests = Vec::new();
            while let Some(script) = scripts.pop_front() {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    stream.read_buf(&mut request).await.expect("a request");
                }
                requests.push(String::from_utf8_lossy(&request).to_lowercase());
                stream.write_all(script.as_bytes()).await.expect("sent");
            }
            requests
        });
        (url, served)
    }

    fn streaming(events: &str) -> String {
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{events}")
    }

    fn planned() -> PlannedStream {
        PlannedStream { kind: RequestKind::Greedy, path: COMPLETIONS, body: json!({"prompt": "x"}) }
    }

    async fn play(urls: &[String], may_reconnect: bool) -> StreamRecord {
        let record = SharedRecord::default();
        DrillClient::new(Some("k")).expect("a client").play(&planned(), urls, may_reconnect, &record).await;
        record.lock().clone()
    }

    #[tokio::test]
    async fn a_cut_stream_is_continued_elsewhere_from_the_last_event() {
        let first = chunk("1", 5, None) + &chunk("2", 6, None) + "id: 3\ndata: {\"choi";
        let rest = format!(": waiting\n\n{}{}data: [DONE]\n\n", chunk("3", 7, None), chunk("3f", 0, Some("length")));
        let (a, asked_a) = node(vec![streaming(&first)]).await;
        let (b, asked_b) = node(vec![streaming(&rest)]).await;
        let record = play(&[a, b], true).await;
        assert_eq!((&record.end, record.reconnects), (&Some(StreamEnd::Done), 1));
        assert_eq!(record.transcript.choices[0].tokens, [5, 6, 7]);
        assert_eq!(record.token_times.len(), 3);
        let (first, second) = (asked_a.await.expect("no panic").remove(0), asked_b.await.expect("no panic").remove(0));
        let header = |request: &str, name: &str| {
            request.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::to_owned))
        };
        assert_eq!(header(&first, "last-event-id"), None);
        assert_eq!(header(&second, "last-event-id").as_deref(), Some("2"));
        assert!(header(&first, "idempotency-key").is_some_and(|key| key.len() > 20));
        assert_eq!(header(&first, "idempotency-key"), header(&second, "idempotency-key"));
        assert_eq!(header(&second, "authorization").as_deref(), Some("bearer k"));
    }

    #[tokio::test]
    async fn without_reconnecting_a_cut_an_error_and_an_early_end_are_failures() {
        let error = format!("{}data: {}\n\n", chunk("1", 5, None), json!({"error": {"message": "gone"}}));
        for (events, why) in
            [(chunk("1", 5, None), "cut"), (error, "gone"), (chunk("1", 5, None) + "data: [DONE]\n\n", "is not")]
        {
            let (url, _served) = node(vec![streaming(&events)]).await;
            let record = play(&[url], false).await;
            assert!(record.failure().is_some_and(|told| told.contains(why)), "{why}: {:?}", record.end);
        }
    }

    #[tokio::test]
    async fn a_refusal_of_the_request_is_final_and_one_of_the_node_is_not() {
        let refusal = |status: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let (url, _served) = node(vec![refusal("422 Unprocessable Entity")]).await;
        assert!(play(&[url], true).await.failure().is_some_and(|why| why.contains("422")));
        let whole = chunk("1", 5, None) + &chunk("1f", 0, Some("stop")) + "data: [DONE]\n\n";
        let (url, _served) = node(vec![refusal("503 Service Unavailable"), streaming(&whole)]).await;
        let record = play(&[url], true).await;
        assert_eq!((record.end, record.reconnects), (Some(StreamEnd::Done), 1));
    }
}
