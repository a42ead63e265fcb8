//! The gossip task: passes this node's values to chitchat, and builds views from what chitchat knows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chitchat::{Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, spawn_chitchat};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

use super::diagnosis::Diagnosis;
use super::incarnation_now;
use super::publisher::Publisher;
use super::roster::{Change, Observed, Roster, Update, Value};
use super::seeds::Seeds;
use crate::cluster::gossip::encode_description;
use crate::cluster::seal::transport::SealedTransport;
use crate::cluster::{ClusterView, Config, LoadReport, NodeDescription, Problems};
use crate::observability::Metrics;
use crate::types::{NodeId, watch};

/// Chitchat's keys are sent over the network, so they are short.
const DESCRIPTION_KEY: &str = "d";
const REPORT_KEY: &str = "r";
const PACE_KEY: &str = "p";
const PREFIXES_KEY: &str = "h";
const GOODBYE_KEY: &str = "x";

/// A node counts as dead when its silence exceeds this multiple of the usual time between its heartbeats.
const PHI_THRESHOLD: f64 = 7.0;
/// The mean is taken over so few heartbeats that chitchat's prior, of weight 5, is half of it. In a larger cluster heartbeats
/// arrive through every peer and therefore more often; the prior keeps the limit from shrinking with them. With a prior of two
/// rounds, a node counts as dead after a silence of 7 to 10 rounds, about 2 s by default, and later if its heartbeats were
/// slow. In large clusters its last heartbeats keep spreading for some rounds.
const PHI_WINDOW: usize = 5;
const PRIOR_ROUNDS: u32 = 2;
/// Longer pauses are not counted in the mean.
const LONGEST_ROUNDS: u32 = 40;
/// Dead nodes are gossiped for half of this time; then all nodes forget them within the other half.
const DEAD_GRACE: Duration = Duration::from_secs(60);
/// Has no effect, since keys are deleted only together with their node. It must be set.
const TOMBSTONE_GRACE: Duration = Duration::from_secs(3600);

/// Seeds contacted per round when no peer is known, and rounds between seeds otherwise. Two halves of a cluster that have
/// forgotten each other meet again through their seeds.
const SEEDS_WHEN_ALONE: usize = 3;
const SEED_ROUNDS: u64 = 8;
/// Peers that are told at once of an urgent change; they tell the others.
const URGENT_PEERS: usize = 32;
/// How often leaving is announced, with pauses in which each exchange can finish.
const GOODBYES: u32 = 3;
const GOODBYE_PAUSE: Duration = Duration::from_millis(80);
/// A report that has not been renewed for this long is not repeated.
const REPORT_SILENCE: Duration = Duration::from_secs(3);
/// Pause before gossip that has ended unexpectedly is restarted.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// After a restart gossip knows no nodes, so the view stays unchanged for this long.
const RELEARNING: Duration = Duration::from_secs(5);
/// If a round is this many intervals late, this process was paused or starved, and heartbeats are old for that reason. The view
/// then stays unchanged until the others have been heard again.
const LATE_ROUNDS: u32 = 4;
const CATCHING_UP_ROUNDS: u32 = 8;

/// What this node publishes.
#[derive(Clone, Debug, Default)]
pub(super) struct Own {
    pub(super) description: Option<NodeDescription>,
    pub(super) report: LoadReport,
    /// When the report was last renewed.
    pub(super) reported_at: Option<Instant>,
}

/// The components of the task.
pub(super) struct MembershipParts {
    pub(super) id: NodeId,
    pub(super) incarnation: u64,
    pub(super) bound: SocketAddr,
    pub(super) config: Config,
    pub(super) transport: SealedTransport,
    pub(super) metrics: Arc<Metrics>,
    pub(super) problems: Problems,
    pub(super) view: watch::Sender<Arc<ClusterView>>,
    pub(super) own: watch::Receiver<Own>,
}

pub(super) struct MembershipTask {
    parts: MembershipParts,
    seeds: Seeds,
    gossip: Gossip,
    publisher: Publisher,
    roster: Roster,
    diagnosis: Diagnosis,
    rounds: u64,
    last_round: Instant,
    /// Before this time, the silence of other nodes is ignored.
    trusts_silence_from: Instant,
}

/// Chitchat, and notifications of what it learns.
struct Gossip {
    handle: ChitchatHandle,
    news: Arc<Notify>,
}

impl MembershipTask {
    pub(super) async fn start(parts: MembershipParts) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let MembershipParts { id, incarnation, bound, config, transport, .. } = &parts;
        let gossip = Gossip::start(id, *incarnation, *bound, config, transport).await?;
        let (problems, now) = (parts.problems.clone(), Instant::now());
        Ok(Self {
            seeds: Seeds::start(&config.peers),
            gossip,
            publisher: Publisher::default(),
            roster: Roster::new(id.clone(), *incarnation),
            diagnosis: Diagnosis::new(problems, transport.clone(), config, *bound, now),
            rounds: 0,
            last_round: now,
            trusts_silence_from: now,
            parts,
        })
    }

    /// Runs until all handles are dropped, or one asks to leave.
    pub(super) async fn run(mut self, mut leave: mpsc::Receiver<oneshot::Sender<()>>) {
        let mut rounds = tokio::time::interval(self.parts.config.gossip_interval);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                asked = leave.recv() => {
                    if let Some(done) = asked {
                        self.say_goodbye().await;
                        let _ = self.gossip.handle.initiate_shutdown();
                        let _ = done.send(());
                    }
                    return;
                }
                _ = self.gossip.handle.termination_watcher() => self.restart().await,
                _ = rounds.tick() => self.round().await,
                changed = self.parts.own.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.tell(false).await;
                }
                () = self.gossip.news.notified() => self.look().await,
            }
        }
    }

    async fn round(&mut self) {
        self.note_lateness(Instant::now());
        self.tell(true).await;
        self.look().await;
        self.meet_seeds().await;
        self.diagnose().await;
        self.rounds += 1;
    }

    fn note_lateness(&mut self, now: Instant) {
        let interval = self.parts.config.gossip_interval;
        let since = now.saturating_duration_since(self.last_round);
        if since > interval * LATE_ROUNDS {
            tracing::warn!(seconds = since.as_secs_f64(), "this node's gossip was stalled");
            self.trusts_silence_from = self.trusts_silence_from.max(now + interval * CATCHING_UP_ROUNDS);
        }
        self.last_round = now;
    }

    /// Passes values to chitchat that should be sent.
    async fn tell(&mut self, is_round: bool) {
        let (description, publication) = {
            let own = self.parts.own.borrow_and_update();
            let description = own.description.as_ref().map(encode_description);
            let now = Instant::now();
            let is_kept_up = own.reported_at.is_some_and(|at| now.saturating_duration_since(at) <= REPORT_SILENCE);
            (description, self.publisher.publish(&own.report, is_kept_up, is_round, now))
        };
        let values = [
            (DESCRIPTION_KEY, description),
            (REPORT_KEY, publication.report),
            (PACE_KEY, publication.pace),
            (PREFIXES_KEY, publication.prefixes),
        ];
        self.gossip
            .handle
            .with_chitchat(|chitchat| {
                let state = chitchat.self_node_state();
                for (key, value) in values.iter().filter_map(|(key, value)| Some((key, value.as_ref()?))) {
                    // Setting an equal value has no effect in chitchat.
                    state.set(key, value);
                }
            })
            .await;
        if publication.is_urgent {
            self.gossip_with_peers().await;
        }
    }

    /// Builds a view from what chitchat knows.
    async fn look(&mut self) {
        let now = Instant::now();
        if now < self.trusts_silence_from {
            return;
        }
        let roster = &mut self.roster;
        let update = self.gossip.handle.with_chitchat(|chitchat| roster.update(observe(chitchat), now)).await;
        self.note(update);
    }

    fn note(&self, update: Update) {
        for (peer, change) in &update.changes {
            self.parts.metrics.cluster_changes.with([change.label()]).inc();
            match change {
                Change::Died => tracing::warn!(%peer, "a peer died"),
                Change::Joined | Change::Left | Change::Replaced => {
                    tracing::info!(%peer, change = change.label(), "the cluster changed");
                }
            }
        }
        for (peer, reason) in &update.refused {
            tracing::warn!(%peer, reason, "ignoring what a node gossips");
        }
        if let Some(view) = update.view {
            self.parts.metrics.cluster_nodes.with(["alive"]).set(view.peers.len() as f64);
            self.parts.metrics.cluster_nodes.with(["dead"]).set(view.dead.len() as f64);
            self.parts.view.send_replace(view);
        }
    }

    async fn meet_seeds(&mut self) {
        let peers = self.live_addrs().await;
        let count = match peers.len() {
            0 => SEEDS_WHEN_ALONE,
            _ => usize::from(self.rounds.is_multiple_of(SEED_ROUNDS)),
        };
        let is_wanted = |addr: SocketAddr| self.diagnosis.is_for_gossip(addr) && !peers.contains(&addr);
        for addr in self.seeds.next(count, is_wanted) {
            let _ = self.gossip.handle.gossip(addr);
        }
    }

    /// Looks for problems, about every second.
    async fn diagnose(&mut self) {
        let now = Instant::now();
        if self.diagnosis.is_due(now) {
            let live = self.live_addrs().await;
            self.diagnosis.run(&self.seeds.list(), &live, self.roster.strangers(), now).await;
            self.parts.problems.publish(&self.parts.metrics);
        }
    }

    async fn live_addrs(&self) -> Vec<SocketAddr> {
        let live = |chitchat: &mut Chitchat| {
            let own = chitchat.self_chitchat_id();
            let others = chitchat.live_nodes().filter(|id| *id != own);
            others.map(|id| id.gossip_advertise_addr).collect()
        };
        self.gossip.handle.with_chitchat(live).await
    }

    async fn gossip_with_peers(&self) {
        for addr in self.live_addrs().await.into_iter().take(URGENT_PEERS) {
            let _ = self.gossip.handle.gossip(addr);
        }
    }

    async fn say_goodbye(&mut self) {
        self.gossip.handle.with_chitchat(|chitchat| chitchat.self_node_state().set(GOODBYE_KEY, "")).await;
        if self.live_addrs().await.is_empty() {
            return;
        }
        for _ in 0..GOODBYES {
            self.gossip_with_peers().await;
            tokio::time::sleep(GOODBYE_PAUSE).await;
        }
    }

    /// Chitchat ends by itself only if it panics. This node then continues with a later incarnation.
    async fn restart(&mut self) {
        tracing::error!("gossip stopped unexpectedly; restarting it");
        tokio::time::sleep(RESTART_PAUSE).await;
        let incarnation = incarnation_now();
        match Gossip::start(&self.parts.id, incarnation, self.parts.bound, &self.parts.config, &self.parts.transport)
            .await
        {
            Ok(gossip) => self.gossip = gossip,
            Err(error) => return tracing::error!(error, "cannot restart gossip"),
        }
        self.publisher = Publisher::default();
        self.roster.restarted(incarnation);
        self.trusts_silence_from = Instant::now() + RELEARNING;
    }
}

impl Gossip {
    async fn start(
        id: &NodeId,
        incarnation: u64,
        bound: SocketAddr,
        config: &Config,
        transport: &SealedTransport,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let interval = config.gossip_interval;
        let chitchat_config = ChitchatConfig {
            chitchat_id: ChitchatId::new(id.as_str(), incarnation, config.gossip_advertised(bound)),
            cluster_id: config.cluster_id.clone(),
            gossip_interval: interval,
            listen_addr: bound,
            // Chitchat would wait for names to resolve before it starts, and looks them up only once a minute. `Seeds` does
            // this instead.
            seed_nodes: Vec::new(),
            failure_detector_config: FailureDetectorConfig::new(
                PHI_THRESHOLD,
                PHI_WINDOW,
                interval * LONGEST_ROUNDS,
                interval * PRIOR_ROUNDS,
                DEAD_GRACE,
            ),
            marked_for_deletion_grace_period: TOMBSTONE_GRACE,
            catchup_callback: None,
            extra_liveness_predicate: None,
        };
        let handle = spawn_chitchat(chitchat_config, Vec::new(), transport).await?;
        let news = Arc::new(Notify::new());
        let word = Arc::clone(&news);
        // Called under chitchat's lock, so it only sends a notification.
        handle
            .with_chitchat(|chitchat| {
                let word = Arc::clone(&word);
                chitchat.subscribe_event("", move |_| word.notify_one()).forever();
            })
            .await;
        Ok(Self { handle, news })
    }
}

/// What chitchat knows about every process, including this one.
fn observe(chitchat: &Chitchat) -> impl Iterator<Item = Observed<'_>> {
    let live: std::collections::HashSet<&ChitchatId> = chitchat.live_nodes().collect();
    chitchat.node_states().iter().map(move |(id, state)| {
        let value = |key| state.get_versioned(key).map(|found| Value { version: found.version, text: &found.value });
        Observed {
            id: &id.node_id,
            incarnation: id.generation_id,
            is_alive: live.contains(id),
            has_left: state.contains_key(GOODBYE_KEY),
            description: value(DESCRIPTION_KEY),
            report: value(REPORT_KEY),
            pace: value(PACE_KEY),
            prefixes: value(PREFIXES_KEY),
        }
    })
}
