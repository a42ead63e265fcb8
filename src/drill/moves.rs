//! Counts, from the nodes' own counters, how often streams changed their node, and detects the first change after a fault.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::arena::Arena;
use super::client::DrillClient;
use crate::router::ClusterOverview;
use crate::types::tasks::spawn_background;

/// Polling interval while waiting for the first change.
const POLL: Duration = Duration::from_millis(4);

/// How often streams changed their node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Moves {
    /// Streams that lost their replica and continued on another, by kind of failure.
    pub(super) failovers: BTreeMap<String, u64>,
    pub(super) hand_overs: u64,
    pub(super) resumed: u64,
    /// Streams that moved because their replica was slow.
    pub(super) rescued: u64,
}

impl Moves {
    pub(super) fn of(overview: &ClusterOverview) -> Self {
        let streams = &overview.streams;
        Self {
            failovers: streams.failovers.clone(),
            hand_overs: streams.hand_overs,
            resumed: streams.resumed,
            rescued: streams.rescued,
        }
    }

    fn total(&self) -> u64 {
        self.failovers.values().sum::<u64>() + self.hand_overs + self.resumed + self.rescued
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (kind, count) in &other.failovers {
            *self.failovers.entry(kind.clone()).or_default() += count;
        }
        self.hand_overs += other.hand_overs;
        self.resumed += other.resumed;
        self.rescued += other.rescued;
    }

    /// The increase since `before`. A counter that is lower than before belongs to a restarted process and is taken whole.
    pub(super) fn since(&self, before: &Self) -> Self {
        let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        let of_kind = |(kind, count): (&String, &u64)| {
            let count = since(*count, before.failovers.get(kind).copied().unwrap_or_default());
            (count > 0).then(|| (kind.clone(), count))
        };
        Self {
            failovers: self.failovers.iter().filter_map(of_kind).collect(),
            hand_overs: since(self.hand_overs, before.hand_overs),
            resumed: since(self.resumed, before.resumed),
            rescued: since(self.rescued, before.rescued),
        }
    }
}

/// The sum over all nodes except the silent ones.
pub(super) fn total_of_others(moves: &[Moves], silent: &[usize]) -> Moves {
    let mut sum = Moves::default();
    let heard = moves.iter().enumerate().filter(|(index, _)| !silent.contains(index));
    heard.for_each(|(_, moves)| sum.add(moves));
    sum
}

/// Waits for the first stream that changes its node.
pub(super) struct Watch {
    client: DrillClient,
    admins: Vec<String>,
    /// Indices of nodes that are not asked.
    pub(super) silent: Vec<usize>,
    pub(super) before: Moves,
    task: Option<tokio::task::JoinHandle<Duration>>,
}

impl Watch {
    /// Prepares to ask all nodes except the silent ones, and to count from `before`.
    pub(super) fn new(arena: &Arena, silent: &[usize], before: &[Moves]) -> Self {
        let nodes = arena.nodes.iter().enumerate().filter(|(index, _)| !silent.contains(index));
        let admins = nodes.filter_map(|(_, node)| node.admin.clone()).collect();
        let before = total_of_others(before, silent);
        Self { client: arena.client.clone(), admins, silent: silent.to_vec(), before, task: None }
    }

    pub(super) fn start(&mut self, fault: Instant) {
        let (client, admins, before) = (self.client.clone(), self.admins.clone(), self.before.total());
        self.task = Some(spawn_background(async move {
            loop {
                let mut total = 0;
                for admin in &admins {
                    let overview = client.overview(admin).await;
                    total += overview.map_or(0, |overview| Moves::of(&overview).total());
                }
                if total > before {
                    return fault.elapsed();
                }
                sleep(POLL).await;
            }
        }));
    }

    /// The time from the fault to the first change, if there was one.
    pub(super) async fn finish(self) -> Option<Duration> {
        let task = self.task?;
        if !task.is_finished() {
            task.abort();
        }
        task.await.ok()
    }
}
