//! Round trips of all messages, and damaged input.

use std::path::Path;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::cluster::journal::{ChoiceProgress, JournalEntry, JournalHead, JournalKey, JournalRecord};
use crate::cluster::transport::{FollowCall, GenerateCall, JournalBatch};
use crate::types::{ChoiceStart, Fingerprint, NodeId, RequestId, SamplingParams, StopCause};

fn failures() -> impl Strategy<Value = Failure> {
    let code = prop_oneof![Just(None), (0..CODES.len()).prop_map(|index| Some(CODES[index]))];
    let kind = (0..FailureKind::ALL.len()).prop_map(|index| FailureKind::ALL[index]);
    (kind, ".{0,40}", option::of(".{0,9}"), code, option::of(any::<Duration>())).prop_map(
        |(kind, message, param, code, retry_after)| Failure { kind, message, param, code, retry_after, source: None },
    )
}

fn reasons() -> impl Strategy<Value = FinishReason> {
    prop_oneof![
        any::<u32>().prop_map(|token| FinishReason::Stop(StopCause::EndOfSequence(token))),
        any::<u32>().prop_map(|token| FinishReason::Stop(StopCause::Token(token))),
        ".{0,20}".prop_map(|text| FinishReason::Stop(StopCause::String(text))),
        Just(FinishReason::Length),
        Just(FinishReason::Deadline),
        Just(FinishReason::Shutdown),
    ]
}

fn logprobs() -> impl Strategy<Value = TokenLogprobs> {
    let number = -1e9f32..0.0;
    (number.clone(), any::<u32>(), vec((any::<u32>(), number), 0..21)).prop_map(|(logprob, rank, top)| TokenLogprobs {
        logprob,
        rank,
        top,
    })
}

fn frames() -> impl Strategy<Value = PeerFrame> {
    let event = prop_oneof![
        any::<u32>().prop_map(|cached_tokens| GenerationEvent::Scheduled { cached_tokens }),
        (any::<u32>(), any::<u32>(), option::of(logprobs().prop_map(Box::new)))
            .prop_map(|(choice, token, logprobs)| GenerationEvent::Token { choice, token, logprobs }),
        (any::<u32>(), vec(logprobs(), 0..9))
            .prop_map(|(start, logprobs)| GenerationEvent::PromptLogprobs { start, logprobs }),
        (any::<u32>(), reasons()).prop_map(|(choice, reason)| GenerationEvent::Finished { choice, reason }),
        failures().prop_map(GenerationEvent::Failed),
    ];
    prop_oneof![event.prop_map(PeerFrame::Event), Just(PeerFrame::Heartbeat), Just(PeerFrame::HandOver)]
}

/// All frames in `bytes`, delivered in pieces of `step` bytes.
fn decode_in_pieces(bytes: &[u8], step: usize) -> Result<Vec<PeerFrame>, WireError> {
    let mut decoder = FrameDecoder::default();
    let mut frames = Vec::new();
    for piece in bytes.chunks(step) {
        decoder.push(piece);
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
    }
    decoder.finish()?;
    Ok(frames)
}

/// `Failure`'s equality ignores the retry time, which matters between nodes.
fn retry_times(frames: &[PeerFrame]) -> Vec<Option<Duration>> {
    let retry = |frame: &PeerFrame| match frame {
        PeerFrame::Event(GenerationEvent::Failed(failure)) => failure.retry_after,
        _ => None,
    };
    frames.iter().map(retry).collect()
}

proptest! {
    #[test]
    fn frames_survive_any_cutting(frames in vec(frames(), 0..12), step in 1..200usize) {
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| encode_frame(frame.clone(), &mut bytes));
        let decoded = decode_in_pieces(&bytes, step).expect("our own frames");
        prop_assert_eq!(retry_times(&decoded), retry_times(&frames));
        prop_assert_eq!(decoded, frames);
    }

    #[test]
    fn any_bytes_are_an_error_or_a_value(bytes in vec(any::<u8>(), 0..600), step in 1..100usize) {
        let _ = decode_in_pieces(&bytes, step);
        let _ = decode_failure(&bytes);
        let _ = decode_call(&bytes);
        let _ = decode_message::<FollowCall>(&bytes);
        let _ = decode_message::<JournalBatch>(&bytes);
        let _ = decode_message::<Option<JournalRecord>>(&bytes);
    }

    /// Real messages with a few changed bytes are parsed further than random bytes.
    #[test]
    fn damaged_messages_do_no_harm(
        frames in vec(frames(), 1..6),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Vec::new();
        frames.into_iter().for_each(|frame| encode_frame(frame, &mut bytes));
        for (at, byte) in &damage {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        let _ = decode_in_pieces(&bytes[..cut.index(bytes.len())], 7);
        let mut call = encode_call(&extended_call()).expect("small").to_vec();
        let mut batch = encode_message(&journal_batch()).expect("small").to_vec();
        for (at, byte) in damage {
            for message in [&mut call, &mut batch] {
                let at = at.index(message.len());
                message[at] = byte;
            }
        }
        let _ = decode_call(&call);
        let _ = decode_message::<JournalBatch>(&batch);
    }
}

fn generate_call() -> GenerateCall {
    GenerateCall {
        id: RequestId::new("cmpl-1"),
        fingerprint: Fingerprint::new("f00d"),
        prompt: Arc::from([1, 70_000, u32::MAX]),
        choices: vec![ChoiceStart { index: 0, emitted: vec![7, 8] }, ChoiceStart { index: 3, emitted: Vec::new() }],
        sampling: Arc::new(SamplingParams {
            seed: u64::MAX,
            temperature: 0.1,
            logit_bias: vec![(3, -100.0)],
            stop: vec!["\n\n".into()],
            logprobs: Some(5),
            ..SamplingParams::default()
        }),
        priority: -1,
        remaining: Some(Duration::from_millis(1500)),
        is_continuation: true,
        extensions: Extensions::default(),
    }
}

fn extended_call() -> GenerateCall {
    let extensions = Extensions { cache_salt: Some(CacheSalt::new([7; 16])), prompt_logprobs: Some(3) };
    GenerateCall { extensions, ..generate_call() }
}

fn journal_batch() -> JournalBatch {
    let key = JournalKey::new("tenant", "key", 1);
    let head = JournalHead {
        key,
        body: [9; 16],
        id: RequestId::new("chatcmpl-2"),
        created: 1_700_000_000,
        model: "default".into(),
        fingerprint: Fingerprint::new("f00d"),
        prompt: Arc::from([1, 2]),
        sampling: Arc::new(SamplingParams::default()),
    };
    let choices = vec![ChoiceProgress { tokens: vec![5], finished: Some(FinishReason::Length) }];
    let record = JournalRecord { head: Arc::new(head), epoch: 2, entry: NodeId::new("a"), choices };
    let append = JournalEntry::Append { key, epoch: 2, choice: 0, start: 1, tokens: vec![6], finished: None };
    let drop = JournalEntry::Drop { key, epoch: 3 };
    JournalBatch { from: NodeId::new("a"), entries: vec![JournalEntry::Put(record), append, drop] }
}

#[test]
fn calls_come_back_as_they_were() {
    let call = generate_call();
    assert_eq!(decode_call(&encode_call(&call).expect("small")).expect("our own"), call);
    let batch = journal_batch();
    assert_eq!(decode_message::<JournalBatch>(&encode_message(&batch).expect("small")).expect("our own"), batch);
    let follow = FollowCall { key: JournalKey::new("t", "k", 0), have: vec![0, 300] };
    assert_eq!(decode_message::<FollowCall>(&encode_message(&follow).expect("small")).expect("our own"), follow);
}

/// A node of the first version decodes a call as `decode_message` does.
#[test]
fn an_older_node_reads_what_it_can_do_and_refuses_what_it_cannot() {
    let as_before = |call: &GenerateCall| decode_message::<GenerateCall>(&encode_call(call).expect("small"));
    let plain = generate_call();
    assert_eq!(as_before(&plain).expect("as before"), plain);
    let sampling = SamplingParams { min_tokens: 2, ..(*plain.sampling).clone() };
    let stops_later = GenerateCall { sampling: Arc::new(sampling), ..plain.clone() };
    for call in [extended_call(), stops_later] {
        assert!(matches!(as_before(&call), Err(WireError::Trailing { .. })), "{call:?}");
        assert_eq!(decode_call(&encode_call(&call).expect("small")).expect("our own"), call);
    }
    // In the same way this node refuses features that it does not know.
    let mut bytes = encode_call(&plain).expect("small").to_vec();
    bytes.extend([1, 99]);
    assert!(matches!(decode_call(&bytes), Err(WireError::Malformed(_))));
}

#[test]
fn messages_are_read_to_their_end_and_bounded() {
    let mut bytes = encode_message(&7u32).expect("small").to_vec();
    bytes.push(0);
    assert!(matches!(decode_message::<u32>(&bytes), Err(WireError::Trailing { bytes: 1 })));
    let large = vec![0u8; MAX_MESSAGE_BYTES + 1];
    assert!(matches!(decode_message::<Vec<u8>>(&large), Err(WireError::TooLarge { .. })));
    assert!(matches!(encode_message(&large), Err(WireError::TooLarge { .. })));
    // A length field that claims four thousand million elements, with no data.
    assert!(matches!(decode_message::<Vec<u32>>(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Err(WireError::Malformed(_))));
}

#[test]
fn a_frame_that_claims_too_much_is_refused_before_it_has_arrived() {
    let mut decoder = FrameDecoder::default();
    decoder.push(&(MAX_FRAME_BYTES as u32).to_le_bytes());
    assert!(matches!(decoder.next_frame(), Ok(None)), "it may still come");
    assert!(matches!(decoder.finish(), Err(WireError::Truncated)));
    let mut decoder = FrameDecoder::default();
    decoder.push(&(MAX_FRAME_BYTES as u32 + 1).to_le_bytes());
    assert!(matches!(decoder.next_frame(), Err(WireError::TooLarge { .. })));
}

#[test]
fn a_frame_that_would_be_too_large_becomes_a_failure() {
    let reason = FinishReason::Stop(StopCause::String("x".repeat(MAX_FRAME_BYTES)));
    let mut bytes = Vec::new();
    encode_frame(PeerFrame::Heartbeat, &mut bytes);
    encode_frame(PeerFrame::Event(GenerationEvent::Finished { choice: 0, reason }), &mut bytes);
    let frames = decode_in_pieces(&bytes, 1000).expect("our own frames");
    let [PeerFrame::Heartbeat, PeerFrame::Event(GenerationEvent::Failed(failure))] = &frames[..] else {
        panic!("{frames:?}");
    };
    assert_eq!(failure.kind, FailureKind::Internal);
}

#[test]
fn failures_cross_with_what_a_node_may_know() {
    let failure = Failure::invalid("prompt", "é".repeat(MAX_FAILURE_TEXT_BYTES))
        .with_code("context_length_exceeded")
        .with_retry_after(Duration::from_millis(2500))
        .with_source(std::io::Error::other("the path of a file"));
    let bytes = encode_failure(failure);
    assert!(!bytes.windows(4).any(|window| window == b"path"));
    let crossed = decode_failure(&bytes).expect("our own");
    assert_eq!(crossed.message, "é".repeat(MAX_FAILURE_TEXT_BYTES / 2));
    assert_eq!(crossed.code, Some("context_length_exceeded"));
    assert_eq!((crossed.param.as_deref(), crossed.retry_after), (Some("prompt"), Some(Duration::from_millis(2500))));
    let unknown = Failure::new(FailureKind::Internal, "x").with_code("a_word_of_tomorrow");
    assert_eq!(decode_failure(&encode_failure(unknown)).expect("our own").code, None);
}

/// Codes from the layers below the API are dropped between nodes unless they are in the table.
#[test]
fn every_code_below_the_api_crosses() {
    fn sources(folder: &Path, texts: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                sources(&entry, texts);
            } else if !entry.to_string_lossy().contains("test") {
                texts.push(std::fs::read_to_string(entry).expect("a text"));
            }
        }
    }
    let mut texts = Vec::new();
    for module in ["admission", "cluster", "engine", "router", "tokenizer"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(module), &mut texts);
    }
    let given =
        texts.iter().flat_map(|text| text.split(".with_code(\"").skip(1).filter_map(|rest| rest.split('"').next()));
    let codes: Vec<_> = given.collect();
    assert!(codes.contains(&"context_length_exceeded"), "none found: {codes:?}");
    let missing: Vec<_> = codes.iter().filter(|code| !CODES.contains(code)).collect();
    assert!(missing.is_empty(), "CODES of cluster/wire.rs lacks {missing:?}");
}

#[test]
fn paths_name_the_version_of_the_protocol() {
    let version = format!("/outrigger/v{}/", crate::cluster::PROTOCOL_VERSION);
    for path in [GENERATE_PATH, FOLLOW_PATH, JOURNAL_PATH, LOOKUP_PATH, TOKENIZER_PATH] {
        assert!(path.starts_with(&version), "{path}");
    }
}
