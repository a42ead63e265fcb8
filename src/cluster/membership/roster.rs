//! Turns what gossip knows into the view: which nodes are alive, which of two processes with the same name counts, and when
//! each latest value arrived. Pure; time is passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::damping::{Damper, LOSS, UNREADINESS};
use crate::cluster::gossip::{GossipError, decode_description, decode_pace, decode_prefixes, decode_report};
use crate::cluster::load_report::{LoadReport, NodeDescription};
use crate::cluster::protocol::{PROTOCOL, ProtocolRange};
use crate::cluster::view::{ClusterView, Peer};
use crate::types::{NodeId, NodeState};

/// A node that was never seen alive counts as dead only after this time, since its first heartbeats may still be on their way.
const BIRTH: Duration = Duration::from_secs(3);

/// A value and its version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value<'a> {
    pub(super) version: u64,
    pub(super) text: &'a str,
}

/// What gossip knows about one process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Observed<'a> {
    pub(super) id: &'a str,
    pub(super) incarnation: u64,
    pub(super) is_alive: bool,
    /// It has announced that it leaves.
    pub(super) has_left: bool,
    pub(super) description: Option<Value<'a>>,
    pub(super) report: Option<Value<'a>>,
    pub(super) pace: Option<Value<'a>>,
    pub(super) prefixes: Option<Value<'a>>,
}

/// A change in a peer's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Joined,
    Left,
    Died,
    /// Replaced by another process with the same name.
    Replaced,
}

impl Change {
    pub(super) fn label(self) -> &'static str {
        match self {
            Change::Joined => "joined",
            Change::Left => "left",
            Change::Died => "died",
            Change::Replaced => "replaced",
        }
    }
}

/// The result of an update.
#[derive(Debug, Default)]
pub(super) struct Update {
    /// The new view, if it differs from the previous one.
    pub(super) view: Option<Arc<ClusterView>>,
    pub(super) changes: Vec<(NodeId, Change)>,
    /// Values that were rejected, with the reason. Each is reported once.
    pub(super) refused: Vec<(NodeId, String)>,
}

/// Nodes that gossip in this cluster but cannot work with this node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Strangers {
    /// Live nodes that share no protocol version with this one, and their versions.
    pub(super) of_other_protocols: Vec<(NodeId, ProtocolRange)>,
    /// Whether a later process uses this node's own name.
    pub(super) is_superseded: bool,
}

/// One process.
struct Known {
    first_seen: Instant,
    was_alive: bool,
    is_alive: bool,
    has_left: bool,
    description: Option<NodeDescription>,
    /// Its protocol versions, if none is ours; then nothing else of it can be read.
    other_protocol: Option<ProtocolRange>,
    report: LoadReport,
    reported_at: Instant,
    measured_at: Instant,
    /// The versions of values that were examined, whether accepted or rejected.
    seen: SeenVersions,
}

#[derive(Default)]
struct SeenVersions {
    description: u64,
    report: u64,
    pace: u64,
    prefixes: u64,
}

pub(super) struct Roster {
    own: NodeId,
    own_incarnation: u64,
    known: BTreeMap<(NodeId, u64), Known>,
    view: Arc<ClusterView>,
    /// A process without a configured name gets a new one at every start, but often has the same address. So flapping is
    /// recorded for both.
    by_name: Damper<NodeId>,
    by_addr: Damper<SocketAddr>,
    is_superseded: bool,
}

impl Roster {
    pub(super) fn new(own: NodeId, own_incarnation: u64) -> Self {
        Self {
            own,
            own_incarnation,
            known: BTreeMap::new(),
            view: Arc::default(),
            by_name: Damper::new(),
            by_addr: Damper::new(),
            is_superseded: false,
        }
    }

    /// This node's own process continues with a later incarnation.
    pub(super) fn restarted(&mut self, incarnation: u64) {
        (self.own_incarnation, self.is_superseded) = (incarnation, false);
    }

    /// Processes everything that gossip knows now.
    pub(super) fn update<'a>(&mut self, observed: impl Iterator<Item = Observed<'a>>, now: Instant) -> Update {
        let mut update = Update::default();
        let mut present = BTreeSet::new();
        self.is_superseded = false;
        for process in observed {
            if process.id == self.own.as_str() {
                self.is_superseded |= process.is_alive && process.incarnation > self.own_incarnation;
                continue;
            }
            let key = (NodeId::new(process.id), process.incarnation);
            self.observe(&key, &process, now, &mut update);
            present.insert(key);
        }
        self.known.retain(|key, _| present.contains(key));
        let chosen = self.choose();
        self.note_losses(&chosen, now, &mut update);
        let view = self.build(&chosen, now);
        if view.peers != self.view.peers || view.dead != self.view.dead {
            self.view = Arc::new(view);
            update.view = Some(Arc::clone(&self.view));
        }
        update
    }

    /// As of the last update.
    pub(super) fn strangers(&self) -> Strangers {
        let alive = self.known.iter().filter(|(_, known)| known.is_alive && !known.has_left);
        let others = alive.filter_map(|((id, _), known)| Some((id.clone(), known.other_protocol?)));
        Strangers { of_other_protocols: others.collect(), is_superseded: self.is_superseded }
    }

    fn observe(&mut self, key: &(NodeId, u64), process: &Observed<'_>, now: Instant, update: &mut Update) {
        let known = self.known.entry(key.clone()).or_insert_with(|| Known::new(now));
        known.is_alive = process.is_alive;
        known.was_alive |= process.is_alive;
        known.has_left |= process.has_left;
        let was_ready = known.report.ready;
        let mut refuse = |error: String| update.refused.push((key.0.clone(), error));
        if let Some(value) = process.description.filter(|value| value.version > known.seen.description) {
            known.seen.description = value.version;
            let decoded = decode_description(value.text);
            known.other_protocol = match decoded {
                Err(GossipError::OtherProtocol(protocol)) => Some(protocol),
                Ok(_) | Err(GossipError::Malformed) => None,
            };
            if let Err(error @ GossipError::Malformed) = &decoded {
                refuse(error.to_string());
            }
            known.description = decoded.ok();
        }
        if known.other_protocol.is_some() {
            return;
        }
        if let Some(value) = process.report.filter(|value| value.version > known.seen.report) {
            known.seen.report = value.version;
            match decode_report(value.text) {
                Ok(report) => known.take_report(report, now),
                Err(error) => refuse(error.to_string()),
            }
        }
        if let Some(value) = process.pace.filter(|value| value.version > known.seen.pace) {
            known.seen.pace = value.version;
            match decode_pace(value.text) {
                Ok(pace) => {
                    known.measured_at = now.checked_sub(pace.age()).unwrap_or(known.measured_at);
                    known.report.pace = Some(pace);
                }
                Err(error) => refuse(error.to_string()),
            }
        }
        if let Some(value) = process.prefixes.filter(|value| value.version > known.seen.prefixes) {
            known.seen.prefixes = value.version;
            match decode_prefixes(value.text) {
                Ok(prefixes) => known.report.hot_prefixes = prefixes,
                Err(error) => refuse(error.to_string()),
            }
        }
        if was_ready && known.is_unwell() {
            self.penalize(key, UNREADINESS, now);
        }
    }

    fn penalize(&mut self, key: &(NodeId, u64), amount: f64, now: Instant) {
        self.by_name.add(&key.0, amount, now);
        let description = self.known.get(key).and_then(|known| known.description.as_ref());
        if let Some(description) = description {
            self.by_addr.add(&description.peer_addr, amount, now);
        }
    }

    /// For each name, the latest process that is alive and can be understood.
    fn choose(&self) -> BTreeMap<NodeId, u64> {
        let usable = self.known.iter().filter(|(_, known)| known.is_usable());
        // Processes of a name are in ascending order, so the latest one remains.
        usable.map(|((id, incarnation), _)| (id.clone(), *incarnation)).collect()
    }

    /// Compares with the current view.
    fn note_losses(&mut self, chosen: &BTreeMap<NodeId, u64>, now: Instant, update: &mut Update) {
        let view = Arc::clone(&self.view);
        for (id, peer) in &view.peers {
            let successor = chosen.get(id).filter(|incarnation| **incarnation != peer.incarnation);
            let has_left = self.known.get(&(id.clone(), peer.incarnation)).is_some_and(|known| known.has_left);
            let change = match (chosen.contains_key(id), successor) {
                (true, None) => continue,
                (_, Some(_)) => Change::Replaced,
                (false, None) if has_left => Change::Left,
                (false, None) => Change::Died,
            };
            if !has_left {
                self.by_name.add(id, LOSS, now);
                self.by_addr.add(&peer.description.peer_addr, LOSS, now);
            }
            update.changes.push((id.clone(), change));
        }
        let joined = chosen.keys().filter(|id| !view.peers.contains_key(*id));
        update.changes.extend(joined.map(|id| (id.clone(), Change::Joined)));
    }

    fn build(&self, chosen: &BTreeMap<NodeId, u64>, now: Instant) -> ClusterView {
        let peers = chosen.iter().filter_map(|(id, &incarnation)| {
            let known = self.known.get(&(id.clone(), incarnation))?;
            let peer = known.peer(id, incarnation, self.stability(id, known, now))?;
            let standing = self.view.peers.get(id).filter(|standing| ***standing == peer);
            Some((id.clone(), standing.cloned().unwrap_or_else(|| Arc::new(peer))))
        });
        ClusterView { peers: peers.collect(), dead: self.dead(chosen, now) }
    }

    fn stability(&self, id: &NodeId, known: &Known, now: Instant) -> f64 {
        let by_addr = known.description.as_ref().map(|found| self.by_addr.stability(&found.peer_addr, now));
        self.by_name.stability(id, now).min(by_addr.unwrap_or(1.0))
    }

    fn dead(&self, chosen: &BTreeMap<NodeId, u64>, now: Instant) -> Vec<NodeId> {
        let is_dead = |known: &Known| {
            let is_born = known.was_alive || now.saturating_duration_since(known.first_seen) > BIRTH;
            !known.is_alive && !known.has_left && is_born
        };
        let alive = self.known.iter().filter(|(_, known)| known.is_alive);
        let alive: BTreeSet<&NodeId> = alive.map(|((id, _), _)| id).collect();
        let dead = self.known.iter().filter(|(_, known)| is_dead(known)).map(|((id, _), _)| id);
        let mut dead: Vec<NodeId> =
            dead.filter(|id| !chosen.contains_key(*id) && !alive.contains(id)).cloned().collect();
        dead.dedup();
        dead
    }
}

impl Known {
    fn new(now: Instant) -> Self {
        Self {
            first_seen: now,
            was_alive: false,
            is_alive: false,
            has_left: false,
            description: None,
            other_protocol: None,
            report: LoadReport::default(),
            reported_at: now,
            measured_at: now,
            seen: SeenVersions::default(),
        }
    }

    fn take_report(&mut self, report: LoadReport, now: Instant) {
        let (pace, hot_prefixes) = (self.report.pace, std::mem::take(&mut self.report.hot_prefixes));
        self.report = LoadReport { pace, hot_prefixes, ..report };
        self.reported_at = now;
    }

    fn is_usable(&self) -> bool {
        self.is_alive && !self.has_left && self.description.is_some()
    }

    /// Whether the node is unready without having announced that it leaves.
    fn is_unwell(&self) -> bool {
        !self.report.ready && !matches!(self.report.state, NodeState::Draining | NodeState::Stopped)
    }

    fn peer(&self, id: &NodeId, incarnation: u64, stability: f64) -> Option<Peer> {
        let description = self.description.clone()?;
        Some(Peer {
            id: id.clone(),
            incarnation,
            protocol: PROTOCOL.common(description.protocol)?,
            description,
            report: self.report.clone(),
            reported_at: self.reported_at.into_std(),
            measured_at: self.measured_at.into_std(),
            stability,
        })
    }
}

#[cfg(test)]
#[path = "roster_tests.rs"]
mod tests;
