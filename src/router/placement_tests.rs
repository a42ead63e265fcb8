//! Tests of the placement.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::strategy::Strategy as Generator;

use super::*;
use crate::router::config::Strategy;
use crate::router::hot_prefixes::hashes;
use crate::types::DegradedBy;

fn idle() -> LoadReport {
    LoadReport {
        state: NodeState::Ready,
        ready: true,
        seats: 8,
        free_token_budget: 10_000,
        drain_tokens_per_second: 1000.0,
        ..LoadReport::default()
    }
}

/// All seats are taken, and the queue is this full.
fn queueing(saturation: f32) -> LoadReport {
    LoadReport {
        running: 8,
        waiting: 4,
        waiting_tokens: 4000,
        free_token_budget: 6000,
        queue_saturation: saturation,
        ..idle()
    }
}

fn peer(report: &LoadReport) -> Candidate<'_> {
    Candidate {
        report,
        age: Duration::ZERO,
        is_here: false,
        is_same_zone: true,
        sent_choices: 0,
        sent_tokens: 0,
        weight: 1.0,
        memory_share: 1.0,
        slowness: None,
        is_silent: false,
        may_serve: true,
    }
}

fn here(report: &LoadReport) -> Candidate<'_> {
    Candidate { is_here: true, ..peer(report) }
}

const REQUEST: PlacementRequest<'static> =
    PlacementRequest { prompt_tokens: 100, choices: 1, prefix_hashes: &[], remaining: None, is_continuation: false };
const CONTINUATION: PlacementRequest<'static> = PlacementRequest { is_continuation: true, ..REQUEST };

/// How often each candidate is chosen in 1,000 requests.
fn shares(strategy: Strategy, request: &PlacementRequest<'_>, candidates: &[Candidate<'_>]) -> Vec<usize> {
    let mut shares = vec![0; candidates.len()];
    for turn in 0..1000u64 {
        let random = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        match place(strategy, request, candidates, random) {
            Placement::Serve(index) => shares[index] += 1,
            other => panic!("{strategy:?}: {other:?}"),
        }
    }
    shares
}

fn only(strategy: Strategy, request: &PlacementRequest<'_>, candidates: &[Candidate<'_>]) -> usize {
    let shares = shares(strategy, request, candidates);
    shares.iter().position(|&share| share == 1000).unwrap_or_else(|| panic!("{strategy:?}: {shares:?}"))
}

#[test]
fn this_node_serves_while_it_has_a_seat_and_a_peer_when_it_has_not() {
    let (free, full) = (idle(), queueing(0.2));
    assert_eq!(only(Strategy::Balanced, &REQUEST, &[peer(&free), here(&free)]), 1);
    for strategy in Strategy::ALL {
        assert_eq!(only(strategy, &REQUEST, &[peer(&free), here(&full)]), 0, "{strategy:?}");
    }
}

#[test]
fn a_node_that_is_not_well_does_not_keep_its_requests() {
    let (free, slow) = (idle(), LoadReport { inter_token_latency: 0.5, ..idle() });
    let fast = LoadReport { inter_token_latency: 0.05, ..idle() };
    let shares = shares(Strategy::Balanced, &REQUEST, &[here(&slow), peer(&fast)]);
    assert!((20..200).contains(&shares[0]), "less, not nothing: {shares:?}");
    let pressed = Candidate { memory_share: 0.2, ..here(&free) };
    let shares = self::shares(Strategy::Balanced, &REQUEST, &[pressed, peer(&free)]);
    assert!((10..200).contains(&shares[0]), "less, not nothing: {shares:?}");
    let degraded = LoadReport { state: NodeState::Degraded, ..idle() };
    let shares = self::shares(Strategy::Balanced, &REQUEST, &[here(&degraded), peer(&free)]);
    assert!((100..400).contains(&shares[0]), "less, not nothing: {shares:?}");
}

#[test]
fn a_slow_node_gets_nothing_while_another_could_take_it() {
    let (free, crawling) = (idle(), LoadReport { inter_token_latency: 0.2, ..idle() });
    let slow = |report| Candidate { slowness: Some(20.0), ..peer(report) };
    let far = Candidate { is_same_zone: false, ..peer(&free) };
    let hashes = hashes(&(0..2048).collect::<Vec<u32>>(), None);
    let cached = PlacementRequest { prompt_tokens: 2048, prefix_hashes: &hashes, ..REQUEST };
    let holder = LoadReport { hot_prefixes: vec![hashes[7]], ..crawling.clone() };
    for strategy in Strategy::ALL {
        for request in [REQUEST, CONTINUATION] {
            assert_eq!(only(strategy, &request, &[slow(&crawling), peer(&free)]), 1, "{strategy:?}");
            assert_eq!(only(strategy, &request, &[slow(&crawling), far]), 1, "{strategy:?}: another zone is better");
            let here_is_slow = Candidate { is_here: true, ..slow(&crawling) };
            assert_eq!(only(strategy, &request, &[here_is_slow, peer(&free)]), 1, "{strategy:?}");
            assert_eq!(only(strategy, &request, &[slow(&crawling)]), 0, "{strategy:?}: better than nobody");
        }
        assert_eq!(only(strategy, &cached, &[slow(&holder), peer(&free)]), 1, "{strategy:?}: a prefix does not help");
    }
}

#[test]
fn a_slow_node_with_a_free_seat_is_better_than_a_queue_that_takes_longer() {
    let crawling = LoadReport { inter_token_latency: 0.1, ..idle() };
    let queue = |waiting_tokens| LoadReport { waiting_tokens, inter_token_latency: 0.005, ..queueing(0.5) };
    let slow = Candidate { slowness: Some(20.0), ..peer(&crawling) };
    let (short, long) = (queue(5_000), queue(50_000));
    for strategy in Strategy::ALL {
        assert_eq!(only(strategy, &REQUEST, &[slow, peer(&short)]), 1, "{strategy:?}: 5 s beside 10 s");
        assert_eq!(only(strategy, &REQUEST, &[slow, peer(&long)]), 0, "{strategy:?}: 50 s beside 10 s");
        let full = LoadReport { running: 8, waiting: 1, ..crawling.clone() };
        let slow_and_full = Candidate { slowness: Some(20.0), ..peer(&full) };
        assert_eq!(only(strategy, &REQUEST, &[slow_and_full, peer(&long)]), 1, "{strategy:?}");
    }
}

#[test]
fn who_is_silent_is_asked_last() {
    let (free, full) = (idle(), queueing(0.9));
    let silent = Candidate { is_silent: true, ..peer(&free) };
    for strategy in Strategy::ALL {
        for request in [REQUEST, CONTINUATION] {
            assert_eq!(only(strategy, &request, &[silent, peer(&full)]), 1, "{strategy:?}: a queue is better");
            assert_eq!(only(strategy, &request, &[silent]), 0, "{strategy:?}: better than nobody");
        }
    }
}

#[test]
fn equal_peers_share() {
    let (busy, free) = (queueing(0.1), idle());
    let candidates = [here(&busy), peer(&free), peer(&free), peer(&free)];
    for strategy in Strategy::ALL {
        let shares = shares(strategy, &REQUEST, &candidates);
        assert_eq!(shares[0], 0, "{strategy:?}");
        assert!(shares[1..].iter().all(|share| (230..440).contains(share)), "{strategy:?}: {shares:?}");
    }
}

#[test]
fn what_was_sent_since_the_report_counts() {
    let (busy, free) = (queueing(0.1), idle());
    let strategies = Strategy::ALL.into_iter().filter(|strategy| *strategy != Strategy::Random);
    for strategy in strategies {
        let mut sent = [0u32; 3];
        for turn in 0..24u64 {
            let peers =
                sent.map(|sent| Candidate { sent_choices: sent, sent_tokens: 100 * u64::from(sent), ..peer(&free) });
            let candidates = [here(&busy), peers[0], peers[1], peers[2]];
            match place(strategy, &REQUEST, &candidates, turn.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
                Placement::Serve(index @ 1..) => sent[index - 1] += 1,
                other => panic!("{strategy:?} {turn}: {other:?}"),
            }
        }
        assert_eq!(sent, [8, 8, 8], "{strategy:?}: stale reports make no herd");
    }
}

#[test]
fn only_when_all_are_over_their_caps_is_a_request_shed() {
    let (full, nearly) = (queueing(1.0), queueing(0.9));
    for strategy in Strategy::ALL {
        assert_eq!(only(strategy, &REQUEST, &[here(&full), peer(&nearly)]), 1);
        let shed = place(strategy, &REQUEST, &[here(&full), peer(&full)], 7);
        assert_eq!(shed, Placement::Shed { retry_after: Duration::from_secs(4) }, "8,000 tokens at 2,000 a second");
        shares(strategy, &CONTINUATION, &[here(&full), peer(&full)]);
    }
    let with_a_seat = LoadReport { running: 3, waiting: 4, ..queueing(1.0) };
    assert_eq!(only(Strategy::Balanced, &REQUEST, &[here(&full), peer(&with_a_seat)]), 1, "a seat is free");
    let sent = Candidate { sent_choices: 1, sent_tokens: 7000, ..peer(&nearly) };
    assert!(matches!(place(Strategy::Balanced, &REQUEST, &[sent], 7), Placement::Shed { .. }), "full by what was sent");
}

#[test]
fn the_time_to_come_back_is_bounded() {
    let shed = |report: &LoadReport| match place(Strategy::Balanced, &REQUEST, &[here(report)], 0) {
        Placement::Shed { retry_after } => retry_after.as_secs(),
        other => panic!("{other:?}"),
    };
    assert_eq!(shed(&LoadReport { waiting_tokens: 10, ..queueing(1.0) }), 1);
    assert_eq!(shed(&LoadReport { waiting_tokens: u64::MAX, ..queueing(1.0) }), 60);
    assert_eq!(shed(&LoadReport { drain_tokens_per_second: 0.0, ..queueing(1.0) }), 1);
}

#[test]
fn who_cannot_serve_is_left_out() {
    let free = idle();
    let unusable = [
        LoadReport { state: NodeState::Starting, ..idle() },
        LoadReport { state: NodeState::Warming, ..idle() },
        LoadReport { state: NodeState::Draining, ..idle() },
        LoadReport { state: NodeState::Stopped, ..idle() },
        LoadReport { state: NodeState::Failed, ..idle() },
        LoadReport { ready: false, reasons: vec![NodeReason::DeviceLost.into()], ..queueing(0.9) },
        LoadReport { ready: false, ..queueing(0.9) },
    ];
    for strategy in Strategy::ALL {
        for request in [REQUEST, CONTINUATION] {
            for report in &unusable {
                assert_eq!(only(strategy, &request, &[here(report), peer(&free)]), 1, "{report:?}");
                assert_eq!(place(strategy, &request, &[here(report)], 3), Placement::Nowhere);
            }
            let broken = Candidate { may_serve: false, ..peer(&free) };
            assert_eq!(place(strategy, &request, &[broken], 3), Placement::Nowhere);
        }
        assert_eq!(place(strategy, &REQUEST, &[], 3), Placement::Nowhere);
    }
}

#[test]
fn a_full_queue_alone_makes_nobody_useless() {
    let free = idle();
    let slow = NodeReason::Degraded(DegradedBy::Slow);
    let later = ReportedReason::Unknown("of_tomorrow".to_owned());
    let doubtful = LoadReport { ready: false, reasons: vec![NodeReason::QueueFull.into(), later], ..queueing(0.95) };
    assert_eq!(place(Strategy::Balanced, &REQUEST, &[peer(&doubtful)], 3), Placement::Nowhere);
    for reasons in [vec![NodeReason::QueueFull], vec![NodeReason::QueueFull, slow]] {
        let reasons = reasons.into_iter().map(ReportedReason::from).collect();
        let saturated = LoadReport { ready: false, reasons, ..queueing(0.95) };
        for request in [REQUEST, CONTINUATION] {
            assert_eq!(only(Strategy::Balanced, &request, &[peer(&saturated), peer(&free)]), 1);
            assert_eq!(only(Strategy::Balanced, &request, &[peer(&saturated)]), 0);
        }
    }
}

#[test]
fn old_reports_lose_weight_and_then_their_say() {
    let (busy, free) = (queueing(0.1), idle());
    let aged = |seconds| Candidate { age: Duration::from_secs(seconds), ..peer(&free) };
    let shares = shares(Strategy::Balanced, &REQUEST, &[here(&busy), peer(&free), aged(6)]);
    assert!((120..300).contains(&shares[2]), "{shares:?}");
    assert_eq!(only(Strategy::Balanced, &REQUEST, &[here(&busy), aged(16)]), 0, "not believed");
    assert_eq!(place(Strategy::Balanced, &REQUEST, &[aged(16)], 0), Placement::Nowhere);
    assert_eq!(only(Strategy::Balanced, &CONTINUATION, &[aged(16), aged(2)]), 1);
    assert_eq!(only(Strategy::Balanced, &CONTINUATION, &[aged(16)]), 0, "the last resort of a stream");
}

#[test]
fn the_own_zone_comes_first_until_it_is_full() {
    let (busy, free) = (queueing(0.1), idle());
    let far = |report| Candidate { is_same_zone: false, ..peer(report) };
    for strategy in Strategy::ALL {
        assert_eq!(only(strategy, &REQUEST, &[far(&free), here(&busy), peer(&free)]), 2, "{strategy:?}");
        assert_eq!(only(strategy, &REQUEST, &[far(&free), here(&busy), peer(&busy)]), 0, "{strategy:?}");
        assert_eq!(shares(strategy, &REQUEST, &[far(&busy), here(&busy), peer(&busy)])[0], 0, "{strategy:?}");
    }
}

#[test]
fn a_deadline_avoids_queues_that_outlast_it() {
    let (short, long) = (queueing(0.2), LoadReport { waiting: 1, waiting_tokens: 5000, ..queueing(0.2) });
    let request = PlacementRequest { remaining: Some(Duration::from_millis(4500)), ..REQUEST };
    assert_eq!(only(Strategy::LeastRequest, &REQUEST, &[peer(&short), peer(&long)]), 1);
    assert_eq!(only(Strategy::LeastRequest, &request, &[peer(&short), peer(&long)]), 0);
    let hopeless = PlacementRequest { remaining: Some(Duration::from_millis(10)), ..REQUEST };
    assert_eq!(only(Strategy::LeastRequest, &hopeless, &[peer(&short), peer(&long)]), 1, "its queue tells the client");
}

#[test]
fn a_prompt_goes_where_the_queue_has_room_for_it() {
    let tight = LoadReport { free_token_budget: 50, ..queueing(0.5) };
    let roomy = LoadReport { waiting: 20, ..queueing(0.6) };
    assert_eq!(only(Strategy::LeastRequest, &REQUEST, &[peer(&tight), peer(&roomy)]), 1);
    assert_eq!(only(Strategy::LeastRequest, &REQUEST, &[peer(&tight)]), 0);
}

#[test]
fn strategies_weigh_what_they_are_named_after() {
    let reports = [
        LoadReport { running: 1, kv_usage: 0.5, inter_token_latency: 0.02, drain_tokens_per_second: 500.0, ..idle() },
        LoadReport { running: 4, kv_usage: 0.1, inter_token_latency: 0.03, drain_tokens_per_second: 800.0, ..idle() },
        LoadReport { running: 4, kv_usage: 0.6, inter_token_latency: 0.01, drain_tokens_per_second: 800.0, ..idle() },
        LoadReport { running: 2, kv_usage: 0.7, inter_token_latency: 0.05, drain_tokens_per_second: 3000.0, ..idle() },
    ];
    let candidates: Vec<Candidate<'_>> = reports.iter().map(peer).collect();
    let expected =
        BTreeMap::from([("least-request", 0), ("least-kv-cache", 1), ("least-latency", 2), ("throughput", 3)]);
    for (name, index) in expected {
        let strategy = Strategy::from_name(name).expect("known");
        assert_eq!(only(strategy, &REQUEST, &candidates), index, "{name}");
    }
    let shares = shares(Strategy::PowerOfTwo, &REQUEST, &candidates);
    assert!((430..570).contains(&shares[0]), "whenever it is one of the two: {shares:?}");
    assert!(shares[1] < 250 && shares[2] < 250, "{shares:?}");
}

#[test]
fn a_cached_prompt_draws_its_request() {
    let prompt: Vec<u32> = (0..2048).collect();
    let hashes = hashes(&prompt, None);
    let request = PlacementRequest { prompt_tokens: 2048, prefix_hashes: &hashes, ..REQUEST };
    let holding = |level: usize| LoadReport { hot_prefixes: vec![7, hashes[level]], ..idle() };
    let (cold, short, long) = (idle(), holding(2), holding(7));
    assert_eq!(only(Strategy::PrefixCache, &request, &[here(&cold), peer(&short), peer(&long)]), 2);
    assert_eq!(only(Strategy::Balanced, &request, &[here(&cold), peer(&short)]), 0, "64 tokens are not worth a hop");
    let shares = shares(Strategy::Balanced, &request, &[here(&cold), peer(&cold), peer(&long)]);
    assert!(shares[2] > 550 && shares[0] > 50, "{shares:?}");
    let crowded = LoadReport { running: 8, waiting: 8, ..holding(7) };
    assert_eq!(only(Strategy::PrefixCache, &request, &[peer(&short), peer(&crowded)]), 0, "no herd on the holder");
    let unknown = PlacementRequest { prefix_hashes: &[1, 2], ..request };
    assert_eq!(only(Strategy::PrefixCache, &unknown, &[here(&crowded), peer(&cold)]), 1);
}

#[test]
fn nonsense_from_the_wire_does_no_harm() {
    let nonsense = LoadReport {
        queue_saturation: f32::NAN,
        kv_usage: f32::INFINITY,
        memory_pressure: -1.0,
        time_to_first_token: f32::NAN,
        drain_tokens_per_second: f32::NEG_INFINITY,
        running: u32::MAX,
        waiting: u32::MAX,
        waiting_tokens: u64::MAX,
        seats: 0,
        ..idle()
    };
    let candidate = Candidate {
        sent_tokens: u64::MAX,
        sent_choices: u32::MAX,
        weight: f64::NAN,
        memory_share: f64::NAN,
        ..peer(&nonsense)
    };
    let free = idle();
    for strategy in Strategy::ALL {
        for random in [0, 1, u64::MAX] {
            let placed = place(strategy, &CONTINUATION, &[candidate, here(&free)], random);
            assert_eq!(placed, Placement::Serve(1), "{strategy:?}");
            assert_eq!(place(strategy, &CONTINUATION, &[candidate], random), Placement::Serve(0));
        }
    }
}

fn any_report() -> impl Generator<Value = LoadReport> {
    let state =
        prop::sample::select(vec![NodeState::Ready, NodeState::Ready, NodeState::Degraded, NodeState::Draining]);
    let load = (0u32..12, 0u32..6, 0u64..9000, 0u64..9000, 0.0f32..1.2, 0.0f32..1.0);
    let speed = (0.0f32..1.0, 0.0f32..2.0, 0.0f32..0.2, 0.0f32..4000.0);
    (state, prop::bool::weighted(0.8), load, speed).prop_map(|(state, ready, load, speed)| {
        let (running, waiting, waiting_tokens, free_token_budget, queue_saturation, kv_usage) = load;
        let (memory_pressure, time_to_first_token, inter_token_latency, drain_tokens_per_second) = speed;
        LoadReport {
            state,
            ready,
            reasons: Vec::new(),
            running,
            waiting,
            waiting_tokens,
            seats: 8,
            queue_saturation,
            kv_usage,
            memory_pressure,
            memory_share: None,
            time_to_first_token,
            inter_token_latency,
            drain_tokens_per_second,
            free_token_budget,
            pace: None,
            hot_prefixes: vec![1, 2],
        }
    })
}

type Circumstances = (u64, bool, u32, f64, bool, bool);

fn any_circumstances() -> impl Generator<Value = Circumstances> {
    (0u64..20_000, any::<bool>(), 0u32..10, 0.0f64..=1.0, prop::bool::weighted(0.2), prop::bool::weighted(0.85))
}

fn candidate<'a>(index: usize, report: &'a LoadReport, circumstances: &Circumstances) -> Candidate<'a> {
    let &(age, is_same_zone, sent_choices, weight, slowness, may_serve) = circumstances;
    Candidate {
        report,
        age: if index == 0 { Duration::ZERO } else { Duration::from_millis(age) },
        is_here: index == 0,
        is_same_zone: is_same_zone || index == 0,
        sent_choices,
        sent_tokens: u64::from(sent_choices) * 100,
        weight,
        memory_share: 1.0 - weight / 2.0,
        slowness: slowness.then_some(20.0),
        is_silent: slowness && weight < 0.5,
        may_serve,
    }
}

proptest! {
    #[test]
    fn placement_keeps_its_promises(
        nodes in prop::collection::vec((any_report(), any_circumstances()), 0..8),
        is_continuation in any::<bool>(),
        choices in 1u32..4,
        strategy in prop::sample::select(Strategy::ALL.to_vec()),
        random in any::<u64>(),
    ) {
        let candidates: Vec<Candidate<'_>> = nodes.iter().enumerate()
            .map(|(index, (report, circumstances))| candidate(index, report, circumstances)).collect();
        let request = PlacementRequest { choices, is_continuation, ..REQUEST };
        let placed = place(strategy, &request, &candidates, random);
        prop_assert_eq!(placed, place(strategy, &request, &candidates, random), "equal for equal inputs");
        let usable = || candidates.iter().filter(|candidate| is_usable(candidate, is_continuation));
        let is_full = |candidate: &Candidate<'_>| RatedCandidate::new(0, candidate, &request).is_full;
        match placed {
            Placement::Serve(index) => {
                prop_assert!(is_usable(&candidates[index], is_continuation));
                prop_assert!(is_continuation || !is_full(&candidates[index]));
            }
            Placement::Shed { retry_after } => {
                prop_assert!(!is_continuation, "continuations are not shed");
                prop_assert!(usable().count() > 0 && usable().all(is_full));
                prop_assert!((MIN_RETRY_AFTER..=MAX_RETRY_AFTER).contains(&retry_after));
            }
            Placement::Nowhere => prop_assert_eq!(usable().count(), 0),
        }
    }

    #[test]
    fn full_means_seats_taken_and_queue_full(report in any_report(), circumstances in any_circumstances()) {
        let candidate = candidate(1, &report, &circumstances);
        let rated = RatedCandidate::new(1, &candidate, &REQUEST);
        if rated.is_full {
            prop_assert!(report.running + report.waiting + candidate.sent_choices >= report.seats);
            prop_assert!(report.queue_saturation > 0.0 || candidate.sent_choices > 0);
        }
        if report.running + report.waiting >= report.seats && report.queue_saturation >= 1.0 {
            prop_assert!(rated.is_full);
        }
        prop_assert!(rated.health > 0.0 && rated.health <= 1.0);
    }
}
