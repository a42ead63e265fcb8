//! Runs exercises. Records reference streams first; then, for each exercise, runs the same streams with a fault, compares them
//! and repairs the cluster.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use tokio::time::{Instant, sleep, sleep_until};

use super::DrillError;
use super::arena::{Arena, ArenaError, EXIT_PATIENCE, NodeAction};
use super::client::{DrillClient, StreamRecord};
use super::exercise::{Clients, Exercise, Injury, Moment};
use super::flight::Flight;
use super::measure::{Gaps, Outcome, seen_by_moved};
use super::moves::{Moves, Watch, total_of_others};
use super::served_model::ServedModel;
use super::transcript::Transcript;
use super::workload::{COMPLETIONS, PlannedStream, RequestKind, Shape, plan, with_stop_string};
use crate::router::ClusterOverview;
use crate::types::{NodeId, with_causes};

/// The node that clients connect to if they do not spread.
const ENTRY: usize = 0;
/// Polling interval while waiting for a condition.
const WATCH_POLL: Duration = Duration::from_millis(4);
/// Once the moment has come, how long to wait until the victim computes half its fair share of the streams. Afterwards one
/// stream is enough.
const SHARE_PATIENCE: Duration = Duration::from_millis(300);
/// Time limit for the entry to learn that its peers have finished the previous streams.
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);
/// Time limit for the moment of the fault to come.
const MOMENT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a node is paused. Longer than the default `peer_stall_timeout`.
const PAUSE: Duration = Duration::from_secs(3);
/// A slow node is paused for this long, less than the default `peer_stall_timeout`, and runs for `RUN` in between.
const STANDSTILL: Duration = Duration::from_millis(1500);
const RUN: Duration = Duration::from_millis(100);
/// Time limit for the entry to detect that the node is slow.
const SLOWNESS_PATIENCE: Duration = Duration::from_secs(20);
/// Time limit for the entry to detect that the node has recovered.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(20);
/// Pause before each node of a rolling restart, so that the cluster is under load again.
const BETWEEN_RESTARTS: Duration = Duration::from_millis(500);
const DECODE_PROMPT_WORDS: usize = 24;

/// The amount of load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    pub streams: usize,
    pub tokens: u32,
    /// Words of each prompt in exercises that disturb prefill; about one token each.
    pub prefill_words: usize,
}

/// A cluster, the streams for it, and the transcript of each stream from a run without faults.
pub struct GameDay {
    pub arena: Arena,
    decode: Vec<Rehearsed>,
    prefill: Vec<Rehearsed>,
    /// A node has ended and nobody restarted it.
    is_broken: bool,
}

struct Rehearsed {
    name: String,
    stream: PlannedStream,
    reference: Transcript,
}

impl GameDay {
    /// Runs every stream without a fault and keeps the transcripts as references. All nodes must be up.
    pub async fn rehearse(arena: Arena, load: &Load) -> Result<Self, DrillError> {
        let model = ServedModel::look(&arena, ENTRY).await?;
        let shape = |prompt_words, salt| Shape {
            model: model.name.clone(),
            has_chat: model.has_chat,
            streams: load.streams,
            tokens: load.tokens,
            prompt_words,
            salt,
        };
        let short = model.fit(&arena, ENTRY, shape(DECODE_PROMPT_WORDS, 1)).await?;
        let long = model.fit(&arena, ENTRY, shape(load.prefill_words, 2)).await?;
        let mut day = Self { arena, decode: Vec::new(), prefill: Vec::new(), is_broken: false };
        day.decode = day.references(plan(&short)).await?;
        day.prefill = day.references(plan(&long)).await?;
        Ok(day)
    }

    async fn references(&self, mut streams: Vec<PlannedStream>) -> Result<Vec<Rehearsed>, DrillError> {
        let is_stopped = |stream: &&mut PlannedStream| stream.kind == RequestKind::StopString;
        let unstopped: Vec<PlannedStream> =
            streams.iter_mut().filter(is_stopped).map(|stream| stream.clone()).collect();
        let transcripts = self.play_calmly(&unstopped).await?;
        for (stream, transcript) in streams.iter_mut().filter(is_stopped).zip(&transcripts) {
            *stream = with_stop_string(stream, transcript);
        }
        let references = self.play_calmly(&streams).await?;
        let rehearsed = |(number, (stream, reference)): (usize, (PlannedStream, Transcript))| {
            let name = format!("stream {number} ({:?}, {})", stream.kind, stream.path);
            Rehearsed { name, stream, reference }
        };
        Ok(streams.into_iter().zip(references).enumerate().map(rehearsed).collect())
    }

    /// Runs all streams at once, spread over all nodes.
    async fn play_calmly(&self, streams: &[PlannedStream]) -> Result<Vec<Transcript>, DrillError> {
        let mut flight = self.take_off(streams, Clients::Spread, false, false);
        let mut transcripts = vec![Transcript::default(); streams.len()];
        for (index, record) in flight.land().await {
            if let Some(why) = record.failure() {
                return Err(DrillError::Rehearsal(why.to_owned()));
            }
            transcripts[index] = record.transcript;
        }
        Ok(transcripts)
    }

    fn take_off(&self, streams: &[PlannedStream], clients: Clients, may_reconnect: bool, repeats: bool) -> Flight {
        let urls_of = |index| match clients {
            Clients::OneEntry => vec![self.arena.nodes[ENTRY].url.clone()],
            Clients::Reconnecting => self.arena.urls_from(ENTRY),
            Clients::Spread => self.arena.urls_from(index),
        };
        Flight::take_off(&self.arena.client, streams, urls_of, may_reconnect, repeats)
    }

    /// Runs one exercise on a complete cluster and repairs the cluster afterwards.
    pub async fn run(&mut self, exercise: Exercise) -> Result<Outcome, DrillError> {
        if let Some(why) = self.obstacle(exercise) {
            return Ok(Outcome::skipped(exercise.name(), why));
        }
        match self.arena.wait_until_whole().await {
            Ok(()) => {}
            Err(error) if self.arena.is_foreign() => {
                self.is_broken = true;
                return Ok(Outcome::skipped(exercise.name(), with_causes(&error).to_string()));
            }
            Err(error) => return Err(error.into()),
        }
        self.settle().await;
        let before = self.moves_of_each().await;
        let ids = self.arena.ids().await;
        let began = Instant::now();
        let rehearsed = if exercise.moment() == Moment::Prefill { &self.prefill } else { &self.decode };
        let streams: Vec<PlannedStream> = rehearsed.iter().map(|one| one.stream.clone()).collect();
        let clients = exercise.clients();
        let is_rolling = exercise.injury() == Injury::Rolling;
        let mut flight = self.take_off(&streams, clients, clients != Clients::OneEntry, is_rolling);
        let mut outcome = Outcome { exercise: exercise.name(), ..Outcome::default() };
        let injury = self.injure(exercise, &flight, Before { moves: before, ids }, &mut outcome).await;
        flight.descend();
        let records = flight.land().await;
        outcome.seconds = began.elapsed().as_secs_f64();
        let Injured { fault, victims, watch, harvested } = injury?;

        let rehearsed = if exercise.moment() == Moment::Prefill { &self.prefill } else { &self.decode };
        for (index, record) in &records {
            outcome.count(&rehearsed[*index].name, record, &rehearsed[*index].reference);
        }
        let records: Vec<StreamRecord> = records.into_iter().map(|(_, record)| record).collect();
        let mut moves = total_of_others(&self.moves_of_each().await, &watch.silent);
        moves.add(&harvested);
        let moves = moves.since(&watch.before);
        (outcome.failovers, outcome.hand_overs) = (moves.failovers, moves.hand_overs);
        (outcome.resumed, outcome.rescued) = (moves.resumed, moves.rescued);
        outcome.time(&records, fault);
        if is_rolling {
            // Every node was a fault of its own, so a time since the first fault means nothing.
            outcome.route_around_seconds = None;
        }
        outcome.detect_seconds = watch.finish().await.map(|time| time.as_secs_f64());
        if fault.is_some() && self.has_admin() && outcome.moved() == 0 {
            outcome.problem("no stream changed its node, so the exercise tested nothing");
        }
        if let Some(fault) = fault.filter(|_| !is_rolling) {
            let seen = seen_by_moved(&records, fault, outcome.moved() as usize);
            outcome.replay_seconds = self.replay(seen, &victims).await;
        }
        self.repair(exercise, &victims, &mut outcome).await?;
        Ok(outcome)
    }

    /// Waits until the entry's reports show that all nodes are idle; with older reports it would keep most streams to itself.
    /// On a cluster that others use, this may never happen, so the wait ends after `SETTLE_PATIENCE`.
    async fn settle(&self) {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        DrillClient::until(deadline, WATCH_POLL, async || {
            let Some(overview) = self.arena.overview(ENTRY).await else { return true };
            overview.nodes().all(|node| node.report.running + node.report.waiting == 0)
        })
        .await;
    }

    /// Makes the remaining nodes compute these token sequences, all at the same time, and measures how long each takes.
    async fn replay(&self, seen: Vec<Vec<u32>>, victims: &[usize]) -> Option<Gaps> {
        let left: Vec<&str> = self
            .arena
            .nodes
            .iter()
            .enumerate()
            .filter(|(index, _)| !victims.contains(index))
            .map(|(_, node)| node.url.as_str())
            .collect();
        let model = self.decode.first().map(|rehearsed| rehearsed.stream.body["model"].clone())?;
        let ask = |(number, tokens): (usize, Vec<u32>)| {
            let (client, url) = (self.arena.client.clone(), left.get(number % left.len().max(1)).copied());
            let body = json!({"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0});
            async move {
                let start = Instant::now();
                client.post(url?, COMPLETIONS, &body).await.ok()?;
                Some(start.elapsed())
            }
        };
        let times: Option<Vec<Duration>> = join_all(seen.into_iter().enumerate().map(ask)).await.into_iter().collect();
        times.filter(|times| !times.is_empty()).map(|times| Gaps::of(&times))
    }

    /// Why an exercise cannot run on this cluster.
    fn obstacle(&self, exercise: Exercise) -> Option<String> {
        if self.is_broken {
            return Some("the cluster was not repaired after an earlier exercise".into());
        }
        if exercise != Exercise::Calm && self.arena.nodes.len() < 2 {
            return Some("it needs at least two nodes".into());
        }
        let needs = exercise.needs()?;
        let forbidden = |index: &usize| !self.arena.nodes[*index].allows(needs);
        let hit: Vec<usize> = match exercise.injury() {
            Injury::Entry(_) => vec![ENTRY],
            Injury::Rolling => (0..self.arena.nodes.len()).collect(),
            _ => (0..self.arena.nodes.len()).filter(|index| *index != ENTRY).collect(),
        };
        let node = hit.into_iter().find(forbidden)?;
        Some(format!("{} is not allowed on {}", needs.name(), self.arena.nodes[node].url))
    }

    fn has_admin(&self) -> bool {
        self.arena.nodes.iter().all(|node| node.admin.is_some())
    }

    async fn injure(
        &mut self,
        exercise: Exercise,
        flight: &Flight,
        before: Before,
        outcome: &mut Outcome,
    ) -> Result<Injured, DrillError> {
        let injury = exercise.injury();
        if injury == Injury::None {
            return Ok(Injured {
                fault: None,
                victims: Vec::new(),
                watch: Watch::new(&self.arena, &[], &before.moves),
                harvested: Moves::default(),
            });
        }
        let victims = self.wait_for_moment(exercise, flight, &before.ids, outcome).await;
        // An entry whose engine dies still counts its failovers.
        let silent: &[usize] = if matches!(injury, Injury::EntryFault(_)) { &[] } else { &victims };
        let mut watch = Watch::new(&self.arena, silent, &before.moves);
        let fault = Instant::now();
        watch.start(fault);
        let mut harvested = Moves::default();
        match injury {
            Injury::None => {}
            Injury::GeneratorFault(name) | Injury::EntryFault(name) => {
                let url = self.arena.nodes[victims[0]].url.clone();
                self.arena.client.inject(&url, name).await.map_err(DrillError::Fault)?;
            }
            Injury::Generator(action) | Injury::Entry(action) | Injury::AllButEntry(action) => {
                for &victim in &victims {
                    self.arena.nodes[victim].act(action).await?;
                }
                if action == NodeAction::Pause {
                    sleep(PAUSE).await;
                    self.arena.nodes[victims[0]].act(NodeAction::Resume).await?;
                }
            }
            Injury::SlowGenerator => {
                let node = before.ids[victims[0]].clone();
                self.slow_down(victims[0], node.as_ref(), flight, outcome).await?;
            }
            Injury::Rolling => harvested = self.roll(outcome).await?,
        }
        Ok(Injured { fault: Some(fault), victims, watch, harvested })
    }

    /// Waits for the moment of the fault and returns the victims.
    async fn wait_for_moment(
        &self,
        exercise: Exercise,
        flight: &Flight,
        ids: &[Option<NodeId>],
        outcome: &mut Outcome,
    ) -> Vec<usize> {
        let deadline = Instant::now() + MOMENT_PATIENCE;
        let (mut victims, mut time_since) = (Vec::new(), None);
        let came = DrillClient::until(deadline, WATCH_POLL, async || {
            let is_time = match exercise.moment() {
                Moment::Decode => flight.half_have_tokens(),
                Moment::Prefill => true,
            };
            if !is_time {
                return false;
            }
            let is_early = time_since.get_or_insert_with(Instant::now).elapsed() < SHARE_PATIENCE;
            let fair_share = (flight.streams() / self.arena.nodes.len()) as u64;
            let enough = if is_early { (fair_share / 2).max(1) } else { 1 };
            victims = self.choose_victims(exercise.injury(), ids, enough).await;
            !victims.is_empty() || flight.is_over()
        })
        .await;
        if !came || victims.is_empty() {
            outcome.problem(
                "there was no moment for the fault: no other node computed a stream, or all streams ended too soon",
            );
            victims = vec![(ENTRY + 1) % self.arena.nodes.len()];
        }
        victims
    }

    /// The nodes to act on. Empty while no suitable node computes at least `enough` streams.
    async fn choose_victims(&self, injury: Injury, ids: &[Option<NodeId>], enough: u64) -> Vec<usize> {
        let others = || (0..self.arena.nodes.len()).filter(|index| *index != ENTRY);
        match injury {
            Injury::Entry(_) | Injury::EntryFault(_) => vec![ENTRY],
            Injury::None | Injury::Rolling => Vec::from_iter(others().take(1)),
            Injury::AllButEntry(_) => match self.busiest_generator(ids, enough).await {
                Some(_) => others().collect(),
                None => Vec::new(),
            },
            Injury::Generator(_) | Injury::SlowGenerator | Injury::GeneratorFault(_) => {
                self.busiest_generator(ids, enough).await.into_iter().collect()
            }
        }
    }

    /// The node, other than the entry, that computes most of the entry's streams, if these are at least `enough`.
    async fn busiest_generator(&self, ids: &[Option<NodeId>], enough: u64) -> Option<usize> {
        let Some(overview) = self.arena.overview(ENTRY).await else {
            // Without an admin address the drill cannot know, so it takes the next node.
            return Some((ENTRY + 1) % self.arena.nodes.len());
        };
        let busiest = overview.peers.iter().max_by_key(|peer| peer.streams)?;
        if busiest.streams < enough {
            return None;
        }
        (0..ids.len()).find(|&index| index != ENTRY && ids[index].as_ref() == Some(&busiest.node.id))
    }

    /// Pauses the node and lets it run briefly, in turn, until the entry has detected that it is slow and all streams have
    /// ended.
    async fn slow_down(
        &mut self,
        victim: usize,
        node: Option<&NodeId>,
        flight: &Flight,
        outcome: &mut Outcome,
    ) -> Result<(), DrillError> {
        let deadline = Instant::now() + SLOWNESS_PATIENCE;
        // Without an admin address the drill cannot ask the entry.
        let mut is_found = self.arena.nodes[ENTRY].admin.is_none();
        while Instant::now() < deadline && !(is_found && flight.is_over()) {
            self.arena.nodes[victim].act(NodeAction::Pause).await?;
            let end = Instant::now() + STANDSTILL;
            is_found |= DrillClient::until(end, WATCH_POLL, async || self.is_slow(node).await).await;
            sleep_until(end).await;
            self.arena.nodes[victim].act(NodeAction::Resume).await?;
            sleep(RUN).await;
        }
        if !is_found {
            outcome.problem(format!("the entry did not detect the slow node within {SLOWNESS_PATIENCE:?}"));
        }
        Ok(())
    }

    /// Whether the entry reports the node as slow. False if the entry does not answer.
    async fn is_slow(&self, node: Option<&NodeId>) -> bool {
        let Some(overview) = self.arena.overview(ENTRY).await else { return false };
        let peer = overview.peers.iter().find(|peer| Some(&peer.node.id) == node);
        peer.and_then(|peer| peer.pace.as_ref()).is_some_and(|pace| pace.is_slow)
    }

    /// Stops and restarts every node in turn. Returns the counts of the processes that ended.
    async fn roll(&mut self, outcome: &mut Outcome) -> Result<Moves, DrillError> {
        let mut harvested = Moves::default();
        for index in 0..self.arena.nodes.len() {
            sleep(BETWEEN_RESTARTS).await;
            let seen = self.arena.overview(index).await;
            self.arena.nodes[index].act(NodeAction::Terminate).await?;
            harvested.add(&self.see_off(index, seen, outcome).await?);
            self.arena.nodes[index].act(NodeAction::Restart).await?;
            self.arena.wait_until_whole().await?;
        }
        Ok(harvested)
    }

    /// Waits until a node that leaves has ended. Returns its last counts, which include what it handed over on leaving.
    async fn see_off(
        &mut self,
        index: usize,
        mut seen: Option<ClusterOverview>,
        outcome: &mut Outcome,
    ) -> Result<Moves, DrillError> {
        let deadline = Instant::now() + EXIT_PATIENCE;
        while let Some(process) = self.arena.nodes[index].process() {
            match process.exit(WATCH_POLL).await {
                Some(status) if status.success() => break,
                Some(status) => {
                    outcome.problem(format!("{} ended with {status} after SIGTERM", process.name));
                    break;
                }
                None if Instant::now() < deadline => {}
                None => {
                    outcome.problem(format!("{} did not end within {EXIT_PATIENCE:?} of SIGTERM", process.name));
                    self.arena.nodes[index].act(NodeAction::Kill).await?;
                    break;
                }
            }
            seen = self.arena.overview(index).await.or(seen);
        }
        Ok(seen.as_ref().map(Moves::of).unwrap_or_default())
    }

    /// Restarts the victims and waits until the cluster is complete again. After an exercise with a slow node, waits until the
    /// entry reports that the node has recovered.
    async fn repair(&mut self, exercise: Exercise, victims: &[usize], outcome: &mut Outcome) -> Result<(), DrillError> {
        if exercise == Exercise::SlowNode {
            let node = self.arena.ids().await[victims[0]].clone();
            let deadline = Instant::now() + RECOVERY_PATIENCE;
            if !DrillClient::until(deadline, WATCH_POLL, async || !self.is_slow(node.as_ref()).await).await {
                outcome.problem(format!("the node still counts as slow {RECOVERY_PATIENCE:?} after it was resumed"));
            }
            return Ok(());
        }
        if matches!(exercise.injury(), Injury::None | Injury::Rolling) || exercise == Exercise::Pause {
            return Ok(());
        }
        for &victim in victims {
            let node = &mut self.arena.nodes[victim];
            if matches!(exercise, Exercise::EnginePanic | Exercise::DeviceError | Exercise::EntryEnginePanic)
                && let Some(process) = node.process()
            {
                match process.exit(EXIT_PATIENCE).await {
                    Some(status) if !status.success() => {}
                    Some(_) => outcome.problem(format!("{} ended with success although its engine died", process.name)),
                    None => outcome.problem(format!("{} did not end after its engine had died", process.name)),
                }
            }
            if !node.allows(NodeAction::Restart) {
                // Somebody else may restart it; the next exercise waits for that.
                return Ok(());
            }
            if node.process().is_some_and(|process| process.is_running()) {
                node.act(NodeAction::Kill).await?;
            }
            node.act(NodeAction::Restart).await?;
        }
        self.arena.wait_until_whole().await?;
        Ok(())
    }

    /// The counts of every node; zeros for a node that does not answer.
    async fn moves_of_each(&self) -> Vec<Moves> {
        let overviews = join_all((0..self.arena.nodes.len()).map(|node| self.arena.overview(node))).await;
        overviews
            .into_iter()
            .map(|overview| overview.map(|overview| Moves::of(&overview)).unwrap_or_default())
            .collect()
    }
}

/// The state of the cluster before the exercise.
struct Before {
    moves: Vec<Moves>,
    ids: Vec<Option<NodeId>>,
}

/// What `injure` did.
struct Injured {
    fault: Option<Instant>,
    victims: Vec<usize>,
    watch: Watch,
    /// Counts of processes that have ended.
    harvested: Moves,
}

impl From<ArenaError> for DrillError {
    fn from(error: ArenaError) -> Self {
        DrillError::Arena(error)
    }
}
