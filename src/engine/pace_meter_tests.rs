//! The meter at a bench whose steps take what they cost, times a slowness.

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
        self.meter.launch(tokens, attended);
        self.now += STEP.mul_f64(true_cost(tokens, attended) * self.slowness);
        self.meter.step(self.now);
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
    meter.launch(8, 36);
    meter.step(now + STEP);
    assert_eq!(meter.pace(now + STEP), None, "a prompt may be of any length");
    meter.launch(1, 9);
    meter.step(now + STEP * 2);
    let pace = meter.pace(now + STEP * 3).expect("measured");
    assert!((pace.unit_seconds - STEP.as_secs_f64()).abs() < 1e-9 && pace.age == STEP, "{pace:?}");
}

#[test]
fn whatever_an_engine_works_on_its_pace_is_the_same() {
    let mut bench = Bench::new(1.0);
    for (tokens, attended) in [(1, 64), (4, 400), (64, 2_000), (4, 900), (32, 20_000), (512, 120_000), (16, 6_000)] {
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
    assert!(bench.apparent() < 1.5 && bench.pace().age > BREAK, "two steps, and a healthy past: {:?}", bench.pace());
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
fn a_step_of_much_work_may_take_long() {
    for was_busy in [false, true] {
        let mut bench = Bench::new(1.0);
        if was_busy {
            bench.decode(4, seconds(3.0));
        } else {
            bench.meter.rest();
            bench.now += seconds(5.0);
        }
        // A prompt in one step, of a kind that was never seen.
        let (tokens, attended) = (4096, 4096 * 2048);
        bench.meter.begin(bench.now);
        bench.meter.launch(tokens, attended);
        let took = STEP.mul_f64(true_cost(tokens, attended));
        assert!(took > LATE * 5);
        let end = bench.now + took;
        while bench.now < end {
            bench.now += seconds(0.1);
            assert!(bench.apparent() < 1.6, "busy {was_busy}, {:?} to go: {}", end - bench.now, bench.apparent());
            assert!(bench.pace().step_seconds >= 0.1, "streams wait for it");
        }
        bench.now += took * 20;
        assert!(bench.apparent() > 5.0, "it does not end: {}", bench.apparent());
    }
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
    /// Costs are learned one from another, each a little wrong: rare sequences of loads miss by a factor of two.
    #[test]
    fn slowness_shows_as_what_it_is_within_a_factor_of_two_and_a_half(
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
        let start = bench.now;
        // Until the short window holds nothing from before.
        while bench.now < start + seconds(0.7) {
            play(&mut bench);
        }
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
            meter.launch(tokens, attended);
            now += Duration::from_millis(millis);
            meter.step(now);
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
