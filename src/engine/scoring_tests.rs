//! Prompts whose tokens are scored, and prompts that are salted, through the whole engine on the fake runner.

use super::config::Config;
use super::engine_tests::{Harness, alone, at_each_depth, config, mixed_load, model, request};
use super::fake_runner::FakeModel;
use crate::types::{
    CacheSalt, ChoiceStart, FinishReason, GenerateRequest, GenerationEvent, SamplingParams, TokenId, TokenLogprobs,
};

at_each_depth! {
    a_prompt_scores_as_it_was_generated
    a_prompt_scores_the_same_in_a_crowd_with_little_memory
    a_prompt_is_scored_without_generating
    nothing_to_score_and_nothing_to_generate_ends_at_once
    a_scored_prompt_neither_reads_nor_fills_the_prefix_cache
    a_deadline_and_a_disconnect_end_the_scoring
    rows_that_are_no_numbers_fail_only_their_own_request
    prompts_of_different_salts_share_nothing
}

fn scored(request: GenerateRequest, num_logprobs: u32) -> GenerateRequest {
    let envelope = request.envelope.with(|envelope| envelope.extensions.prompt_logprobs = Some(num_logprobs));
    GenerateRequest { envelope, ..request }
}

fn salted(request: GenerateRequest, salt: u8) -> GenerateRequest {
    let salt = CacheSalt::new([salt; 16]);
    let envelope = request.envelope.with(|envelope| envelope.extensions.cache_salt = Some(salt));
    GenerateRequest { envelope, ..request }
}

/// How the prompt scored, and the other events. Scores come in order, before any token or end.
fn split(events: Vec<GenerationEvent>) -> (Vec<TokenLogprobs>, Vec<GenerationEvent>) {
    let (mut scores, mut rest) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            GenerationEvent::PromptLogprobs { start, logprobs } => {
                assert_eq!(start as usize, scores.len(), "in order, and each once");
                assert!(rest.iter().all(|event| matches!(event, GenerationEvent::Scheduled { .. })), "{rest:?}");
                scores.extend(logprobs);
            }
            event => rest.push(event),
        }
    }
    (scores, rest)
}

fn run(harness: &mut Harness, request: &GenerateRequest) -> (Vec<TokenLogprobs>, Vec<GenerationEvent>) {
    let serial = harness.submit(request.clone());
    harness.run();
    split(harness.events(serial))
}

/// The prompt followed by what the model made of it, and the log-probabilities of the latter.
fn generated() -> (Vec<TokenId>, usize, Vec<TokenLogprobs>) {
    let prompt = [3, 1, 4, 1, 5];
    let sampling = SamplingParams {
        seed: 9,
        max_tokens: 40,
        temperature: 1.2,
        ignore_eos: true,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let output = alone(&request(&prompt, sampling)).remove(&0).expect("a choice");
    let logprobs = output.logprobs.into_iter().map(|logprobs| *logprobs.expect("asked for")).collect();
    ([&prompt[..], &output.tokens].concat(), prompt.len(), logprobs)
}

fn a_prompt_scores_as_it_was_generated(depth: usize) {
    let (tokens, prompt_len, logprobs) = generated();
    let sampling = SamplingParams { max_tokens: 2, ignore_eos: true, ..Default::default() };
    for max_scored_tokens in [1, 5, 7, 1000] {
        let mut harness = Harness::new(&config(), FakeModel { max_scored_tokens, ..model(depth) });
        let (scores, rest) = run(&mut harness, &scored(request(&tokens, sampling.clone()), 3));
        assert_eq!(scores.len(), tokens.len() - 1);
        assert_eq!(scores[prompt_len - 1..], logprobs, "at most {max_scored_tokens} rows a step");
        assert_eq!(rest.len(), 1 + 2 + 1);
        assert!(harness.log.most_rows() <= max_scored_tokens.max(1));
    }
}

fn a_prompt_scores_the_same_in_a_crowd_with_little_memory(depth: usize) {
    let (tokens, _, _) = generated();
    let sampling = SamplingParams { n: 2, seed: 4, max_tokens: 9, ignore_eos: true, ..Default::default() };
    let asked = scored(request(&tokens, sampling), 2);
    let (expected, expected_rest) = {
        let config = Config { max_num_batched_tokens: 1024, ..config() };
        let roomy = FakeModel { num_blocks: 1024, max_scored_tokens: 1000, ..FakeModel::default() };
        run(&mut Harness::new(&config, roomy), &asked)
    };
    let tight = FakeModel { num_blocks: 20, max_scored_tokens: 3, ..model(depth) };
    for model in [tight.clone(), FakeModel { num_blocks: 256, memory_tokens: 3, ..tight }] {
        let mut harness = Harness::new(&config(), model);
        let crowd = mixed_load(12);
        let mut serials = Vec::new();
        for (index, other) in crowd.iter().enumerate() {
            serials.push((harness.submit(other.clone()), None));
            if index % 3 == 1 {
                serials.push((harness.submit(asked.clone()), Some(())));
                harness.step();
            }
        }
        harness.run();
        let mut others = crowd.iter();
        for (serial, is_asked) in serials {
            if is_asked.is_none() {
                assert_eq!(harness.outputs(serial), alone(others.next().expect("as many")));
                continue;
            }
            let (scores, rest) = split(harness.events(serial));
            assert_eq!(scores, expected);
            let tokens_of = |events: &[GenerationEvent], wanted: u32| -> Vec<TokenId> {
                let token = |event: &GenerationEvent| match event {
                    GenerationEvent::Token { choice, token, .. } if *choice == wanted => Some(*token),
                    _ => None,
                };
                events.iter().filter_map(token).collect()
            };
            for choice in 0..2 {
                assert_eq!(tokens_of(&rest, choice), tokens_of(&expected_rest, choice));
            }
        }
        let counters = harness.board.counters.snapshot();
        assert!(counters.preemptions + counters.out_of_memory > 0, "nothing was tight: the test does not test");
        // A row for each sequence, and those that are scored.
        assert!(harness.log.most_rows() <= config().max_num_seqs + 1 + 3);
    }
}

fn a_prompt_is_scored_without_generating(depth: usize) {
    let (tokens, prompt_len, logprobs) = generated();
    let sampling = SamplingParams { n: 3, max_tokens: 0, ..Default::default() };
    // As long as a sequence may be: there is no token after it.
    let longest = FakeModel { max_model_len: tokens.len(), ..model(depth) };
    let mut harness = Harness::new(&config(), longest);
    let (scores, rest) = run(&mut harness, &scored(request(&tokens, sampling), 3));
    assert_eq!(scores[prompt_len - 1..], logprobs);
    let end = |choice| GenerationEvent::Finished { choice, reason: FinishReason::Length };
    assert_eq!(rest, [GenerationEvent::Scheduled { cached_tokens: 0 }, end(0), end(1), end(2)]);
    assert_eq!(harness.log.tokens(), tokens.len() as u64 - 1, "the last token is not needed");
}

fn nothing_to_score_and_nothing_to_generate_ends_at_once(depth: usize) {
    let sampling = SamplingParams { n: 2, max_tokens: 0, ..Default::default() };
    let end = |choice| GenerationEvent::Finished { choice, reason: FinishReason::Length };
    let mut harness = Harness::new(&config(), model(depth));
    for asked in [request(&[1, 2, 3], sampling.clone()), scored(request(&[1], sampling), 2)] {
        assert_eq!(run(&mut harness, &asked), (vec![], vec![end(0), end(1)]));
    }
    assert_eq!(harness.log.forwards(), 0);
}

fn a_scored_prompt_neither_reads_nor_fills_the_prefix_cache(depth: usize) {
    let mut harness = Harness::new(&config(), model(depth));
    let plain = request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], SamplingParams { max_tokens: 1, ..Default::default() });
    let asked = scored(plain.clone(), 0);
    for (request, cached_tokens) in [(&asked, 0), (&plain, 0), (&asked, 0), (&plain, 8)] {
        let (_, rest) = run(&mut harness, request);
        assert_eq!(rest[0], GenerationEvent::Scheduled { cached_tokens });
    }
}

fn a_deadline_and_a_disconnect_end_the_scoring(depth: usize) {
    let mut harness = Harness::new(&config(), FakeModel { max_scored_tokens: 1, ..model(depth) });
    let prompt: Vec<TokenId> = (1..30).collect();
    let asked = scored(request(&prompt, SamplingParams { n: 2, max_tokens: 0, ..Default::default() }), 1);
    let gone = harness.submit(asked.clone());
    let late = asked.envelope.with(|envelope| envelope.deadline = Some(harness.now()));
    let late = harness.submit(GenerateRequest { envelope: late, ..asked });
    harness.step();
    harness.hang_up(gone);
    harness.run();
    assert!(
        matches!(&harness.events(late)[..], [GenerationEvent::Failed(failure)] if failure.message.contains("deadline"))
    );
}

fn rows_that_are_no_numbers_fail_only_their_own_request(depth: usize) {
    let mut harness = Harness::new(&config(), FakeModel { poison_token: Some(13), ..model(depth) });
    let sampling = SamplingParams { max_tokens: 2, ignore_eos: true, ..Default::default() };
    let bad = harness.submit(scored(request(&[1, 2, 13, 4, 5], sampling.clone()), 1));
    let good = harness.submit(scored(request(&[1, 2, 3, 4, 5], sampling.clone()), 1));
    harness.run();
    assert!(matches!(harness.events(bad).last(), Some(GenerationEvent::Failed(_))));
    let mut plain = Harness::new(&config(), model(depth));
    let expected = run(&mut plain, &scored(request(&[1, 2, 3, 4, 5], sampling), 1));
    assert_eq!(split(harness.events(good)), expected);
}

fn prompts_of_different_salts_share_nothing(depth: usize) {
    let mut harness = Harness::new(&config(), model(depth));
    let sampling = SamplingParams { max_tokens: 3, ignore_eos: true, ..Default::default() };
    let plain = request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], sampling);
    let [mine, yours] = [1, 2].map(|salt| salted(plain.clone(), salt));
    let (_, expected) = run(&mut harness, &plain);
    let cases = [(&mine, 0), (&mine, 8), (&yours, 0), (&plain, 8), (&yours, 8), (&mine, 8)];
    for (request, cached_tokens) in cases {
        let (_, rest) = run(&mut harness, request);
        assert_eq!(rest[0], GenerationEvent::Scheduled { cached_tokens });
        assert_eq!(rest[1..], expected[1..], "the cache changes no token");
    }
    // Together, one does not wait for what the other computes.
    let mut harness = Harness::new(&config(), model(depth));
    let serials = [&mine, &yours].map(|request| harness.submit(request.clone()));
    harness.run();
    for serial in serials {
        assert_eq!(harness.events(serial)[0], GenerationEvent::Scheduled { cached_tokens: 0 });
    }
}

/// What was told before a failure comes again, and is the same.
#[test]
fn another_engine_scores_the_same() {
    let (tokens, _, _) = generated();
    let sampling = SamplingParams { max_tokens: 4, ignore_eos: true, ..Default::default() };
    let fresh = scored(request(&tokens, sampling), 2);
    let (expected, expected_rest) = run(&mut Harness::new(&config(), model(1)), &fresh);
    let GenerationEvent::Token { token, .. } = expected_rest[1] else { panic!("a token") };
    let continued = GenerateRequest { choices: vec![ChoiceStart { index: 0, emitted: vec![token] }], ..fresh };
    let (scores, rest) = run(&mut Harness::new(&config(), model(2)), &continued);
    assert_eq!(scores, expected);
    assert_eq!(rest[1..], expected_rest[2..]);
}
