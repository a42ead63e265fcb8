//! Nodes that are neither healthy nor dead: one whose engine's steps take twenty times as long, and one that is cut off from
//! all others.
//!
//! Unlike the random plans of `main`, each run here has one known fault, so the tests can check more: how soon the other nodes
//! detect it, how long clients wait, that no stream moves when all nodes are slow, and that the node is used again once it has
//! recovered.

use std::sync::Arc;
use std::time::Duration;

use outrigger::admission;
use outrigger::app::life::Bounds;
use outrigger::router::{self, Strategy};
use outrigger::types::{Extensions, NodeState, SamplingParams};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::client::Client;
use crate::engine::EngineSize;
use crate::gossip::Gossip;
use crate::node::{Node, NodeConfig};
use crate::oracle::Reference;
use crate::plan::{ClientPlan, Fault, prompt};
use crate::random::Random;
use crate::run::within_a_runtime;
use crate::trace::Trace;
use crate::world::World;

const NODES: usize = 3;
const SLOWNESS: u64 = 20;
const STEP: Duration = Duration::from_millis(10);
const TOKENS: u32 = 60;

const SLOW_AT: Duration = Duration::from_secs(8);
const RELIEVED_AT: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(30);

/// The fault of a run, from `SLOW_AT` to `RELIEVED_AT`.
#[derive(Clone, Copy)]
enum Trouble {
    /// These nodes are slow.
    Slow(&'static [usize]),
    /// The first node is cut off from the others.
    CutOff,
}

/// The observations of a run.
struct Told {
    /// When each client started, and how long it took.
    clients: Vec<(Duration, Duration)>,
    /// The state of the cluster, ten times a second.
    looks: Vec<Look>,
    rescued: u64,
    failovers: u64,
}

struct Look {
    at: Duration,
    states: Vec<NodeState>,
    /// The weights that the first node gives to the others.
    weights: Vec<f64>,
    /// The number of running sequences in each node's engine.
    running: Vec<u32>,
}

fn config(placement: Strategy) -> NodeConfig {
    NodeConfig {
        router: router::Config { placement, ..router::Config::default() },
        admission: admission::Config::default(),
        engine: EngineSize { seats: 8, batched_tokens: 64, blocks: 400, step: STEP, depth: 1 },
        zones: 1,
        bounds: Bounds {
            shutdown_timeout: Duration::from_secs(2),
            relay_timeout: Duration::from_secs(60),
            drain_linger: Duration::ZERO,
            failure_linger: Duration::ZERO,
        },
        devices: 0,
    }
}

/// Runs a cluster with the fault, and a new client after each interval `every`.
fn tell(placement: Strategy, seed: u64, every: Duration, trouble: Trouble) -> Told {
    within_a_runtime(async move {
        let mut random = Random::new(seed);
        let (trace, start) = (Arc::new(Trace::new(false)), Instant::now());
        let world = World::new(NODES, config(placement), random.fork(), trace);
        tokio::spawn(world.clone().gossip(Gossip::new(Duration::from_secs(2), random.fork())));
        let mut clients = JoinSet::new();
        let times = Arc::new(Mutex::new(Vec::new()));
        let count = (END - Duration::from_secs(2)).as_millis() / every.as_millis();
        for index in 0..count as usize {
            let at = Duration::from_secs(2) + every * index as u32;
            let plan = plan(index, &mut random);
            let client = Client::new(index, plan.clone(), Arc::new(Reference::of(&plan)), world.clone(), random.fork());
            let times = times.clone();
            clients.spawn(async move {
                sleep_until(start + at).await;
                let begin = Instant::now();
                let served = client.run().await;
                times.lock().push((at, begin.elapsed()));
                served
            });
        }
        tokio::spawn({
            let world = world.clone();
            async move {
                sleep_until(start + SLOW_AT).await;
                match trouble {
                    Trouble::CutOff => {
                        let lasts = RELIEVED_AT - SLOW_AT;
                        world.suffer(Fault::Partition { members: vec![0], lasts }).await;
                    }
                    Trouble::Slow(nodes) => {
                        nodes.iter().for_each(|node| world.set_slowness(*node, SLOWNESS));
                        sleep_until(start + RELIEVED_AT).await;
                        nodes.iter().for_each(|node| world.set_slowness(*node, 1));
                    }
                }
            }
        });
        let mut looks = Vec::new();
        while start.elapsed() < END {
            sleep(Duration::from_millis(100)).await;
            let nodes: Vec<Node> = world.nodes().into_iter().flatten().collect();
            looks.push(Look {
                at: start.elapsed(),
                states: nodes.iter().map(|node| node.router.report().state).collect(),
                weights: nodes[0].router.overview().peers.iter().map(|peer| peer.weight).collect(),
                running: nodes.iter().map(|node| node.router.report().running).collect(),
            });
        }
        while let Some(client) = clients.join_next().await {
            client.expect("no panic").unwrap_or_else(|violation| panic!("{placement:?}: {}", violation.0));
        }
        world.come_to_rest(Duration::from_secs(5)).await.unwrap_or_else(|violation| panic!("{}", violation.0));
        let tally = world.tally();
        let clients = std::mem::take(&mut *times.lock());
        Told { clients, looks, rescued: tally.rescued, failovers: tally.failovers }
    })
}

/// A client's plan. All streams have the same number of tokens.
fn plan(index: usize, random: &mut Random) -> ClientPlan {
    ClientPlan {
        starts_at: Duration::ZERO,
        request: index,
        is_keyed: false,
        prompt: prompt(random),
        sampling: Arc::new(SamplingParams {
            seed: random.next(),
            max_tokens: TOKENS,
            temperature: 1.0,
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        extensions: Extensions::default(),
        deadline: None,
        strategy: None,
        hang_ups: Vec::new(),
        patience: Duration::from_secs(60),
    }
}

impl Told {
    /// The percentile of the durations of the clients that started in this interval.
    fn percentile(&self, percent: usize, from: Duration, to: Duration) -> Duration {
        let came = self.clients.iter().filter(|(at, _)| (from..to).contains(at));
        let mut times: Vec<Duration> = came.map(|(_, time)| *time).collect();
        times.sort_unstable();
        times[(times.len() * percent / 100).min(times.len() - 1)]
    }

    fn look(&self, at: Duration) -> &Look {
        self.looks.iter().find(|look| look.at >= at).expect("the run is long enough")
    }

    /// How often a node changed its state after the start.
    fn changes(&self, node: usize) -> usize {
        let settled: Vec<NodeState> =
            self.looks.iter().filter(|look| look.at > Duration::from_secs(2)).map(|look| look.states[node]).collect();
        settled.windows(2).filter(|pair| pair[0] != pair[1]).count()
    }
}

#[test]
fn clients_hardly_notice_a_slow_node_whatever_the_placement() {
    for (seed, placement) in Strategy::ALL.into_iter().enumerate() {
        let told = tell(placement, seed as u64 + 1, Duration::from_millis(60), Trouble::Slow(&[1]));
        let healthy = told.percentile(95, Duration::from_secs(3), Duration::from_secs(7));
        // Clients that started shortly before the fault had most of their stream ahead of them.
        let troubled = told.percentile(95, SLOW_AT - healthy, RELIEVED_AT);
        assert!(troubled <= healthy * 2, "{placement:?}: p95 {troubled:?} instead of {healthy:?}");
        let worst = told.percentile(100, SLOW_AT - healthy, RELIEVED_AT);
        assert!(worst <= Duration::from_secs(4), "{placement:?}: the slowest client took {worst:?}");

        let warned = told.look(SLOW_AT + Duration::from_secs(2));
        assert_eq!(warned.states[1], NodeState::Degraded, "{placement:?}: within two seconds");
        assert!(warned.weights[0] < 0.1, "{placement:?}: {:?}", warned.weights);
        let relieved = told.look(SLOW_AT + Duration::from_secs(4));
        assert_eq!(relieved.running[1], 0, "{placement:?}: its streams have moved");
        let recovered = told.look(RELIEVED_AT + Duration::from_secs(5));
        assert_eq!(recovered.states[1], NodeState::Ready, "{placement:?}: within five seconds");
        assert!(recovered.weights[0] > 0.9, "{placement:?}: {:?}", recovered.weights);
        assert_eq!([0, 1, 2].map(|node| told.changes(node)), [0, 2, 0], "{placement:?}: the number of state changes");
        assert!(told.rescued > 0 || placement == Strategy::PrefixCache, "{placement:?}: no stream was moved");
        assert_eq!(told.failovers, 0, "{placement:?}: nothing has failed");
    }
}

#[test]
fn nothing_moves_when_all_nodes_are_equally_slow() {
    for (seed, placement) in Strategy::ALL.into_iter().enumerate() {
        let told = tell(placement, seed as u64 + 100, Duration::from_millis(900), Trouble::Slow(&[0, 1, 2]));
        assert_eq!((told.rescued, told.failovers), (0, 0), "{placement:?}");
        assert_eq!(
            [0, 1, 2].map(|node| told.changes(node)),
            [0, 0, 0],
            "{placement:?}: no node is slower than another"
        );
        let slowest = told.percentile(100, SLOW_AT, RELIEVED_AT);
        assert!(slowest > Duration::from_secs(5), "{placement:?}: the nodes were not slow: {slowest:?}");
    }
}

/// The streams of its clients continue at the node itself: after one stall timeout for the silent replica, without a second one
/// for the next replica.
#[test]
fn a_node_that_is_cut_off_from_all_others_soon_computes_its_clients_streams_itself() {
    let stall = router::Config::default().peer_stall_timeout;
    for (seed, placement) in Strategy::ALL.into_iter().enumerate() {
        let told = tell(placement, seed as u64 + 200, Duration::from_millis(60), Trouble::CutOff);
        let healthy = told.percentile(95, Duration::from_secs(3), Duration::from_secs(7));
        let slowest = told.percentile(100, SLOW_AT - healthy, RELIEVED_AT);
        assert!(slowest <= healthy * 2 + stall * 3 / 2, "{placement:?}: {slowest:?}, {healthy:?} undisturbed");
        // Some strategies compute every request where it arrives, so that no stream depends on another node.
        assert!(slowest > stall || placement != Strategy::Random, "no stream lost its replica");
    }
}
