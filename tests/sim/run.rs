//! Runs one seed from beginning to end.

use std::cell::RefCell;
use std::panic::PanicHookInfo;
use std::sync::{Arc, Once};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::client::Client;
use crate::gossip::Gossip;
use crate::node::Node;
use crate::oracle::{Reference, Violation};
use crate::plan::{PEACE, Plan};
use crate::random::Random;
use crate::trace::Trace;
use crate::world::World;

/// Time limit for all clients to receive their streams. Long after the last fault.
const CLIENTS_LIMIT: Duration = Duration::from_secs(180);
const REST_LIMIT: Duration = Duration::from_secs(40);

thread_local! {
    /// The first panic of the run on this thread. It is recorded here because a task's panic does not end the run.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static IS_RUNNING: RefCell<bool> = const { RefCell::new(false) };
}

/// What happened in a run. A run without faults that had an effect proves little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The digest of all events.
    pub digest: u64,
    /// Streams that continued at another replica, summed over all nodes.
    pub failovers: u64,
    pub hand_overs: u64,
    /// Streams that moved away from a slow replica.
    pub rescued: u64,
    pub resumed: u64,
    pub fenced: u64,
}

impl Outcome {
    pub fn of(node: &Node) -> Self {
        let streams = node.router.overview().streams;
        Self {
            digest: 0,
            failovers: streams.failovers_total(),
            hand_overs: streams.hand_overs,
            rescued: streams.rescued,
            resumed: streams.resumed,
            fenced: node.metrics.journal_fenced.get(),
        }
    }

    pub fn add(&mut self, other: Self) {
        self.failovers += other.failovers;
        self.hand_overs += other.hand_overs;
        self.rescued += other.rescued;
        self.resumed += other.resumed;
        self.fenced += other.fenced;
    }
}

/// Runs the seed. An error describes something that must not happen.
pub fn run(seed: u64, is_told: bool) -> Result<Outcome, Violation> {
    simulate(live(seed, is_told))
}

/// Runs on a simulated clock. A panic of any task is a violation.
pub fn simulate<T>(story: impl Future<Output = Result<T, Violation>>) -> Result<T, Violation> {
    catch_panics();
    PANIC.with_borrow_mut(|panic| *panic = None);
    IS_RUNNING.set(true);
    let result = within_a_runtime(story);
    IS_RUNNING.set(false);
    match PANIC.take() {
        Some(panic) => Err(Violation(panic)),
        None => result,
    }
}

/// Runs a story on a clock that advances when all tasks wait.
pub fn within_a_runtime<T>(story: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without input and output").block_on(story)
}

async fn live(seed: u64, is_told: bool) -> Result<Outcome, Violation> {
    let plan = Plan::new(seed);
    let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 1);
    let trace = Arc::new(Trace::new(is_told));
    trace.note(format_args!("{:?}", plan.config));
    let start = Instant::now();
    let world = World::new(plan.nodes, plan.config.clone(), random.fork(), trace.clone());
    tokio::spawn(world.clone().gossip(Gossip::new(plan.detection, random.fork())));
    let mut faults = JoinSet::new();
    for (at, fault) in plan.faults {
        let world = world.clone();
        faults.spawn(async move {
            sleep_until(start + at).await;
            world.suffer(fault).await;
        });
    }
    let mut clients = JoinSet::new();
    let mut reference: Option<(usize, Arc<Reference>)> = None;
    for (index, client) in plan.clients.into_iter().enumerate() {
        let known = reference.take().filter(|(request, _)| *request == client.request);
        let (_, computed) =
            reference.insert(known.unwrap_or_else(|| (client.request, Arc::new(Reference::of(&client)))));
        clients.spawn(Client::new(index, client, computed.clone(), world.clone(), random.fork()).run());
    }
    tokio::spawn({
        let world = world.clone();
        async move {
            sleep_until(start + PEACE).await;
            world.make_peace();
        }
    });
    let served = async {
        while let Some(client) = clients.join_next().await {
            client.map_err(|error| Violation(format!("a client's task ended: {error}")))??;
        }
        Ok(())
    };
    let is_late = |_| Violation(format!("a client has not received its stream after {CLIENTS_LIMIT:?}"));
    timeout(CLIENTS_LIMIT, served).await.map_err(is_late)??;
    while faults.join_next().await.is_some() {}
    sleep_until((start + PEACE).max(Instant::now()) + Duration::from_secs(2)).await;
    world.come_to_rest(REST_LIMIT).await?;
    if plan.outlives_journals {
        sleep(plan.config.router.journal_ttl + Duration::from_secs(5)).await;
        for node in world.nodes().into_iter().flatten() {
            let streams = node.router.overview().streams;
            if streams.journals > 0 || streams.journal_bytes > 0 {
                let (index, journals) = (node.process.node, streams.journals);
                return Err(Violation(format!("n{index} keeps {journals} expired journals")));
            }
        }
    }
    let outcome = Outcome { digest: trace.digest(), ..world.tally() };
    Ok(outcome)
}

fn catch_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if IS_RUNNING.with_borrow(|running| *running) {
                PANIC.with_borrow_mut(|panic| {
                    panic.get_or_insert_with(|| info.to_string());
                });
            } else {
                before(info);
            }
        }));
    });
}
