//! The addresses of the configured peers. Names are resolved periodically, because the addresses behind a headless service
//! change with every roll-out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Interval of lookups of a name, after success and after failure.
const REFRESH: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
/// Maximum number of addresses per name.
const MAX_ADDRESSES: usize = 256;

/// The addresses of a configured peer, and the error of the last lookup if it failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resolved {
    addresses: Vec<SocketAddr>,
    error: Option<String>,
}

/// By the configured name.
type Addresses = BTreeMap<String, Resolved>;

/// A configured peer, for diagnosis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seed {
    /// The peer as configured.
    pub(super) peer: String,
    pub(super) addresses: Vec<SocketAddr>,
    /// Why its name does not resolve.
    pub(super) error: Option<String>,
}

/// Keeps the addresses up to date until it is dropped.
pub(super) struct Seeds {
    addresses: watch::Receiver<Addresses>,
    _lookups: JoinSet<()>,
    /// Position in the round-robin order.
    turn: usize,
}

impl Seeds {
    /// Each name has its own task, so that a lookup that hangs delays no other.
    pub(super) fn start(peers: &[String]) -> Self {
        let literal = |peer: &String| {
            let addresses = vec![peer.parse().ok()?];
            Some((peer.clone(), Resolved { addresses, error: None }))
        };
        let literals: Addresses = peers.iter().filter_map(literal).collect();
        let names: Vec<String> = peers.iter().filter(|peer| !literals.contains_key(*peer)).cloned().collect();
        let (sender, addresses) = watch::channel(literals);
        let mut lookups = JoinSet::new();
        for name in names {
            lookups.spawn(resolve_again_and_again(name, sender.clone()));
        }
        Self { addresses, _lookups: lookups, turn: 0 }
    }

    fn all(&self) -> BTreeSet<SocketAddr> {
        self.addresses.borrow().values().flat_map(|resolved| resolved.addresses.iter().copied()).collect()
    }

    /// Peers that have been looked up.
    pub(super) fn list(&self) -> Vec<Seed> {
        let seed = |(peer, resolved): (&String, &Resolved)| {
            let Resolved { addresses, error } = resolved.clone();
            Seed { peer: peer.clone(), addresses, error }
        };
        self.addresses.borrow().iter().map(seed).collect()
    }

    /// The next `count` addresses for which `is_wanted` is true, in round-robin order.
    pub(super) fn next(&mut self, count: usize, is_wanted: impl Fn(SocketAddr) -> bool) -> Vec<SocketAddr> {
        let addresses: BTreeSet<SocketAddr> = self.all().into_iter().filter(|addr| is_wanted(*addr)).collect();
        let count = count.min(addresses.len());
        let start = self.turn.checked_rem(addresses.len()).unwrap_or(0);
        self.turn = self.turn.wrapping_add(count);
        addresses.iter().cycle().skip(start).take(count).copied().collect()
    }
}

async fn resolve_again_and_again(name: String, addresses: watch::Sender<Addresses>) {
    loop {
        let found = lookup_host(&name).await;
        let pause = if found.is_ok() { REFRESH } else { RETRY };
        addresses.send_if_modified(|addresses| {
            let resolved = addresses.entry(name.clone()).or_default();
            let before = resolved.clone();
            match found {
                Ok(found) => {
                    let found: BTreeSet<SocketAddr> = found.take(MAX_ADDRESSES).collect();
                    *resolved = Resolved { addresses: found.into_iter().collect(), error: None };
                }
                // A name that does not resolve now keeps its previous addresses.
                Err(error) => resolved.error = Some(error.to_string()),
            }
            *resolved != before
        });
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[tokio::test]
    async fn addresses_take_turns_and_unwanted_ones_do_not() {
        let mut seeds = Seeds::start(&["10.0.0.1:1".into(), "10.0.0.2:1".into(), "10.0.0.3:1".into()]);
        let turns: Vec<SocketAddr> = (0..4).flat_map(|_| seeds.next(1, |_| true)).collect();
        assert_eq!(turns, ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.1:1"].map(addr));
        assert_eq!(seeds.next(5, |found| found != addr("10.0.0.2:1")).len(), 2);
        assert_eq!(seeds.next(5, |_| false), []);
        assert_eq!(Seeds::start(&[]).next(1, |_| true), []);
    }

    #[tokio::test]
    async fn names_are_resolved_and_one_that_is_unknown_stops_no_other() {
        let mut seeds = Seeds::start(&["no-such-host.invalid:1".into(), "localhost:7".into()]);
        let resolved = seeds.addresses.wait_for(|addresses| {
            let has = |peer: &str| addresses.contains_key(peer);
            has("localhost:7") && has("no-such-host.invalid:1")
        });
        tokio::time::timeout(Duration::from_secs(10), resolved).await.expect("in time").expect("running");
        let found = seeds.next(9, |_| true);
        assert!(!found.is_empty() && found.iter().all(|addr| addr.ip().is_loopback() && addr.port() == 7), "{found:?}");
        let unknown = seeds.list().into_iter().find(|seed| seed.peer.starts_with("no-such-host")).expect("looked up");
        assert!(unknown.error.is_some() && unknown.addresses.is_empty(), "{unknown:?}");
    }
}
