//! Whole-engine tests on the fake runner: a stream's tokens depend on nothing but its prompt, parameters, seed and the
//! tokens so far, and no block is ever lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::config::Config;
use super::engine::{Engine, Serial, Submission};
use super::fake_runner::{FakeModel, FakeRunnerLog};
use super::generation::{EndRules, letters};
use super::handle::EngineLimits;
use super::status_board::StatusBoard;
use crate::types::{
    ChoiceStart, Envelope, FailureKind, FinishReason, GenerateRequest, GenerationEvent, GenerationStream, RequestId,
    SamplingParams, StopCause, TokenId, TokenLogprobs,
};

const EOS: TokenId = 0;

/// What one choice got.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Output {
    pub(super) tokens: Vec<TokenId>,
    pub(super) logprobs: Vec<Option<Box<TokenLogprobs>>>,
    pub(super) end: Option<FinishReason>,
}

/// An engine driven step by step, without its thread.
pub(super) struct Harness {
    pub(super) engine: Engine,
    pub(super) log: Arc<FakeRunnerLog>,
    pub(super) board: Arc<StatusBoard>,
    streams: BTreeMap<Serial, GenerationStream>,
    next_serial: Serial,
    start: Instant,
}

impl Harness {
    pub(super) fn new(config: &Config, model: FakeModel) -> Self {
        let (runner, log) = model.runner();
        let limits = EngineLimits::new(config, runner.as_ref()).expect("a usable pool");
        let num_reserved = runner.num_blocks() - limits.num_blocks;
        let rules = EndRules {
            eos_token_ids: Arc::from([EOS]),
            stop_texts: letters(),
            vocab_size: limits.vocab_size,
            max_model_len: limits.max_model_len,
        };
        let start = Instant::now();
        let board = Arc::new(StatusBoard::new(Instant::now, limits.num_blocks));
        let engine = Engine::new(config, runner, rules, num_reserved, Arc::clone(&board), None);
        Self { engine, log, board, streams: BTreeMap::new(), next_serial: 0, start }
    }

    pub(super) fn submit(&mut self, request: GenerateRequest) -> Serial {
        let (events, stream) = GenerationStream::channel();
        let serial = self.next_serial;
        self.next_serial += 1;
        let slot = self.board.take_slot(usize::MAX).expect("no limit");
        self.engine.submit(Submission { serial, request, events, slot });
        self.streams.insert(serial, stream);
        serial
    }

    pub(super) fn step(&mut self) {
        self.engine.step(self.start).expect("the fake device works");
        self.engine.scheduler().assert_consistent();
    }

    pub(super) fn run(&mut self) {
        let mut steps = 0;
        while !self.engine.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "the engine does not come to an end");
        }
        self.assert_empty();
    }

    /// The time that every step is given.
    pub(super) fn now(&self) -> Instant {
        self.start
    }

    /// Nobody listens to the request any more.
    pub(super) fn hang_up(&mut self, serial: Serial) {
        self.streams.remove(&serial);
    }

    /// Nothing is left: no sequence, no used block, no reserved block in use.
    fn assert_empty(&self) {
        let scheduler = self.engine.scheduler();
        assert!(scheduler.is_idle());
        assert_eq!(scheduler.blocks().num_used(), 0);
        scheduler.assert_consistent();
        let status = self.board.status();
        assert_eq!((status.running, status.waiting, status.waiting_tokens, status.kv_blocks_used), (0, 0, 0, 0));
    }

    pub(super) fn events(&mut self, serial: Serial) -> Vec<GenerationEvent> {
        let stream = self.streams.get_mut(&serial).expect("a stream");
        std::iter::from_fn(|| stream.try_next()).collect()
    }

    /// Checks the rules of a stream on the way: one `Scheduled` before the first token, nothing after an end.
    pub(super) fn outputs(&mut self, serial: Serial) -> BTreeMap<u32, Output> {
        let mut outputs: BTreeMap<u32, Output> = BTreeMap::new();
        let mut scheduled = 0;
        for event in self.events(serial) {
            match event {
                GenerationEvent::Scheduled { .. } => scheduled += 1,
                GenerationEvent::PromptLogprobs { .. } => panic!("nobody asked for it"),
                GenerationEvent::Token { choice, token, logprobs } => {
                    assert_eq!(scheduled, 1, "scheduled once, before the first token");
                    let output = outputs.entry(choice).or_default();
                    assert_eq!(output.end, None, "a token after the end");
                    output.tokens.push(token);
                    output.logprobs.push(logprobs);
                }
                GenerationEvent::Finished { choice, reason } => {
                    let before = outputs.entry(choice).or_default().end.replace(reason);
                    assert_eq!(before, None, "one end");
                }
                GenerationEvent::Failed(failure) => panic!("failed: {failure}"),
            }
        }
        outputs
    }
}

pub(super) fn config() -> Config {
    Config { max_num_seqs: 8, max_num_batched_tokens: 24, probe_tokens: 0, ..Config::default() }
}

pub(super) fn request(prompt: &[TokenId], sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest::fresh(Arc::new(Envelope::new(RequestId::new("test"), Arc::from(prompt), sampling)))
}

pub(super) fn model(depth: usize) -> FakeModel {
    FakeModel { depth, ..FakeModel::default() }
}

/// Runs each test with one step in flight at most, and with the next planned while one runs.
macro_rules! at_each_depth {
    ($($name:ident)*) => {
        mod depth_1 {
            $(#[test] fn $name() { super::$name(1); })*
        }
        mod depth_2 {
            $(#[test] fn $name() { super::$name(2); })*
        }
    };
}
pub(super) use at_each_depth;

at_each_depth! {
    a_mixed_load_of_64_equals_the_same_requests_alone
    equal_again_when_the_pool_is_so_small_that_everything_preempts
    equal_again_without_enough_memory_for_a_batch
    a_stream_cut_anywhere_and_resumed_goes_on_as_if_nothing_had_happened
    all_choices_of_a_request_resume_together
    tokens_that_go_on_after_an_end_are_refused
    thirty_two_requests_that_share_a_prefix_prefill_it_once
    a_request_that_bypasses_the_cache_neither_reads_nor_fills_it
    a_disconnect_frees_running_and_waiting_sequences_within_a_step
    a_deadline_ends_a_request_with_its_tokens_and_fails_one_without
    invalid_numbers_fail_only_their_own_request
    invalid_numbers_are_not_cached
    who_finds_no_block_gets_one_within_a_step_of_being_alone_in_flight
    an_end_by_length_wastes_no_step_and_a_stop_at_most_the_one_in_flight
    a_request_that_does_not_fit_into_memory_alone_fails
    the_probe_answers_the_same_under_full_load_as_alone
}

/// The request by itself, one step at a time, in an engine with plenty of everything and no cache.
pub(super) fn alone(request: &GenerateRequest) -> BTreeMap<u32, Output> {
    let config = Config { enable_prefix_caching: false, max_num_batched_tokens: 1024, ..config() };
    let mut harness = Harness::new(&config, FakeModel { num_blocks: 1024, ..FakeModel::default() });
    let serial = harness.submit(request.clone());
    harness.run();
    harness.outputs(serial)
}

/// Sampled requests of all kinds: lengths, penalties, stops, choices, shared and distinct prompts.
pub(super) fn mixed_load(count: u32) -> Vec<GenerateRequest> {
    (0..count)
        .map(|index| {
            let shared = (0..17).map(|position| 1 + position % 5);
            let own = (0..index % 23).map(|position| 1 + (position * 7 + index) % 31);
            let prompt: Vec<TokenId> =
                if index % 3 == 0 { shared.chain(own).collect() } else { own.chain([1 + index % 31]).collect() };
            let sampling = SamplingParams {
                n: 1 + index % 4 / 3 * 2,
                seed: u64::from(index) * 77,
                max_tokens: 1 + index * 5 % 37,
                min_tokens: index % 5,
                temperature: if index % 5 == 0 { 0.0 } else { 1.3 },
                top_k: if index % 4 == 1 { 7 } else { 0 },
                top_p: if index % 6 == 2 { 0.8 } else { 1.0 },
                repetition_penalty: if index % 7 == 3 { 1.2 } else { 1.0 },
                presence_penalty: if index % 7 == 5 { 0.6 } else { 0.0 },
                stop: if index % 4 == 2 { vec!["c".to_owned(), "ab".to_owned()] } else { Vec::new() },
                stop_token_ids: if index % 8 == 6 { vec![9] } else { Vec::new() },
                ignore_eos: index % 2 == 0,
                logprobs: (index % 3 == 1).then_some(2),
                ..SamplingParams::default()
            };
            GenerateRequest { bypass_prefix_cache: index % 11 == 4, ..request(&prompt, sampling) }
        })
        .collect()
}

/// Runs the load with arrivals spread over steps, and compares every stream with the same request alone.
fn assert_load_equals_alone(config: &Config, model: FakeModel, requests: &[GenerateRequest]) -> Harness {
    let mut harness = Harness::new(config, model);
    let mut serials = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        serials.push(harness.submit(request.clone()));
        if index % 3 == 2 {
            harness.step();
        }
    }
    harness.run();
    for (request, serial) in requests.iter().zip(serials) {
        assert_eq!(harness.outputs(serial), alone(request), "{request:?}");
    }
    harness
}

fn a_mixed_load_of_64_equals_the_same_requests_alone(depth: usize) {
    let harness = assert_load_equals_alone(&config(), FakeModel { num_blocks: 256, ..model(depth) }, &mixed_load(64));
    assert!(harness.log.copies() > 0, "choices share a half-filled block");
    assert!(harness.board.counters.snapshot().prefix_cache_hits > 0);
    assert_eq!(harness.board.counters.snapshot().preemptions, 0);
}

fn equal_again_when_the_pool_is_so_small_that_everything_preempts(depth: usize) {
    let longest = 17 + 23 + 37;
    let model = FakeModel { num_blocks: longest / 4 + 1, ..model(depth) };
    for chunk in [9, 24] {
        let config = Config { max_num_batched_tokens: chunk, ..config() };
        let harness = assert_load_equals_alone(&config, model.clone(), &mixed_load(64));
        assert!(harness.board.counters.snapshot().preemptions > 20);
    }
}

fn equal_again_without_enough_memory_for_a_batch(depth: usize) {
    let model = FakeModel { num_blocks: 256, memory_tokens: 3, ..model(depth) };
    let harness = assert_load_equals_alone(&config(), model, &mixed_load(64));
    // Batches grow again in between, so that memory also runs out behind a step in flight.
    assert!(harness.board.counters.snapshot().out_of_memory > 5);
}

fn a_stream_cut_anywhere_and_resumed_goes_on_as_if_nothing_had_happened(depth: usize) {
    for whole in mixed_load(24) {
        let expected = alone(&whole);
        for (&choice, output) in &expected {
            for cut in 0..=output.tokens.len() {
                let start = ChoiceStart { index: choice, emitted: output.tokens[..cut].to_vec() };
                let resumed = GenerateRequest { choices: vec![start], ..whole.clone() };
                let mut harness = Harness::new(&config(), model(depth));
                let serial = harness.submit(resumed);
                harness.run();
                let rest = &harness.outputs(serial)[&choice];
                assert_eq!(rest.tokens, output.tokens[cut..], "cut at {cut} of {whole:?}");
                assert_eq!(rest.logprobs, output.logprobs[cut..]);
                assert_eq!(rest.end, output.end);
            }
        }
    }
}

fn all_choices_of_a_request_resume_together(depth: usize) {
    let sampling = SamplingParams { n: 3, seed: 5, max_tokens: 20, ignore_eos: true, ..Default::default() };
    let whole = request(&[3, 1, 4, 1, 5, 9], sampling);
    let expected = alone(&whole);
    let cuts = [7, 0, 20];
    let choices = expected
        .iter()
        .map(|(&index, output)| ChoiceStart { index, emitted: output.tokens[..cuts[index as usize]].to_vec() })
        .collect();
    let mut harness = Harness::new(&config(), model(depth));
    let serial = harness.submit(GenerateRequest { choices, ..whole });
    harness.run();
    for (index, output) in harness.outputs(serial) {
        assert_eq!(output.tokens, expected[&index].tokens[cuts[index as usize]..]);
        assert_eq!(output.end, expected[&index].end);
    }
}

fn tokens_that_go_on_after_an_end_are_refused(depth: usize) {
    let sampling = SamplingParams { max_tokens: 9, stop_token_ids: vec![7], ..Default::default() };
    let choices = vec![ChoiceStart { index: 0, emitted: vec![3, 7, 3] }];
    let mut harness = Harness::new(&config(), model(depth));
    let serial = harness.submit(GenerateRequest { choices, ..request(&[1], sampling) });
    let events = harness.events(serial);
    assert!(matches!(&events[..], [GenerationEvent::Failed(failure)] if failure.kind == FailureKind::InvalidRequest));
    harness.run();
}

fn thirty_two_requests_that_share_a_prefix_prefill_it_once(depth: usize) {
    let config = Config { max_num_seqs: 32, max_num_batched_tokens: 512, ..config() };
    let model = FakeModel { num_blocks: 1024, max_model_len: 2048, ..model(depth) };
    let mut harness = Harness::new(&config, model);
    let prefix = (0..768).map(|position| 1 + position % 29);
    let requests: Vec<GenerateRequest> = (0..32)
        .map(|index| {
            let prompt: Vec<TokenId> = prefix.clone().chain([index, 31 - index, 5]).collect();
            request(&prompt, SamplingParams { max_tokens: 1, ..Default::default() })
        })
        .collect();
    let serials: Vec<Serial> = requests.iter().map(|request| harness.submit(request.clone())).collect();
    harness.run();
    assert_eq!(harness.log.tokens(), 768 + 32 * 3);
    for (request, serial) in requests.iter().zip(&serials) {
        let events = harness.events(*serial);
        let cached_tokens = if *serial == 0 { 0 } else { 768 };
        assert_eq!(events[0], GenerationEvent::Scheduled { cached_tokens });
        let GenerationEvent::Token { token, .. } = events[1] else { panic!("a token") };
        assert_eq!(token, alone_long(request));
    }
    let counters = harness.board.counters.snapshot();
    assert_eq!((counters.prefix_cache_queries, counters.prefix_cache_hits), (32 * 771, 31 * 768));
}

fn alone_long(request: &GenerateRequest) -> TokenId {
    let config = Config { enable_prefix_caching: false, max_num_batched_tokens: 1024, ..config() };
    let mut harness = Harness::new(&config, FakeModel { num_blocks: 512, max_model_len: 2048, ..FakeModel::default() });
    let serial = harness.submit(request.clone());
    harness.run();
    harness.outputs(serial)[&0].tokens[0]
}

fn a_request_that_bypasses_the_cache_neither_reads_nor_fills_it(depth: usize) {
    let mut harness = Harness::new(&config(), model(depth));
    let sampling = SamplingParams { max_tokens: 1, ..Default::default() };
    let plain = request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], sampling);
    let bypassing = GenerateRequest { bypass_prefix_cache: true, ..plain.clone() };
    for (request, cached_tokens) in [(&bypassing, 0), (&plain, 0), (&bypassing, 0), (&plain, 8)] {
        let serial = harness.submit(request.clone());
        harness.run();
        assert_eq!(harness.events(serial)[0], GenerationEvent::Scheduled { cached_tokens });
    }
}

fn a_disconnect_frees_running_and_waiting_sequences_within_a_step(depth: usize) {
    let config = Config { max_num_seqs: 2, max_num_batched_tokens: 16, ..config() };
    let mut harness = Harness::new(&config, model(depth));
    let sampling = SamplingParams { max_tokens: 100, ignore_eos: true, n: 2, ..Default::default() };
    let running = harness.submit(request(&[1; 9], sampling.clone()));
    let waiting = harness.submit(request(&[2; 9], sampling.clone()));
    let last = harness.submit(request(&[3; 9], sampling));
    for _ in 0..4 {
        harness.step();
    }
    assert_eq!(harness.board.status().waiting, 4);
    harness.engine.cancel(waiting);
    harness.streams.remove(&running);
    harness.step();
    let status = harness.board.status();
    assert_eq!((status.running, status.waiting), (2, 0), "the last one took the slots");
    harness.engine.cancel(last);
    harness.step();
    harness.assert_empty();
    assert_eq!(harness.board.counters.snapshot().requests_cancelled, 3);
}

fn a_deadline_ends_a_request_with_its_tokens_and_fails_one_without(depth: usize) {
    let config = Config { max_num_seqs: 1, ..config() };
    let mut harness = Harness::new(&config, model(depth));
    let sampling = SamplingParams { max_tokens: 100, ignore_eos: true, ..Default::default() };
    let deadline = Some(harness.start + Duration::from_secs(5));
    let within = |request: GenerateRequest| GenerateRequest {
        envelope: request.envelope.with(|envelope| envelope.deadline = deadline),
        ..request
    };
    let running = harness.submit(within(request(&[1, 2], sampling.clone())));
    let waiting = harness.submit(within(request(&[3, 4], sampling)));
    for _ in 0..3 {
        harness.step();
    }
    harness.engine.step(harness.start + Duration::from_secs(6)).expect("works");
    harness.assert_empty();
    let running = harness.outputs(running);
    // What is in flight comes too late.
    assert_eq!((running[&0].tokens.len(), &running[&0].end), (4 - depth, &Some(FinishReason::Deadline)));
    let waiting = harness.events(waiting);
    assert!(matches!(&*waiting, [GenerationEvent::Failed(failure)] if failure.kind == FailureKind::DeadlineExceeded));
}

fn invalid_numbers_fail_only_their_own_request(depth: usize) {
    let model = FakeModel { poison_token: Some(13), ..model(depth) };
    let mut harness = Harness::new(&config(), model);
    let sampling = SamplingParams { max_tokens: 4, logit_bias: vec![(13, -100.0)], n: 2, ..Default::default() };
    let healthy = harness.submit(request(&[1, 2, 3], sampling.clone()));
    let poisoned = harness.submit(request(&[1, 2, 13], sampling));
    harness.run();
    let failure = harness.events(poisoned).pop().expect("an end");
    assert!(matches!(failure, GenerationEvent::Failed(failure) if failure.kind == FailureKind::NumericsInvalid));
    assert_eq!(harness.outputs(healthy).len(), 2);
    assert!(harness.board.counters.snapshot().numerics_invalid >= 1);
}

fn who_finds_no_block_gets_one_within_a_step_of_being_alone_in_flight(depth: usize) {
    let config = Config { max_num_batched_tokens: 128, ..config() };
    let mut harness = Harness::new(&config, FakeModel { block_size: 16, num_blocks: 6, ..model(depth) });
    let sampling = SamplingParams { max_tokens: 30, ignore_eos: true, ..Default::default() };
    // The second takes the last block for its third token. The first needs another for its sixth, when the second has room
    // for many more.
    harness.submit(request(&[1; 44], sampling.clone()));
    harness.submit(request(&[2; 31], sampling));
    for _ in 0..10 {
        harness.step();
    }
    assert_eq!(harness.board.counters.snapshot().preemptions, 1);
    assert_eq!(harness.board.status().waiting, 1);
    harness.run();
}

fn invalid_numbers_are_not_cached(depth: usize) {
    let mut harness = Harness::new(&config(), FakeModel { poison_token: Some(13), ..model(depth) });
    let poisoned = request(&[1, 2, 3, 4, 5, 6, 7, 13, 9], SamplingParams::default());
    for _ in 0..2 {
        let serial = harness.submit(poisoned.clone());
        harness.run();
        let events = harness.events(serial);
        assert_eq!(events[0], GenerationEvent::Scheduled { cached_tokens: 0 });
        assert!(matches!(events[1], GenerationEvent::Failed(_)), "{events:?}");
    }
}

fn an_end_by_length_wastes_no_step_and_a_stop_at_most_the_one_in_flight(depth: usize) {
    let sampling = SamplingParams { seed: 3, max_tokens: 12, ignore_eos: true, ..Default::default() };
    let mut harness = Harness::new(&config(), model(depth));
    let serial = harness.submit(request(&[5, 6], sampling.clone()));
    harness.run();
    let tokens = harness.outputs(serial)[&0].tokens.clone();
    assert_eq!((tokens.len(), harness.log.forwards()), (12, 12));
    let end = tokens.iter().position(|&token| token == tokens[6]).expect("there") + 1;
    let stopped = SamplingParams { stop_token_ids: vec![tokens[6]], ..sampling };
    let mut harness = Harness::new(&config(), model(depth));
    let serial = harness.submit(request(&[5, 6], stopped));
    harness.run();
    assert_eq!(harness.outputs(serial)[&0].tokens, tokens[..end]);
    assert_eq!(harness.log.forwards(), (end + depth - 1) as u64);
}

fn a_request_that_does_not_fit_into_memory_alone_fails(depth: usize) {
    let mut harness = Harness::new(&config(), FakeModel { memory_tokens: 0, ..model(depth) });
    let serial = harness.submit(request(&[1, 2, 3], SamplingParams::default()));
    harness.run();
    let end = harness.events(serial).pop().expect("an end");
    assert!(matches!(end, GenerationEvent::Failed(failure) if failure.kind == FailureKind::OutOfMemory));
}

#[test]
fn a_stop_string_ends_the_choice_with_the_token_that_completes_it() {
    let free = SamplingParams { seed: 3, max_tokens: 40, ignore_eos: true, ..Default::default() };
    let tokens = alone(&request(&[5, 6], free.clone()))[&0].tokens.clone();
    let (first, second) = (tokens[20], tokens[21]);
    let stop: String = [first, second].iter().map(|&token| char::from(b'`' + token as u8)).collect();
    let stopped = &alone(&request(&[5, 6], SamplingParams { stop: vec![stop.clone()], ..free }))[&0];
    let end = tokens.windows(2).position(|pair| pair == [first, second]).expect("there") + 2;
    assert_eq!(stopped.tokens, tokens[..end]);
    assert_eq!(stopped.end, Some(FinishReason::Stop(StopCause::String(stop))));
}

fn the_probe_answers_the_same_under_full_load_as_alone(depth: usize) {
    let config = Config { max_num_seqs: 2, max_num_batched_tokens: 8, probe_tokens: 12, ..config() };
    let model = FakeModel { num_blocks: 12, ..model(depth) };
    let greedy = SamplingParams { temperature: 0.0, max_tokens: 6, ignore_eos: true, ..Default::default() };
    let probe =
        GenerateRequest { is_probe: true, bypass_prefix_cache: true, ..request(&[7, 8, 9, 10, 11], greedy.clone()) };
    let mut harness = Harness::new(&config, model);
    let long = SamplingParams { max_tokens: 30, ignore_eos: true, ..Default::default() };
    for token in 1..10 {
        harness.submit(request(&[token; 5], long.clone()));
    }
    while harness.engine.scheduler().blocks().num_free() > 0 {
        harness.step();
    }
    let serial = harness.submit(probe.clone());
    for _ in 0..7 + depth {
        harness.step();
    }
    let busy = harness.outputs(serial);
    assert_eq!(busy, alone(&GenerateRequest { is_probe: false, ..probe }));
    harness.run();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any order of arrival, any chunk size, any pool, disconnects in between: the streams that stay are the same.
    #[test]
    fn what_happens_around_a_stream_does_not_change_it(
        picks in prop::collection::vec(0usize..48, 4..24),
        max_num_seqs in 1usize..10,
        spare in 1usize..40,
        extra_blocks in 0u32..40,
        cancelled in prop::collection::vec(any::<bool>(), 24),
        steps_between in 0usize..4,
        depth in 1usize..=2,
    ) {
        let load = mixed_load(48);
        let config = Config { max_num_seqs, max_num_batched_tokens: max_num_seqs + spare, ..config() };
        let model = FakeModel { num_blocks: 20 + extra_blocks, ..model(depth) };
        let mut harness = Harness::new(&config, model);
        let mut kept = Vec::new();
        let mut leaving = Vec::new();
        for (&pick, &leaves) in picks.iter().zip(&cancelled) {
            let serial = harness.submit(load[pick].clone());
            if leaves { leaving.push(serial) } else { kept.push((pick, serial)) }
            for _ in 0..steps_between {
                harness.step();
            }
            if let Some(serial) = leaving.pop_if(|_| pick % 2 == 0) {
                harness.streams.remove(&serial);
            }
        }
        harness.run();
        for (pick, serial) in kept {
            prop_assert_eq!(harness.outputs(serial), alone(&load[pick]));
        }
    }
}
