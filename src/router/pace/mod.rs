//! Replicas that are slow but not dead: detecting them, and the consequences for this node, placement and streams.
//!
//! `board` compares what replicas report about their pace with what this node's streams observe (`progress`) and with each
//! other; `detector` decides with hysteresis; `standstill` finds when this process itself is stopped; `rescue` decides whether a
//! stream should be raced. All of these are pure.

mod board;
mod detector;
pub(super) mod progress;
pub(super) mod rescue;
mod standstill;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tracing::{info, warn};

pub(super) use board::ReplicaPace;
use board::{Findings, PaceBoard, Reported, Sight};
use detector::Change;
use progress::StreamProgress;
use rescue::Speed;
use standstill::Standstills;

use super::failover::now;
use super::load::{FirstTokenAverage, ReplicaLoad};
use super::peers::Peers;
use super::placement::sane;
use super::source::Replica;
use super::this_node::ThisNode;
use crate::cluster::{LoadReport, Peer};
use crate::types::{DegradedBy, NodeReason, NodeState, Pace, watch};

pub(super) type Paces = Arc<BTreeMap<Replica, ReplicaPace>>;

/// The pace of this node, from the streams that its engine computes.
pub(super) struct OwnPace {
    pub(super) streams: Arc<StreamProgress>,
    pub(super) first_tokens: Mutex<FirstTokenAverage>,
    standstills: Mutex<Standstills>,
}

/// What this node knows about the pace of all replicas.
pub(super) struct Pacing {
    board: Mutex<PaceBoard>,
    found: RwLock<Paces>,
    /// Notified when a replica becomes slow or recovers.
    pub(super) changes: watch::Sender<()>,
}

impl OwnPace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            streams: Arc::new(StreamProgress::new(now)),
            first_tokens: Mutex::default(),
            standstills: Mutex::default(),
        }
    }

    /// The pace that the engine has measured, or a slower one if this process keeps standing still. To be asked with each
    /// assessment.
    pub(super) fn with_standstills(&self, measured: Option<Pace>, now: Instant) -> Option<Pace> {
        let factor = self.standstills.lock().look(now);
        let pace = measured?;
        // A step that the process stood still in has that time already; what it adds to a slow pace does not matter.
        Some(match factor > 1.0 {
            true => Pace {
                unit_seconds: pace.unit_seconds * factor,
                step_seconds: pace.step_seconds * factor,
                age: Duration::ZERO,
            },
            false => pace,
        })
    }
}

impl Pacing {
    pub(super) fn new() -> Self {
        Self { board: Mutex::default(), found: RwLock::default(), changes: watch::Sender::new(()) }
    }

    pub(super) fn found(&self) -> Paces {
        self.found.read().clone()
    }

    pub(super) fn is_slow(&self, replica: &Replica) -> bool {
        self.found.read().get(replica).is_some_and(|pace| pace.slow_since.is_some())
    }
}

impl ReplicaPace {
    /// How many times as long as its siblings this replica takes, if it is slow.
    pub(super) fn slowness(&self) -> Option<f64> {
        self.slow_since.map(|_| self.ratio().unwrap_or(f64::INFINITY))
    }

    pub(super) fn speed(&self, load: ReplicaLoad) -> Speed {
        let tokens_per_second = f64::from(load.drain_tokens_per_second.max(0.0));
        Speed { unit_seconds: self.unit_seconds, token_seconds: self.token_seconds, tokens_per_second }
    }
}

impl Peers {
    /// Compares the replicas, and acts on changes. `own` is this node's new report.
    pub(super) fn compare_paces(&self, node: &ThisNode, own: &LoadReport) {
        let (view, now) = (self.view.borrow().clone(), now());
        let is_up = |peer: &&Arc<Peer>| matches!(peer.report.state, NodeState::Ready | NodeState::Degraded);
        let peers: Vec<(&Arc<Peer>, Option<Arc<StreamProgress>>)> =
            view.peers.values().filter(is_up).map(|peer| (peer, self.ledger.progress(&peer.id))).collect();
        let here = node.local().map(|local| Sight {
            replica: Replica::Here,
            fingerprint: &local.model.fingerprint,
            reported: own.pace.map(|pace| Reported {
                unit_seconds: pace.unit_seconds.into(),
                token_seconds: own.inter_token_latency.into(),
                measured_at: now.checked_sub(pace.age()).unwrap_or(now),
                reported_at: now,
                has_queue: own.waiting > 0,
                confesses: false,
                stands_still: node.pace.standstills.lock().is_mostly_still(),
            }),
            progress: None,
        });
        let there = peers.iter().filter_map(|(peer, progress)| {
            Some(Sight {
                replica: Replica::At(peer.id.clone()),
                fingerprint: &peer.description.models.first()?.fingerprint,
                reported: peer.report.pace.map(|pace| Reported {
                    unit_seconds: pace.unit_seconds.into(),
                    token_seconds: sane(peer.report.inter_token_latency),
                    measured_at: peer.measured_at,
                    reported_at: peer.reported_at,
                    has_queue: peer.report.waiting > 0,
                    confesses: peer.report.reasons.contains(&NodeReason::Degraded(DegradedBy::Slow).into()),
                    stands_still: false,
                }),
                progress: progress.as_deref(),
            })
        });
        let sights: Vec<Sight<'_>> = here.into_iter().chain(there).collect();
        let findings = self.pacing.board.lock().look(&sights, node.config.slow_node_factor, now);
        self.take_in(node, findings);
    }

    fn take_in(&self, node: &ThisNode, findings: Findings) {
        let Findings { paces, changes, wants_probe } = findings;
        node.health.want_probe(wants_probe);
        let own = paces.get(&Replica::Here);
        node.metrics.pace_unit.set(own.map_or(0.0, |pace| pace.unit_seconds));
        node.metrics.pace_ratio.set(own.and_then(ReplicaPace::ratio).unwrap_or(0.0));
        let paces = Arc::new(paces);
        *self.pacing.found.write() = paces.clone();
        for (replica, change) in &changes {
            let reason = paces[replica].explain();
            let whose = if *replica == Replica::Here { "here" } else { "peer" };
            match change {
                Change::BecameSlow => {
                    warn!(%replica, reason, "a replica is slow");
                    node.metrics.slow_changes.with([whose, "slow"]).inc();
                }
                Change::Recovered => {
                    info!(%replica, reason, "a slow replica has recovered");
                    node.metrics.slow_changes.with([whose, "recovered"]).inc();
                }
            }
            if *replica == Replica::Here {
                match change {
                    Change::BecameSlow => node.health.lifecycle().degrade(DegradedBy::Slow, reason),
                    Change::Recovered => node.health.lifecycle().recover(DegradedBy::Slow, reason),
                }
            }
        }
        if !changes.is_empty() {
            self.pacing.changes.send_replace(());
        }
    }
}
