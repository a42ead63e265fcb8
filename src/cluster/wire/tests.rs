//! Round trips of all messages, and damaged input.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::cluster::journal::{ChoiceProgress, JournalEntry, JournalRecord, JournalRefusal};
use crate::cluster::transport::{FollowCall, GenerateCall, JournalBatch};
use crate::types::{
    CacheSalt, ChoiceStart, Envelope, Extensions, Fingerprint, FinishReason, JournalKey, NodeId, RequestId,
    SamplingParams, StopCause, StreamName, Tenant, TokenLogprobs, TraceContext,
};

fn failures() -> impl Strategy<Value = Failure> {
    let code = prop_oneof![Just(None), (0..CODES.len()).prop_map(|index| Some(CODES[index]))];
    let kind = (0..FailureKind::ALL.len()).prop_map(|index| FailureKind::ALL[index]);
    (kind, ".{0,40}", option::of(".{0,9}"), code, option::of(any::<Duration>())).prop_map(
        |(kind, message, param, code, retry_after)| {
            // An unavailable replica always says why.
            let code = code.or((kind == FailureKind::Unavailable).then_some("no_replica"));
            Failure { kind, message, param, code, retry_after, source: None }
        },
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
        let _ = decode_message::<GenerateCall>(&bytes);
        let _ = decode_message::<FollowCall>(&bytes);
        let _ = decode_message::<JournalBatch>(&bytes);
        let _ = decode_message::<Option<JournalRecord>>(&bytes);
        let _ = decode_message::<Vec<JournalRefusal>>(&bytes);
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
        let mut call = encode_message(&extended_call()).expect("small").to_vec();
        let mut batch = encode_message(&journal_batch()).expect("small").to_vec();
        for (at, byte) in damage {
            for message in [&mut call, &mut batch] {
                let at = at.index(message.len());
                message[at] = byte;
            }
        }
        let _ = decode_message::<GenerateCall>(&call);
        let _ = decode_message::<JournalBatch>(&batch);
    }
}

fn generate_call() -> GenerateCall {
    let sampling = SamplingParams {
        seed: u64::MAX,
        temperature: 0.1,
        logit_bias: vec![(3, -100.0)],
        stop: vec!["\n\n".into()],
        logprobs: Some(5),
        ..SamplingParams::default()
    };
    let envelope = Envelope {
        priority: -1,
        ..Envelope::new(RequestId::new("cmpl-1"), Arc::from([1, 70_000, u32::MAX]), sampling)
    };
    GenerateCall {
        envelope: Arc::new(envelope),
        fingerprint: Fingerprint::new("f00d"),
        choices: vec![ChoiceStart { index: 0, emitted: vec![7, 8] }, ChoiceStart { index: 3, emitted: Vec::new() }],
        remaining: Some(Duration::from_millis(1500)),
        is_continuation: true,
    }
}

/// With everything that an envelope may hold.
fn extended_call() -> GenerateCall {
    let envelope = generate_call().envelope.with(extend);
    GenerateCall { envelope, ..generate_call() }
}

fn extend(envelope: &mut Envelope) {
    envelope.created = 1_700_000_000;
    envelope.tenant = Tenant::new("0123");
    envelope.model = "default".into();
    envelope.tokenizer = "beef".into();
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    envelope.trace = TraceContext::parse(parent, Some("rojo=00f067aa0ba902b7,congo=t61"));
    envelope.extensions = Extensions { cache_salt: Some(CacheSalt::new([7; 16])), prompt_logprobs: Some(3) };
}

fn key(key: &str) -> JournalKey {
    JournalKey::new(&Tenant::new("tenant"), key, 1)
}

fn record() -> JournalRecord {
    let mut envelope = Envelope {
        name: Some(StreamName { key: key("key"), body: [9; 16] }),
        ..Envelope::new(RequestId::new("chatcmpl-2"), Arc::from([1, 2]), SamplingParams::default())
    };
    extend(&mut envelope);
    JournalRecord {
        envelope: Arc::new(envelope),
        fingerprint: Fingerprint::new("f00d"),
        epoch: 2,
        entry: NodeId::new("a"),
        choices: vec![ChoiceProgress { tokens: vec![5], finished: Some(FinishReason::Length) }],
    }
}

fn journal_batch() -> JournalBatch {
    let (record, key) = (record(), record().name().key);
    let append = JournalEntry::Append { key, epoch: 2, choice: 0, start: 1, tokens: vec![6], finished: None };
    let drop = JournalEntry::Drop { key, epoch: 3 };
    JournalBatch { from: NodeId::new("a"), entries: vec![JournalEntry::Put(record), append, drop] }
}

/// What comes out of the other side.
fn across<T: WireMessage>(message: &T) -> Result<T, WireError> {
    decode_message(&encode_message(message).expect("small"))
}

#[test]
fn messages_come_back_as_they_were() {
    for call in [generate_call(), extended_call()] {
        assert_eq!(across(&call).expect("our own"), call);
    }
    let batch = journal_batch();
    assert_eq!(across(&batch).expect("our own"), batch);
    let key = self::key("k");
    let follow = FollowCall { key, have: vec![0, 300] };
    assert_eq!(across(&follow).expect("our own"), follow);
    assert_eq!(across(&key).expect("our own"), key);
    assert_eq!(across(&"digest".to_owned()).expect("our own"), "digest");
    let refusals =
        vec![JournalRefusal::Fenced { key, epoch: 7 }, JournalRefusal::Unknown { key }, JournalRefusal::Full { key }];
    assert_eq!(across(&refusals).expect("our own"), refusals);
    let JournalEntry::Put(record) = batch.entries[0].clone() else { panic!("a record") };
    assert_eq!(across(&Some(record.clone())).expect("our own"), Some(record));
    assert_eq!(across(&None::<JournalRecord>).expect("our own"), None);
}

#[test]
fn numbers_keep_their_bits() {
    let sampling = SamplingParams { presence_penalty: -0.0, temperature: 0.0, ..SamplingParams::default() };
    let envelope = generate_call().envelope.with(|envelope| envelope.sampling = Arc::new(sampling));
    let back = across(&GenerateCall { envelope, ..generate_call() }).expect("our own");
    assert_eq!(back.envelope.sampling.presence_penalty.to_bits(), (-0.0f32).to_bits());
    let logprobs = Some(Box::new(TokenLogprobs { logprob: -0.0, rank: 1, top: vec![(5, -0.0), (6, 0.0)] }));
    let mut bytes = Vec::new();
    encode_frame(PeerFrame::Event(GenerationEvent::Token { choice: 0, token: 5, logprobs }), &mut bytes);
    let frames = decode_in_pieces(&bytes, 3).expect("our own");
    let [PeerFrame::Event(GenerationEvent::Token { logprobs: Some(back), .. })] = &frames[..] else {
        panic!("{frames:?}");
    };
    let bits = [back.logprob, back.top[0].1, back.top[1].1].map(f32::to_bits);
    assert_eq!(bits, [-0.0f32, -0.0, 0.0].map(f32::to_bits));
}

/// A field of a later version: number 1000, with some bytes.
const LATER_FIELD: &[u8] = &[0xc2, 0x3e, 3, 1, 2, 3];

#[test]
fn fields_of_a_later_version_are_skipped_in_every_message() {
    fn check<T: WireMessage + PartialEq + std::fmt::Debug>(message: &T) {
        let bytes = [&encode_message(message).expect("small")[..], LATER_FIELD].concat();
        assert_eq!(&decode_message::<T>(&bytes).expect("skipped"), message);
    }
    let key = self::key("k");
    check(&extended_call());
    check(&journal_batch());
    check(&FollowCall { key, have: vec![1] });
    check(&key);
    check(&"digest".to_owned());
    check(&vec![JournalRefusal::Full { key }]);
    check(&None::<JournalRecord>);
    let failure = Failure::new(FailureKind::Overloaded, "full");
    let bytes = [&encode_failure(failure)[..], LATER_FIELD].concat();
    assert_eq!(decode_failure(&bytes).expect("skipped").kind, FailureKind::Overloaded);
}

/// A frame as it is sent: its length, and its message.
fn sent(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_le_bytes()[..], message].concat()
}

#[test]
fn frames_of_a_later_version_are_skipped_and_unknown_ends_and_failures_replaced() {
    let mut bytes = sent(LATER_FIELD);
    encode_frame(PeerFrame::Heartbeat, &mut bytes);
    bytes.extend(sent(
        &[&schema::WireFrame { kind: Some(schema::WireFrameKind::HandOver(true)) }.encode_to_vec()[..], LATER_FIELD]
            .concat(),
    ));
    assert_eq!(decode_in_pieces(&bytes, 5).expect("skipped"), [PeerFrame::Heartbeat, PeerFrame::HandOver]);

    let reason = Some(schema::WireFinish { reason: 99, ..schema::WireFinish::default() });
    let finished = schema::WireFinished { choice: 1, reason: reason.clone() };
    let kind =
        schema::WireFailed { kind: 99, message: "new".into(), code: Some("of_tomorrow".into()), ..Default::default() };
    for (kind, expected) in [
        (schema::WireFrameKind::Finished(finished), FailureKind::Internal),
        (schema::WireFrameKind::Failed(kind), FailureKind::Internal),
    ] {
        let frames =
            decode_in_pieces(&sent(&schema::WireFrame { kind: Some(kind) }.encode_to_vec()), 9).expect("replaced");
        let [PeerFrame::Event(GenerationEvent::Failed(failure))] = &frames[..] else { panic!("{frames:?}") };
        assert_eq!((failure.kind, failure.code), (expected, None));
    }

    // In a journal, an unknown end is an end that is not known yet.
    let mut found = Some(record()).to_schema();
    found.record.as_mut().expect("given").choices[0].finished = reason;
    let back = Option::<JournalRecord>::from_schema(found).expect("read").expect("given");
    assert_eq!((back.choices[0].tokens.len(), &back.choices[0].finished), (1, &None));
}

#[test]
fn what_a_later_version_needs_is_refused_if_it_is_not_known() {
    let mut call = generate_call().to_schema();
    call.envelope.as_mut().expect("given").needs = vec![4711];
    assert!(matches!(decode_message::<GenerateCall>(&call.encode_to_vec()), Err(WireError::Needs(4711))));

    let (key, mut batch) = (record().name().key, journal_batch().to_schema());
    let Some(schema::WireEntryKind::Put(record)) = &mut batch.entries[0].kind else { panic!("a record") };
    let head = record.head.as_mut().expect("given");
    head.envelope.as_mut().expect("given").needs = vec![4711];
    batch.entries[1].kind = None;
    let entries = JournalBatch::from_schema(batch).expect("read").entries;
    let (full, unknown) = (JournalRefusal::Full { key }, JournalRefusal::Unknown { key });
    assert_eq!(entries[..2], [JournalEntry::Unreadable(full), JournalEntry::Unreadable(unknown)]);
    assert!(matches!(entries[2], JournalEntry::Drop { .. }), "the others of the batch count");

    let refusals = schema::WireRefusals {
        refusals: vec![schema::WireRefusal { key: key.bytes().to_vec(), reason: 99, epoch: 0 }],
    };
    assert_eq!(Vec::from_schema(refusals).expect("read"), [JournalRefusal::Full { key }]);
}

#[test]
fn what_an_earlier_version_did_not_say_is_not_known() {
    let mut call = extended_call().to_schema();
    let said = call.envelope.take().expect("given");
    let (created, tokenizer, tenant, model) = Default::default();
    let (traceparent, tracestate) = Default::default();
    call.envelope = Some(schema::WireEnvelope { created, model, tokenizer, tenant, traceparent, tracestate, ..said });
    let back: GenerateCall = decode_message(&call.encode_to_vec()).expect("read");
    let extensions = extended_call().envelope.extensions;
    assert_eq!(back.envelope, generate_call().envelope.with(|envelope| envelope.extensions = extensions));
}

#[test]
fn a_trace_that_makes_no_sense_is_none() {
    let mut call = extended_call().to_schema();
    call.envelope.as_mut().expect("given").traceparent = "01".into();
    assert_eq!(GenerateCall::from_schema(call).expect("read").envelope.trace, None);
}

#[test]
fn parts_that_make_no_sense_are_refused() {
    let changed = |change: fn(&mut schema::WireEnvelope)| {
        let mut call = extended_call().to_schema();
        change(call.envelope.as_mut().expect("given"));
        GenerateCall::from_schema(call)
    };
    assert!(changed(|_| {}).is_ok());
    for refused in [
        changed(|envelope| envelope.prompt.clear()),
        changed(|envelope| envelope.sampling = None),
        changed(|envelope| envelope.cache_salt = Some(vec![1])),
        changed(|envelope| envelope.remaining = Some(schema::WireDuration { seconds: 1, nanos: 1_000_000_000 })),
        changed(|envelope| envelope.sampling.as_mut().expect("given").top_p = None),
        changed(|envelope| envelope.sampling.as_mut().expect("given").biased.push(9)),
        GenerateCall::from_schema(schema::WireGenerate { envelope: None, ..extended_call().to_schema() }),
    ] {
        assert!(matches!(refused, Err(WireError::Invalid(_))), "{refused:?}");
    }
    assert!(matches!(JournalKey::from_schema(schema::WireLookup { key: vec![0; 15] }), Err(WireError::Invalid(_))));
}

#[test]
fn messages_are_bounded() {
    let prompt: Arc<[u32]> = vec![u32::MAX; MAX_MESSAGE_BYTES / 5 + 1].into();
    let large = GenerateCall { envelope: generate_call().envelope.with(|it| it.prompt = prompt), ..generate_call() };
    assert!(matches!(encode_message(&large), Err(WireError::TooLarge { .. })));
    let large = vec![0u8; MAX_MESSAGE_BYTES + 1];
    assert!(matches!(decode_message::<GenerateCall>(&large), Err(WireError::TooLarge { .. })));
    // A list that claims four thousand million bytes, with no data.
    let claim = [0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f];
    assert!(matches!(decode_message::<GenerateCall>(&claim), Err(WireError::Malformed(_))));
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

/// What a node of the release in which protocol 2 began makes of a failure, and what is made of its failures.
#[test]
fn nodes_of_the_first_release_know_later_kinds_by_an_older_kind_and_a_code() {
    for (failure, number, code) in [
        (Failure::shutting_down("leaves"), 4, "shutting_down"),
        (Failure::new(FailureKind::VersionTooOld, "new"), 4, "version_too_old"),
        (Failure::new(FailureKind::KeyReused, "used"), 1, "idempotency_key_reused"),
        (Failure::new(FailureKind::StreamNotFound, "gone"), 1, "stream_not_found"),
    ] {
        let mut sent = schema::WireFailed::decode(&encode_failure(failure.clone())[..]).expect("our own");
        assert_eq!((sent.kind, sent.code.as_deref()), (number, Some(code)), "{failure}");
        sent.exact_kind = None;
        assert_eq!(decode_failure(&sent.encode_to_vec()).expect("theirs"), failure);
    }
    let full = schema::WireFailed { kind: 4, message: "full".into(), ..Default::default() };
    assert_eq!(decode_failure(&full.encode_to_vec()).expect("theirs").kind, FailureKind::Overloaded);
    let newer = schema::WireFailed { exact_kind: Some(99), ..full };
    assert_eq!(decode_failure(&newer.encode_to_vec()).expect("a later one").kind, FailureKind::Overloaded);
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
    assert!(missing.is_empty(), "CODES of cluster/wire/mod.rs lacks {missing:?}");
}

#[test]
fn paths_name_the_version_of_the_protocol_and_other_versions_are_no_calls() {
    for call in CallKind::ALL {
        assert_eq!(CallKind::at(&call.path(PROTOCOL.newest)), Some(call));
        assert_eq!(CallKind::at(&call.path(PROTOCOL.oldest)), Some(call));
        for other in [PROTOCOL.oldest - 1, PROTOCOL.newest + 1] {
            assert_eq!(CallKind::at(&call.path(other)), None);
        }
    }
    for path in ["", "/outrigger/v2", "/outrigger/v2/nothing", "/outrigger/vx/generate", "/outrigger/v2/generate/"] {
        assert_eq!(CallKind::at(path), None, "{path}");
    }
}
