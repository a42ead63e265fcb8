//! Runs exercises: references first, then streams in flight, the injury at its moment, the comparison, and the repair.

use std::ops::{Add, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::DrillError;
use super::arena::{Action, Arena, ArenaError, EXIT_PATIENCE};
use super::client::{DrillClient, SharedRecord, StreamRecord};
use super::exercise::{Clients, Exercise, Injury, Moment};
use super::measure::Outcome;
use super::transcript::Transcript;
use super::workload::{Kind, PlannedStream, Shape, plan, with_stop_string};
use crate::router::ClusterOverview;

/// Through which clients come that do not spread.
const ENTRY: usize = 0;
/// From one look to the next, while something is about to happen.
const WATCH_POLL: Duration = Duration::from_millis(4);
/// For the moment of the injury to come.
const MOMENT_PATIENCE: Duration = Duration::from_secs(60);
/// For which a paused node is paused: longer than the default `peer_stall_timeout`.
const PAUSE: Duration = Duration::from_secs(3);
/// In a rolling restart, for load to be there before the next node goes.
const BETWEEN_RESTARTS: Duration = Duration::from_millis(500);
const DECODE_PROMPT_WORDS: usize = 24;

/// How much load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    pub streams: usize,
    pub tokens: u32,
    /// Of the prompts whose prefill is disturbed; about a token each.
    pub prefill_words: usize,
}

/// A cluster, the streams for it and what they say when nothing disturbs them.
pub struct GameDay {
    pub arena: Arena,
    decode: Vec<Rehearsed>,
    prefill: Vec<Rehearsed>,
}

struct Rehearsed {
    name: String,
    stream: PlannedStream,
    reference: Transcript,
}

/// How often streams changed their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Moves {
    failovers: u64,
    hand_overs: u64,
    resumed: u64,
}

impl Moves {
    fn of(overview: &ClusterOverview) -> Self {
        let streams = &overview.streams;
        Self { failovers: streams.failovers_total(), hand_overs: streams.hand_overs, resumed: streams.resumed }
    }

    fn total(self) -> u64 {
        self.failovers + self.hand_overs + self.resumed
    }
}

impl Add for Moves {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            failovers: self.failovers + other.failovers,
            hand_overs: self.hand_overs + other.hand_overs,
            resumed: self.resumed + other.resumed,
        }
    }
}

impl Sub for Moves {
    type Output = Self;

    /// Counters that went backwards are of a new process: nothing is taken away then.
    fn sub(self, other: Self) -> Self {
        Self {
            failovers: self.failovers.checked_sub(other.failovers).unwrap_or(self.failovers),
            hand_overs: self.hand_overs.checked_sub(other.hand_overs).unwrap_or(self.hand_overs),
            resumed: self.resumed.checked_sub(other.resumed).unwrap_or(self.resumed),
        }
    }
}

/// The streams of an exercise, under way.
struct Flight {
    records: Vec<SharedRecord>,
    players: JoinSet<Vec<(usize, StreamRecord)>>,
    /// Whether streams that end begin again.
    goes_on: Arc<AtomicBool>,
}

impl GameDay {
    /// Plays every stream undisturbed. The arena is whole.
    pub async fn rehearse(arena: Arena, load: &Load) -> Result<Self, DrillError> {
        let (model, has_chat) = look_at_model(&arena).await?;
        let shape = |prompt_words, salt| Shape {
            model: model.clone(),
            has_chat,
            streams: load.streams,
            tokens: load.tokens,
            prompt_words,
            salt,
        };
        let mut day = Self { arena, decode: Vec::new(), prefill: Vec::new() };
        day.decode = day.references(plan(&shape(DECODE_PROMPT_WORDS, 1))).await?;
        day.prefill = day.references(plan(&shape(load.prefill_words, 2))).await?;
        Ok(day)
    }

    async fn references(&self, streams: Vec<PlannedStream>) -> Result<Vec<Rehearsed>, DrillError> {
        let first = self.play_calmly(&streams).await?;
        let with_stop = |(stream, transcript): (&PlannedStream, &Transcript)| match stream.kind {
            Kind::StopString => with_stop_string(stream, transcript),
            _ => stream.clone(),
        };
        let streams: Vec<PlannedStream> = streams.iter().zip(&first).map(with_stop).collect();
        let references = self.play_calmly(&streams).await?;
        let rehearsed = |(number, (stream, reference)): (usize, (PlannedStream, Transcript))| {
            let name = format!("stream {number} ({:?}, {})", stream.kind, stream.path);
            Rehearsed { name, stream, reference }
        };
        Ok(streams.into_iter().zip(references).enumerate().map(rehearsed).collect())
    }

    /// All of them at one time, through all nodes.
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
        let records: Vec<SharedRecord> = streams.iter().map(|_| SharedRecord::default()).collect();
        let goes_on = Arc::new(AtomicBool::new(repeats));
        let mut players = JoinSet::new();
        for (index, (stream, shown)) in streams.iter().zip(&records).enumerate() {
            let urls = match clients {
                Clients::OneEntry => vec![self.arena.nodes[ENTRY].url.clone()],
                Clients::Reconnecting => self.arena.urls_from(ENTRY),
                Clients::Spread => self.arena.urls_from(index),
            };
            let (client, stream) = (self.arena.client.clone(), stream.clone());
            let (shown, goes_on) = (shown.clone(), goes_on.clone());
            players.spawn(async move {
                let mut ended = Vec::new();
                loop {
                    *shown.lock() = StreamRecord::new();
                    client.play(&stream, &urls, may_reconnect, &shown).await;
                    ended.push((index, shown.lock().clone()));
                    if !goes_on.load(Ordering::Relaxed) {
                        return ended;
                    }
                }
            });
        }
        Flight { records, players, goes_on }
    }

    /// Runs one exercise on a whole cluster and repairs the cluster afterwards.
    pub async fn run(&mut self, exercise: Exercise) -> Result<Outcome, DrillError> {
        if let Some(why) = self.obstacle(exercise) {
            return Ok(Outcome::skipped(exercise.name(), why));
        }
        self.arena.wait_until_whole().await?;
        let began = Instant::now();
        let rehearsed = if exercise.moment() == Moment::Prefill { &self.prefill } else { &self.decode };
        let streams: Vec<PlannedStream> = rehearsed.iter().map(|one| one.stream.clone()).collect();
        let clients = exercise.clients();
        let is_rolling = exercise.injury() == Injury::Rolling;
        let mut flight = self.take_off(&streams, clients, clients != Clients::OneEntry, is_rolling);
        let mut outcome = Outcome { exercise: exercise.name(), ..Outcome::default() };
        let injury = self.injure(exercise, &flight, &mut outcome).await;
        flight.goes_on.store(false, Ordering::Relaxed);
        let records = flight.land().await;
        outcome.seconds = began.elapsed().as_secs_f64();
        let Injured { fault, victims, watch, harvested } = injury?;

        let rehearsed = if exercise.moment() == Moment::Prefill { &self.prefill } else { &self.decode };
        for (index, record) in &records {
            outcome.count(&rehearsed[*index].name, record, &rehearsed[*index].reference);
        }
        let records: Vec<StreamRecord> = records.into_iter().map(|(_, record)| record).collect();
        outcome.time(&records, fault);
        let moves = self.moves(&victims).await + harvested - watch.before;
        (outcome.failovers, outcome.hand_overs, outcome.resumed) = (moves.failovers, moves.hand_overs, moves.resumed);
        outcome.detect_seconds = watch.finish().await.map(|time| time.as_secs_f64());
        if fault.is_some() && self.has_admin() && moves.total() == 0 {
            outcome.problem("no stream changed its node: nothing was shown");
        }
        self.repair(exercise, &victims, &mut outcome).await?;
        Ok(outcome)
    }

    /// Why an exercise cannot be run here.
    fn obstacle(&self, exercise: Exercise) -> Option<String> {
        if exercise != Exercise::Calm && self.arena.nodes.len() < 2 {
            return Some("it takes two nodes or more".into());
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
        outcome: &mut Outcome,
    ) -> Result<Injured, DrillError> {
        let injury = exercise.injury();
        if injury == Injury::None {
            return Ok(Injured {
                fault: None,
                victims: Vec::new(),
                watch: self.watch(&[]).await,
                harvested: Moves::default(),
            });
        }
        let victims = self.wait_for_moment(exercise, flight, outcome).await;
        let mut watch = self.watch(&victims).await;
        let fault = Instant::now();
        watch.start(fault);
        let mut harvested = Moves::default();
        match injury {
            Injury::None => {}
            Injury::GeneratorFault(name) => {
                let url = self.arena.nodes[victims[0]].url.clone();
                self.arena.client.inject(&url, name).await.map_err(DrillError::Fault)?;
            }
            Injury::Generator(action) | Injury::Entry(action) | Injury::AllButEntry(action) => {
                for &victim in &victims {
                    self.arena.nodes[victim].act(action).await?;
                }
                if action == Action::Pause {
                    sleep(PAUSE).await;
                    self.arena.nodes[victims[0]].act(Action::Resume).await?;
                }
            }
            Injury::Rolling => harvested = self.roll(outcome).await?,
        }
        Ok(Injured { fault: Some(fault), victims, watch, harvested })
    }

    /// Waits until the streams are as far as the exercise wants them, and tells whom to hit.
    async fn wait_for_moment(&self, exercise: Exercise, flight: &Flight, outcome: &mut Outcome) -> Vec<usize> {
        let deadline = Instant::now() + MOMENT_PATIENCE;
        let mut victims = Vec::new();
        let came = DrillClient::until(deadline, WATCH_POLL, async || {
            let is_time = match exercise.moment() {
                Moment::Decode => flight.half_have_tokens(),
                Moment::Prefill => true,
            };
            if !is_time {
                return false;
            }
            victims = self.choose_victims(exercise.injury()).await;
            !victims.is_empty() || flight.is_over()
        })
        .await;
        if !came || victims.is_empty() {
            outcome.problem("its moment did not come: no other node computed a stream, or all were over too soon");
            victims = vec![(ENTRY + 1) % self.arena.nodes.len()];
        }
        victims
    }

    /// Empty while the node to hit does nothing that would be missed.
    async fn choose_victims(&self, injury: Injury) -> Vec<usize> {
        let others = || (0..self.arena.nodes.len()).filter(|index| *index != ENTRY);
        match injury {
            Injury::Entry(_) => vec![ENTRY],
            Injury::None | Injury::Rolling => Vec::from_iter(others().take(1)),
            Injury::AllButEntry(_) => match self.busiest_generator().await {
                Some(_) => others().collect(),
                None => Vec::new(),
            },
            Injury::Generator(_) | Injury::GeneratorFault(_) => self.busiest_generator().await.into_iter().collect(),
        }
    }

    /// The node, other than the entry, that computes most of its streams.
    async fn busiest_generator(&self) -> Option<usize> {
        let Some(overview) = self.arena.overview(ENTRY).await else {
            // Without an admin address the next one is as good as any.
            return Some((ENTRY + 1) % self.arena.nodes.len());
        };
        let busiest = overview.peers.iter().filter(|peer| peer.streams > 0).max_by_key(|peer| peer.streams)?;
        for index in 0..self.arena.nodes.len() {
            let seen = self.arena.overview(index).await;
            if index != ENTRY && seen.is_some_and(|seen| seen.node.id == busiest.node.id) {
                return Some(index);
            }
        }
        None
    }

    /// Ends and starts every node in turn; gives the counts of those that ended.
    async fn roll(&mut self, outcome: &mut Outcome) -> Result<Moves, DrillError> {
        let mut harvested = Moves::default();
        for index in 0..self.arena.nodes.len() {
            sleep(BETWEEN_RESTARTS).await;
            let seen = self.arena.overview(index).await;
            harvested = harvested + seen.map(|overview| Moves::of(&overview)).unwrap_or_default();
            let node = &mut self.arena.nodes[index];
            node.act(Action::Terminate).await?;
            if let Some(process) = node.process() {
                match process.exit(EXIT_PATIENCE).await {
                    Some(status) if status.success() => {}
                    Some(status) => outcome.problem(format!("{} ended with {status} after SIGTERM", process.name)),
                    None => {
                        outcome.problem(format!("{} did not end within {EXIT_PATIENCE:?} of SIGTERM", process.name));
                        node.act(Action::Kill).await?;
                    }
                }
            }
            self.arena.nodes[index].act(Action::Restart).await?;
            self.arena.wait_until_whole().await?;
        }
        Ok(harvested)
    }

    /// Makes the cluster whole again.
    async fn repair(&mut self, exercise: Exercise, victims: &[usize], outcome: &mut Outcome) -> Result<(), DrillError> {
        if matches!(exercise.injury(), Injury::None | Injury::Rolling) || exercise == Exercise::Pause {
            return Ok(());
        }
        for &victim in victims {
            let node = &mut self.arena.nodes[victim];
            if exercise == Exercise::EnginePanic
                && let Some(process) = node.process()
            {
                match process.exit(EXIT_PATIENCE).await {
                    Some(status) if !status.success() => {}
                    Some(_) => outcome.problem(format!("{} ended well although its engine died", process.name)),
                    None => outcome.problem(format!("{} did not end after its engine had died", process.name)),
                }
            }
            if !node.allows(Action::Restart) {
                continue;
            }
            if node.process().is_some_and(|process| process.is_running()) {
                node.act(Action::Kill).await?;
            }
            node.act(Action::Restart).await?;
        }
        self.arena.wait_until_whole().await?;
        Ok(())
    }

    /// Counts of all nodes but the victims.
    async fn moves(&self, victims: &[usize]) -> Moves {
        let mut sum = Moves::default();
        for index in (0..self.arena.nodes.len()).filter(|index| !victims.contains(index)) {
            let seen = self.arena.overview(index).await;
            sum = sum + seen.map(|overview| Moves::of(&overview)).unwrap_or_default();
        }
        sum
    }

    async fn watch(&self, victims: &[usize]) -> Watch {
        let nodes = self.arena.nodes.iter().enumerate().filter(|(index, _)| !victims.contains(index));
        let admins = nodes.filter_map(|(_, node)| node.admin.clone()).collect();
        Watch { client: self.arena.client.clone(), admins, before: self.moves(victims).await, task: None }
    }
}

/// What `injure` did.
struct Injured {
    fault: Option<Instant>,
    victims: Vec<usize>,
    watch: Watch,
    /// Counts of processes that are gone.
    harvested: Moves,
}

/// Looks out for the first stream that changes its node.
struct Watch {
    client: DrillClient,
    admins: Vec<String>,
    before: Moves,
    task: Option<tokio::task::JoinHandle<Duration>>,
}

impl Watch {
    fn start(&mut self, fault: Instant) {
        let (client, admins, before) = (self.client.clone(), self.admins.clone(), self.before.total());
        self.task = Some(tokio::spawn(async move {
            loop {
                let mut total = 0;
                for admin in &admins {
                    let overview = client.overview(admin).await;
                    total += overview.map_or(0, |overview| Moves::of(&overview).total());
                }
                if total > before {
                    return fault.elapsed();
                }
                sleep(WATCH_POLL).await;
            }
        }));
    }

    /// When it was seen, if it was.
    async fn finish(self) -> Option<Duration> {
        let task = self.task?;
        if !task.is_finished() {
            task.abort();
        }
        task.await.ok()
    }
}

impl Flight {
    /// Waits for all streams; the records with the numbers of their streams.
    async fn land(&mut self) -> Vec<(usize, StreamRecord)> {
        let mut records = Vec::new();
        while let Some(ended) = self.players.join_next().await {
            // A player does not panic; were one to, its stream is missing from the count and the drill fails on that.
            records.extend(ended.unwrap_or_default());
        }
        records.sort_by_key(|(index, _)| *index);
        records
    }

    fn half_have_tokens(&self) -> bool {
        const SOME: usize = 4;
        let begun = self.records.iter().filter(|record| record.lock().token_times.len() >= SOME).count();
        2 * begun >= self.records.len()
    }

    fn is_over(&self) -> bool {
        self.records.iter().all(|record| record.lock().end.is_some())
    }
}

/// The name of the model, and whether it takes chats.
async fn look_at_model(arena: &Arena) -> Result<(String, bool), DrillError> {
    use super::workload::CHAT;
    let url = &arena.nodes[ENTRY].url;
    let models = arena.client.get(url, "/v1/models").await.map_err(DrillError::Rehearsal)?;
    let name = models["data"][0]["id"].as_str().ok_or_else(|| DrillError::Rehearsal("no model is served".into()))?;
    let question = serde_json::json!({"model": name, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1});
    let has_chat = arena.client.post(url, CHAT, &question).await.is_ok();
    Ok((name.to_owned(), has_chat))
}

impl From<ArenaError> for DrillError {
    fn from(error: ArenaError) -> Self {
        DrillError::Arena(error)
    }
}
