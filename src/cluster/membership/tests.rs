//! Nodes that gossip with real datagrams over loopback. Everything is waited for, with a deadline.

use std::net::Ipv4Addr;

use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::cluster::seal::DropReason;
use crate::cluster::{ClusterKey, PROTOCOL};
use crate::types::NodeState;

/// Generous, since other tests keep the cores busy.
const DEADLINE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(100);

struct Node {
    membership: Membership,
    metrics: Arc<Metrics>,
}

fn config(name: &str, seeds: &[&Node]) -> Config {
    Config {
        node_id: Some(name.into()),
        gossip_addr: Some((Ipv4Addr::LOCALHOST, 0).into()),
        peers: seeds.iter().map(|seed| seed.addr().to_string()).collect(),
        gossip_interval: INTERVAL,
        ..Config::default()
    }
}

async fn start_with(config: &Config, secret: u8) -> Node {
    let keys = ClusterKey::from_secret(&[secret; 32]).expect("long enough").into();
    let metrics = Arc::new(Metrics::new("m"));
    let membership = Membership::start(config, &keys, Arc::clone(&metrics)).await.expect("a port");
    let peer_addr = membership.gossip_addr().expect("clustered");
    membership.describe(NodeDescription {
        protocol: PROTOCOL,
        version: "1".into(),
        peer_addr,
        zone: "z".into(),
        models: Vec::new(),
        tenants: None,
    });
    Node { membership, metrics }
}

async fn start(name: &str, seeds: &[&Node]) -> Node {
    start_with(&config(name, seeds), 1).await
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

impl Node {
    fn addr(&self) -> SocketAddr {
        self.membership.gossip_addr().expect("clustered")
    }

    async fn sees(&self, what: &str, is_so: impl FnMut(&Arc<ClusterView>) -> bool) -> Arc<ClusterView> {
        let mut view = self.membership.view();
        in_time(what, async { view.wait_for(is_so).await.expect("running").clone() }).await
    }

    async fn sees_peers(&self, names: &[&str]) -> Arc<ClusterView> {
        self.sees(&format!("peers {names:?}"), |view| view.peers.keys().map(NodeId::as_str).eq(names.iter().copied()))
            .await
    }

    fn drops(&self, reason: DropReason) -> u64 {
        self.metrics.gossip_drops.with([reason.label()]).get()
    }
}

fn report(running: u32) -> LoadReport {
    LoadReport { state: NodeState::Ready, ready: true, running, ..LoadReport::default() }
}

#[tokio::test]
async fn three_nodes_find_one_another_from_one_seed_and_reports_reach_all() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let c = start("c", &[&a]).await;
    a.sees_peers(&["b", "c"]).await;
    b.sees_peers(&["a", "c"]).await;
    c.sees_peers(&["a", "b"]).await;
    for running in [3, 4] {
        b.membership.publish(LoadReport { hot_prefixes: vec![running], ..report(running) });
        for other in [&a, &c] {
            let view = other.sees("the report", |view| view.peers[&NodeId::new("b")].report.running == running).await;
            let peer = &view.peers[&NodeId::new("b")];
            assert_eq!((peer.report.ready, peer.report.state), (true, NodeState::Ready));
            assert_eq!((peer.description.peer_addr, peer.description.zone.as_str()), (b.addr(), "z"));
            assert!(peer.report_age(tokio::time::Instant::now().into_std()) < Duration::from_secs(5));
            other.sees("prefixes", |view| view.peers[&NodeId::new("b")].report.hot_prefixes == [running]).await;
        }
    }
}

/// Renews the node's report periodically, as the server does, until dropped.
fn keep_up(node: &Node) -> DropGuard {
    let (membership, stop) = (node.membership.clone(), CancellationToken::new());
    tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
        loop {
            membership.publish(LoadReport::default());
            tokio::time::sleep(INTERVAL).await;
        }
    }));
    stop.drop_guard()
}

#[tokio::test]
async fn an_idle_node_goes_on_reporting_for_as_long_as_it_looks_after_itself() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let kept_up = keep_up(&b);
    let peer = |view: &Arc<ClusterView>| Arc::clone(&view.peers[&NodeId::new("b")]);
    let first = peer(&a.sees_peers(&["b"]).await).reported_at;
    let later = a.sees("a fresh report", |view| peer(view).reported_at > first + Duration::from_millis(500)).await;
    assert_eq!(peer(&later).report, LoadReport::default(), "nothing but its time is new");
    drop(kept_up);
    in_time("the report ages", async {
        let age = || peer(&a.membership.view().borrow()).report_age(tokio::time::Instant::now().into_std());
        while age() < Duration::from_secs(4) {
            tokio::time::sleep(INTERVAL).await;
        }
    })
    .await;
    a.sees_peers(&["b"]).await;
}

#[tokio::test]
async fn gossip_that_ends_by_itself_is_told_from_a_goodbye() {
    let a = start("a", &[]).await;
    let broke = |node: &Node| {
        let membership = node.membership.clone();
        tokio::spawn(async move { membership.broke().await })
    };
    let after_goodbye = broke(&a);
    in_time("leave", a.membership.leave()).await;
    tokio::time::sleep(INTERVAL * 4).await;
    assert!(!after_goodbye.is_finished());
    after_goodbye.abort();

    let (leave, task) = tokio::sync::mpsc::channel(1);
    let ended = Membership { leave: Some(leave), ..Membership::alone(&Config::default()) };
    drop(task);
    in_time("it broke", ended.broke()).await;
}

#[tokio::test]
async fn a_silent_node_dies_and_is_forgotten_as_a_peer() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let c = start("c", &[&a]).await;
    a.sees_peers(&["b", "c"]).await;
    c.sees_peers(&["a", "b"]).await;
    drop(b);
    for other in [&a, &c] {
        let view = other.sees("b's death", |view| !view.dead.is_empty()).await;
        assert_eq!((view.dead.as_slice(), view.peers.len()), ([NodeId::new("b")].as_slice(), 1));
    }
    assert_eq!(a.metrics.cluster_changes.with(["died"]).get(), 1);
}

#[tokio::test]
async fn a_goodbye_arrives_long_before_silence_would_tell() {
    // With this interval, a silence takes at least eight seconds to be noticed.
    let slow = |config: Config| Config { gossip_interval: Duration::from_secs(1), ..config };
    let a = start_with(&slow(config("a", &[])), 1).await;
    let b = start_with(&slow(config("b", &[&a])), 1).await;
    a.sees_peers(&["b"]).await;
    b.sees_peers(&["a"]).await;
    let asked = tokio::time::Instant::now();
    in_time("leave", b.membership.leave()).await;
    a.sees_peers(&[]).await;
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_eq!(a.metrics.cluster_changes.with(["left"]).get(), 1);
    in_time("a second goodbye", b.membership.leave()).await;
}

#[tokio::test]
async fn what_decides_on_traffic_does_not_wait_for_a_round() {
    let slow = |config: Config| Config { gossip_interval: Duration::from_secs(1), ..config };
    let a = start_with(&slow(config("a", &[])), 1).await;
    let b = start_with(&slow(config("b", &[&a])), 1).await;
    b.sees_peers(&["a"]).await;
    a.sees_peers(&["b"]).await;
    let asked = tokio::time::Instant::now();
    // In regular rounds this would take half a second each time.
    for is_ready in [true, false].repeat(6) {
        b.membership.publish(LoadReport { ready: is_ready, ..report(1) });
        a.sees("readiness", |view| view.peers[&NodeId::new("b")].report.ready == is_ready).await;
    }
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn a_node_with_another_key_or_cluster_neither_sees_nor_is_seen() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let wrong_key = start_with(&config("w", &[&a, &b]), 2).await;
    let wrong_cluster = start_with(&Config { cluster_id: "other".into(), ..config("x", &[&a, &b]) }, 1).await;
    a.sees_peers(&["b"]).await;
    in_time("many refusals", async {
        while a.drops(DropReason::Unauthenticated) < 10 || b.drops(DropReason::Unauthenticated) < 10 {
            tokio::time::sleep(INTERVAL).await;
        }
    })
    .await;
    assert_eq!(a.membership.view().borrow().peers.len(), 1);
    for stranger in [&wrong_key, &wrong_cluster] {
        let view = stranger.membership.view();
        assert!(view.borrow().peers.is_empty() && view.borrow().dead.is_empty());
        assert!(stranger.metrics.gossip_bytes.with(["sent"]).get() > 0);
        assert_eq!(stranger.metrics.gossip_bytes.with(["received"]).get(), 0, "nobody answers a stranger");
    }
}

#[tokio::test]
async fn a_later_process_of_a_name_replaces_the_earlier_one() {
    let a = start("a", &[]).await;
    let first = start("b", &[&a]).await;
    let incarnation = |view: &Arc<ClusterView>| view.peers.get(&NodeId::new("b")).map(|peer| peer.incarnation);
    let before = incarnation(&a.sees_peers(&["b"]).await);
    drop(first);
    let second = start("b", &[&a]).await;
    let view = a.sees("the restarted process", |view| incarnation(view) > before).await;
    assert_eq!(view.peers[&NodeId::new("b")].description.peer_addr, second.addr());
    second.sees_peers(&["a"]).await;

    // The same while the earlier process is still alive.
    let third = start("b", &[&a]).await;
    let view = a
        .sees("the third process", |view| {
            view.peers.get(&NodeId::new("b")).is_some_and(|peer| peer.description.peer_addr == third.addr())
        })
        .await;
    assert!(incarnation(&view) > before && view.dead.is_empty());
}

/// All nodes here share a thread, so all of them pause together.
#[tokio::test]
async fn who_stood_still_does_not_hold_the_others_for_dead() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let _kept_up = [keep_up(&a), keep_up(&b)];
    a.sees_peers(&["b"]).await;
    b.sees_peers(&["a"]).await;
    for _ in 0..3 {
        std::thread::sleep(INTERVAL * 20);
        // A report that arrives after the pause shows that the view is being updated again.
        let now = tokio::time::Instant::now().into_std();
        for (node, peer) in [(&a, "b"), (&b, "a")] {
            node.sees("a fresh report", |view| {
                view.peers.get(&NodeId::new(peer)).is_some_and(|peer| peer.reported_at > now)
            })
            .await;
        }
    }
    for node in [&a, &b] {
        assert_eq!(node.metrics.cluster_changes.with(["died"]).get(), 0);
    }
}

#[tokio::test]
async fn two_halves_that_have_lost_one_another_meet_again() {
    let a = start("a", &[]).await;
    let addr = a.addr();
    let b = start("b", &[&a]).await;
    b.sees_peers(&["a"]).await;
    drop(a);
    b.sees("a's death", |view| view.dead.len() == 1).await;
    let again = start_with(&Config { gossip_addr: Some(addr), ..config("a", &[]) }, 1).await;
    again.sees_peers(&["b"]).await;
    b.sees_peers(&["a"]).await;
}

#[tokio::test]
async fn garbage_on_the_port_is_counted_and_harms_nobody() {
    let a = start("a", &[]).await;
    let b = start("b", &[&a]).await;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    for len in (0..3000).step_by(7) {
        socket.send_to(&vec![1; len], a.addr()).await.expect("sent");
    }
    a.sees_peers(&["b"]).await;
    in_time("counted garbage", async {
        while a.drops(DropReason::Malformed) == 0 || a.drops(DropReason::Unauthenticated) == 0 {
            tokio::time::sleep(INTERVAL).await;
        }
    })
    .await;
    b.sees_peers(&["a"]).await;
}

#[tokio::test]
async fn a_cluster_of_one_has_a_name_and_sees_nobody() {
    let alone = Membership::alone(&Config::default());
    assert_eq!(alone.id().as_str().len(), 12);
    assert_ne!(alone.id(), Membership::alone(&Config::default()).id());
    assert!(alone.view().borrow().peers.is_empty());
    alone.publish(report(1));
    in_time("leave", alone.leave()).await;
    let keys = ClusterKey::from_secret(&[1; 32]).expect("long enough").into();
    let started = Membership::start(&Config::default(), &keys, Arc::new(Metrics::new("m"))).await;
    assert!(matches!(started, Err(MembershipError::Alone)));
}

#[tokio::test]
async fn a_taken_port_is_reported() {
    let a = start("a", &[]).await;
    let taken = Config { gossip_addr: Some(a.addr()), ..config("b", &[]) };
    let keys = ClusterKey::from_secret(&[1; 32]).expect("long enough").into();
    let started = Membership::start(&taken, &keys, Arc::new(Metrics::new("m"))).await;
    assert!(matches!(started, Err(MembershipError::Bind { addr, .. }) if addr == a.addr()));
}
