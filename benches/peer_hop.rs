//! Benchmarks one hop between nodes: a call with one token, over loopback and mutual TLS, to a service that answers at once.
//!
//! ```text
//! cargo bench --bench peer_hop [-- CALLS]
//! ```
//!
//! Measures from the call to its last frame. One thread calls and another answers, as on two nodes. Calls are made one after
//! the other, then by 16 and 64 tasks at a time.

#![expect(clippy::print_stdout, reason = "its result")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;
use outrigger::api::peer::serve;
use outrigger::cluster::peer_client::HttpPeerTransport;
use outrigger::cluster::tls::PeerTls;
use outrigger::cluster::{
    ClusterKey, ClusterView, FollowCall, GenerateCall, JournalBatch, JournalRecord, JournalRefusal, LoadReport,
    NodeDescription, PROTOCOL, Peer, PeerFrame, PeerService, PeerStream, PeerTransport, Problems,
};
use outrigger::observability::Metrics;
use outrigger::types::watch;
use outrigger::types::{
    ChoiceStart, Envelope, Failure, FailureKind, Fingerprint, FinishReason, GenerationEvent, JournalKey, NodeId,
    RequestId, SamplingParams,
};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

/// A prompt of usual length.
const PROMPT_TOKENS: u32 = 512;

fn main() {
    // `cargo bench` passes `--bench`; what is left is our own number.
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let calls = numbers.next().unwrap_or(20_000);
    let peer = start_peer();
    let runtime = single_threaded();
    runtime.block_on(async {
        let peers = BTreeMap::from([(peer.id.clone(), Arc::new(peer.clone()))]);
        let views = watch::Sender::new(Arc::new(ClusterView { peers, dead: Vec::new() }));
        let transport = HttpPeerTransport::new(tls(), Duration::from_secs(1), views.subscribe());
        measure(&transport, &peer, 1, calls / 10).await;
        for tasks in [1, 16, 64] {
            let start = Instant::now();
            let mut latencies = measure(&transport, &peer, tasks, calls).await;
            let rate = latencies.len() as f64 / start.elapsed().as_secs_f64();
            latencies.sort_unstable();
            let quantile = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
            println!(
                "{tasks:>3} at a time: p50 {:>6.0} us, p90 {:>6.0} us, p99 {:>6.0} us, p99.9 {:>6.0} us, {rate:>6.0} calls/s",
                quantile(0.5),
                quantile(0.9),
                quantile(0.99),
                quantile(0.999),
            );
        }
    });
}

/// The time of each call.
async fn measure(transport: &HttpPeerTransport, peer: &Peer, tasks: usize, calls: usize) -> Vec<Duration> {
    let prompt: Arc<[u32]> = (0..PROMPT_TOKENS).map(|token| token * 37).collect();
    let sampling = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
    let envelope = Arc::new(Envelope::new(RequestId::new("cmpl-0123456789abcdef"), prompt, sampling));
    let task = async || {
        let mut latencies = Vec::with_capacity(calls / tasks);
        for _ in 0..calls / tasks {
            let call = GenerateCall {
                envelope: envelope.clone(),
                fingerprint: Fingerprint::new("f00d"),
                choices: ChoiceStart::fresh(1),
                remaining: None,
                is_continuation: false,
            };
            let start = Instant::now();
            let mut stream = transport.generate(peer, call).await.expect("accepted");
            while !matches!(stream.next().await, PeerFrame::Event(GenerationEvent::Finished { .. })) {}
            latencies.push(start.elapsed());
        }
        latencies
    };
    join_all((0..tasks).map(|_| task())).await.concat()
}

/// Serves on a thread of its own, for as long as the process lives.
fn start_peer() -> Peer {
    let runtime = single_threaded();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let addr = listener.local_addr().expect("an address");
    thread::spawn(move || {
        let metrics = Arc::new(Metrics::new("null"));
        runtime.block_on(serve(
            listener,
            &tls(),
            Arc::new(AtOnce),
            metrics,
            Problems::default(),
            CancellationToken::new(),
        ));
    });
    peer(addr)
}

fn single_threaded() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn tls() -> PeerTls {
    PeerTls::from_keys(&ClusterKey::from_secret(&[7; 32]).expect("long enough").into()).expect("a certificate")
}

fn peer(peer_addr: SocketAddr) -> Peer {
    let description = NodeDescription {
        protocol: PROTOCOL,
        version: String::new(),
        peer_addr,
        zone: String::new(),
        models: Vec::new(),
        tenants: None,
    };
    let report = LoadReport::default();
    Peer {
        id: NodeId::new("peer"),
        incarnation: 1,
        protocol: PROTOCOL.newest,
        description,
        report,
        reported_at: Instant::now(),
        measured_at: Instant::now(),
        stability: 1.0,
    }
}

/// Answers every generate call with one token.
struct AtOnce;

impl PeerService for AtOnce {
    fn generate(&self, _call: GenerateCall) -> Result<PeerStream, Failure> {
        let (frames, stream) = PeerStream::channel();
        for event in [
            GenerationEvent::Scheduled { cached_tokens: 0 },
            GenerationEvent::Token { choice: 0, token: 1, logprobs: None },
            GenerationEvent::Finished { choice: 0, reason: FinishReason::Length },
        ] {
            let _ = frames.send(PeerFrame::Event(event));
        }
        Ok(stream)
    }

    fn follow(&self, _call: FollowCall) -> Result<PeerStream, Failure> {
        Err(Failure::new(FailureKind::Internal, "Nothing runs here."))
    }

    fn journal(&self, _batch: JournalBatch) -> Vec<JournalRefusal> {
        Vec::new()
    }

    fn lookup(&self, _key: JournalKey) -> Option<JournalRecord> {
        None
    }

    fn tokenizer(&self, _digest: &str) -> Option<Bytes> {
        None
    }
}
