//! Benchmarks the HTTP side: HTTP, JSON, chat template, tokenizer, admission, responses. The engine behind it answers at once.
//!
//! One thread serves and another sends, over loopback, so the server uses at most one core:
//!
//! ```text
//! cargo bench --bench front [-- SECONDS [CONNECTIONS]]
//! ```
//!
//! It reports the rate per second of elapsed time, and the rate per second of the server thread's CPU time, which is the same
//! on a loaded machine.

#![expect(clippy::disallowed_methods, reason = "a bench waits for its own tasks")]
#![expect(clippy::print_stdout, reason = "its result")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger::admission::{self, AdmissionController};
use outrigger::api::{self, ApiState, ServedModel};
use outrigger::cluster::ModelReport;
use outrigger::engine::null::NullEngine;
use outrigger::health::{self, Health};
use outrigger::observability::Metrics;
use outrigger::router::{self, LocalReplica, Router};
use outrigger::tenancy::{Directory, Tenants};
use outrigger::tokenizer::Tokenizer;
use outrigger::types::Backend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

const FIXTURE: &str = "models/fixtures/llama-gqa-tied-bf16";
const MAX_MODEL_LEN: u32 = 512;

struct Workload {
    name: &'static str,
    path: &'static str,
    body: &'static str,
    /// Events or responses that one request brings.
    answers: usize,
}

const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "chat, max_tokens 1",
        path: "/v1/chat/completions",
        body: r#"{"model":"default","messages":[{"role":"user","content":"the wave hits the hull"}],"max_tokens":1}"#,
        answers: 1,
    },
    Workload {
        name: "completion of ids, max_tokens 1",
        path: "/v1/completions",
        body: r#"{"prompt":[5,6,7,8,9,10,11,12],"max_tokens":1}"#,
        answers: 1,
    },
    Workload {
        name: "chat stream, 128 tokens",
        path: "/v1/chat/completions",
        body: r#"{"messages":[{"role":"user","content":"the wave"}],"max_tokens":128,"stream":true}"#,
        answers: 128,
    },
];

fn main() {
    // `cargo bench` passes `--bench`; what is left are our own two numbers.
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<u64>().ok());
    let duration = Duration::from_secs(numbers.next().unwrap_or(5));
    let connections = numbers.next().unwrap_or(16) as usize;
    let server = Server::start();
    println!("{connections} connections, {} s each, one server thread", duration.as_secs());
    for workload in &WORKLOADS {
        measure(&server, workload, Duration::from_millis(500), connections);
        let result = measure(&server, workload, duration, connections);
        println!("{:<34}{result}", workload.name);
    }
}

struct Server {
    address: SocketAddr,
    runtime: Handle,
}

impl Server {
    /// A node over the null engine, on a thread of its own.
    fn start() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let runtime = single_thread();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                let address = listener.local_addr().expect("an address");
                sender.send(Self { address, runtime: Handle::current() }).expect("somebody waits");
                api::serve(listener, node(), axum::Router::new(), CancellationToken::new()).await;
            });
        });
        receiver.recv().expect("the server starts")
    }

    /// CPU time of the server's thread so far.
    fn cpu_time(&self) -> Duration {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.runtime.spawn(async move {
            let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells");
            let nanos = stat.split(' ').next().and_then(|field| field.parse().ok()).expect("nanoseconds");
            sender.send(Duration::from_nanos(nanos)).expect("somebody waits");
        });
        receiver.recv().expect("the server runs")
    }
}

fn node() -> ApiState {
    let tokenizer = Tokenizer::from_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE)).expect("the fixture");
    let template = tokenizer.chat_template().expect("the fixture has a template");
    let metrics = Arc::new(Metrics::new("null"));
    let admission = AdmissionController::new(admission::Config::default(), 64, metrics.clone());
    let health = Health::new(health::Config::default(), metrics.clone());
    let router = Router::alone(router::Config::default(), admission.clone(), health.clone(), metrics.clone());
    let tenants = Tenants::new(Directory::default());
    let state = ApiState::new(api::Config::default(), tenants, metrics, admission, health.clone(), router.clone());
    let backend = Arc::new(NullEngine::new(tokenizer.vocab_size() as u32));
    let model = ModelReport {
        names: vec!["null".into()],
        fingerprint: backend.fingerprint(),
        tokenizer: "tokenizer".into(),
        max_model_len: MAX_MODEL_LEN,
        created: 1,
    };
    state.set_model(ServedModel::new(&model, tokenizer, template, vec![]));
    router.attach(LocalReplica { engine: backend, model, seats: 64, tokenizer: Bytes::new() });
    health.lifecycle().warming("loaded").expect("a step of the diagram");
    health.lifecycle().ready("tried").expect("a step of the diagram");
    state
}

struct Outcome {
    requests: usize,
    answers: usize,
    elapsed: Duration,
    cpu: Duration,
    latencies: Vec<Duration>,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percentile = |p: usize| self.latencies[(self.latencies.len() - 1) * p / 100].as_secs_f64() * 1e3;
        write!(
            f,
            "{:>9.0} answers/s  {:>9.0} per server core  p50 {:.2} ms  p99 {:.2} ms  {} requests",
            self.answers as f64 / self.elapsed.as_secs_f64(),
            self.answers as f64 / self.cpu.as_secs_f64(),
            percentile(50),
            percentile(99),
            self.requests,
        )
    }
}

/// Each connection sends its next request when the last one is answered.
fn measure(server: &Server, workload: &'static Workload, duration: Duration, connections: usize) -> Outcome {
    let cpu = server.cpu_time();
    let start = Instant::now();
    let end = start + duration;
    let mut latencies = single_thread().block_on(async {
        let clients: Vec<_> = (0..connections).map(|_| tokio::spawn(client(server.address, workload, end))).collect();
        let mut latencies = Vec::new();
        for client in clients {
            latencies.extend(client.await.expect("a client does not panic"));
        }
        latencies
    });
    let (elapsed, cpu) = (start.elapsed(), server.cpu_time() - cpu);
    latencies.sort_unstable();
    let requests = latencies.len();
    Outcome { requests, answers: requests * workload.answers, elapsed, cpu, latencies }
}

async fn client(address: SocketAddr, workload: &Workload, end: Instant) -> Vec<Duration> {
    let mut connection = TcpStream::connect(address).await.expect("the server listens");
    connection.set_nodelay(true).expect("a socket");
    let Workload { path, body, .. } = workload;
    let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut latencies = Vec::new();
    let mut response = Vec::with_capacity(64 << 10);
    while Instant::now() < end {
        let sent = Instant::now();
        connection.write_all(request.as_bytes()).await.expect("the server reads");
        read_response(&mut connection, &mut response).await;
        latencies.push(sent.elapsed());
    }
    latencies
}

/// Reads one response of known length, or of chunks up to the last one.
async fn read_response(connection: &mut TcpStream, response: &mut Vec<u8>) {
    response.clear();
    loop {
        let read = connection.read_buf(response).await.expect("the server answers");
        assert!(read > 0, "the server closed the connection");
        let Some(head) = response.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let body = head + 4;
        let text = std::str::from_utf8(&response[..head]).expect("a head is ASCII");
        assert!(text.starts_with("HTTP/1.1 200"), "{}", String::from_utf8_lossy(response));
        let is_whole = match text.split("content-length: ").nth(1) {
            Some(rest) => {
                let length: usize = rest.split("\r\n").next().unwrap_or(rest).parse().expect("a number");
                response.len() >= body + length
            }
            None => response.ends_with(b"\r\n0\r\n\r\n"),
        };
        if is_whole {
            return;
        }
    }
}

fn single_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}
