//! Calls between nodes over real sockets: the endpoint and its client together.

mod refusals;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::sockets::{in_time, until};
use crate::api::peer::serve;
use crate::cluster::peer_client::HttpPeerTransport;
use crate::cluster::tls::PeerTls;
use crate::cluster::{
    ClusterKey, ClusterView, FollowCall, GenerateCall, JournalBatch, JournalRecord, JournalRefusal, LoadReport,
    NodeDescription, PROTOCOL, Peer, PeerFrame, PeerService, PeerStream, PeerTransport, Problems,
};
use crate::observability::Metrics;
use crate::types::{
    CacheSalt, ChoiceStart, Envelope, Extensions, Failure, FailureKind, Fingerprint, FinishReason, GenerationEvent,
    JournalKey, NodeId, RequestId, SamplingParams, StreamName, Tenant, watch,
};

/// Far more than a loopback needs, far less than any timeout of ours.
const AT_ONCE: Duration = Duration::from_millis(900);

type Frames = UnboundedSender<PeerFrame>;
type Script = dyn Fn(GenerateCall, Frames) -> Result<(), Failure> + Send + Sync;

/// Answers generate calls by a script, and the others from what it remembers.
struct FakeService {
    script: Box<Script>,
    batches: Mutex<Vec<JournalBatch>>,
}

impl FakeService {
    fn new(script: impl Fn(GenerateCall, Frames) -> Result<(), Failure> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { script: Box::new(script), batches: Mutex::default() })
    }

    /// Streams stay open; their senders can be had one after the other.
    fn manual() -> (Arc<Self>, tokio::sync::mpsc::UnboundedReceiver<Frames>) {
        let (senders, opened) = tokio::sync::mpsc::unbounded_channel();
        let service = Self::new(move |_, frames| {
            frames.send(PeerFrame::Heartbeat).expect("the stream is open");
            let _ = senders.send(frames);
            Ok(())
        });
        (service, opened)
    }

    /// Every stream has the tokens `0..max_tokens` and its end.
    fn counting() -> Arc<Self> {
        Self::new(|call, frames| {
            (0..call.envelope.sampling.max_tokens).for_each(|token| send(&frames, token));
            frames.send(finished()).expect("the stream is open");
            Ok(())
        })
    }
}

impl PeerService for FakeService {
    fn generate(&self, call: GenerateCall) -> Result<PeerStream, Failure> {
        let (frames, stream) = PeerStream::channel();
        (self.script)(call, frames)?;
        Ok(stream)
    }

    fn follow(&self, call: FollowCall) -> Result<PeerStream, Failure> {
        let (frames, stream) = PeerStream::channel();
        call.have.iter().for_each(|have| send(&frames, *have));
        Ok(stream)
    }

    fn journal(&self, batch: JournalBatch) -> Vec<JournalRefusal> {
        self.batches.lock().push(batch);
        vec![JournalRefusal::Fenced { key: key("k"), epoch: 9 }]
    }

    fn lookup(&self, key: JournalKey) -> Option<JournalRecord> {
        (key == record().name().key).then(record)
    }

    fn tokenizer(&self, digest: &str) -> Option<Bytes> {
        // Larger than the windows of a stream.
        (digest == "abc").then(|| Bytes::from(vec![7; 5 << 20]))
    }
}

fn key(key: &str) -> JournalKey {
    JournalKey::new(&Tenant::new("t"), key, 0)
}

fn envelope(sampling: SamplingParams) -> Envelope {
    Envelope::new(RequestId::new("cmpl-1"), Arc::from([1, 2, 3]), sampling)
}

fn record() -> JournalRecord {
    let envelope = envelope(SamplingParams::default());
    JournalRecord {
        envelope: envelope.with(|envelope| envelope.name = Some(StreamName { key: key("k"), body: [1; 16] })),
        fingerprint: Fingerprint::new("f00d"),
        epoch: 1,
        entry: NodeId::new("a"),
        choices: Vec::new(),
    }
}

fn token(token: u32) -> PeerFrame {
    PeerFrame::Event(GenerationEvent::Token { choice: 0, token, logprobs: None })
}

fn finished() -> PeerFrame {
    PeerFrame::Event(GenerationEvent::Finished { choice: 0, reason: FinishReason::Length })
}

fn send(frames: &Frames, number: u32) {
    frames.send(token(number)).expect("the stream is open");
}

fn call(max_tokens: u32) -> GenerateCall {
    GenerateCall {
        envelope: Arc::new(envelope(SamplingParams { max_tokens, ..SamplingParams::default() })),
        fingerprint: Fingerprint::new("f00d"),
        choices: ChoiceStart::fresh(1),
        remaining: None,
        is_continuation: false,
    }
}

fn tls(secret: u8) -> PeerTls {
    PeerTls::from_keys(&ClusterKey::from_secret(&[secret; 32]).expect("long enough").into()).expect("a certificate")
}

/// A node that answers calls.
struct Callee {
    addr: SocketAddr,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

impl Callee {
    async fn start(secret: u8, service: Arc<FakeService>) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), secret, service).await
    }

    async fn start_at(addr: SocketAddr, secret: u8, service: Arc<FakeService>) -> Self {
        let listener = TcpListener::bind(addr).await.expect("a free port");
        let addr = listener.local_addr().expect("an address");
        let (metrics, shutdown) = (Arc::new(Metrics::new("m")), CancellationToken::new());
        let server = tokio::spawn({
            let (metrics, shutdown) = (metrics.clone(), shutdown.clone());
            async move { serve(listener, &tls(secret), service, metrics, Problems::default(), shutdown).await }
        });
        Self { addr, metrics, shutdown, server }
    }

    fn peer(&self, incarnation: u64) -> Peer {
        peer(self.addr, incarnation)
    }

    /// As `kill -9` looks from outside: sockets close, nobody says a word.
    async fn kill(self) {
        self.server.abort();
        assert!(in_time("the server to end", self.server).await.expect_err("killed").is_cancelled());
    }
}

fn peer(addr: SocketAddr, incarnation: u64) -> Peer {
    let description = NodeDescription {
        protocol: PROTOCOL,
        version: "0".into(),
        peer_addr: addr,
        zone: "".into(),
        models: Vec::new(),
        tenants: None,
    };
    let report = LoadReport::default();
    Peer {
        id: NodeId::new("b"),
        incarnation,
        protocol: PROTOCOL.newest,
        description,
        report,
        reported_at: Instant::now(),
        measured_at: Instant::now(),
        stability: 1.0,
    }
}

/// A node that calls.
struct Caller {
    transport: HttpPeerTransport,
    views: watch::Sender<Arc<ClusterView>>,
}

impl Caller {
    fn new(secret: u8, peers: &[&Peer]) -> Self {
        Self::with_connect_timeout(secret, peers, Duration::from_secs(10))
    }

    fn with_connect_timeout(secret: u8, peers: &[&Peer], connect_timeout: Duration) -> Self {
        let views = watch::Sender::new(view(peers));
        Self { transport: HttpPeerTransport::new(tls(secret), connect_timeout, views.subscribe()), views }
    }

    async fn generate(&self, peer: &Peer, call: GenerateCall) -> Result<PeerStream, Failure> {
        in_time("an answer", self.transport.generate(peer, call)).await
    }

    async fn accepted(&self, peer: &Peer, call: GenerateCall) -> PeerStream {
        self.generate(peer, call).await.unwrap_or_else(|failure| panic!("{failure}: {:?}", failure.source))
    }

    async fn refused(&self, peer: &Peer) -> Failure {
        self.generate(peer, call(1)).await.err().expect("a refusal")
    }
}

fn view(peers: &[&Peer]) -> Arc<ClusterView> {
    let peers: BTreeMap<_, _> = peers.iter().map(|peer| (peer.id.clone(), Arc::new((*peer).clone()))).collect();
    Arc::new(ClusterView { peers, dead: Vec::new() })
}

async fn next(stream: &mut PeerStream) -> PeerFrame {
    in_time("a frame", stream.next()).await
}

async fn failure_of(stream: &mut PeerStream) -> FailureKind {
    match next(stream).await {
        PeerFrame::Event(GenerationEvent::Failed(failure)) => failure.kind,
        other => panic!("{other:?}"),
    }
}

async fn assert_counts(mut stream: PeerStream, tokens: u32) {
    for number in 0..tokens {
        assert_eq!(next(&mut stream).await, token(number));
    }
    assert_eq!(next(&mut stream).await, finished());
}

#[tokio::test]
async fn every_call_has_its_answer() {
    let service = FakeService::counting();
    let callee = Callee::start(1, service.clone()).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    assert_counts(caller.accepted(&peer, call(3)).await, 3).await;

    let follow = FollowCall { key: record().name().key, have: vec![5, 6] };
    let mut followed = in_time("an answer", caller.transport.follow(&peer, follow)).await.expect("accepted");
    assert_eq!((next(&mut followed).await, next(&mut followed).await), (token(5), token(6)));
    assert_eq!(failure_of(&mut followed).await, FailureKind::PeerDisconnected, "it ended without its last choice");

    let batch = JournalBatch { from: NodeId::new("a"), entries: Vec::new() };
    let refusals = in_time("an answer", caller.transport.journal(&peer, batch.clone())).await.expect("taken");
    assert_eq!(refusals, [JournalRefusal::Fenced { key: record().name().key, epoch: 9 }]);
    assert_eq!(*service.batches.lock(), [batch]);

    let lookup = |key| in_time("an answer", caller.transport.lookup(&peer, key));
    assert_eq!(lookup(record().name().key).await.expect("answered"), Some(record()));
    assert_eq!(lookup(key("other")).await.expect("answered"), None);

    let tokenizer = |digest: &str| in_time("an answer", caller.transport.tokenizer(&peer, digest.into()));
    assert_eq!(tokenizer("abc").await.expect("known"), vec![7; 5 << 20]);
    assert_eq!(tokenizer("def").await.expect_err("unknown").kind, FailureKind::InvalidRequest);
    assert_eq!(callee.metrics.peer_connections.get(), 1, "one connection for all");
}

#[tokio::test]
async fn what_a_call_asks_for_arrives() {
    let asked = Extensions { cache_salt: Some(CacheSalt::new([3; 16])), prompt_logprobs: Some(2) };
    let scored = || PeerFrame::Event(GenerationEvent::PromptLogprobs { start: 0, logprobs: Vec::new() });
    let service = FakeService::new(move |call, frames| {
        assert_eq!(call.envelope.extensions, asked);
        frames.send(scored()).expect("the stream is open");
        Ok(())
    });
    let callee = Callee::start(1, service).await;
    let peer = callee.peer(1);
    let caller = Caller::new(1, &[&peer]);
    let mut stream = caller
        .accepted(&peer, GenerateCall { envelope: call(1).envelope.with(|it| it.extensions = asked), ..call(1) })
        .await;
    assert_eq!(next(&mut stream).await, scored());
}

#[tokio::test]
async fn frames_come_as_they_are_sent() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let mut stream = caller.accepted(&peer, call(10)).await;
    let frames = in_time("the call", opened.recv()).await.expect("a call");
    assert_eq!(next(&mut stream).await, PeerFrame::Heartbeat);
    for number in 0..10 {
        send(&frames, number);
        assert_eq!(next(&mut stream).await, token(number));
    }
    frames.send(PeerFrame::HandOver).expect("open");
    assert_eq!(next(&mut stream).await, PeerFrame::HandOver);
    let failure = Failure::new(FailureKind::OutOfMemory, "No block is free.");
    frames.send(PeerFrame::Event(GenerationEvent::Failed(failure.clone()))).expect("open");
    assert_eq!(next(&mut stream).await, PeerFrame::Event(GenerationEvent::Failed(failure)), "the peer's own word");
    in_time("the call to end after a failure", frames.closed()).await;
}

#[tokio::test]
async fn a_dropped_stream_is_cancelled_at_the_peer() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let neighbour = caller.accepted(&peer, call(1)).await;
    let kept = in_time("the call", opened.recv()).await.expect("a call");
    for _ in 0..3 {
        let stream = caller.accepted(&peer, call(1)).await;
        let frames = in_time("the call", opened.recv()).await.expect("a call");
        drop(stream);
        let start = Instant::now();
        in_time("the cancellation", frames.closed()).await;
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    }
    assert!(!kept.is_closed(), "the neighbour goes on");
    drop(neighbour);
    in_time("the cancellation", kept.closed()).await;
}

/// More than the library allows strangers: calls that are cancelled before the peer has taken notice of them, and answers to
/// calls that were cancelled meanwhile.
#[tokio::test]
async fn a_storm_of_cancellations_leaves_the_neighbours_alone() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let mut neighbour = caller.accepted(&peer, call(1)).await;
    let frames = in_time("the call", opened.recv()).await.expect("a call");
    for round in 0..24 {
        let mut calls: Vec<_> = (0..300).map(|_| caller.transport.generate(&peer, call(1))).collect();
        for call in &mut calls {
            let _ = futures::poll!(call);
        }
        // Each round lets them come a little further.
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        drop(calls);
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(next(&mut neighbour).await, PeerFrame::Heartbeat);
    send(&frames, 1);
    assert_eq!(next(&mut neighbour).await, token(1));
    while let Ok(cancelled) = opened.try_recv() {
        in_time("the cancellation", cancelled.closed()).await;
    }
    assert_eq!(callee.metrics.peer_connections.get(), 1);
}

#[tokio::test]
async fn when_a_peer_is_killed_its_streams_break_at_once() {
    let (service, _opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let mut streams = join_all((0..32).map(|_| caller.accepted(&peer, call(9)))).await;
    for stream in &mut streams {
        assert_eq!(next(stream).await, PeerFrame::Heartbeat);
    }
    let start = Instant::now();
    callee.kill().await;
    for stream in &mut streams {
        assert_eq!(failure_of(stream).await, FailureKind::PeerDisconnected);
    }
    assert_eq!(caller.refused(&peer).await.kind, FailureKind::PeerUnreachable);
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
}

/// Its host has lost power, say: no packet comes any more, and none is refused. Neither side has anything to send.
#[tokio::test]
async fn a_host_that_vanishes_is_noticed_by_both_sides() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (addr, cable) = lay_cable(callee.addr).await;
    let caller = Caller::new(1, &[&peer(addr, 1)]);
    let mut stream = caller.accepted(&peer(addr, 1), call(1)).await;
    let frames = in_time("the call", opened.recv()).await.expect("a call");
    assert_eq!(next(&mut stream).await, PeerFrame::Heartbeat);
    cable.cancel();
    sleep(Duration::from_millis(20)).await;
    // From here on the clock jumps whenever nothing is to be done.
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    assert_eq!(failure_of(&mut stream).await, FailureKind::PeerDisconnected);
    in_time("the peer to give the call up", frames.closed()).await;
    let elapsed = start.elapsed();
    assert!(elapsed > Duration::from_secs(4) && elapsed < Duration::from_secs(12), "{elapsed:?}");
}

/// A way to `addr` that carries one connection, until it is cut and swallows what is sent.
async fn lay_cable(addr: SocketAddr) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let (entry, cut) = (listener.local_addr().expect("an address"), CancellationToken::new());
    tokio::spawn({
        let cut = cut.clone();
        async move {
            let (mut near, _) = listener.accept().await.expect("a connection");
            let mut far = TcpStream::connect(addr).await.expect("a connection");
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            }
            std::future::pending::<()>().await;
        }
    });
    (entry, cut)
}

#[tokio::test]
async fn a_peer_that_comes_back_is_connected_to_anew() {
    let callee = Callee::start(1, FakeService::counting()).await;
    let (addr, peer) = (callee.addr, callee.peer(1));
    let caller = Caller::new(1, &[&peer]);
    assert_counts(caller.accepted(&peer, call(1)).await, 1).await;
    callee.kill().await;
    let callee = Callee::start_at(addr, 1, FakeService::counting()).await;
    // Before gossip has told of its new life, and afterwards.
    assert_counts(caller.accepted(&peer, call(1)).await, 1).await;
    let reborn = callee.peer(2);
    caller.views.send_replace(view(&[&reborn]));
    assert_counts(caller.accepted(&reborn, call(1)).await, 1).await;
    until("the connection to the former life to close", || callee.metrics.peer_connections.get() == 1).await;
    assert_counts(caller.accepted(&reborn, call(1)).await, 1).await;
}

#[tokio::test]
async fn a_peer_that_left_is_let_go_when_its_streams_have_ended() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let mut stream = caller.accepted(&peer, call(1)).await;
    let frames = in_time("the call", opened.recv()).await.expect("a call");
    caller.views.send_replace(view(&[]));
    assert_eq!(next(&mut stream).await, PeerFrame::Heartbeat);
    sleep(Duration::from_millis(20)).await;
    send(&frames, 1);
    assert_eq!(next(&mut stream).await, token(1), "what runs goes on");
    drop(stream);
    until("the connection to close", || callee.metrics.peer_connections.get() == 0).await;
    // A call that was placed by an older view is made all the same.
    drop(caller.accepted(&peer, call(1)).await);
    until("the connection to close", || callee.metrics.peer_connections.get() == 0).await;
}

#[tokio::test]
async fn two_hundred_streams_share_one_connection() {
    let callee = Callee::start(1, FakeService::counting()).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let count = |tokens| assert_counts_of(&caller, &peer, tokens);
    join_all((0..200).map(|index| count(index % 50))).await;
    assert_eq!(callee.metrics.peer_connections.get(), 1);
}

async fn assert_counts_of(caller: &Caller, peer: &Peer, tokens: u32) {
    assert_counts(caller.accepted(peer, call(tokens)).await, tokens).await;
}

/// More frames than may lie unread on the way: the peer waits, and nothing is lost.
#[tokio::test]
async fn a_slow_reader_gets_everything_and_holds_nobody_up() {
    const TOKENS: u32 = 400_000;
    let callee = Callee::start(1, FakeService::counting()).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let slow = caller.accepted(&peer, call(TOKENS)).await;
    assert_counts(caller.accepted(&peer, call(100)).await, 100).await;
    assert_counts(slow, TOKENS).await;
}

#[tokio::test]
async fn a_refusal_is_the_peers_own_word() {
    let refusal = Failure::new(FailureKind::Overloaded, "The queue is full.").with_retry_after(Duration::from_secs(3));
    let service = FakeService::new({
        let refusal = refusal.clone();
        move |_, _| Err(refusal.clone())
    });
    let callee = Callee::start(1, service).await;
    let caller = Caller::new(1, &[&callee.peer(1)]);
    let refused = caller.refused(&callee.peer(1)).await;
    assert_eq!((&refused, refused.retry_after), (&refusal, Some(Duration::from_secs(3))));
}

#[tokio::test]
async fn a_wrong_key_is_unreachable() {
    let callee = Callee::start(1, FakeService::counting()).await;
    let caller = Caller::new(2, &[&callee.peer(1)]);
    assert_eq!(caller.refused(&callee.peer(1)).await.kind, FailureKind::PeerUnreachable);
    until("the refusal to be counted", || callee.metrics.peer_connections_refused.with(["handshake"]).get() == 1).await;
    assert_eq!(callee.metrics.peer_connections.get(), 0);
    let caller = Caller::new(1, &[&callee.peer(1)]);
    assert_counts(caller.accepted(&callee.peer(1), call(1)).await, 1).await;
}

#[tokio::test]
async fn nobody_behind_the_address_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("an address");
    let limit = Duration::from_millis(300);
    let caller = Caller::with_connect_timeout(1, &[&peer(addr, 1)], limit);
    // Takes connections and says nothing: all calls wait for the same one.
    let start = Instant::now();
    for failure in join_all((0..20).map(|_| async { caller.refused(&peer(addr, 1)).await })).await {
        assert_eq!(failure.kind, FailureKind::PeerUnreachable);
    }
    assert!(start.elapsed() >= limit && start.elapsed() < 4 * limit, "{:?}", start.elapsed());
    drop(listener);
    let start = Instant::now();
    assert_eq!(caller.refused(&peer(addr, 1)).await.kind, FailureKind::PeerUnreachable);
    assert!(start.elapsed() < limit, "a refused connection is no reason to wait: {:?}", start.elapsed());
}

#[tokio::test]
async fn a_peer_that_never_answers_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("an address");
    // It has the key, and is stopped after the handshake.
    let frozen = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a connection");
        let _stream = tls(1).accept(stream).await.expect("a peer");
        sleep(super::sockets::PATIENCE).await;
    });
    let caller = Caller::new(1, &[&peer(addr, 1)]);
    assert_eq!(caller.refused(&peer(addr, 1)).await.kind, FailureKind::PeerUnreachable);
    frozen.abort();
}

#[tokio::test]
async fn shutdown_lets_streams_end_and_takes_no_new_ones() {
    let (service, mut opened) = FakeService::manual();
    let callee = Callee::start(1, service).await;
    let (caller, peer) = (Caller::new(1, &[&callee.peer(1)]), callee.peer(1));
    let mut stream = caller.accepted(&peer, call(1)).await;
    let frames = in_time("the call", opened.recv()).await.expect("a call");
    assert_eq!(next(&mut stream).await, PeerFrame::Heartbeat);
    callee.shutdown.cancel();
    let refused = async {
        while let Ok(stream) = caller.transport.generate(&peer, call(1)).await {
            drop(stream);
            sleep(Duration::from_millis(2)).await;
        }
    };
    in_time("calls to be refused", refused).await;
    send(&frames, 1);
    frames.send(finished()).expect("open");
    drop(frames);
    assert_eq!((next(&mut stream).await, next(&mut stream).await), (token(1), finished()));
    drop(opened);
    in_time("the server to end", callee.server).await.expect("no panic");
}
