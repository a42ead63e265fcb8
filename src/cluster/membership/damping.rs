//! Flap damping, after BGP's model (RFC 2439): each flap adds a penalty, penalties decay with a half-life, and a node with a
//! high penalty gets less traffic. Pure; time is passed in.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// Penalty for a node that disappears without announcing it.
pub(super) const LOSS: f64 = 1.0;
/// Penalty for a node that becomes unready.
pub(super) const UNREADINESS: f64 = 0.5;
/// A single loss does not count as flapping.
const ALLOWANCE: f64 = 1.0;
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Penalties are capped, so that a node has recovered after at most `HALF_LIFE * log2(MAX_PENALTY / ALLOWANCE)`, two and a half
/// minutes, without flapping.
const MAX_PENALTY: f64 = 5.5;
/// Minimum stability: a flapping node still gets a little traffic, so that its recovery shows.
const FLOOR: f64 = 0.1;
/// Stability is rounded to steps, since views are compared for changes.
const STEPS: f64 = 16.0;
/// Lower penalties are removed.
const FORGOTTEN: f64 = 0.1;
/// Names with a penalty. Beyond this, the smallest penalty is removed.
const MAX_NAMES: usize = 1024;

/// Penalties by name.
pub(super) struct Damper<K> {
    penalties: BTreeMap<K, Penalty>,
}

#[derive(Clone, Copy)]
struct Penalty {
    value: f64,
    at: Instant,
}

impl Penalty {
    #[expect(clippy::disallowed_methods, reason = "a weight; no token depends on it")]
    fn value(self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        self.value * (-age / HALF_LIFE.as_secs_f64()).exp2()
    }
}

impl<K: Ord + Clone> Damper<K> {
    pub(super) fn new() -> Self {
        Self { penalties: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, name: &K, amount: f64, now: Instant) {
        let value = (self.penalty(name, now) + amount).min(MAX_PENALTY);
        self.penalties.insert(name.clone(), Penalty { value, at: now });
        if self.penalties.len() > MAX_NAMES {
            self.penalties.retain(|_, penalty| penalty.value(now) >= FORGOTTEN);
        }
        if self.penalties.len() > MAX_NAMES {
            let values = self.penalties.iter().map(|(name, penalty)| (name, penalty.value(now)));
            let least = values.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(name, _)| name.clone());
            least.map(|name| self.penalties.remove(&name));
        }
    }

    /// 1 for a stable node, `FLOOR` for a flapping one, and `STEPS` values in between.
    #[expect(clippy::disallowed_methods, reason = "a weight; no token depends on it")]
    pub(super) fn stability(&self, name: &K, now: Instant) -> f64 {
        let excess = (self.penalty(name, now) - ALLOWANCE).max(0.0);
        (((-excess).exp2() * STEPS).round() / STEPS).max(FLOOR)
    }

    fn penalty(&self, name: &K, now: Instant) -> f64 {
        self.penalties.get(name).map_or(0.0, |penalty| penalty.value(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[tokio::test]
    async fn one_loss_is_forgiven_and_repeated_losses_are_not() {
        let start = Instant::now();
        let mut damper = Damper::new();
        assert_eq!(damper.stability(&"a", start), 1.0);
        damper.add(&"a", LOSS, start);
        assert_eq!(damper.stability(&"a", start), 1.0);
        damper.add(&"a", LOSS, after(start, 5));
        let twice = damper.stability(&"a", after(start, 5));
        damper.add(&"a", LOSS, after(start, 10));
        let thrice = damper.stability(&"a", after(start, 10));
        assert!(FLOOR < thrice && thrice < twice && twice < 0.7, "{twice} {thrice}");
        assert_eq!(damper.stability(&"b", after(start, 10)), 1.0, "another's flaps are its own");
    }

    #[tokio::test]
    async fn however_much_it_flapped_it_recovers_within_a_bounded_time() {
        let start = Instant::now();
        let mut damper = Damper::new();
        for second in 0..600 {
            damper.add(&"a", LOSS, after(start, second));
        }
        assert_eq!(damper.stability(&"a", after(start, 600)), FLOOR);
        let recovery: Vec<f64> = (600..=760).map(|second| damper.stability(&"a", after(start, second))).collect();
        assert!(recovery.is_sorted());
        assert_eq!(recovery.last(), Some(&1.0));
    }

    #[tokio::test]
    async fn rare_losses_never_add_up() {
        let start = Instant::now();
        let mut damper = Damper::new();
        for quarter in 0..100 {
            let now = after(start, quarter * 900);
            damper.add(&"a", LOSS, now);
            assert_eq!(damper.stability(&"a", now), 1.0);
        }
    }

    #[tokio::test]
    async fn memory_is_bounded_and_the_worst_are_kept() {
        let start = Instant::now();
        let mut damper = Damper::new();
        damper.add(&u32::MAX, MAX_PENALTY, start);
        for name in 0..5000 {
            damper.add(&name, LOSS, start);
        }
        assert!(damper.penalties.len() <= MAX_NAMES);
        assert_eq!(damper.stability(&u32::MAX, start), FLOOR);
        damper.add(&7, LOSS, after(start, 3600));
        assert!(damper.penalties.len() <= MAX_NAMES);
    }

    /// A node that is up and down for ten seconds each gets little traffic, and recovers after a simulated hour.
    #[tokio::test]
    async fn a_node_that_comes_and_goes_gets_little() {
        let start = Instant::now();
        let mut damper = Damper::new();
        let mut seen = Vec::new();
        for round in 0..30 {
            damper.add(&"a", LOSS, after(start, round * 20));
            seen.push(damper.stability(&"a", after(start, round * 20 + 10)));
        }
        assert_eq!(seen[0], 1.0);
        assert!(seen[5..].iter().all(|stability| (FLOOR..=0.25).contains(stability)), "{seen:?}");
        assert_eq!(damper.stability(&"a", after(start, 30 * 20 + 3600)), 1.0);
    }
}
