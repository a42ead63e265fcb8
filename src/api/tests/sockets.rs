//! Over real sockets: what depends on connections.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::api::connection::Routes;
use crate::api::places::PlaceLimits;
use crate::api::routes::{overflow_router, router};
use crate::api::serve;
use crate::api::server::serve_routes;

/// Nothing here takes this long unless it hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

struct Served {
    address: SocketAddr,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

async fn serve_node(node: &Node) -> Served {
    serve_node_with(node, axum::Router::new()).await
}

async fn serve_node_with(node: &Node, extra: axum::Router) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(serve(listener, node.state.clone(), extra, shutdown.clone()));
    Served { address, shutdown, server }
}

pub(super) async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    in_time(what, waiting).await;
}

pub(super) async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what}: nothing happened for {PATIENCE:?}"))
}

impl Served {
    async fn connect(&self) -> TcpStream {
        in_time("connect", TcpStream::connect(self.address)).await.expect("a connection")
    }

    async fn post(&self, body: serde_json::Value) -> TcpStream {
        let mut stream = self.connect().await;
        let body = body.to_string();
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).await.expect("sent");
        stream
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = self.connect().await;
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("sent");
        read_all(&mut stream).await
    }

    /// As clients do that are asked to come back.
    async fn get_in_the_end(&self, path: &str) {
        let coming_back = async {
            while !self.get(path).await.starts_with("HTTP/1.1 200") {
                sleep(Duration::from_millis(20)).await;
            }
        };
        in_time("served", coming_back).await;
    }
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    in_time("read", stream.read_to_string(&mut text)).await.expect("UTF-8 until the end");
    text
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&bytes).contains(what) {
            let read = stream.read_buf(&mut bytes).await.expect("readable");
            assert_ne!(read, 0, "the connection ended before {what:?}");
        }
    };
    in_time(what, reading).await;
    String::from_utf8(bytes).expect("UTF-8")
}

/// Sends one token and then waits; the senders are kept.
fn waiting_node(config: Config) -> (Node, Arc<Mutex<Vec<Events>>>) {
    let senders: Arc<Mutex<Vec<Events>>> = Arc::default();
    let kept = senders.clone();
    let node = Node::with_config(config, admission::Config::default(), move |_, events| {
        let _ = events.send(GenerationEvent::Token { choice: 0, token: ids("a")[0], logprobs: None });
        kept.lock().push(events);
        Ok(())
    });
    (node, senders)
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let (node, senders) = waiting_node(Config::default());
    let served = serve_node(&node).await;
    for stream in [true, false] {
        let mut connection = served.post(json!({"prompt": [5], "stream": stream})).await;
        if stream {
            read_until(&mut connection, "data: {").await;
        }
        until("the request", || !senders.lock().is_empty()).await;
        let events = senders.lock().pop().expect("a request");
        assert!(!events.is_closed());
        drop(connection);
        until("the cancellation", || events.is_closed()).await;
        until("the permit", || node.state.admission.status().admitted_requests == 0).await;
    }
}

#[tokio::test]
async fn shutting_down_lets_streams_finish() {
    let (node, senders) = waiting_node(Config::default());
    let served = serve_node(&node).await;
    let mut idle = served.connect().await;
    let mut connection = served.post(json!({"prompt": [5], "stream": true})).await;
    read_until(&mut connection, "data: {").await;
    let mut kept_alive = served.connect().await;
    kept_alive.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    read_until(&mut kept_alive, env!("CARGO_PKG_VERSION")).await;
    node.state.health.lifecycle().drain("told to").expect("a step of the diagram");
    served.shutdown.cancel();
    tokio::task::yield_now().await;
    // A client that asks once more is answered and told not to come again.
    kept_alive.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    let last = read_all(&mut kept_alive).await;
    assert!(last.starts_with("HTTP/1.1 200") && last.contains("connection: close"), "{last}");
    // The listener is gone, idle connections end, the stream goes on.
    in_time("the listener", async { while TcpStream::connect(served.address).await.is_ok() {} }).await;
    assert_eq!(read_all(&mut idle).await, "");
    assert!(!served.server.is_finished());
    let events = senders.lock().pop().expect("a request");
    events.send(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length }).expect("somebody listens");
    let rest = read_all(&mut connection).await;
    assert!(rest.contains("data: [DONE]"), "{rest}");
    in_time("the server", served.server).await.expect("no panic");
    assert_eq!(node.state.metrics.http_connections.get(), 0);
}

#[tokio::test]
async fn connections_beyond_the_limit_get_503_and_probes_the_truth() {
    let (node, _senders) = waiting_node(Config { max_connections: 1, ..Config::default() });
    let served = serve_node(&node).await;
    let mut first = served.post(json!({"prompt": [5], "stream": true})).await;
    read_until(&mut first, "data: {").await;
    let refused = served.get("/v1/models").await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("max_connections"), "{refused}");
    assert!(served.get("/livez").await.starts_with("HTTP/1.1 200"));
    assert!(served.get("/metrics").await.contains("outrigger_http_connections_refused_total 1\n"));
    drop(first);
    until("the place", || node.state.metrics.http_connections.get() == 0).await;
    assert!(served.get("/v1/models").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn idle_connections_make_room_for_newcomers_and_streams_do_not() {
    let (node, senders) = waiting_node(Config { max_connections: 3, ..Config::default() });
    let served = serve_node(&node).await;
    let mut stream = served.post(json!({"prompt": [5], "stream": true})).await;
    read_until(&mut stream, "data: {").await;
    // One that has had an answer, and one that never says anything.
    let mut kept_alive = served.connect().await;
    kept_alive.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    read_until(&mut kept_alive, env!("CARGO_PKG_VERSION")).await;
    let mut silent = served.connect().await;
    until("three connections", || node.state.metrics.http_connections.get() == 3).await;
    served.get_in_the_end("/v1/models").await;
    assert_eq!(read_all(&mut kept_alive).await, "", "the one that was idle for longest is closed");
    let _another = served.connect().await;
    served.get_in_the_end("/v1/models").await;
    assert_eq!(read_all(&mut silent).await, "");
    assert_eq!(node.state.metrics.http_connections_recycled.get(), 2);
    let events = senders.lock().pop().expect("a request");
    events.send(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length }).expect("somebody listens");
    read_until(&mut stream, "data: [DONE]").await;
}

/// The end of a long answer is in the kernel's and the library's buffers when its request is done.
#[tokio::test]
async fn a_connection_that_still_sends_is_not_idle() {
    let node = Node::saying(&"wave ".repeat(40));
    let mut config = node.state.config.clone();
    config.max_connections = 1;
    let overview = "x".repeat(8 << 20);
    let long = axum::Router::new().route("/long", axum::routing::get(async move || overview.clone()));
    let node = Node::with_config(config, admission::Config::default(), |_, _| panic!("nothing is generated"));
    let served = serve_node_with(&node, long).await;
    let mut slow = served.connect().await;
    slow.write_all(b"GET /long HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("sent");
    read_until(&mut slow, "HTTP/1.1 200").await;
    for _ in 0..3 {
        assert!(served.get("/v1/models").await.starts_with("HTTP/1.1 503"));
    }
    let rest = read_all(&mut slow).await;
    assert!(rest.len() > 8 << 20 >> 1 && rest.ends_with("xxx"), "{} bytes", rest.len());
    assert_eq!(node.state.metrics.http_connections_recycled.get(), 0);
}

#[tokio::test]
async fn heads_that_do_not_arrive_end_the_connection() {
    let config = Config { header_read_timeout: Duration::from_millis(50), ..Config::default() };
    let (node, _senders) = waiting_node(config);
    let served = serve_node(&node).await;
    // Nothing at all, the beginning that HTTP/2 shares, and half a head.
    for beginning in ["", "P", "GET /livez HTTP/1.1\r\nhost: x\r\n"] {
        let mut connection = served.connect().await;
        connection.write_all(beginning.as_bytes()).await.expect("sent");
        assert_eq!(read_all(&mut connection).await, "", "{beginning:?}");
    }
}

#[tokio::test]
async fn one_connection_serves_several_requests() {
    let node = Node::saying("x");
    let served = serve_node(&node).await;
    let mut connection = served.connect().await;
    for _ in 0..3 {
        connection.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
        read_until(&mut connection, env!("CARGO_PKG_VERSION")).await;
    }
    assert_eq!(node.state.metrics.http_connections_opened.get(), 1);
}

#[tokio::test]
async fn who_connects_in_the_moment_of_the_shutdown_is_answered() {
    let node = Node::new(|_, _| Ok(()));
    for _ in 0..20 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shutdown = CancellationToken::new();
        let mut client = TcpStream::connect(address).await.expect("established");
        client.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("sent");
        // The server finds both at one time.
        shutdown.cancel();
        let server = tokio::spawn(serve(listener, node.state.clone(), axum::Router::new(), shutdown));
        let answer = read_all(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 "), "{answer:?}");
        in_time("ended", server).await.expect("no panic");
    }
}

#[tokio::test]
async fn who_finds_every_place_taken_in_the_moment_of_the_shutdown_is_answered() {
    // The shutdown comes before anybody is accepted, or while one who was accepted waits for a place.
    for opened_before in [0, 2] {
        let node = Node::new(|_, _| Ok(()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        // These two say nothing, and keep their places for the grace period.
        let mut silent = Vec::new();
        for _ in 0..2 {
            silent.push(TcpStream::connect(address).await.expect("established"));
        }
        let mut clients = Vec::new();
        for _ in 0..3 {
            let mut client = TcpStream::connect(address).await.expect("established");
            client.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("sent");
            clients.push(client);
        }
        let (state, shutdown) = (node.state.clone(), CancellationToken::new());
        let served = router(state.clone());
        let routes = Routes { served, overflow: overflow_router(state.clone(), "busy".to_owned()) };
        let limits = PlaceLimits { served: 1, overflow: 1 };
        let server = tokio::spawn(serve_routes(listener, state, routes, limits, shutdown.clone()));
        if opened_before > 0 {
            until("the places are taken", || node.state.metrics.http_connections_opened.get() == opened_before).await;
        }
        shutdown.cancel();
        for client in &mut clients {
            let answer = read_all(client).await;
            assert!(answer.starts_with("HTTP/1.1 "), "{answer:?}");
        }
        in_time("ended", server).await.expect("no panic");
    }
}
