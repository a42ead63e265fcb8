//! The simulated world: the live nodes, the current faults, and when the last ones ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use outrigger::cluster::PeerService;
use outrigger::types::JournalKey;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::gossip::Gossip;
use crate::net::{Net, Process};
use crate::node::{Node, NodeConfig};
use crate::oracle::{Reference, Violation};
use crate::plan::Fault;
use crate::random::Random;
use crate::run::Outcome;
use crate::trace::Trace;

const GOSSIP_INTERVAL: Duration = Duration::from_millis(250);
/// The journals are checked once in this many gossip rounds.
const ROUNDS_PER_CHECK: u32 = 3;
/// Once a replica has been healthy and reachable for this long, no request may be refused.
const SETTLED: Duration = Duration::from_secs(6);

pub struct World {
    pub trace: Arc<Trace>,
    pub net: Arc<Net>,
    config: NodeConfig,
    nodes: Mutex<Vec<Option<Node>>>,
    weather: Mutex<Weather>,
    random: Mutex<Random>,
    /// The sum of the counts of processes that have died.
    tally: Mutex<Outcome>,
    /// The reference of every stream, by its key.
    references: Mutex<BTreeMap<JournalKey, Arc<Reference>>>,
}

/// The faults: which are active, and when each node or link last had one.
struct Weather {
    incarnations: u64,
    /// For each node, the number of active faults.
    troubles: Vec<u32>,
    /// For each node, when it last could not compute for others.
    unfit: Vec<Instant>,
    /// For each node, when its process was last paused.
    paused: Vec<Instant>,
    /// When each link (sender, receiver) was last cut.
    broken_links: BTreeMap<(usize, usize), Instant>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.net.close();
    }
}

impl World {
    pub fn new(nodes: usize, config: NodeConfig, mut random: Random, trace: Arc<Trace>) -> Arc<Self> {
        let now = Instant::now();
        let weather = Weather {
            incarnations: 0,
            troubles: vec![0; nodes],
            unfit: vec![now; nodes],
            paused: vec![now; nodes],
            broken_links: BTreeMap::new(),
        };
        let world = Arc::new(Self {
            net: Net::new(config.keeps_all_journals(), random.fork(), trace.clone()),
            trace,
            config,
            nodes: Mutex::new(vec![None; nodes]),
            weather: Mutex::new(weather),
            random: Mutex::new(random),
            tally: Mutex::default(),
            references: Mutex::default(),
        });
        (0..nodes).for_each(|node| world.start(node));
        world
    }

    pub fn nodes(&self) -> Vec<Option<Node>> {
        self.nodes.lock().clone()
    }

    fn node(&self, node: usize) -> Option<Node> {
        self.nodes.lock()[node].clone()
    }

    /// A random node for a client to ask. Not the avoided one if there is another.
    pub fn some_node(&self, avoided: Option<usize>, random: &mut Random) -> Option<Node> {
        let nodes: Vec<Node> = self.nodes().into_iter().flatten().collect();
        let others: Vec<&Node> = nodes.iter().filter(|node| Some(node.process.node) != avoided).collect();
        if others.is_empty() { nodes.first().cloned() } else { Some((*random.pick(&others)).clone()) }
    }

    /// Whether a request at this node must be served: the node has not been paused, and a healthy replica has been reachable
    /// from it, for at least `SETTLED`. The node itself may have just started.
    pub fn could_serve(&self, entry: &Node) -> bool {
        let (weather, own) = (self.weather.lock(), entry.process.node);
        let is_settled = |since: &Instant| since.elapsed() >= SETTLED;
        let reaches = |to| {
            to == own || [(own, to), (to, own)].iter().all(|link| weather.broken_links.get(link).is_none_or(is_settled))
        };
        let mut replicas = weather.unfit.iter().enumerate();
        is_settled(&weather.paused[own]) && replicas.any(|(node, since)| is_settled(since) && reaches(node))
    }

    /// Whether there was a fault after this time or shortly before it.
    pub fn had_trouble_since(&self, since: Instant) -> bool {
        if !self.config.keeps_all_journals() {
            return true;
        }
        let weather = self.weather.lock();
        let mut troubles = weather.unfit.iter().chain(weather.broken_links.values());
        troubles.any(|trouble| *trouble + SETTLED >= since)
    }

    pub fn remember(&self, key: JournalKey, reference: Arc<Reference>) {
        self.references.lock().insert(key, reference);
    }

    /// Asserts that the journals agree with the references and stay within their memory limit.
    fn check_journals(&self, nodes: &[Option<Node>]) {
        let limit = self.config.router.journal_memory;
        for node in nodes.iter().flatten() {
            let bytes = node.router.overview().streams.journal_bytes;
            assert!(bytes <= limit, "n{} keeps {bytes} bytes of journals, of at most {limit}", node.process.node);
            let contradictions = node.metrics.stream_contradictions.get();
            assert_eq!(contradictions, 0, "n{} has seen replicas contradict each other", node.process.node);
        }
        for (key, reference) in self.references.lock().iter() {
            for node in nodes.iter().flatten() {
                let record = node.router.lookup(*key);
                if let Some(lie) = record.and_then(|record| reference.contradiction(&record)) {
                    panic!("n{} keeps a false journal of {key:?}: {lie}", node.process.node);
                }
            }
        }
    }

    pub fn has_tight_queues(&self) -> bool {
        self.config.admission.max_num_queued_requests < 100
    }

    /// Runs gossip rounds forever, checks the journals, and records which nodes and links have faults.
    pub async fn gossip(self: Arc<Self>, mut gossip: Gossip) {
        let mut ticks = interval(GOSSIP_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rounds = 0;
        loop {
            ticks.tick().await;
            let nodes = self.nodes();
            gossip.round(&nodes, &self.net);
            rounds += 1;
            if rounds % ROUNDS_PER_CHECK == 0 {
                self.check_journals(&nodes);
            }
            let mut weather = self.weather.lock();
            for (index, node) in nodes.iter().enumerate() {
                let is_paused = self.net.is_paused(index);
                let is_ready = node.as_ref().is_some_and(|node| node.router.report().ready);
                if is_paused {
                    weather.paused[index] = Instant::now();
                }
                if is_paused || !is_ready || weather.troubles[index] > 0 {
                    weather.unfit[index] = Instant::now();
                }
                for to in (0..nodes.len()).filter(|to| self.net.is_cut(index, *to)) {
                    weather.broken_links.insert((index, to), Instant::now());
                }
            }
        }
    }

    /// Starts the node's next process, unless one is running.
    fn start(self: &Arc<Self>, node: usize) {
        if self.node(node).is_some() {
            return;
        }
        let incarnation = {
            let mut weather = self.weather.lock();
            weather.incarnations += 1;
            weather.unfit[node] = Instant::now();
            weather.incarnations
        };
        let (seed, loading) = {
            let mut random = self.random.lock();
            (random.next(), random.millis(50, 800))
        };
        self.trace.note(format_args!("n{node} starts as {incarnation}"));
        let process = Process { node, incarnation };
        let started = Node::start(process, &self.config, &self.net, seed, loading);
        self.nodes.lock()[node] = Some(started.clone());
        // When the process exits by itself, another one is started, as a supervisor would do.
        let world = self.clone();
        tokio::spawn(async move {
            let death = started.death.clone();
            if death.run_until_cancelled(started.ended()).await.is_some() {
                world.replace(&started).await;
            }
        });
    }

    /// Kills the process, if it is still running.
    fn kill(&self, node: &Node, with_machine: bool) {
        let index = node.process.node;
        let mut nodes = self.nodes.lock();
        if nodes[index].as_ref().is_some_and(|current| current.process == node.process) {
            self.trace.note(format_args!("n{index} dies{}", if with_machine { " with its machine" } else { "" }));
            nodes[index] = None;
            drop(nodes);
            self.tally.lock().add(Outcome::of(node));
            self.net.leave(&node.process, with_machine);
            self.net.pause(index, false);
            node.death.cancel();
        }
    }

    fn begin_trouble(&self, node: usize) {
        let mut weather = self.weather.lock();
        weather.troubles[node] += 1;
        weather.unfit[node] = Instant::now();
    }

    fn end_trouble(&self, node: usize) {
        let mut weather = self.weather.lock();
        weather.troubles[node] -= 1;
        weather.unfit[node] = Instant::now();
    }

    fn cut(&self, from: usize, to: usize, is_cut: bool) {
        self.net.cut(from, to, is_cut);
        self.weather.lock().broken_links.insert((from, to), Instant::now());
    }

    /// Causes the fault, and ends it after its duration.
    pub async fn suffer(self: Arc<Self>, fault: Fault) {
        self.trace.note(format_args!("{fault:?}"));
        match fault {
            Fault::Kill { node, with_machine, back_after } => {
                if let Some(process) = self.node(node) {
                    self.begin_trouble(node);
                    self.kill(&process, with_machine);
                    sleep(back_after).await;
                    self.start(node);
                    self.end_trouble(node);
                }
            }
            Fault::Pause { node, lasts } => self.pause(node, lasts).await,
            Fault::Cut { from, to, both_ways, lasts } => {
                let links = if both_ways { vec![(from, to), (to, from)] } else { vec![(from, to)] };
                self.cut_links(links, lasts).await;
            }
            Fault::Partition { members, lasts } => {
                let others = (0..self.nodes.lock().len()).filter(|node| !members.contains(node));
                let links = others.flat_map(|other| members.iter().flat_map(move |&one| [(one, other), (other, one)]));
                self.cut_links(links.collect(), lasts).await;
            }
            Fault::Reset { a, b } => {
                self.net.reset(a, b);
                self.weather.lock().broken_links.extend([((a, b), Instant::now()), ((b, a), Instant::now())]);
            }
            Fault::Slow { node, times, lasts } => {
                self.harm(node, lasts, |node, harmed| node.engine.set_slowness(if harmed { times } else { 1 })).await;
            }
            Fault::Hang { node, lasts } => self.harm(node, lasts, |node, harmed| node.engine.stand_still(harmed)).await,
            Fault::Nan { node, lasts } => self.lie(node, lasts).await,
            Fault::OutOfMemory { node, lasts } => {
                self.harm(node, lasts, |node, harmed| node.engine.lack_memory(harmed)).await;
            }
            Fault::Crash { node } => self.crash(node).await,
            Fault::Restart { node } => self.restart(node).await,
            Fault::RestartTwo { one, other } => {
                tokio::join!(self.restart(one), self.restart(other));
            }
            Fault::RollingRestart => {
                let nodes = self.nodes.lock().len();
                for node in 0..nodes {
                    self.restart(node).await;
                    sleep(Duration::from_millis(1500)).await;
                }
            }
        }
    }

    /// Sets how many times as long as usual the steps of the node's engine take.
    pub fn set_slowness(&self, node: usize, times: u64) {
        self.trace.note(format_args!("n{node} takes {times} times as long"));
        self.node(node).inspect(|process| process.engine.set_slowness(times));
    }

    async fn harm(&self, node: usize, lasts: Duration, harm: impl Fn(&Node, bool)) {
        if let Some(process) = self.node(node) {
            self.begin_trouble(node);
            harm(&process, true);
            sleep(lasts).await;
            harm(&process, false);
            self.trace.note(format_args!("n{node} is relieved"));
            self.end_trouble(node);
        }
    }

    /// Makes the node's engine return NaN. It does not recover, so after `lasts` the process is replaced.
    async fn lie(self: &Arc<Self>, node: usize, lasts: Duration) {
        let Some(process) = self.node(node) else { return };
        self.begin_trouble(node);
        process.engine.return_nan();
        sleep(lasts).await;
        self.replace(&process).await;
        self.end_trouble(node);
    }

    async fn pause(&self, node: usize, lasts: Duration) {
        let Some(process) = self.node(node) else { return };
        self.begin_trouble(node);
        self.net.pause(node, true);
        process.engine.stand_still(true);
        sleep(lasts).await;
        process.engine.stand_still(false);
        let is_current = self.node(node).is_some_and(|current| current.process == process.process);
        if is_current {
            self.net.pause(node, false);
        }
        self.weather.lock().paused[node] = Instant::now();
        self.trace.note(format_args!("n{node} resumes"));
        self.end_trouble(node);
    }

    async fn cut_links(&self, links: Vec<(usize, usize)>, lasts: Duration) {
        links.iter().for_each(|&(from, to)| self.cut(from, to, true));
        sleep(lasts).await;
        links.iter().for_each(|&(from, to)| self.cut(from, to, false));
        self.trace.note(format_args!("links {links:?} are whole again"));
    }

    async fn crash(&self, node: usize) {
        let Some(process) = self.node(node) else { return };
        self.begin_trouble(node);
        process.engine.crash();
        self.next_process(&process).await;
        self.end_trouble(node);
    }

    async fn restart(&self, node: usize) {
        let Some(process) = self.node(node) else { return };
        self.begin_trouble(node);
        self.trace.note(format_args!("n{node} is asked to end"));
        process.terminate();
        self.next_process(&process).await;
        self.end_trouble(node);
    }

    /// Returns once another process has replaced this one.
    async fn next_process(&self, process: &Node) {
        process.death.cancelled().await;
        while self.node(process.process.node).is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn replace(self: &Arc<Self>, process: &Node) {
        let node = process.process.node;
        self.kill(process, false);
        let time = self.random.lock().millis(100, 1000);
        sleep(time).await;
        self.start(node);
    }

    /// Ends all network faults and pauses, and starts all nodes that are down.
    pub fn make_peace(self: &Arc<Self>) {
        self.trace.note(format_args!("peace"));
        self.net.heal();
        (0..self.nodes().len()).for_each(|node| self.start(node));
    }

    /// The sum of all nodes' counts, including those of dead processes.
    pub fn tally(&self) -> Outcome {
        let mut tally = *self.tally.lock();
        self.nodes().iter().flatten().for_each(|node| tally.add(Outcome::of(node)));
        tally
    }

    /// Waits, after the last client is gone, until no node holds resources for streams. It is an error if one still does after
    /// `limit`.
    pub async fn come_to_rest(&self, limit: Duration) -> Result<(), Violation> {
        let deadline = Instant::now() + limit;
        loop {
            let leftovers: Vec<String> = self.nodes().iter().flatten().filter_map(Node::leftovers).collect();
            if leftovers.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Violation(format!("after all clients have gone, {}", leftovers.join("; "))));
            }
            sleep(Duration::from_millis(500)).await;
        }
    }
}
