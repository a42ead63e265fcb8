//! Benchmarks gossip for clusters of several sizes: bytes per node and second, and the time until all nodes know of a new node,
//! a change, a goodbye and a death.
//!
//! All nodes run in this process on a simulated clock. The datagrams are real and encrypted, and cross a simulated network with
//! half a millisecond of latency and no losses. So the figures describe the protocol and do not depend on the machine's load:
//!
//! ```text
//! cargo bench --bench gossip [-- NODES…]
//! ```

#![expect(clippy::disallowed_methods, reason = "a bench waits for its own tasks")]
#![expect(clippy::print_stdout, reason = "its result")]

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use outrigger::cluster::membership::Membership;
use outrigger::cluster::seal::transport::Datagrams;
use outrigger::cluster::{ClusterKey, ClusterView, Config, LoadReport, ModelReport, NodeDescription, PROTOCOL};
use outrigger::observability::Metrics;
use outrigger::types::{Fingerprint, NodeId, NodeState};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

const SIZES: [usize; 4] = [3, 10, 30, 100];
const LATENCY: Duration = Duration::from_micros(500);
/// A socket's buffer, in datagrams.
const QUEUE: usize = 256;
/// Of the steady state.
const MEASURED: Duration = Duration::from_secs(10);
/// Changes whose way to all nodes is timed.
const CHANGES: u32 = 20;
/// Nothing here takes so long, unless it is broken.
const DEADLINE: Duration = Duration::from_secs(120);

type Inbox = mpsc::Sender<(SocketAddr, Vec<u8>)>;

/// Carries datagrams between the sockets of this process.
#[derive(Clone, Default)]
struct Network(Arc<Mutex<HashMap<SocketAddr, Inbox>>>);

struct Port {
    addr: SocketAddr,
    network: Network,
    inbox: tokio::sync::Mutex<mpsc::Receiver<(SocketAddr, Vec<u8>)>>,
}

impl Network {
    fn bind(&self, addr: SocketAddr) -> Arc<Port> {
        let (sender, inbox) = mpsc::channel(QUEUE);
        self.0.lock().insert(addr, sender);
        Arc::new(Port { addr, network: self.clone(), inbox: tokio::sync::Mutex::new(inbox) })
    }
}

impl Datagrams for Port {
    fn receive<'a>(&'a self, buffer: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(async move {
            let received = self.inbox.lock().await.recv().await;
            let (from, datagram) = received.ok_or(io::ErrorKind::BrokenPipe)?;
            let len = datagram.len().min(buffer.len());
            buffer[..len].copy_from_slice(&datagram[..len]);
            Ok((len, from))
        })
    }

    fn send<'a>(&'a self, datagram: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>> {
        let inbox = self.network.0.lock().get(&to).cloned();
        let (from, datagram) = (self.addr, datagram.to_vec());
        tokio::spawn(async move {
            sleep(LATENCY).await;
            // What does not fit is lost, as in a socket.
            inbox.map(|inbox| inbox.try_send((from, datagram)))
        });
        Box::pin(async { Ok(()) })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }
}

struct Node {
    membership: Membership,
    metrics: Arc<Metrics>,
}

fn addr(number: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (number / 250) as u8, (number % 250) as u8 + 1], 7946))
}

async fn start(network: &Network, number: usize) -> Node {
    let config = Config { peers: vec![addr(0).to_string()], ..Config::default() };
    let keys = ClusterKey::from_secret(&[1; 32]).expect("long enough").into();
    let metrics = Arc::new(Metrics::new("m"));
    let port = network.bind(addr(number));
    let membership = Membership::start_on(port, &config, &keys, Arc::clone(&metrics)).await.expect("started");
    membership.describe(NodeDescription {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        peer_addr: addr(number),
        zone: "zone-a".into(),
        models: vec![ModelReport {
            names: vec!["HuggingFaceTB/SmolLM2-135M-Instruct".into(), "default".into()],
            fingerprint: Fingerprint::new("f".repeat(64)),
            tokenizer: "7".repeat(64),
            max_model_len: 8192,
            created: 1_700_000_000,
        }],
        tenants: None,
    });
    membership.publish(report(number as u64));
    Node { membership, metrics }
}

/// A busy node's report, another for each `seed`.
fn report(seed: u64) -> LoadReport {
    let mut state = seed;
    let mut draw = |bound: u64| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % bound
    };
    LoadReport {
        state: NodeState::Ready,
        ready: true,
        running: draw(16) as u32,
        waiting: draw(64) as u32,
        waiting_tokens: draw(20_000),
        seats: 16,
        queue_saturation: draw(1000) as f32 / 1000.0,
        kv_usage: draw(1000) as f32 / 1000.0,
        memory_pressure: draw(1000) as f32 / 1000.0,
        time_to_first_token: draw(1000) as f32 / 1000.0,
        inter_token_latency: draw(100) as f32 / 1000.0,
        drain_tokens_per_second: draw(5000) as f32,
        free_token_budget: draw(100_000),
        hot_prefixes: (0..64).map(|_| draw(1 << 32) as u32).collect(),
        ..LoadReport::default()
    }
}

/// The time until the views of all `nodes` are so.
async fn until_all(what: &str, nodes: &[Node], is_so: impl Fn(&NodeId, &ClusterView) -> bool) -> Duration {
    let start = Instant::now();
    for node in nodes {
        let mut view = node.membership.view();
        let id = node.membership.id();
        let seen = view.wait_for(|view| is_so(id, view));
        drop(timeout(DEADLINE, seen).await.unwrap_or_else(|_| panic!("not in time: {what}")).expect("running"));
    }
    start.elapsed()
}

fn bytes_sent(nodes: &[Node]) -> u64 {
    nodes.iter().map(|node| node.metrics.gossip_bytes.with(["sent"]).get()).sum()
}

/// Bytes for each node and second, while every node's report changes every `change`.
async fn steady_rate(nodes: &[Node], change: Option<Duration>) -> f64 {
    let before = bytes_sent(nodes);
    let start = Instant::now();
    let mut round = 0u64;
    while start.elapsed() < MEASURED {
        sleep(change.unwrap_or(MEASURED)).await;
        round += 1;
        if change.is_some() {
            for (number, node) in (0u64..).zip(nodes) {
                node.membership.publish(report(round << 16 | number));
            }
        }
    }
    (bytes_sent(nodes) - before) as f64 / nodes.len() as f64 / start.elapsed().as_secs_f64()
}

/// The times that changes need from one node to all, sorted.
async fn spread(nodes: &[Node], change: impl Fn(u32) -> LoadReport) -> Vec<Duration> {
    let mut times = Vec::new();
    for number in 0..CHANGES {
        let source = &nodes[number as usize % nodes.len()];
        let next = change(number);
        // Another phase of the round each time.
        sleep(Duration::from_millis(1500 + u64::from(number) * 37)).await;
        source.membership.publish(next.clone());
        let has_heard = |id: &NodeId, view: &ClusterView| {
            let peer = view.peers.get(source.membership.id());
            id == source.membership.id()
                || peer.is_some_and(|peer| peer.report.running == next.running && peer.report.ready == next.ready)
        };
        times.push(until_all("a change", nodes, has_heard).await);
    }
    times.sort_unstable();
    times
}

fn drops(nodes: &[Node]) -> u64 {
    let reasons = ["incomplete", "oversized", "unsent", "replayed", "malformed", "crowded"];
    nodes.iter().flat_map(|node| reasons.map(|reason| node.metrics.gossip_drops.with([reason]).get())).sum()
}

async fn measure(count: usize) {
    let network = Network::default();
    let mut nodes = Vec::new();
    for number in 0..count {
        nodes.push(start(&network, number).await);
    }
    let joined = until_all("join", &nodes, |_, view| view.peers.len() == count - 1).await;
    sleep(Duration::from_secs(10)).await;
    let idle = steady_rate(&nodes, None).await;
    let busy = steady_rate(&nodes, Some(Duration::from_millis(200))).await;
    let routine = spread(&nodes, |number| LoadReport { running: 1000 + number * 500, ..report(1) }).await;
    let ready =
        |number: u32| LoadReport { ready: number / count as u32 % 2 == 1, running: 90_000 + number, ..report(1) };
    let urgent = spread(&nodes, ready).await;
    let lost = drops(&nodes);
    let leaver = nodes.pop().expect("many");
    let goodbye = async {
        let leave = leaver.membership.leave();
        let gone = until_all("a goodbye", &nodes, |_, view| view.peers.len() == count - 2);
        tokio::join!(leave, gone).1
    };
    let goodbye = goodbye.await;
    drop(nodes.pop());
    let death = until_all("a death", &nodes, |_, view| view.peers.len() == count - 3).await;
    let (last, middle) = (CHANGES as usize - 1, CHANGES as usize / 2);
    println!(
        "| {count} | {:.1} | {:.1} | {} / {} | {} / {} | {} | {:.1} | {:.1} | {lost} |",
        idle / 1000.0,
        busy / 1000.0,
        routine[middle].as_millis(),
        routine[last].as_millis(),
        urgent[middle].as_millis(),
        urgent[last].as_millis(),
        goodbye.as_millis(),
        death.as_secs_f64(),
        joined.as_secs_f64(),
    );
}

fn main() {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if asked.is_empty() { SIZES.to_vec() } else { asked };
    println!(
        "| nodes | idle kB/s | busy kB/s | change ms, p50 / max | readiness ms, p50 / max | goodbye ms | death s | join s | lost |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for count in sizes.into_iter().filter(|count| *count >= 3) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(measure(count));
    }
}
