//! Derives from a seed the plan of a run: the cluster, its clients, and the faults with their times.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use outrigger::admission;
use outrigger::app::life::Bounds;
use outrigger::router::{self, Strategy};
use outrigger::types::{CacheSalt, Envelope, Extensions, RequestId, SamplingParams, TokenId, TraceContext};

use crate::engine::{EngineSize, VOCABULARY};
use crate::node::{MODEL, NodeConfig, TOKENIZER};
use crate::random::Random;

/// No fault happens after this time.
pub const PEACE: Duration = Duration::from_secs(16);

pub struct Plan {
    pub nodes: usize,
    pub config: NodeConfig,
    /// Gossip considers a node dead after this time without reports.
    pub detection: Duration,
    pub clients: Vec<ClientPlan>,
    /// The faults and their times, in order of time.
    pub faults: Vec<(Duration, Fault)>,
    /// Whether the run waits at the end until all journals must have expired. Only some runs do.
    pub outlives_journals: bool,
}

/// A client's request, and how the client behaves.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    pub starts_at: Duration,
    /// Index of the request; twins share it.
    pub request: usize,
    /// Whether the client sends its own idempotency key. Otherwise the server names the stream.
    pub is_keyed: bool,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    pub extensions: Extensions,
    pub deadline: Option<Duration>,
    pub strategy: Option<Strategy>,
    /// After how many tokens the client hangs up, and for how long.
    pub hang_ups: Vec<(usize, Duration)>,
    /// The client gives up a server that is silent for this long.
    pub patience: Duration,
}

impl ClientPlan {
    /// The request, without a name and a deadline.
    pub fn envelope(&self, id: RequestId) -> Envelope {
        Envelope {
            model: MODEL.into(),
            tokenizer: TOKENIZER.into(),
            extensions: self.extensions,
            trace: Some(trace(&self.prompt, self.sampling.seed)),
            ..Envelope::new(id, self.prompt.clone(), (*self.sampling).clone())
        }
    }
}

/// The trace of a request, which every node that works on it has to know.
pub fn trace(prompt: &[TokenId], seed: u64) -> TraceContext {
    let mut hasher = DefaultHasher::new();
    (prompt, seed).hash(&mut hasher);
    let digest = hasher.finish().max(1).to_le_bytes();
    let id: [u8; 16] = std::array::from_fn(|index| digest[index % 8]);
    TraceContext::begin(id, digest).expect("not zero")
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// Kills the process, and its machine if `with_machine`. A new process starts after `back_after`.
    Kill {
        node: usize,
        with_machine: bool,
        back_after: Duration,
    },
    /// Pauses the process.
    Pause {
        node: usize,
        lasts: Duration,
    },
    /// Cuts the link from one node to another, and the way back if `both_ways`.
    Cut {
        from: usize,
        to: usize,
        both_ways: bool,
        lasts: Duration,
    },
    /// Cuts all links between the members and the other nodes.
    Partition {
        members: Vec<usize>,
        lasts: Duration,
    },
    /// Breaks the connections between two nodes.
    Reset {
        a: usize,
        b: usize,
    },
    Slow {
        node: usize,
        times: u64,
        lasts: Duration,
    },
    /// Stops the engine for a while; the rest of the process continues.
    Hang {
        node: usize,
        lasts: Duration,
    },
    Nan {
        node: usize,
        lasts: Duration,
    },
    OutOfMemory {
        node: usize,
        lasts: Duration,
    },
    /// Crashes the engine; the process lives until its streams have ended.
    Crash {
        node: usize,
    },
    /// Shuts the process down and starts another.
    Restart {
        node: usize,
    },
    /// Restarts two nodes at the same time.
    RestartTwo {
        one: usize,
        other: usize,
    },
    /// Restarts all nodes, one after another.
    RollingRestart,
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let nodes = *random.pick(&[2, 3, 3, 3, 4, 5]);
        let config = config(&mut random.fork());
        let detection = random.millis(1000, 4000);
        let faults = faults(nodes, &mut random.fork());
        let mut clients_random = random.fork();
        let num_requests = clients_random.between(2, 9) as usize;
        let mut clients: Vec<_> =
            (0..num_requests).flat_map(|request| clients(request, &faults, &mut clients_random)).collect();
        clients.extend((num_requests..num_requests + 2).map(|request| latecomer(request, &mut clients_random)));
        Self { nodes, config, detection, clients, faults, outlives_journals: random.percent(15) }
    }
}

fn config(random: &mut Random) -> NodeConfig {
    let is_tight = random.percent(20);
    let engine = EngineSize {
        seats: random.between(2, 6) as usize,
        batched_tokens: random.between(8, 40) as usize,
        blocks: random.between(60, 160) as u32,
        step: random.millis(8, 70),
        depth: 1,
    };
    let router = router::Config {
        placement: if random.percent(50) { Strategy::Balanced } else { *random.pick(&Strategy::ALL) },
        peer_stall_timeout: random.millis(500, 2000),
        journal_ttl: Duration::from_secs(40),
        journal_memory: if random.percent(10) { 6 << 10 } else { 64 << 20 },
        ..router::Config::default()
    };
    let queue = if is_tight { random.between(1, 3) as u32 } else { 512 };
    let admission = admission::Config { max_num_queued_requests: queue, ..admission::Config::default() };
    let zones = random.between(1, 2) as usize;
    let is_patient = random.percent(50);
    let bounds = Bounds {
        shutdown_timeout: if is_patient { random.millis(4000, 9000) } else { random.millis(300, 4000) },
        // Longer than any stream takes at a healthy replica, so a stream is interrupted only if there is no replica.
        relay_timeout: Duration::from_secs(60),
        drain_linger: random.millis(0, 1500),
        failure_linger: random.millis(0, 1500),
    };
    NodeConfig { router, admission, engine, zones, bounds, devices: random.between(0, 31) }
}

/// One client, or twins with the same key and body.
fn clients(request: usize, faults: &[(Duration, Fault)], random: &mut Random) -> Vec<ClientPlan> {
    let is_keyed = random.percent(60);
    let twins = if is_keyed && random.percent(25) { random.between(2, 3) } else { 1 };
    let extensions = extensions(random);
    let first = ClientPlan {
        starts_at: starts_at(faults, random),
        request,
        is_keyed,
        prompt: prompt(random),
        sampling: Arc::new(sampling(&extensions, random)),
        extensions,
        // Twins may start at different times, but the stream that they share has one deadline, so they have none.
        deadline: (twins == 1 && random.percent(8)).then(|| random.millis(300, 12_000)),
        strategy: random.percent(15).then(|| *random.pick(&Strategy::ALL)),
        hang_ups: Vec::new(),
        patience: Duration::ZERO,
    };
    let client = |_| ClientPlan {
        starts_at: first.starts_at + if random.percent(50) { Duration::ZERO } else { random.millis(0, 2500) },
        hang_ups: hang_ups(random),
        patience: random.millis(2500, 9000),
        ..first.clone()
    };
    (0..twins).map(client).collect()
}

/// The start of a client, mostly shortly before a fault.
fn starts_at(faults: &[(Duration, Fault)], random: &mut Random) -> Duration {
    match faults.is_empty() || random.percent(30) {
        true => random.millis(1500, 10_000),
        false => random.pick(faults).0.saturating_sub(random.millis(0, 1200)).max(Duration::from_millis(800)),
    }
}

/// A client that starts when there has been no fault for a while.
fn latecomer(request: usize, random: &mut Random) -> ClientPlan {
    let extensions = extensions(random);
    ClientPlan {
        starts_at: PEACE + random.millis(10_000, 11_000),
        request,
        is_keyed: random.percent(50),
        prompt: prompt(random),
        sampling: Arc::new(sampling(&extensions, random)),
        extensions,
        deadline: None,
        strategy: None,
        hang_ups: Vec::new(),
        patience: Duration::from_secs(5),
    }
}

fn hang_ups(random: &mut Random) -> Vec<(usize, Duration)> {
    let count = *random.pick(&[0, 0, 0, 1, 1, 2]);
    let mut hang_ups: Vec<_> = (0..count).map(|_| (random.index(40), random.millis(1, 4000))).collect();
    hang_ups.sort_unstable();
    hang_ups
}

/// A random prompt. Some prompts share a prefix.
pub fn prompt(random: &mut Random) -> Arc<[TokenId]> {
    let common = if random.percent(40) { *random.pick(&[4, 16, 21]) } else { 0 };
    let own = random.between(1, 24);
    let beginning = (0..common).map(|index| (index * 5 + 1) % VOCABULARY);
    let rest: Vec<TokenId> = (0..own).map(|_| (random.next() % u64::from(VOCABULARY)) as TokenId).collect();
    beginning.chain(rest).collect()
}

fn extensions(random: &mut Random) -> Extensions {
    Extensions {
        cache_salt: random.percent(25).then(|| CacheSalt::new([random.index(2) as u8; 16])),
        prompt_logprobs: random.percent(25).then(|| random.between(0, 3) as u32),
    }
}

fn sampling(extensions: &Extensions, random: &mut Random) -> SamplingParams {
    // A request for prompt log-probabilities often generates nothing.
    let generates_nothing = random.percent(if extensions.prompt_logprobs.is_some() { 30 } else { 2 });
    let is_greedy = random.percent(25);
    let is_penalised = random.percent(30);
    let letters = |random: &mut Random| char::from(b'a' + random.index(26) as u8).to_string();
    let stop = if random.percent(25) { vec![letters(random) + &letters(random), letters(random)] } else { Vec::new() };
    SamplingParams {
        n: *random.pick(&[1, 1, 1, 1, 2, 3]),
        seed: random.next(),
        max_tokens: if generates_nothing { 0 } else { random.between(1, 48) as u32 },
        min_tokens: if random.percent(20) { random.between(0, 10) as u32 } else { 0 },
        temperature: if is_greedy { 0.0 } else { 0.7 + random.index(10) as f32 / 10.0 },
        top_k: if random.percent(20) { 8 } else { 0 },
        top_p: if random.percent(30) { 0.9 } else { 1.0 },
        min_p: if random.percent(10) { 0.05 } else { 0.0 },
        repetition_penalty: if is_penalised { 1.2 } else { 1.0 },
        presence_penalty: if is_penalised { 0.4 } else { 0.0 },
        frequency_penalty: if is_penalised && random.percent(50) { 0.3 } else { 0.0 },
        logit_bias: if random.percent(10) { vec![(3, 2.0), (9, -4.0)] } else { Vec::new() },
        ignore_eos: random.percent(50),
        stop,
        stop_token_ids: if random.percent(10) { vec![7] } else { Vec::new() },
        logprobs: random.percent(35).then(|| random.between(0, 3) as u32),
        ..SamplingParams::default()
    }
}

fn faults(nodes: usize, random: &mut Random) -> Vec<(Duration, Fault)> {
    let latest = PEACE.as_millis() as u64 - 4000;
    // In most runs one node is spared, so that there is always a replica.
    let spared = random.percent(75).then(|| random.index(nodes));
    let mut faults: Vec<_> =
        (0..random.between(0, 9)).map(|_| (random.millis(1200, latest), fault(nodes, spared, random))).collect();
    if random.percent(15) {
        faults.retain(|_| random.percent(30));
        faults.push((random.millis(1500, 4000), Fault::RollingRestart));
    }
    faults.sort_by_key(|(at, _)| *at);
    faults
}

fn fault(nodes: usize, spared: Option<usize>, random: &mut Random) -> Fault {
    let node = match random.index(nodes) {
        node if Some(node) == spared => (node + 1) % nodes,
        node => node,
    };
    let other = (node + 1 + random.index(nodes - 1)) % nodes;
    let lasts = random.millis(100, 6000);
    match random.next() % 100 {
        0..20 => Fault::Kill { node, with_machine: random.percent(30), back_after: random.millis(300, 6000) },
        20..33 => Fault::Pause { node, lasts },
        33..42 => Fault::Cut { from: node, to: other, both_ways: random.percent(50), lasts },
        42..48 => {
            let members = (0..nodes).filter(|member| *member == node || random.percent(30)).collect();
            Fault::Partition { members, lasts }
        }
        48..55 => Fault::Reset { a: node, b: other },
        55..60 => Fault::Slow { node, times: random.between(3, 30), lasts },
        60..68 => Fault::Hang { node, lasts },
        68..75 => Fault::Nan { node, lasts },
        75..80 => Fault::OutOfMemory { node, lasts: lasts / 2 },
        80..86 => Fault::Crash { node },
        86..90 => Fault::RestartTwo { one: node, other },
        _ => Fault::Restart { node },
    }
}
