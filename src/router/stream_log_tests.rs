//! Listeners must see one consistent stream, whatever happens to the sources.

use super::*;
use crate::types::{Extensions, RequestId, SamplingParams};

fn log(n: u32, is_gated: bool) -> Arc<StreamLog> {
    let sampling = SamplingParams { n, ..SamplingParams::default() };
    let envelope = Envelope::new(RequestId::new("r"), Arc::from([1]), sampling);
    Arc::new(StreamLog::new(Arc::new(envelope), Fingerprint::new("f"), 1, Vec::new(), is_gated))
}

/// A stream of one choice whose prompt is to be scored, with the tokens that are known already.
fn scoring_log(prompt: &[TokenId], known: Vec<ChoiceProgress>) -> Arc<StreamLog> {
    let envelope = Envelope {
        extensions: Extensions { prompt_logprobs: Some(0), cache_salt: None },
        ..Envelope::new(RequestId::new("r"), prompt.into(), SamplingParams::default())
    };
    Arc::new(StreamLog::new(Arc::new(envelope), Fingerprint::new("f"), 1, known, false))
}

fn token(choice: u32, token: TokenId) -> GenerationEvent {
    GenerationEvent::Token { choice, token, logprobs: None }
}

fn end(choice: u32) -> GenerationEvent {
    GenerationEvent::Finished { choice, reason: FinishReason::Length }
}

fn heard(stream: &mut GenerationStream) -> Vec<GenerationEvent> {
    std::iter::from_fn(|| stream.try_next()).collect()
}

#[test]
fn two_sources_make_one_stream() {
    let log = log(2, false);
    let mut listener = log.listen(&[]).expect("open");
    let mut first = log.continuation().1;
    for event in [token(0, 5), token(1, 6), token(0, 7)] {
        assert_eq!(log.take(&mut first, event), News::Taken);
    }
    let (starts, mut second) = log.continuation();
    assert_eq!(starts[0], ChoiceStart { index: 0, emitted: vec![5, 7] });
    assert_eq!(starts[1], ChoiceStart { index: 1, emitted: vec![6] });
    assert_eq!(log.take(&mut second, token(0, 8)), News::Taken);
    assert_eq!(log.take(&mut first, token(0, 8)), News::Known, "the first one says the same a little later");
    assert_eq!(log.take(&mut first, token(0, 9)), News::Taken, "and then is ahead");
    assert_eq!(log.take(&mut second, token(0, 9)), News::Known);
    assert_eq!(log.take(&mut second, end(0)), News::Taken);
    assert_eq!(log.take(&mut first, end(0)), News::Known);
    assert_eq!(log.take(&mut second, end(1)), News::Taken);
    assert!(log.is_complete());
    let tokens = [token(0, 5), token(1, 6), token(0, 7), token(0, 8), token(0, 9), end(0), end(1)];
    assert_eq!(heard(&mut listener), tokens);
}

#[test]
fn a_source_that_says_otherwise_is_found_out() {
    let log = log(1, false);
    let (mut first, mut second) = (log.continuation().1, log.continuation().1);
    assert_eq!(log.take(&mut first, token(0, 5)), News::Taken);
    assert_eq!(log.take(&mut second, token(0, 6)), News::Contradiction { choice: 0, position: 0 });
    let mut late = Cursor::fresh(1);
    assert_eq!(log.take(&mut late, end(0)), News::Contradiction { choice: 0, position: 0 });
    assert_eq!(log.take(&mut first, end(0)), News::Taken);
    assert_eq!(log.take(&mut first, token(0, 7)), News::Contradiction { choice: 0, position: 1 });
    assert_eq!(log.take(&mut first, token(1, 7)), News::Foreign);
    assert_eq!(log.take(&mut first, end(9)), News::Foreign);
}

fn scored(start: u32, values: &[f32]) -> GenerationEvent {
    let logprobs = values.iter().map(|&logprob| TokenLogprobs { logprob, rank: 1, top: Vec::new() }).collect();
    GenerationEvent::PromptLogprobs { start, logprobs }
}

#[test]
fn a_prompt_is_scored_once_whoever_does_it_and_before_any_token() {
    let log = scoring_log(&[1, 2, 3, 4], Vec::new());
    let mut listener = log.listen(&[]).expect("open");
    let (mut first, mut second) = (log.continuation().1, log.continuation().1);
    assert_eq!(log.take(&mut first, scored(0, &[-1.0])), News::Taken);
    assert!(log.has_begun() && !log.is_scored());
    assert_eq!(log.take(&mut first, token(0, 5)), News::Foreign, "the prompt is not scored yet");
    assert_eq!(log.take(&mut first, end(0)), News::Foreign);
    assert_eq!(log.take(&mut second, scored(0, &[-1.0, -2.0])), News::Taken);
    assert_eq!(log.take(&mut first, scored(1, &[-2.0])), News::Known);
    assert_eq!(log.take(&mut first, scored(1, &[-2.5])), News::Contradiction { choice: 0, position: 0 });
    assert_eq!(log.take(&mut second, scored(3, &[-4.0])), News::Foreign, "a token is missing");
    assert_eq!(log.take(&mut second, scored(2, &[-3.0, -4.0])), News::Foreign, "the prompt has no more");
    assert_eq!(log.take(&mut second, scored(2, &[-3.0])), News::Taken);
    assert!(log.is_scored());
    assert_eq!(log.take(&mut second, token(0, 5)), News::Taken);
    let told = [scored(0, &[-1.0]), scored(1, &[-2.0]), scored(2, &[-3.0]), token(0, 5)];
    assert_eq!(heard(&mut listener), told);
    let mut late = log.listen(&[]).expect("open");
    assert_eq!(heard(&mut late), [scored(0, &[-1.0, -2.0, -3.0]), token(0, 5)]);
}

#[test]
fn a_stream_that_knows_tokens_before_its_scores_is_not_for_those_who_want_both() {
    assert!(!log(1, false).tells_scores_first(), "it tells none");
    assert!(scoring_log(&[1, 2], Vec::new()).tells_scores_first());
    let resumed = scoring_log(&[1, 2], vec![ChoiceProgress { tokens: vec![5], finished: None }]);
    assert!(!resumed.tells_scores_first());
    let mut cursor = resumed.continuation().1;
    assert_eq!(resumed.take(&mut cursor, scored(0, &[-1.0])), News::Taken);
    assert!(resumed.tells_scores_first(), "they are there now");
}

#[test]
fn late_listeners_hear_everything_or_what_they_lack() {
    let log = log(1, false);
    let mut cursor = log.continuation().1;
    log.take(&mut cursor, GenerationEvent::Scheduled { cached_tokens: 3 });
    for id in [5, 6, 7] {
        log.take(&mut cursor, token(0, id));
    }
    let mut whole = log.listen(&[]).expect("open");
    let mut rest = log.listen(&[2]).expect("open");
    log.take(&mut cursor, end(0));
    let scheduled = GenerationEvent::Scheduled { cached_tokens: 3 };
    assert_eq!(heard(&mut whole), [scheduled.clone(), token(0, 5), token(0, 6), token(0, 7), end(0)]);
    assert_eq!(heard(&mut rest), [scheduled, token(0, 7), end(0)]);
    assert!(log.close(false) && log.listen(&[]).is_none());
}

#[test]
fn nothing_leaves_before_the_gate_opens() {
    let log = log(1, true);
    let mut listener = log.listen(&[]).expect("open");
    let mut cursor = log.continuation().1;
    log.take(&mut cursor, token(0, 5));
    log.take(&mut cursor, end(0));
    assert_eq!(heard(&mut listener), []);
    log.open_gate();
    assert_eq!(heard(&mut listener), [token(0, 5), end(0)]);
}

#[tokio::test]
async fn a_stream_is_abandoned_when_the_last_listener_goes() {
    let log = log(1, false);
    let (first, second) = (log.listen(&[]).expect("open"), log.listen(&[]).expect("open"));
    drop(first);
    assert!(!log.close(true), "one is left");
    let waiting = tokio::spawn({
        let log = log.clone();
        async move { log.abandoned().await }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    drop(second);
    waiting.await.expect("it ends");
    assert!(log.close(true));
}

#[test]
fn a_deadline_ends_a_stream_wherever_it_is() {
    let log = log(1, false);
    let (mut first, mut second) = (log.continuation().1, log.continuation().1);
    log.take(&mut first, token(0, 5));
    let deadline = GenerationEvent::Finished { choice: 0, reason: FinishReason::Deadline };
    assert_eq!(log.take(&mut second, deadline), News::Taken);
    assert_eq!(log.take(&mut first, token(0, 6)), News::Known);
}
