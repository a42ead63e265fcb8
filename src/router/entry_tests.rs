//! What is refused before it is tokenized, and that it is what a dispatch at the same moment refuses, in the same words.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::super::failover::now;
use super::super::no_peers::NoPeers;
use super::super::{Config, Dispatch, EarlierAttempt, LocalReplica, NodeIdentity, RouterParts, Strategy};
use super::*;
use crate::admission::{self, AdmissionController, Permit};
use crate::cluster::{ClusterView, LoadReport, ModelReport, NodeDescription, PROTOCOL, Peer};
use crate::engine::null::NullEngine;
use crate::health::inference_probe::InferenceProbe;
use crate::health::{self, Health};
use crate::observability::Metrics;
use crate::types::{Backend, Envelope, FailureKind, Fingerprint, NodeId, NodeState, RequestId, SamplingParams, watch};

const MODEL: &str = "model";
const TOKENIZER: &str = "letters";

/// A node that computes one sequence while another one waits, and what it knows of its peers.
struct Node {
    router: Router,
    health: Health,
    admission: AdmissionController,
    metrics: Arc<Metrics>,
    _view: watch::Sender<Arc<ClusterView>>,
}

fn model(name: &str) -> ModelReport {
    ModelReport {
        names: vec![name.into()],
        fingerprint: Fingerprint::new("00"),
        tokenizer: TOKENIZER.into(),
        max_model_len: 100,
        created: 1,
    }
}

/// A peer that serves `model` and computes one sequence.
fn peer(model: ModelReport, is_full: bool) -> Peer {
    let report = LoadReport {
        state: NodeState::Ready,
        ready: true,
        running: u32::from(is_full),
        seats: 1,
        queue_saturation: f32::from(u8::from(is_full)),
        free_token_budget: 1000,
        ..LoadReport::default()
    };
    Peer {
        id: NodeId::new("peer"),
        incarnation: 1,
        description: NodeDescription {
            protocol: PROTOCOL,
            version: String::new(),
            peer_addr: ([127, 0, 0, 1], 1).into(),
            zone: String::new(),
            models: vec![model],
            tenants: None,
        },
        protocol: PROTOCOL.newest,
        report,
        reported_at: now(),
        measured_at: now(),
        stability: 1.0,
    }
}

impl Node {
    /// A node that has no model yet.
    fn starting(peers: impl IntoIterator<Item = Peer>) -> Self {
        let metrics = Arc::new(Metrics::new(MODEL));
        let health = Health::new(health::Config::default(), metrics.clone());
        let limits = admission::Config { max_num_queued_requests: 1, ..admission::Config::default() };
        let admission = AdmissionController::new(limits, 1, metrics.clone());
        let peers = peers.into_iter().map(|peer| (peer.id.clone(), Arc::new(peer))).collect();
        let (sender, view) = watch::channel(Arc::new(ClusterView { peers, dead: Vec::new() }));
        let router = Router::new(RouterParts {
            config: Config { failover_timeout: Duration::ZERO, placement: Strategy::Random, ..Config::default() },
            own: NodeId::new("own"),
            identity: NodeIdentity { cluster_id: String::new(), incarnation: 1, zone: String::new(), peer_addr: None },
            is_clustered: true,
            admission: admission.clone(),
            health: health.clone(),
            metrics: metrics.clone(),
            transport: Arc::new(NoPeers),
            view,
            seed: 1,
        });
        Self { router, health, admission, metrics, _view: sender }
    }

    async fn ready(peers: impl IntoIterator<Item = Peer>) -> Self {
        let node = Self::starting(peers);
        let engine: Arc<dyn Backend> = Arc::new(NullEngine::new(10));
        node.health.attach(engine.clone());
        node.health.lifecycle().warming("a test").expect("a step of the diagram");
        let probe = InferenceProbe::calibrate(node.health.clone(), engine.clone(), Arc::from([1])).await;
        drop(probe.expect("the engine answers"));
        node.router.attach(LocalReplica { engine, model: model(MODEL), seats: 1, tokenizer: Bytes::new() });
        node.health.lifecycle().ready("a test").expect("a step of the diagram");
        node.router.refresh();
        node
    }

    /// Takes the node's places: one sequence is computed, and one waits.
    fn fill(&self) -> [Permit; 2] {
        let enter = || self.admission.try_admit(one(), 0.0).expect("there is a place");
        let mut running = enter();
        running.scheduled();
        [running, enter()]
    }

    fn check(&self, least: Demand) -> Result<(), Failure> {
        self.router.check_room(MODEL, TOKENIZER, least)
    }

    async fn dispatch(&self, least: Demand) -> Result<(), Failure> {
        self.dispatch_to(MODEL, least).await
    }

    async fn dispatch_to(&self, model: &str, least: Demand) -> Result<(), Failure> {
        let sampling = SamplingParams { n: least.choices, max_tokens: 1, ..SamplingParams::default() };
        let envelope = Envelope {
            model: model.into(),
            tokenizer: TOKENIZER.into(),
            priority: least.priority,
            deadline: least.deadline,
            ..Envelope::new(RequestId::new("r"), Arc::from([1, 2, 3]), sampling)
        };
        let dispatch = Dispatch {
            envelope: Arc::new(envelope),
            strategy: None,
            allows_other_fingerprint: false,
            earlier: EarlierAttempt::default(),
        };
        self.router.dispatch(dispatch).await.map(drop)
    }

    /// What both steps say. They have to agree: for any draw, and in every word.
    async fn refusal(&self, least: Demand) -> Failure {
        let words = |failure: &Failure| (failure.kind, failure.code, failure.message.clone(), failure.retry_after);
        let later = self.dispatch(least).await.expect_err("a dispatch is refused");
        for _ in 0..20 {
            let early = self.check(least).expect_err("it is refused before");
            assert_eq!(words(&early), words(&later));
        }
        later
    }

    /// That the first step lets through what the second one takes, for any draw.
    async fn accepts(&self, least: Demand) {
        (0..20).for_each(|_| self.check(least).expect("there is room"));
        let admitted = self.admission.status().admitted_requests;
        self.dispatch(least).await.expect("a dispatch is accepted");
        let ended = async {
            while self.admission.status().admitted_requests > admitted {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(60), ended).await.expect("the stream ends, and gives its place back");
    }

    fn counted(&self, series: &str) -> u32 {
        let text = self.metrics.prometheus_text();
        let value = text.lines().find_map(|line| line.strip_prefix(series));
        value.map_or(0, |value| value.trim().parse().expect("a number"))
    }
}

fn one() -> Demand {
    Demand::least(1, 0, None)
}

#[tokio::test]
async fn a_full_node_without_peers_refuses_and_counts_the_step() {
    let node = Node::ready([]).await;
    node.accepts(one()).await;
    let place = node.fill();
    let refused = node.refusal(one()).await;
    assert_eq!(refused.kind, FailureKind::Overloaded);
    assert!(refused.message.contains("max_num_queued_requests") && refused.retry_after.is_some(), "{refused:?}");
    let rejections = "outrigger_admission_rejections_total{reason=\"queued_requests\",step=";
    assert_eq!(node.counted(&format!("{rejections}\"entry\"}}")), 20);
    assert_eq!(node.counted(&format!("{rejections}\"queue\"}}")), 1);
    assert_eq!(node.counted("outrigger_placements_total{target=\"shed\"}"), 21);
    drop(place);
    node.accepts(one()).await;
    assert_eq!(node.admission.status().admitted_requests, 0, "a check takes no place");
}

#[tokio::test]
async fn a_full_node_sends_to_a_peer_with_room() {
    let node = Node::ready([peer(model(MODEL), false)]).await;
    let _place = node.fill();
    node.accepts(one()).await;
    assert_eq!(node.counted("outrigger_placements_total{target=\"shed\"}"), 0);
    assert_eq!(node.counted("outrigger_admission_rejections_total{reason=\"queued_requests\",step=\"entry\"}"), 0);
}

#[tokio::test]
async fn a_cluster_that_is_full_sheds() {
    let node = Node::ready([peer(model(MODEL), true)]).await;
    node.accepts(one()).await;
    let _place = node.fill();
    let refused = node.refusal(one()).await;
    assert!(refused.message.starts_with("Every node is busy"), "{}", refused.message);
    assert!(refused.retry_after.is_some());
    assert_eq!(node.counted("outrigger_placements_total{target=\"shed\"}"), 21);
    assert_eq!(node.counted("outrigger_admission_rejections_total"), 0, "no queue was asked");
}

/// A dispatch calls a peer that has just failed if no other is long enough for its prompt.
#[tokio::test]
async fn a_short_peer_that_is_full_does_not_hide_a_long_one_that_has_failed() {
    let short = ModelReport { max_model_len: 2, ..model("other") };
    let short = Peer { id: NodeId::new("short"), ..peer(short, true) };
    let long = peer(model("other"), false);
    let node = Node::ready([short, long.clone()]).await;
    let ledger = &node.router.peers.ledger;
    let (attempt, in_flight) = ledger.send(&long, 1, 3, now());
    ledger.failed(&long.id, attempt.expect("the first call"), FailureKind::PeerUnreachable, now(), 0);
    drop(in_flight);
    assert!(!ledger.standing(&long, now()).allows);
    (0..20).for_each(|_| node.router.check_room("other", TOKENIZER, one()).expect("the long one may have room"));
    node.dispatch_to("other", one()).await.expect("the long one is called");
}

/// A deadline that has passed is the reason, although all peers are full as well.
#[tokio::test]
async fn a_node_that_starts_looks_at_the_deadline_first() {
    let node = Node::starting([peer(model(MODEL), true)]);
    assert_eq!(node.refusal(Demand::least(1, 0, Some(now()))).await.kind, FailureKind::DeadlineExceeded);
}

#[tokio::test]
async fn a_peer_with_another_model_is_no_help_and_this_nodes_load_no_hindrance() {
    let tokenizer = ModelReport { tokenizer: "words".into(), ..model(MODEL) };
    for other in [model("other"), tokenizer] {
        let node = Node::ready([peer(other, false)]).await;
        let _place = node.fill();
        assert!(node.refusal(one()).await.message.contains("max_num_queued_requests"));
    }
    let node = Node::ready([peer(model("other"), false)]).await;
    let _place = node.fill();
    node.router.check_room("other", TOKENIZER, one()).expect("the peer has room");
    let node = Node::ready([peer(model("other"), true)]).await;
    let refused = node.router.check_room("other", TOKENIZER, one()).expect_err("this node's room is for its own model");
    assert_eq!(refused.kind, FailureKind::Overloaded);
}

/// Nobody can serve the request yet, so it is held later. What would not be held then is not held now.
#[tokio::test]
async fn a_node_that_starts_holds_requests_unless_the_others_are_full() {
    let node = Node::starting([]);
    node.check(one()).expect("a replica may come");
    let node = Node::starting([peer(model("other"), false)]);
    node.check(one()).expect("a replica may come");
    let node = Node::starting([peer(model(MODEL), false)]);
    node.accepts(one()).await;
    let node = Node::starting([peer(model(MODEL), true)]);
    assert_eq!(node.refusal(one()).await.kind, FailureKind::Overloaded);
}

#[tokio::test]
async fn a_node_that_leaves_serves_only_what_nobody_else_takes() {
    let leaving = async |peers: Option<Peer>| {
        let node = Node::ready(peers).await;
        node.health.lifecycle().drain("a test").expect("a step of the diagram");
        node.router.leave();
        node
    };
    for peers in [None, Some(peer(model(MODEL), true))] {
        let node = leaving(peers).await;
        node.accepts(one()).await;
        let _place = node.fill();
        assert_eq!(node.refusal(one()).await.kind, FailureKind::Overloaded);
    }
    let node = leaving(Some(peer(model(MODEL), false))).await;
    let _place = node.fill();
    node.accepts(one()).await;
    node.router.stop_computing();
    node.accepts(one()).await;
    node.router.cut();
    assert_eq!(node.refusal(one()).await.code, Some("shutting_down"));

    let node = leaving(None).await;
    node.admission.close();
    assert_eq!(node.refusal(one()).await.code, Some("shutting_down"));
    let node = leaving(None).await;
    node.router.stop_computing();
    assert_eq!(node.refusal(one()).await.code, Some("shutting_down"));
}

/// This node refuses a deadline where a peer may be drawn that does not know it yet.
#[tokio::test]
async fn a_deadline_is_refused_here_only_if_no_peer_can_be_chosen() {
    let passed = Demand::least(1, 0, Some(now()));
    let node = Node::ready([]).await;
    assert_eq!(node.refusal(passed).await.kind, FailureKind::DeadlineExceeded);
    let node = Node::ready([peer(model(MODEL), false)]).await;
    (0..20).for_each(|_| node.check(passed).expect("the peer decides"));
    let node = Node::ready([peer(model(MODEL), true)]).await;
    assert_eq!(node.refusal(passed).await.kind, FailureKind::DeadlineExceeded);
}
