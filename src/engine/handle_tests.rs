//! Tests through the handle and the real thread: refusals at the door, faults, drain, disconnects.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::RunnerError;
use super::config::Config;
use super::fake_runner::FakeModel;
use super::generation::letters;
use super::handle::{EngineHandle, EngineParts, Fault, SpawnError, spawn};
use crate::types::{
    Backend, Envelope, Failure, FailureKind, Fingerprint, FinishReason, GenerateRequest, GenerationEvent,
    GenerationStream, RequestId, SamplingParams, TokenId,
};

/// Longer than any test should take; a test that runs into it fails.
const PATIENCE: Duration = Duration::from_secs(20);

fn parts(config: Config) -> EngineParts {
    EngineParts {
        config,
        fingerprint: Fingerprint::new("fa4e"),
        eos_token_ids: vec![0],
        stop_texts: letters(),
        on_step: None,
        on_failure: None,
    }
}

fn engine(config: Config, model: FakeModel) -> EngineHandle {
    spawn(parts(config), Box::new(move || Ok(model.runner().0))).expect("starts")
}

fn request(prompt: &[TokenId], max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingParams { max_tokens, ignore_eos: true, ..Default::default() };
    GenerateRequest::fresh(Arc::new(Envelope::new(RequestId::new("test"), Arc::from(prompt), sampling)))
}

async fn last_event(mut stream: GenerationStream) -> GenerationEvent {
    let mut last = None;
    let all = async {
        while let Some(event) = stream.next().await {
            let is_end = matches!(event, GenerationEvent::Finished { .. } | GenerationEvent::Failed(_));
            last = Some(event);
            if is_end {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("the stream ends");
    last.expect("an event")
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn slow() -> FakeModel {
    FakeModel { forward_time: Duration::from_millis(2), num_blocks: 256, ..FakeModel::default() }
}

#[tokio::test]
async fn what_can_never_be_computed_is_refused_at_the_door() {
    let config = Config { probe_tokens: 8, ..Config::default() };
    let engine = engine(config, FakeModel { num_blocks: 12, block_size: 4, ..FakeModel::default() });
    assert_eq!(engine.limits().max_model_len, 40, "the pool without the reserve bounds it");
    let refusal = |request| engine.generate(request).err().expect("refused");
    let long = refusal(request(&[1; 40], 1));
    assert_eq!((long.kind, long.code), (FailureKind::InvalidRequest, Some("context_length_exceeded")));
    assert!(long.message.contains("40 tokens (max_model_len)"), "{long}");
    assert_eq!(refusal(request(&[], 1)).param.as_deref(), Some("prompt"));
    assert!(refusal(request(&[32], 1)).message.contains("token id 32"));
    assert_eq!(refusal(GenerateRequest { choices: Vec::new(), ..request(&[1], 1) }).param.as_deref(), Some("n"));
    let probe = refusal(GenerateRequest { is_probe: true, ..request(&[1; 5], 4) });
    assert!(probe.message.contains("probe_tokens"), "{probe}");
    let longest = engine.generate(request(&[1; 39], 5)).expect("fits");
    let end = last_event(longest).await;
    assert_eq!(end, GenerationEvent::Finished { choice: 0, reason: FinishReason::Length });
}

#[tokio::test]
async fn more_requests_than_the_engine_may_hold_are_refused() {
    let engine = engine(Config { max_num_requests: 2, ..Config::default() }, slow());
    let held: Vec<GenerationStream> = (0..2).map(|_| engine.generate(request(&[1], 200)).expect("accepted")).collect();
    let failure = engine.generate(request(&[1], 1)).err().expect("refused");
    assert_eq!(failure.kind, FailureKind::Overloaded);
    drop(held);
    wait_until("room for another", || engine.generate(request(&[1], 1)).is_ok()).await;
}

#[tokio::test]
async fn a_dropped_stream_leaves_the_engine() {
    let engine = engine(Config { max_num_seqs: 1, ..Config::default() }, slow());
    let running = engine.generate(request(&[1; 9], 200)).expect("accepted");
    let waiting = engine.generate(request(&[2; 9], 200)).expect("accepted");
    wait_until("one runs and one waits", || {
        let status = engine.status();
        (status.running, status.waiting) == (1, 1)
    })
    .await;
    drop(waiting);
    wait_until("the waiting one is gone", || engine.status().waiting == 0).await;
    drop(running);
    wait_until("the blocks are free", || engine.status().kv_blocks_used == 0 && engine.status().running == 0).await;
    assert_eq!(engine.counters().requests_cancelled, 2);
}

#[tokio::test]
async fn a_panic_fails_every_stream_and_leaves_a_handle_that_refuses() {
    let engine = engine(Config { max_num_seqs: 1, ..Config::default() }, slow());
    let streams: Vec<GenerationStream> =
        (0..3).map(|_| engine.generate(request(&[1], 200)).expect("accepted")).collect();
    engine.inject_fault(Fault::Panic);
    for stream in streams {
        let GenerationEvent::Failed(failure) = last_event(stream).await else { panic!("the stream fails") };
        assert_eq!(failure.kind, FailureKind::EngineFailed);
    }
    assert!(!engine.status().alive);
    assert_eq!(engine.generate(request(&[1], 1)).err().map(|failure| failure.kind), Some(FailureKind::EngineFailed));
    tokio::time::timeout(PATIENCE, engine.drain(Instant::now())).await.expect("nothing is left to drain");
}

#[tokio::test]
async fn a_device_that_breaks_fails_the_engine_whether_at_the_launch_or_while_the_next_step_is_planned() {
    for depth in [1, 2] {
        let engine = engine(Config::default(), FakeModel { breaks_at: Some(3), depth, ..FakeModel::default() });
        let stream = engine.generate(request(&[1], 200)).expect("accepted");
        let GenerationEvent::Failed(failure) = last_event(stream).await else { panic!("the stream fails") };
        assert_eq!(failure.kind, FailureKind::EngineFailed);
        assert!(!failure.message.contains("fake"), "the cause is for the log");
        wait_until("the status says so", || !engine.status().alive).await;
        assert_eq!(engine.counters().generation_tokens, 3, "no step after the one that failed");
    }
}

#[tokio::test]
async fn an_engine_that_is_told_to_give_up_fails_busy_or_idle_and_says_so_once() {
    for busy in [true, false] {
        let (told, tells) = std::sync::mpsc::channel();
        let on_failure = move |failure: &Failure| told.send(failure.source.as_ref().expect("a cause").to_string());
        let parts = EngineParts {
            on_failure: Some(Box::new(move |failure| on_failure(failure).expect("the test is here"))),
            ..parts(Config::default())
        };
        let engine = spawn(parts, Box::new(|| Ok(FakeModel { depth: 2, ..slow() }.runner().0))).expect("starts");
        let stream = busy.then(|| engine.generate(request(&[1], 250)).expect("accepted"));
        let cause = RunnerError::Device("XID 79".to_owned());
        let failure = Failure::new(FailureKind::NumericsSuspect, "told").with_source(cause);
        engine.give_up(failure.clone());
        engine.give_up(failure.clone());
        if let Some(stream) = stream {
            assert_eq!(last_event(stream).await, GenerationEvent::Failed(failure));
        }
        wait_until("the status says so", || !engine.status().alive).await;
        assert_eq!(tells.recv_timeout(PATIENCE).expect("told"), "the device failed: XID 79");
        assert!(tells.recv_timeout(PATIENCE).is_err(), "only once");
    }
}

#[tokio::test]
async fn an_idle_engine_shows_life_without_progress() {
    let engine = engine(Config::default(), FakeModel::default());
    let first = engine.status();
    wait_until("it beats", || engine.status().heartbeat > first.heartbeat + Duration::from_millis(1200)).await;
    assert_eq!(engine.status().progress, first.progress, "a turn of an idle loop is no progress");
    let stream = engine.generate(request(&[1], 3)).expect("accepted");
    last_event(stream).await;
    assert!(engine.status().progress > first.progress);
}

#[tokio::test]
async fn what_was_handed_to_an_engine_that_hangs_is_owed_until_it_is_answered() {
    let engine = engine(Config::default(), FakeModel::default());
    engine.inject_fault(Fault::Hang(Duration::from_secs(3)));
    wait_until("it hangs", || engine.status().heartbeat.elapsed() > Duration::from_millis(1200)).await;
    let hung = engine.status();
    assert_eq!(hung.outstanding, 0, "it hangs while it has nothing to do");
    let stream = engine.generate(request(&[1], 3)).expect("accepted");
    drop(engine.generate(request(&[2], 3)).expect("accepted"));
    let owing = engine.status();
    assert_eq!(owing.outstanding, 3, "two requests, and word that one of them was given up");
    assert_eq!(
        (owing.running, owing.waiting, owing.progress),
        (0, 0, hung.progress),
        "of which the engine knows nothing"
    );
    last_event(stream).await;
    wait_until("nothing is owed", || engine.status().outstanding == 0).await;
    assert!(engine.status().progress > hung.progress);
}

#[tokio::test]
async fn an_engine_whose_thread_is_gone_is_not_alive_however_it_went() {
    let parts =
        EngineParts { on_failure: Some(Box::new(|_| panic!("in the middle of failing"))), ..parts(Config::default()) };
    let engine = spawn(parts, Box::new(|| Ok(slow().runner().0))).expect("starts");
    let stream = engine.generate(request(&[1], 250)).expect("accepted");
    engine.inject_fault(Fault::Panic);
    wait_until("it is seen", || !engine.status().alive).await;
    let ended = async {
        let mut stream = stream;
        while stream.next().await.is_some() {}
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the stream ends");
}

#[tokio::test]
async fn corrupted_weights_change_the_tokens() {
    let engine = engine(Config::default(), FakeModel::default());
    let mut outputs = Vec::new();
    for _ in 0..2 {
        let mut stream = engine.generate(request(&[3, 4], 20)).expect("accepted");
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                GenerationEvent::Token { token, .. } => tokens.push(token),
                GenerationEvent::Finished { .. } => break,
                _ => {}
            }
        }
        outputs.push(tokens);
        engine.inject_fault(Fault::CorruptWeights);
    }
    assert_ne!(outputs[0], outputs[1]);
}

#[tokio::test]
async fn drain_finishes_what_is_there_and_accepts_nothing_more() {
    let engine = engine(Config { max_num_seqs: 1, ..Config::default() }, slow());
    let streams: Vec<GenerationStream> =
        (0..3).map(|_| engine.generate(request(&[1, 2], 10)).expect("accepted")).collect();
    let draining = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(Instant::now() + PATIENCE).await }
    });
    wait_until("new requests are refused", || engine.generate(request(&[1], 1)).is_err()).await;
    for stream in streams {
        let end = last_event(stream).await;
        assert_eq!(end, GenerationEvent::Finished { choice: 0, reason: FinishReason::Length });
    }
    draining.await.expect("drained");
    assert!(engine.status().alive);
}

#[tokio::test]
async fn what_outlasts_the_drain_ends_with_shutdown() {
    let engine = engine(Config { max_num_seqs: 1, ..Config::default() }, slow());
    let streams: Vec<GenerationStream> =
        (0..2).map(|_| engine.generate(request(&[1, 2], 250)).expect("accepted")).collect();
    let begin = Instant::now();
    engine.drain(begin + Duration::from_millis(30)).await;
    assert!(begin.elapsed() < Duration::from_millis(900), "the deadline holds");
    for stream in streams {
        let end = last_event(stream).await;
        assert_eq!(end, GenerationEvent::Finished { choice: 0, reason: FinishReason::Shutdown });
    }
}

#[test]
fn failures_to_start_say_why() {
    let failing = spawn(parts(Config::default()), Box::new(|| Err("no such file".into())));
    assert!(matches!(failing.err(), Some(SpawnError::Runner(source)) if source.to_string() == "no such file"));
    let panicking = spawn(parts(Config::default()), Box::new(|| panic!("while loading")));
    assert!(matches!(panicking.err(), Some(SpawnError::Panicked)));
    let model = FakeModel { num_blocks: 2, ..FakeModel::default() };
    let small = spawn(parts(Config::default()), Box::new(move || Ok(model.runner().0)));
    assert!(matches!(small.err(), Some(SpawnError::PoolTooSmall { reserved: 16, .. })));
}
