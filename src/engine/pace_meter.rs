//! How long a unit of work takes the engine, whatever it works on: every step is divided by what steps of its kind have
//! cost, so that a full batch, a long prefill and the synthetic inference of an idle node give the same figure. Nodes with
//! the same fingerprint do the same work for a unit, so their figures compare. Pure: time is passed in.
//!
//! A unit is the work of the first step that computed a single token; the synthetic inference that every node begins with
//! makes it the same everywhere. Costs are ratios, so it does not matter whether the node was slow when they were learned.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::types::Pace;

const SLOT: Duration = Duration::from_millis(100);
/// The window that finds out fast, without its longest step: one pause does not make an engine slow.
const SHORT_SLOTS: u64 = 6;
/// The window for a node that stands still most of the time and runs at full speed in between.
const LONG_SLOTS: u64 = 24;
/// The window for the time from step to step.
const STEP_SLOTS: u64 = 15;
/// The short window reaches further back until it has so many steps.
const SHORT_STEPS: u32 = 4;
/// Steps that it needs beside its longest.
const MIN_SHORT_STEPS: u32 = 2;
/// After so long without work, what was measured before is no evidence of the present; it stands until so many new steps
/// were measured.
const BREAK: Duration = Duration::from_millis(700);
const STEPS_AFTER_BREAK: u32 = 3;
/// A step that is under way counts from this on.
const LATE: Duration = Duration::from_secs(1);
/// A cost is learned from steps that directly follow one of another kind, the latest of which weigh this much at least, and
/// then stands: costs that followed one another forever would drift.
const MAX_OBSERVATIONS: u32 = 256;
const LEAST_WEIGHT: f64 = 1.0 / 16.0;
/// Below this context attention costs little beside the token's own products, whose number grows with the width of the model.
const SHORT_CONTEXT: usize = 512;
/// Kinds of steps whose cost is remembered.
const MAX_KINDS: usize = 256;

/// Steps of one kind have as many tokens, and attend to as many positions, within a factor of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    tokens: u32,
    attended: u32,
}

#[derive(Clone, Copy, Debug)]
struct Cost {
    units: f64,
    observations: u32,
    /// Of the first step of the kind.
    tokens: f64,
    attended: f64,
}

/// The steps that ended in one slot of time.
#[derive(Clone, Debug)]
struct Slot {
    number: u64,
    kinds: Vec<KindSum>,
    longest: Longest,
}

#[derive(Clone, Copy, Debug)]
struct KindSum {
    kind: Kind,
    steps: u32,
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
    }

    /// A step of this many tokens has ended; together they attend to this many positions.
    pub(super) fn step(&mut self, tokens: usize, attended: usize, now: Instant) {
        let begin = self.busy_since.replace(now).unwrap_or(now);
        let seconds = now.saturating_duration_since(begin).as_secs_f64();
        // Without a duration nothing is measured: a simulated step after an idle time.
        if seconds == 0.0 || tokens == 0 {
            return;
        }
        let attended = attended.max(tokens * SHORT_CONTEXT);
        let kind = Kind { tokens: tokens.ilog2(), attended: attended.ilog2() };
        if let Some(units) = self.units(kind, tokens as f64, attended as f64, seconds, now) {
            self.record(kind, seconds, units, now);
        }
    }

    /// How fast the engine is; `None` until it has computed a single token in a step.
    pub(super) fn pace(&self, now: Instant) -> Option<Pace> {
        let measured = self.measured(now)?;
        let age = now.saturating_duration_since(measured.at);
        let pending = self.busy_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let at_least = pending.as_secs_f64() / self.last_units;
        Some(match pending >= LATE && at_least > measured.unit_seconds {
            true => {
                let step_seconds = measured.step_seconds.max(pending.as_secs_f64());
                let sum = self.sum(LONG_SLOTS, now);
                let unit_seconds = (sum.seconds + pending.as_secs_f64()) / (sum.units + self.last_units);
                Pace { unit_seconds: unit_seconds.max(measured.unit_seconds), step_seconds, age: Duration::ZERO }
            }
            false => Pace { unit_seconds: measured.unit_seconds, step_seconds: measured.step_seconds, age },
        })
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

    /// What the step is worth. `None` for a step of an unknown kind while the engine's pace is unknown.
    fn units(&mut self, kind: Kind, tokens: f64, attended: f64, seconds: f64, now: Instant) -> Option<f64> {
        if self.costs.is_empty() {
            let unit = Cost { units: 1.0, observations: MAX_OBSERVATIONS, tokens, attended };
            return (tokens == 1.0).then(|| self.learn(kind, unit));
        }
        let known = self.costs.get(&kind).copied();
        if let Some(cost) = known.filter(|cost| cost.observations >= MAX_OBSERVATIONS) {
            return Some(cost.units);
        }
        // What the step before took, which had a cost of its own: the same slowness held for both.
        let before = self.before.filter(|before| before.kind != kind);
        let seen = before.map(|before| seconds * before.units / before.seconds);
        let cost = match (known, seen) {
            (Some(cost), None) => return Some(cost.units),
            (Some(cost), Some(seen)) => {
                let observations = cost.observations + 1;
                let weight = (1.0 / f64::from(observations)).max(LEAST_WEIGHT);
                // The mean of logarithms: twice and half of a cost are equally wrong.
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

    fn learn(&mut self, kind: Kind, cost: Cost) -> f64 {
        if self.costs.len() < MAX_KINDS || self.costs.contains_key(&kind) {
            self.costs.insert(kind, cost);
        }
        cost.units
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

    fn record(&mut self, kind: Kind, seconds: f64, units: f64, now: Instant) {
        let number = self.number(now);
        if self.slots.back().is_none_or(|slot| slot.number != number) {
            while self.slots.front().is_some_and(|slot| slot.number + LONG_SLOTS < number) {
                self.slots.pop_front();
            }
            self.slots.push_back(Slot { number, kinds: Vec::new(), longest: Longest::default() });
        }
        let slot = self.slots.back_mut().expect("just made sure");
        match slot.kinds.iter_mut().find(|sum| sum.kind == kind) {
            Some(sum) => (sum.steps, sum.seconds) = (sum.steps + 1, sum.seconds + seconds),
            None => slot.kinds.push(KindSum { kind, steps: 1, seconds }),
        }
        if seconds > slot.longest.seconds {
            slot.longest = Longest { seconds, units };
        }
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
            // A kind for which there was no room counts as a unit.
            let cost = self.costs.get(&kind_sum.kind).map_or(1.0, |cost| cost.units);
            sum.units += f64::from(kind_sum.steps) * cost;
        }
        if slot.longest.seconds > sum.longest.seconds {
            sum.longest = slot.longest;
        }
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Duration = Duration::from_millis(2);

    /// An engine whose steps take what they cost, times a slowness.
    struct Bench {
        meter: PaceMeter,
        now: Instant,
        slowness: f64,
    }

    /// What a step really costs, in units: a constant, the tokens, and the positions that they attend to.
    fn true_cost(tokens: usize, attended: usize) -> f64 {
        0.7 + 0.3 * tokens as f64 + attended as f64 / 5000.0
    }

    impl Bench {
        /// It has done its first synthetic inference: a prompt of 8 tokens, then single tokens.
        fn new(slowness: f64) -> Self {
            let now = Instant::now();
            let mut bench = Self { meter: PaceMeter::new(now), now, slowness };
            bench.probe();
            bench.probe();
            bench
        }

        fn step(&mut self, tokens: usize, attended: usize) {
            self.meter.begin(self.now);
            self.now += STEP.mul_f64(true_cost(tokens, attended) * self.slowness);
            self.meter.step(tokens, attended, self.now);
        }

        fn probe(&mut self) {
            self.step(8, 36);
            (9..12).for_each(|context| self.step(1, context));
            self.meter.rest();
        }

        /// Decodes a batch for this long; every sequence attends to 100 positions.
        fn decode(&mut self, sequences: usize, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                self.step(sequences, sequences * 100);
            }
        }

        fn pace(&self) -> Pace {
            self.meter.pace(self.now).expect("measured")
        }

        /// How many times slower it looks than an idle node that is well.
        fn apparent(&self) -> f64 {
            self.pace().unit_seconds / STEP.as_secs_f64()
        }
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn nothing_is_known_before_a_single_token_was_computed() {
        let now = Instant::now();
        let mut meter = PaceMeter::new(now);
        assert_eq!(meter.pace(now), None);
        meter.begin(now);
        meter.step(8, 36, now + STEP);
        assert_eq!(meter.pace(now + STEP), None, "a prompt may be of any length");
        meter.step(1, 9, now + STEP * 2);
        let pace = meter.pace(now + STEP * 3).expect("measured");
        assert!((pace.unit_seconds - STEP.as_secs_f64()).abs() < 1e-9 && pace.age == STEP, "{pace:?}");
    }

    #[test]
    fn whatever_an_engine_works_on_its_pace_is_the_same() {
        let mut bench = Bench::new(1.0);
        for (tokens, attended) in [(1, 64), (4, 400), (64, 2_000), (4, 900), (32, 20_000), (512, 120_000), (16, 6_000)]
        {
            (0..40).for_each(|_| bench.step(tokens, attended));
            let apparent = bench.apparent();
            assert!((0.6..1.6).contains(&apparent), "{tokens} tokens, {attended} positions: {apparent}");
        }
    }

    #[test]
    fn a_slow_engine_is_found_within_a_second_and_a_node_that_is_born_slow_is_slow() {
        let mut bench = Bench::new(1.0);
        bench.decode(8, seconds(5.0));
        bench.slowness = 20.0;
        bench.decode(8, seconds(0.9));
        assert!(bench.apparent() > 4.0, "{}", bench.apparent());
        bench.decode(8, seconds(5.0));
        assert!((15.0..25.0).contains(&bench.apparent()), "{}", bench.apparent());
        let mut born = Bench::new(20.0);
        born.decode(8, seconds(3.0));
        assert!((15.0..25.0).contains(&born.apparent()), "{}", born.apparent());
    }

    #[test]
    fn an_engine_that_has_recovered_is_fast_again_within_three_seconds_busy_or_probed() {
        for is_busy in [true, false] {
            let mut bench = Bench::new(1.0);
            bench.decode(8, seconds(5.0));
            bench.slowness = 20.0;
            bench.decode(8, seconds(60.0));
            bench.slowness = 1.0;
            let end = bench.now + seconds(3.0);
            while bench.now < end {
                match is_busy {
                    true => bench.decode(8, seconds(0.1)),
                    false => {
                        bench.meter.rest();
                        bench.now += seconds(0.9);
                        bench.probe();
                    }
                }
            }
            assert!(bench.apparent() < 1.6, "busy {is_busy}: {}", bench.apparent());
        }
    }

    #[test]
    fn once_found_slow_steps_do_not_hide_between_looks() {
        let mut bench = Bench::new(1.0);
        bench.decode(8, seconds(5.0));
        // A step takes 210 ms: two or three of them end in the short window.
        bench.slowness = 30.0;
        bench.decode(8, seconds(1.2));
        let start = bench.now;
        while bench.now < start + seconds(4.0) {
            bench.decode(8, STEP);
            for millis in (0..200).step_by(20) {
                let pace = bench.meter.pace(bench.now + Duration::from_millis(millis)).expect("measured");
                let apparent = pace.unit_seconds / STEP.as_secs_f64();
                assert!(apparent > 10.0, "{apparent} after {:?}", bench.now - start);
            }
        }
    }

    #[test]
    fn after_a_break_what_was_before_stands_until_enough_is_new() {
        let mut bench = Bench::new(1.0);
        bench.decode(8, seconds(3.0));
        bench.meter.rest();
        (bench.slowness, bench.now) = (20.0, bench.now + BREAK);
        bench.decode(8, STEP);
        bench.decode(8, STEP);
        assert!(
            bench.apparent() < 1.5 && bench.pace().age > BREAK,
            "two steps, and a healthy past: {:?}",
            bench.pace()
        );
        bench.decode(8, STEP);
        assert!(bench.apparent() > 15.0 && bench.pace().age.is_zero(), "{:?}", bench.pace());
    }

    #[test]
    fn a_kind_first_seen_in_the_moment_of_slowness_does_not_hide_it() {
        let mut bench = Bench::new(1.0);
        bench.decode(1, seconds(3.0));
        bench.slowness = 20.0;
        // What it costs cannot be told from the slowness.
        bench.decode(6, seconds(2.0));
        for _ in 0..5 {
            bench.decode(1, seconds(0.5));
            bench.decode(6, seconds(0.5));
        }
        bench.decode(6, seconds(4.0));
        assert!((8.0..30.0).contains(&bench.apparent()), "{}", bench.apparent());
    }

    #[test]
    fn one_pause_is_no_slowness_and_pauses_again_and_again_are() {
        let mut bench = Bench::new(1.0);
        bench.decode(4, seconds(3.0));
        bench.now += seconds(1.0);
        for _ in 0..30 {
            bench.decode(4, seconds(0.1));
            assert!(bench.apparent() < 2.5, "a single pause of 1 s: {}", bench.apparent());
        }
        for _ in 0..3 {
            bench.now += seconds(1.5);
            bench.decode(4, seconds(0.1));
        }
        assert!(bench.apparent() > 6.0, "runs 0.1 s of every 1.6 s: {}", bench.apparent());
    }

    #[test]
    fn a_step_that_does_not_end_counts_while_it_lasts() {
        let mut bench = Bench::new(1.0);
        bench.decode(4, seconds(3.0));
        let pace = bench.meter.pace(bench.now + seconds(20.0)).expect("measured");
        assert!(pace.unit_seconds > 6.0 * STEP.as_secs_f64() && pace.age.is_zero(), "{pace:?}");
        assert!(pace.step_seconds > 19.0, "{pace:?}");
        bench.meter.rest();
        let pace = bench.meter.pace(bench.now + seconds(20.0)).expect("measured");
        assert!(pace.unit_seconds < 1.5 * STEP.as_secs_f64(), "an idle engine is not slow: {pace:?}");
        assert_eq!(pace.age, seconds(20.0));
    }

    #[test]
    fn minutes_of_slowness_in_bursts_do_not_bend_the_costs() {
        let mut bench = Bench::new(1.0);
        bench.decode(8, seconds(1.0));
        for _ in 0..3000 {
            // As a quota of the processor does: some steps pass, the next waits for its share.
            bench.step(8, 800);
            bench.now += seconds(0.095);
            bench.step(8, 800);
        }
        bench.decode(8, seconds(3.0));
        assert!((0.5..1.7).contains(&bench.apparent()), "{}", bench.apparent());
    }

    proptest! {
        #[test]
        fn slowness_shows_as_what_it_is_within_a_factor_of_two(
            slowness in 1.0f64..40.0,
            loads in prop::collection::vec((1usize..64, 10usize..2000), 1..6),
        ) {
            let mut bench = Bench::new(1.0);
            let play = |bench: &mut Bench| {
                for &(sequences, context) in &loads {
                    (0..30).for_each(|_| bench.step(sequences, sequences * context));
                }
            };
            play(&mut bench);
            bench.probe();
            bench.slowness = slowness;
            play(&mut bench);
            bench.now += STEP;
            let apparent = bench.apparent() / slowness;
            prop_assert!((0.4..2.5).contains(&apparent), "{apparent} of {slowness}");
        }

        #[test]
        fn whatever_happens_a_pace_is_a_sane_number(
            steps in prop::collection::vec((0u64..3000, 0usize..5000, 0usize..1_000_000, any::<bool>()), 0..200)
        ) {
            let mut now = Instant::now();
            let mut meter = PaceMeter::new(now);
            for (millis, tokens, attended, rests) in steps {
                meter.begin(now);
                now += Duration::from_millis(millis);
                meter.step(tokens, attended, now);
                if rests {
                    meter.rest();
                }
                if let Some(pace) = meter.pace(now) {
                    prop_assert!(pace.unit_seconds > 0.0 && pace.unit_seconds.is_finite());
                    prop_assert!(pace.step_seconds > 0.0 && pace.step_seconds.is_finite());
                }
                prop_assert!(meter.costs.len() <= MAX_KINDS && meter.slots.len() <= LONG_SLOTS as usize + 1);
            }
        }
    }
}
