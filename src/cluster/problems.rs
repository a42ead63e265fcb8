//! Problems between this node and others, for operators: each problem has a reason and its sources, and is shown in the log, in
//! `/cluster` and as a metric.
//!
//! Strangers can cause any number of events from any number of addresses, so the number of sources kept per reason is limited,
//! and so is the logging. Configured peers take precedence over other sources.
//!
//! The log is a pure core, with time passed in; `Problems` is its handle. Knows nothing of how problems are found.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::observability::Metrics;

/// Sources kept per reason.
const MAX_SOURCES: usize = 8;
/// A problem is over if its event has not been repeated for this long.
const FADE: Duration = Duration::from_secs(90);
/// Minimum time between log lines about one reason, and before a line with the same sources is repeated.
const LOG_SPACING: Duration = Duration::from_secs(60);
const LOG_REPEAT: Duration = Duration::from_secs(600);

/// Why this node and others do not work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemReason {
    /// Peers are configured, but none is heard.
    Alone,
    /// A configured peer has never answered.
    Unheard,
    /// The name of a configured peer does not resolve.
    Unresolved,
    ForeignKey,
    ForeignCluster,
    ForeignProtocol,
    /// Datagrams that are not gossip.
    Unreadable,
    /// The sender of the datagrams does not answer challenges.
    Unproven,
    Replayed,
    /// The operating system does not send this node's gossip.
    Unsent,
    /// A peer gossips but cannot be called.
    Unreachable,
    /// A certificate is refused, on either side.
    Untrusted,
    /// A file has changed and is invalid.
    RefusedFile,
    /// A later process uses this node's name.
    NameTaken,
    /// A peer knows other tenants.
    OtherTenants,
}

impl ProblemReason {
    pub const ALL: [ProblemReason; 15] = [
        ProblemReason::Alone,
        ProblemReason::Unheard,
        ProblemReason::Unresolved,
        ProblemReason::ForeignKey,
        ProblemReason::ForeignCluster,
        ProblemReason::ForeignProtocol,
        ProblemReason::Unreadable,
        ProblemReason::Unproven,
        ProblemReason::Replayed,
        ProblemReason::Unsent,
        ProblemReason::Unreachable,
        ProblemReason::Untrusted,
        ProblemReason::RefusedFile,
        ProblemReason::NameTaken,
        ProblemReason::OtherTenants,
    ];

    /// The name in metric labels, logs and JSON.
    pub fn label(self) -> &'static str {
        match self {
            ProblemReason::Alone => "alone",
            ProblemReason::Unheard => "unheard",
            ProblemReason::Unresolved => "unresolved",
            ProblemReason::ForeignKey => "foreign_key",
            ProblemReason::ForeignCluster => "foreign_cluster",
            ProblemReason::ForeignProtocol => "foreign_protocol",
            ProblemReason::Unreadable => "unreadable",
            ProblemReason::Unproven => "unproven",
            ProblemReason::Replayed => "replayed",
            ProblemReason::Unsent => "unsent",
            ProblemReason::Unreachable => "unreachable",
            ProblemReason::Untrusted => "untrusted",
            ProblemReason::RefusedFile => "refused_file",
            ProblemReason::NameTaken => "name_taken",
            ProblemReason::OtherTenants => "other_tenants",
        }
    }

    /// What the reason means and what to check, for the log.
    fn explanation(self) -> &'static str {
        match self {
            ProblemReason::Alone => "this node hears none of its configured peers: it serves as a cluster of one",
            ProblemReason::Unheard => {
                "configured peers have never answered: they may be down, unreachable, or have another cluster key"
            }
            ProblemReason::Unresolved => "names of configured peers do not resolve",
            ProblemReason::ForeignKey => {
                "gossip cannot be opened with the keys of cluster_key_file: its sender has another key (or an older version with \
                 another cluster_id)"
            }
            ProblemReason::ForeignCluster => "nodes with this cluster key and another cluster_id send gossip here",
            ProblemReason::ForeignProtocol => "nodes of this cluster use another version of the protocol between nodes",
            ProblemReason::Unreadable => "datagrams at gossip_addr are not gossip, or gossip of another version",
            ProblemReason::Unproven => {
                "gossip can be decrypted, but its sender does not answer: it does not hear this node, or somebody replays old gossip"
            }
            ProblemReason::Replayed => {
                "the same gossip arrives repeatedly: somebody replays it, or two nodes run from one snapshot"
            }
            ProblemReason::Unsent => "the operating system does not send gossip",
            ProblemReason::Unreachable => "peers gossip, but cannot be called at their peer_addr",
            ProblemReason::Untrusted => {
                "certificates between nodes are refused: see cluster_key_file and peer_tls_ca_file"
            }
            ProblemReason::RefusedFile => "files have changed and are invalid: the previous contents stay in use",
            ProblemReason::NameTaken => "a later process uses this node's node_id: the others no longer see this one",
            ProblemReason::OtherTenants => "peers know other tenants: give all nodes the same tenants_file",
        }
    }

    /// Events of one source before it is reported, and the time that they must span. One datagram may be damaged on its way,
    /// and a node that has just started is not proven yet.
    fn threshold(self) -> (u64, Duration) {
        match self {
            ProblemReason::ForeignKey | ProblemReason::Unreadable | ProblemReason::Unsent => (3, Duration::ZERO),
            ProblemReason::Unproven => (5, Duration::from_secs(5)),
            ProblemReason::Replayed => (20, Duration::from_secs(5)),
            ProblemReason::Alone
            | ProblemReason::Unheard
            | ProblemReason::Unresolved
            | ProblemReason::ForeignCluster
            | ProblemReason::ForeignProtocol
            | ProblemReason::Unreachable
            | ProblemReason::Untrusted
            | ProblemReason::RefusedFile
            | ProblemReason::NameTaken
            | ProblemReason::OtherTenants => (1, Duration::ZERO),
        }
    }

    /// Whether the problem ends as soon as its source is heard.
    fn ends_when_heard(self) -> bool {
        matches!(
            self,
            ProblemReason::ForeignKey | ProblemReason::ForeignCluster | ProblemReason::Unproven | ProblemReason::Unsent
        )
    }
}

/// A problem as shown to operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    pub reason: ProblemReason,
    /// An address, a configured peer, a node's name, or a configuration key. Empty if the source is this node.
    pub source: String,
    pub detail: String,
    /// How often it happened or was found.
    pub count: u64,
    /// Time since the first and the last event.
    pub since_seconds: f64,
    pub age_seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ProblemSource {
    Addr(SocketAddr),
    Name(String),
}

impl std::fmt::Display for ProblemSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProblemSource::Addr(addr) => addr.fmt(f),
            ProblemSource::Name(name) => f.write_str(name),
        }
    }
}

struct ProblemEntry {
    source: ProblemSource,
    detail: String,
    count: u64,
    first: Instant,
    last: Instant,
    is_expected: bool,
}

/// All sources of one reason.
#[derive(Default)]
struct Group {
    entries: Vec<ProblemEntry>,
    /// Events of sources that are not kept, and the time of the last one.
    others: u64,
    others_at: Option<Instant>,
    logged_at: Option<Instant>,
    logged: Vec<ProblemSource>,
}

/// The current problems. The pure core.
struct ProblemLog {
    groups: Vec<Group>,
    /// Addresses of configured peers.
    expected: BTreeSet<SocketAddr>,
    /// Expected addresses that have ever answered.
    answered: BTreeSet<SocketAddr>,
    /// Expected addresses that do not answer now, and the result of a call to the same TCP port.
    silent: BTreeMap<SocketAddr, String>,
}

/// A log line.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Begun { reason: ProblemReason, sources: String, events: u64, others: u64 },
    Over { reason: ProblemReason },
}

impl ProblemLog {
    fn new() -> Self {
        let groups = ProblemReason::ALL.iter().map(|_| Group::default()).collect();
        Self { groups, expected: BTreeSet::new(), answered: BTreeSet::new(), silent: BTreeMap::new() }
    }

    /// Records an event. `detail` is called when the source is new.
    fn event(&mut self, reason: ProblemReason, source: ProblemSource, detail: impl FnOnce() -> String, now: Instant) {
        if let ProblemSource::Addr(addr) = &source
            && reason == ProblemReason::ForeignKey
            && self.group(ProblemReason::ForeignCluster).has(&ProblemSource::Addr(*addr), now)
        {
            // The sender has already reported why its gossip cannot be decrypted.
            return;
        }
        if reason == ProblemReason::ForeignCluster {
            self.group_mut(ProblemReason::ForeignKey).entries.retain(|entry| entry.source != source);
        }
        let is_expected = matches!(&source, ProblemSource::Addr(addr) if self.expected.contains(addr));
        let group = self.group_mut(reason);
        if let Some(entry) = group.entries.iter_mut().find(|entry| entry.source == source) {
            if is_over(entry, now) {
                (entry.count, entry.first, entry.detail) = (0, now, detail());
            }
            (entry.count, entry.last) = (entry.count + 1, now);
        } else if group.make_room(is_expected, now) {
            group.entries.push(ProblemEntry { source, detail: detail(), count: 1, first: now, last: now, is_expected });
        } else {
            (group.others, group.others_at) = (group.others_now(now) + 1, Some(now));
        }
    }

    /// Replaces all current sources of a reason that is checked periodically.
    fn state(&mut self, reason: ProblemReason, found: Vec<(String, String)>, now: Instant) {
        let group = self.group_mut(reason);
        (group.others, group.others_at) = (found.len().saturating_sub(MAX_SOURCES) as u64, Some(now));
        let before = std::mem::take(&mut group.entries);
        let entry = |(name, detail): (String, String)| {
            let source = ProblemSource::Name(name);
            let known = before.iter().find(|entry| entry.source == source);
            let (count, first) = known.map_or((0, now), |entry| (entry.count, entry.first));
            ProblemEntry { source, detail, count: count + 1, first, last: now, is_expected: true }
        };
        group.entries = found.into_iter().take(MAX_SOURCES).map(entry).collect();
    }

    /// An address was heard: a node with our key and cluster id.
    fn heard(&mut self, addr: SocketAddr) {
        if self.expected.contains(&addr) {
            self.answered.insert(addr);
        }
        for reason in ProblemReason::ALL.into_iter().filter(|reason| reason.ends_when_heard()) {
            let entries = &mut self.group_mut(reason).entries;
            if !entries.is_empty() {
                entries.retain(|entry| entry.source != ProblemSource::Addr(addr));
            }
        }
    }

    fn expect(&mut self, addrs: BTreeSet<SocketAddr>) {
        self.answered.retain(|addr| addrs.contains(addr));
        self.expected = addrs;
    }

    fn group(&self, reason: ProblemReason) -> &Group {
        &self.groups[reason as usize]
    }

    fn group_mut(&mut self, reason: ProblemReason) -> &mut Group {
        &mut self.groups[reason as usize]
    }

    /// The current problems, by reason.
    fn list(&self, now: Instant) -> Vec<Problem> {
        let of = |reason: ProblemReason| {
            self.group(reason).visible(reason, now).map(move |entry| Problem {
                reason,
                source: entry.source.to_string(),
                detail: entry.detail.clone(),
                count: entry.count,
                since_seconds: now.saturating_duration_since(entry.first).as_secs_f64(),
                age_seconds: now.saturating_duration_since(entry.last).as_secs_f64(),
            })
        };
        ProblemReason::ALL.into_iter().flat_map(of).collect()
    }

    /// The log lines that are due. A reason has at most one per minute.
    fn lines(&mut self, now: Instant) -> Vec<Line> {
        ProblemReason::ALL.into_iter().filter_map(|reason| self.group_mut(reason).line(reason, now)).collect()
    }
}

fn is_over(entry: &ProblemEntry, now: Instant) -> bool {
    now.saturating_duration_since(entry.last) > FADE
}

impl Group {
    fn has(&self, source: &ProblemSource, now: Instant) -> bool {
        self.entries.iter().any(|entry| entry.source == *source && !is_over(entry, now))
    }

    /// Makes room for a source. Returns false if it is not to be kept.
    fn make_room(&mut self, is_expected: bool, now: Instant) -> bool {
        if self.entries.len() < MAX_SOURCES {
            return true;
        }
        let may_go = |entry: &ProblemEntry| is_over(entry, now) || (is_expected && !entry.is_expected);
        let victim = self.entries.iter().position(may_go);
        victim.map(|at| self.entries.remove(at)).is_some()
    }

    fn others_now(&self, now: Instant) -> u64 {
        let is_recent = self.others_at.is_some_and(|at| now.saturating_duration_since(at) <= FADE);
        if is_recent { self.others } else { 0 }
    }

    fn visible(&self, reason: ProblemReason, now: Instant) -> impl Iterator<Item = &ProblemEntry> {
        let (count, span) = reason.threshold();
        // A sender that keeps changing its address is still noticed.
        let is_crowded = self.others_now(now) >= count;
        self.entries.iter().filter(move |entry| {
            let is_settled = entry.count >= count && entry.last.saturating_duration_since(entry.first) >= span;
            !is_over(entry, now) && (is_settled || is_crowded)
        })
    }

    fn line(&mut self, reason: ProblemReason, now: Instant) -> Option<Line> {
        let seen: Vec<&ProblemEntry> = self.visible(reason, now).collect();
        let sources: Vec<ProblemSource> = seen.iter().map(|entry| entry.source.clone()).collect();
        let since = self.logged_at.map(|at| now.saturating_duration_since(at));
        if seen.is_empty() {
            let was_logged = !self.logged.is_empty();
            self.entries.retain(|entry| !is_over(entry, now));
            self.logged.clear();
            return was_logged.then_some(Line::Over { reason });
        }
        let spacing = if sources == self.logged { LOG_REPEAT } else { LOG_SPACING };
        if since.is_some_and(|since| since < spacing) {
            return None;
        }
        let describe = |entry: &&ProblemEntry| match (entry.source.to_string(), entry.detail.as_str()) {
            (source, "") => source,
            (source, detail) if source.is_empty() => detail.to_owned(),
            (source, detail) => format!("{source} ({detail})"),
        };
        let line = Line::Begun {
            reason,
            sources: seen.iter().map(describe).collect::<Vec<_>>().join(", "),
            events: seen.iter().map(|entry| entry.count).sum(),
            others: self.others_now(now),
        };
        (self.logged_at, self.logged) = (Some(now), sources);
        Some(line)
    }
}

/// The handle to the problem log. Cheap to clone.
#[derive(Clone)]
pub struct Problems(Arc<Mutex<ProblemLog>>);

impl Default for Problems {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(ProblemLog::new())))
    }
}

impl Problems {
    /// Records an event caused by this address. `detail` is called when the source is new.
    pub fn event(&self, reason: ProblemReason, from: SocketAddr, detail: impl FnOnce() -> String) {
        self.0.lock().event(reason, ProblemSource::Addr(from), detail, Instant::now());
    }

    /// Records an event of a source that is not a gossip address.
    pub fn event_at(&self, reason: ProblemReason, source: &str, detail: impl FnOnce() -> String) {
        self.0.lock().event(reason, ProblemSource::Name(source.to_owned()), detail, Instant::now());
    }

    /// Sets all current sources, as (source, detail), of a reason that is checked periodically.
    pub fn state(&self, reason: ProblemReason, found: Vec<(String, String)>) {
        self.0.lock().state(reason, found, Instant::now());
    }

    /// A node of this cluster was heard from this address, or has answered there.
    pub fn heard(&self, addr: SocketAddr) {
        self.0.lock().heard(addr);
    }

    /// Sets the addresses of configured peers.
    pub fn expect(&self, addrs: BTreeSet<SocketAddr>) {
        self.0.lock().expect(addrs);
    }

    /// Whether this expected address has ever answered.
    pub fn has_answered(&self, addr: &SocketAddr) -> bool {
        self.0.lock().answered.contains(addr)
    }

    /// Sets the expected addresses that do not answer now.
    pub fn set_silent(&self, addrs: BTreeSet<SocketAddr>) {
        let silent = &mut self.0.lock().silent;
        let before = std::mem::take(silent);
        *silent = addrs.into_iter().map(|addr| (addr, before.get(&addr).cloned().unwrap_or_default())).collect();
    }

    pub fn silent(&self) -> Vec<SocketAddr> {
        self.0.lock().silent.keys().copied().collect()
    }

    /// Adds details about a silent address.
    pub fn explain(&self, addr: SocketAddr, detail: String) {
        if let Some(known) = self.0.lock().silent.get_mut(&addr) {
            *known = detail;
        }
    }

    /// What is known about a silent address; empty if nothing.
    pub fn explanation(&self, addr: &SocketAddr) -> String {
        self.0.lock().silent.get(addr).cloned().unwrap_or_default()
    }

    /// Ends a problem of this source.
    pub fn clear(&self, reason: ProblemReason, source: &str) {
        let mut log = self.0.lock();
        log.group_mut(reason)
            .entries
            .retain(|entry| !matches!(&entry.source, ProblemSource::Name(name) if name == source));
    }

    /// The current problems.
    pub fn list(&self) -> Vec<Problem> {
        self.0.lock().list(Instant::now())
    }

    /// Logs and counts the problems. Call it about every second.
    pub fn publish(&self, metrics: &Metrics) {
        let (lines, problems) = {
            let (mut log, now) = (self.0.lock(), Instant::now());
            (log.lines(now), log.list(now))
        };
        for reason in ProblemReason::ALL {
            let count = problems.iter().filter(|problem| problem.reason == reason).count();
            metrics.cluster_problems.with([reason.label()]).set(count as f64);
        }
        for line in lines {
            match line {
                Line::Begun { reason: ProblemReason::NameTaken, .. } => {
                    tracing::error!(
                        reason = ProblemReason::NameTaken.label(),
                        "{}",
                        ProblemReason::NameTaken.explanation()
                    );
                }
                Line::Begun { reason, sources, events, others } => {
                    tracing::warn!(reason = reason.label(), sources, events, others, "{}", reason.explanation());
                }
                Line::Over { reason } => tracing::info!(reason = reason.label(), "a problem of the cluster is over"),
            }
        }
    }
}

#[cfg(test)]
#[path = "problems_tests.rs"]
mod tests;
