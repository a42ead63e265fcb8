//! Measures the engine's pace: the seconds that one unit of work takes. The time of each step is divided by the usual cost of
//! such a step in units. So a full batch, a long prefill and the synthetic inference of an idle node give the same figure, and
//! nodes with the same fingerprint can be compared. Pure: time is passed in.
//!
//! One unit is the work of the first step that computed a single token. Every node starts with the same synthetic inference, so
//! the unit is the same everywhere. Costs are learned as ratios of steps, so a node may be slow while it learns them.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::types::Pace;

const SLOT: Duration = Duration::from_millis(100);
/// A short window finds slowness quickly. Its longest step is left out, because a single pause is not slowness.
const SHORT_SLOTS: u64 = 6;
/// A long window finds nodes that stand still most of the time and run at full speed in between.
const LONG_SLOTS: u64 = 24;
/// Window for the mean time of a step.
const STEP_SLOTS: u64 = 15;
/// The short window is extended into the past until it holds this many steps.
const SHORT_STEPS: u32 = 4;
/// With this many steps or fewer the short window says nothing.
const MIN_SHORT_STEPS: u32 = 2;
/// After a break of this length without work, older measurements are kept only until this many new steps were measured.
const BREAK: Duration = Duration::from_millis(700);
const STEPS_AFTER_BREAK: u32 = 3;
/// A running step counts once it has taken this long.
const LATE: Duration = Duration::from_secs(1);
/// The cost of a kind is learned from this many steps that directly follow a step of another kind, and is then fixed: costs
/// that kept following each other would drift. Each observation has at least the weight below.
const MAX_OBSERVATIONS: u32 = 256;
const LEAST_WEIGHT: f64 = 1.0 / 16.0;
/// Up to this many positions, attention costs little compared with the rest of the model.
const SHORT_CONTEXT: usize = 512;
/// How many kinds' costs are kept.
const MAX_KINDS: usize = 256;

/// Steps of one kind have as many tokens, and attend to as many positions, within a factor of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    tokens: u32,
    attended: u32,
}

/// What a step of a kind costs that has as many tokens and attends to as many positions as the first one had.
#[derive(Clone, Copy, Debug)]
struct Cost {
    units: f64,
    observations: u32,
    tokens: f64,
    attended: f64,
}

/// The steps that ended in one slot of time.
#[derive(Clone, Debug)]
struct Slot {
    number: u64,
    kinds: Vec<KindSum>,
    longest: LongStep,
}

#[derive(Clone, Copy, Debug)]
struct LongStep {
    kind: Kind,
    scale: f64,
    seconds: f64,
}

/// What a step computes: so many tokens, which together attend to so many positions.
#[derive(Clone, Copy, Debug)]
struct Work {
    tokens: f64,
    attended: f64,
}

#[derive(Clone, Copy, Debug)]
struct KindSum {
    kind: Kind,
    steps: u32,
    /// The steps' work, as multiples of their kind's cost.
    scale: f64,
    seconds: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Longest {
    seconds: f64,
    units: f64,
}

/// Sums over slots.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    steps: u32,
    seconds: f64,
    units: f64,
    longest: Longest,
}

#[derive(Debug)]
pub(super) struct PaceMeter {
    epoch: Instant,
    costs: BTreeMap<Kind, Cost>,
    /// Since the last break, the oldest first.
    slots: VecDeque<Slot>,
    steps_since_break: u32,
    /// What was measured before the last break.
    before_break: Option<Measured>,
    last_end: Instant,
    last_units: f64,
    /// The steps that are under way, the oldest first.
    launched: VecDeque<Work>,
    /// The step that ended when the present one began.
    before: Option<StepBefore>,
    /// Since when the engine has had work and has ended no step.
    busy_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct StepBefore {
    kind: Kind,
    seconds: f64,
    units: f64,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    unit_seconds: f64,
    step_seconds: f64,
    at: Instant,
}

impl PaceMeter {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            costs: BTreeMap::new(),
            slots: VecDeque::new(),
            steps_since_break: 0,
            before_break: None,
            last_end: now,
            last_units: 1.0,
            launched: VecDeque::new(),
            before: None,
            busy_since: None,
        }
    }

    /// The engine has something to compute.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.busy_since.is_none() {
            self.busy_since = Some(now);
            if now.saturating_duration_since(self.last_end) >= BREAK {
                self.before_break = self.measured(now);
                self.steps_since_break = 0;
                self.slots.clear();
            }
        }
    }

    /// Nothing is left to compute: what comes until the next beginning is no work.
    pub(super) fn rest(&mut self) {
        self.busy_since = None;
        self.before = None;
        self.launched.clear();
    }

    /// A step of this many tokens begins, after those that are under way; together its tokens attend to this many positions.
    pub(super) fn launch(&mut self, tokens: usize, attended: usize) {
        let attended = attended.max(tokens * SHORT_CONTEXT);
        self.launched.push_back(Work { tokens: tokens.max(1) as f64, attended: attended.max(1) as f64 });
    }

    /// The step that was launched last is not computed.
    pub(super) fn cancel(&mut self) {
        self.launched.pop_back();
    }

    /// The oldest step that is under way has ended.
    pub(super) fn step(&mut self, now: Instant) {
        let begin = self.busy_since.replace(now).unwrap_or(now);
        let seconds = now.saturating_duration_since(begin).as_secs_f64();
        let Some(work) = self.launched.pop_front() else { return };
        // Without a duration nothing is measured: a simulated step after an idle time.
        if seconds == 0.0 {
            return;
        }
        let kind = work.kind();
        if let Some(cost) = self.cost(kind, work.tokens, work.attended, seconds, now) {
            self.record(kind, cost, cost.scale(work.tokens, work.attended), seconds, now);
        }
    }

    /// How fast the engine is; `None` until it has computed a single token in a step.
    pub(super) fn pace(&self, now: Instant) -> Option<Pace> {
        let measured = self.measured(now)?;
        let age = now.saturating_duration_since(measured.at);
        let pending = self.busy_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        // Streams wait for the step that is under way, however much work it is.
        let step_seconds = measured.step_seconds.max(pending.as_secs_f64());
        let units = self.launched.front().map_or(self.last_units, |work| self.expected_units(*work));
        let at_least = pending.as_secs_f64() / units;
        Some(match pending >= LATE && at_least > measured.unit_seconds {
            true => {
                let sum = self.sum(LONG_SLOTS, now);
                let unit_seconds = (sum.seconds + pending.as_secs_f64()) / (sum.units + units);
                Pace { unit_seconds: unit_seconds.max(measured.unit_seconds), step_seconds, age: Duration::ZERO }
            }
            false => Pace { unit_seconds: measured.unit_seconds, step_seconds, age },
        })
    }

    /// What a step costs that has not ended: at most, if no step of its kind was measured.
    fn expected_units(&self, work: Work) -> f64 {
        let kind = work.kind();
        match self.costs.get(&kind) {
            Some(cost) => cost.units * cost.scale(work.tokens, work.attended),
            None => self.bounded(kind, f64::INFINITY, work.tokens, work.attended),
        }
    }

    /// What the steps that have ended say.
    fn measured(&self, now: Instant) -> Option<Measured> {
        if self.steps_since_break < STEPS_AFTER_BREAK
            && let Some(before) = self.before_break
        {
            return Some(before);
        }
        let last = self.slots.back()?;
        let window = |slots| {
            let mut sum = self.sum(slots, now);
            if sum.steps == 0 {
                self.add(&mut sum, last);
            }
            sum
        };
        let (short, long, stepping) = (self.short(now), window(LONG_SLOTS), window(STEP_SLOTS));
        let steady = long.seconds / long.units;
        Some(Measured {
            unit_seconds: short.without_longest().map_or(steady, |without| without.max(steady)),
            step_seconds: stepping.seconds / f64::from(stepping.steps),
            at: self.last_end,
        })
    }

    /// What steps of the kind cost. `None` for a step of an unknown kind while the engine's pace is unknown.
    #[expect(clippy::disallowed_methods, reason = "an estimate; no token depends on it")]
    fn cost(&mut self, kind: Kind, tokens: f64, attended: f64, seconds: f64, now: Instant) -> Option<Cost> {
        if self.costs.is_empty() {
            let unit = Cost { units: 1.0, observations: MAX_OBSERVATIONS, tokens, attended };
            return (tokens == 1.0).then(|| self.learn(kind, unit));
        }
        let known = self.costs.get(&kind).copied();
        if let Some(cost) = known.filter(|cost| cost.observations >= MAX_OBSERVATIONS) {
            return Some(cost);
        }
        // What the step before took, which had a cost of its own: the same slowness held for both.
        let before = self.before.filter(|before| before.kind != kind);
        let seen = before.map(|before| seconds * before.units / before.seconds);
        let cost = match (known, seen) {
            (Some(cost), None) => return Some(cost),
            (Some(cost), Some(seen)) => {
                let observations = cost.observations + 1;
                let weight = (1.0 / f64::from(observations)).max(LEAST_WEIGHT);
                // The mean of logarithms: twice and half of a cost are equally wrong.
                let seen = seen / cost.scale(tokens, attended);
                let mean = cost.units * (weight * (seen / cost.units).ln()).exp();
                Cost { units: self.bounded(kind, mean, cost.tokens, cost.attended), observations, ..cost }
            }
            (None, seen) => {
                let guess = seen.map_or_else(|| Some(seconds / self.measured(now)?.unit_seconds), Some)?;
                let units = self.bounded(kind, guess, tokens, attended);
                Cost { units, observations: 1, tokens, attended }
            }
        };
        Some(self.learn(kind, cost))
    }

    fn learn(&mut self, kind: Kind, cost: Cost) -> Cost {
        if self.costs.len() < MAX_KINDS || self.costs.contains_key(&kind) {
            self.costs.insert(kind, cost);
        }
        cost
    }

    /// A step costs no less than one that is smaller in every respect, and work grows no faster than tokens or positions.
    fn bounded(&self, kind: Kind, units: f64, tokens: f64, attended: f64) -> f64 {
        let known = || self.costs.iter().filter(|(known, _)| **known != kind).map(|(_, cost)| cost);
        let smaller = known().filter(|cost| cost.tokens <= tokens && cost.attended <= attended);
        let least = smaller.map(|cost| cost.units).fold(0.0, f64::max);
        let grown = known().map(|cost| cost.units * (tokens / cost.tokens).max(attended / cost.attended).max(1.0));
        let most = grown.fold(f64::INFINITY, f64::min);
        units.min(most).max(least.min(most))
    }

    fn record(&mut self, kind: Kind, cost: Cost, scale: f64, seconds: f64, now: Instant) {
        let number = self.number(now);
        if self.slots.back().is_none_or(|slot| slot.number != number) {
            while self.slots.front().is_some_and(|slot| slot.number + LONG_SLOTS < number) {
                self.slots.pop_front();
            }
            let longest = LongStep { kind, scale, seconds: 0.0 };
            self.slots.push_back(Slot { number, kinds: Vec::new(), longest });
        }
        let slot = self.slots.back_mut().expect("just made sure");
        match slot.kinds.iter_mut().find(|sum| sum.kind == kind) {
            Some(sum) => {
                sum.steps += 1;
                sum.scale += scale;
                sum.seconds += seconds;
            }
            None => slot.kinds.push(KindSum { kind, steps: 1, scale, seconds }),
        }
        if seconds > slot.longest.seconds {
            slot.longest = LongStep { kind, scale, seconds };
        }
        let units = cost.units * scale;
        self.last_end = now;
        self.last_units = units;
        self.before = Some(StepBefore { kind, seconds, units });
        self.steps_since_break += 1;
    }

    fn number(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis() / SLOT.as_millis()).unwrap_or(u64::MAX)
    }

    fn short(&self, now: Instant) -> Sum {
        let number = self.number(now);
        let mut sum = Sum::default();
        for slot in self.slots.iter().rev().take_while(|slot| slot.number + LONG_SLOTS > number) {
            if slot.number + SHORT_SLOTS <= number && sum.steps >= SHORT_STEPS {
                break;
            }
            self.add(&mut sum, slot);
        }
        sum
    }

    /// Of the last so many slots.
    fn sum(&self, slots: u64, now: Instant) -> Sum {
        let number = self.number(now);
        let mut sum = Sum::default();
        let recent = self.slots.iter().rev().take_while(|slot| slot.number + slots > number);
        recent.for_each(|slot| self.add(&mut sum, slot));
        sum
    }

    fn add(&self, sum: &mut Sum, slot: &Slot) {
        for kind_sum in &slot.kinds {
            sum.steps += kind_sum.steps;
            sum.seconds += kind_sum.seconds;
            sum.units += kind_sum.scale * self.units_of(kind_sum.kind);
        }
        let LongStep { kind, scale, seconds } = slot.longest;
        if seconds > sum.longest.seconds {
            sum.longest = Longest { seconds, units: scale * self.units_of(kind) };
        }
    }

    /// A kind for which there was no room counts as a unit.
    fn units_of(&self, kind: Kind) -> f64 {
        self.costs.get(&kind).map_or(1.0, |cost| cost.units)
    }
}

impl Work {
    fn kind(self) -> Kind {
        Kind { tokens: (self.tokens as u32).ilog2(), attended: (self.attended as u64).ilog2() }
    }
}

impl Cost {
    /// How many times as much a step of the kind costs that has so many tokens and attends to so many positions: work grows
    /// no faster than both and shrinks no faster than both, and the middle between these bounds is at most a factor of
    /// two from the truth.
    fn scale(&self, tokens: f64, attended: f64) -> f64 {
        let (by_tokens, by_attended) = (tokens / self.tokens, attended / self.attended);
        (by_tokens.max(by_attended).max(1.0) * by_tokens.min(by_attended).min(1.0)).sqrt()
    }
}

impl Sum {
    /// Seconds per unit of all steps but the longest, if that leaves enough.
    fn without_longest(&self) -> Option<f64> {
        let units = self.units - self.longest.units;
        (self.steps > MIN_SHORT_STEPS && units > 0.0).then(|| (self.seconds - self.longest.seconds) / units)
    }
}

#[cfg(test)]
#[path = "pace_meter_tests.rs"]
mod tests;
