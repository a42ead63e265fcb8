//! Looks every second for what separates this node from its configured peers: names that do not resolve, peers that have never
//! answered, or no peers at all. Introduces this node to silent addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::roster::Strangers;
use super::seeds::Seed;
use crate::cluster::problems::{ProblemReason, Problems};
use crate::cluster::seal::transport::SealedTransport;
use crate::cluster::{Config, PROTOCOL};

const INTERVAL: Duration = Duration::from_secs(1);
/// How long a peer may take to start and to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval of introductions to a silent address, and how many run at the same time.
const INTRODUCTION_INTERVAL: Duration = Duration::from_secs(5);
const MAX_INTRODUCTIONS: usize = 8;
/// Silent addresses listed when no peer is heard.
const MAX_NAMED: usize = 4;

pub(super) struct Diagnosis {
    problems: Problems,
    transport: SealedTransport,
    bound: SocketAddr,
    /// This node's gossip address, as others use it.
    advertised: SocketAddr,
    next: Instant,
    next_introductions: Instant,
    /// Since when each configured peer has had an address for gossip.
    since: BTreeMap<String, Instant>,
    last_company: Instant,
}

/// The findings about configured peers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Findings {
    unresolved: Vec<(String, String)>,
    /// Configured peers that have never answered, and their addresses.
    unheard: Vec<(String, Vec<SocketAddr>)>,
    /// Peers that only have addresses of the other IP version.
    unsuited: Vec<String>,
    /// Addresses to gossip with.
    expected: BTreeSet<SocketAddr>,
    /// Number of configured peers that are not this node, as far as known.
    others: usize,
}

impl Diagnosis {
    pub(super) fn new(
        problems: Problems,
        transport: SealedTransport,
        config: &Config,
        bound: SocketAddr,
        now: Instant,
    ) -> Self {
        Self {
            problems,
            transport,
            bound,
            advertised: config.gossip_advertised(bound),
            next: now,
            next_introductions: now,
            since: BTreeMap::new(),
            last_company: now,
        }
    }

    /// Whether this node can gossip with the address, and it is not this node's own.
    pub(super) fn is_for_gossip(&self, addr: SocketAddr) -> bool {
        addr.is_ipv4() == self.bound.is_ipv4() && addr != self.bound && addr != self.advertised
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next <= now
    }

    /// `live`: gossip addresses of the live nodes.
    pub(super) async fn run(&mut self, seeds: &[Seed], live: &[SocketAddr], strangers: Strangers, now: Instant) {
        self.next = now + INTERVAL;
        let findings = self.examine(seeds, live, now);
        if !live.is_empty() || findings.others == 0 {
            self.last_company = now;
        }
        let is_alone = now.saturating_duration_since(self.last_company) >= PATIENCE;
        let silent: BTreeSet<SocketAddr> = match is_alone {
            true => findings.expected.clone(),
            false => findings.unheard.iter().flat_map(|(_, addresses)| addresses.iter().copied()).collect(),
        };
        self.problems.expect(findings.expected.clone());
        self.problems.set_silent(silent.clone());
        self.tell(&findings, is_alone, &silent, strangers);
        if now >= self.next_introductions && !silent.is_empty() {
            self.next_introductions = now + INTRODUCTION_INTERVAL;
            for addr in silent.into_iter().take(MAX_INTRODUCTIONS) {
                self.transport.introduce(addr).await;
            }
        }
    }

    fn examine(&mut self, seeds: &[Seed], live: &[SocketAddr], now: Instant) -> Findings {
        let mut findings = Findings::default();
        for Seed { peer, addresses, error } in seeds {
            if let Some(error) = error {
                findings.unresolved.push((peer.clone(), error.clone()));
            }
            let usable: Vec<SocketAddr> = addresses.iter().copied().filter(|addr| self.is_for_gossip(*addr)).collect();
            findings.expected.extend(&usable);
            if usable.is_empty() {
                let is_other_family = |addr: &SocketAddr| addr.is_ipv4() != self.bound.is_ipv4();
                if !addresses.is_empty() && addresses.iter().all(is_other_family) {
                    findings.unsuited.push(peer.clone());
                }
                findings.others += usize::from(addresses.is_empty() || addresses.iter().any(is_other_family));
                continue;
            }
            findings.others += 1;
            let since = *self.since.entry(peer.clone()).or_insert(now);
            let is_met = usable.iter().any(|addr| live.contains(addr) || self.problems.has_answered(addr));
            if !is_met && now.saturating_duration_since(since) >= PATIENCE {
                findings.unheard.push((peer.clone(), usable));
            }
        }
        findings
    }

    fn tell(&self, findings: &Findings, is_alone: bool, silent: &BTreeSet<SocketAddr>, strangers: Strangers) {
        let explained = |addresses: &mut dyn Iterator<Item = SocketAddr>| {
            let told = addresses.map(|addr| (addr, self.problems.explanation(&addr)));
            let told = told.filter(|(_, detail)| !detail.is_empty()).take(MAX_NAMED);
            told.map(|(addr, detail)| format!("{addr}: {detail}")).collect::<Vec<_>>().join("; ")
        };
        let own_family = if self.bound.is_ipv4() { "IPv4" } else { "IPv6" };
        let unsuited = findings.unsuited.iter().map(|peer| {
            (peer.clone(), format!("it has no {own_family} address, but gossip_addr is an {own_family} address"))
        });
        let unheard =
            findings.unheard.iter().map(|(peer, addresses)| (peer.clone(), explained(&mut addresses.iter().copied())));
        let alone = is_alone.then(|| {
            let count = findings.others;
            let why = explained(&mut silent.iter().copied());
            (String::new(), if why.is_empty() { format!("{count} configured") } else { why })
        });
        let of_other_protocols = strangers.of_other_protocols.into_iter().map(|(node, protocol)| {
            (node.to_string(), format!("it speaks {protocol} of the protocol, this node {PROTOCOL}"))
        });
        let name_taken = strangers.is_superseded.then(Default::default);
        self.problems.state(ProblemReason::Alone, alone.into_iter().collect());
        self.problems.state(ProblemReason::Unheard, unsuited.chain(unheard).collect());
        self.problems.state(ProblemReason::Unresolved, findings.unresolved.clone());
        self.problems.state(ProblemReason::ForeignProtocol, of_other_protocols.collect());
        self.problems.state(ProblemReason::NameTaken, name_taken.into_iter().collect());
    }
}
