//! Between the types of this process and the messages on the wire. What comes in is checked; what a later version may have added
//! is skipped, replaced or refused as each conversion says.

use std::sync::Arc;
use std::time;

use super::schema::{self, WireEntryKind, WireFrameKind};
use super::{CODES, MAX_FAILURE_TEXT_BYTES, WireError};
use crate::cluster::journal::{ChoiceProgress, JournalEntry, JournalRecord, JournalRefusal};
use crate::cluster::transport::{FollowCall, GenerateCall, JournalBatch, PeerFrame};
use crate::types::{
    CacheSalt, ChoiceStart, Envelope, Extensions, Failure, FailureKind, Fingerprint, FinishReason, GenerationEvent,
    JournalKey, NodeId, RequestId, SamplingParams, StopCause, StreamName, Tenant, TokenLogprobs, TraceContext,
};

/// A type that is sent between nodes.
pub trait WireMessage: Sized {
    type Schema: prost::Message + Default;

    fn to_schema(&self) -> Self::Schema;

    fn from_schema(schema: Self::Schema) -> Result<Self, WireError>;
}

/// The numbers of `needs` that this version knows.
const KNOWN_NEEDS: &[u32] = &[];

/// A kind of failure, its number, and what the first nodes of protocol 2 send and get for a later kind: an older kind and a code.
type Kind = (FailureKind, u32, Option<(FailureKind, &'static str)>);

/// Unknown numbers are `Internal`. The numbers 3 and 6 were never sent.
const KINDS: [Kind; 16] = [
    (FailureKind::Internal, 0, None),
    (FailureKind::InvalidRequest, 1, None),
    (FailureKind::Unauthenticated, 2, None),
    (FailureKind::Overloaded, 4, None),
    (FailureKind::DeadlineExceeded, 5, None),
    (FailureKind::EngineFailed, 7, None),
    (FailureKind::NumericsInvalid, 8, None),
    (FailureKind::NumericsSuspect, 9, None),
    (FailureKind::OutOfMemory, 10, None),
    (FailureKind::PeerUnreachable, 11, None),
    (FailureKind::PeerDisconnected, 12, None),
    (FailureKind::PeerStalled, 13, None),
    (FailureKind::Unavailable, 14, Some((FailureKind::Overloaded, "shutting_down"))),
    (FailureKind::VersionTooOld, 15, Some((FailureKind::Overloaded, "version_too_old"))),
    (FailureKind::KeyReused, 16, Some((FailureKind::InvalidRequest, "idempotency_key_reused"))),
    (FailureKind::StreamNotFound, 17, Some((FailureKind::InvalidRequest, "stream_not_found"))),
];

fn duration(duration: time::Duration) -> schema::WireDuration {
    schema::WireDuration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() }
}

fn from_duration(duration: schema::WireDuration) -> Result<time::Duration, WireError> {
    match duration.nanos < 1_000_000_000 {
        true => Ok(time::Duration::new(duration.seconds, duration.nanos)),
        false => Err(WireError::Invalid("a duration")),
    }
}

fn sixteen(bytes: &[u8]) -> Result<[u8; 16], WireError> {
    bytes.try_into().map_err(|_| WireError::Invalid("a key or digest"))
}

fn key(bytes: &[u8]) -> Result<JournalKey, WireError> {
    sixteen(bytes).map(JournalKey::from_bytes)
}

/// Pairs lists of equal length.
fn pairs(tokens: Vec<u32>, numbers: Vec<f32>) -> Result<Vec<(u32, f32)>, WireError> {
    match tokens.len() == numbers.len() {
        true => Ok(tokens.into_iter().zip(numbers).collect()),
        false => Err(WireError::Invalid("two lists that belong together")),
    }
}

impl WireMessage for GenerateCall {
    type Schema = schema::WireGenerate;

    fn to_schema(&self) -> schema::WireGenerate {
        let choice = |start: &ChoiceStart| schema::WireChoice { index: start.index, emitted: start.emitted.clone() };
        schema::WireGenerate {
            envelope: Some(envelope(&self.envelope, self.remaining)),
            fingerprint: self.fingerprint.as_str().to_owned(),
            choices: self.choices.iter().map(choice).collect(),
            is_continuation: self.is_continuation,
        }
    }

    fn from_schema(call: schema::WireGenerate) -> Result<Self, WireError> {
        let (envelope, remaining) = from_envelope(call.envelope)?;
        let choice = |choice: schema::WireChoice| ChoiceStart { index: choice.index, emitted: choice.emitted };
        Ok(Self {
            envelope: Arc::new(envelope),
            fingerprint: Fingerprint::new(call.fingerprint),
            choices: call.choices.into_iter().map(choice).collect(),
            remaining,
            is_continuation: call.is_continuation,
        })
    }
}

/// All of the envelope but its name, which only journals need, and its deadline, in place of which stands the time left.
fn envelope(envelope: &Envelope, remaining: Option<time::Duration>) -> schema::WireEnvelope {
    let Envelope {
        id,
        created,
        name: _,
        tenant,
        model,
        tokenizer,
        prompt,
        sampling,
        priority,
        deadline: _,
        extensions,
        trace,
    } = envelope;
    schema::WireEnvelope {
        id: id.as_str().to_owned(),
        created: *created,
        model: (**model).to_owned(),
        prompt: prompt.to_vec(),
        sampling: Some(self::sampling(sampling)),
        priority: *priority,
        remaining: remaining.map(duration),
        cache_salt: extensions.cache_salt.map(|salt| salt.bytes().to_vec()),
        prompt_logprobs: extensions.prompt_logprobs,
        tokenizer: (**tokenizer).to_owned(),
        tenant: tenant.as_str().to_owned(),
        traceparent: trace.as_ref().map(TraceContext::parent).unwrap_or_default(),
        tracestate: trace.as_ref().and_then(TraceContext::state).unwrap_or_default().to_owned(),
        needs: Vec::new(),
    }
}

/// The envelope, without name and deadline, and the time left, if it is there and needs nothing that this version does not know.
fn from_envelope(envelope: Option<schema::WireEnvelope>) -> Result<(Envelope, Option<time::Duration>), WireError> {
    let envelope = envelope.ok_or(WireError::Invalid("no envelope"))?;
    if let Some(need) = envelope.needs.iter().find(|need| !KNOWN_NEEDS.contains(need)) {
        return Err(WireError::Needs(*need));
    }
    let salt = envelope.cache_salt.as_deref().map(sixteen).transpose()?;
    let remaining = envelope.remaining.map(from_duration).transpose()?;
    let envelope = Envelope {
        id: RequestId::new(envelope.id),
        created: envelope.created,
        name: None,
        tenant: Tenant::new(envelope.tenant),
        model: envelope.model.into(),
        tokenizer: envelope.tokenizer.into(),
        prompt: prompt(envelope.prompt)?,
        sampling: from_sampling(envelope.sampling)?,
        priority: envelope.priority,
        deadline: None,
        trace: TraceContext::parse(&envelope.traceparent, Some(&envelope.tracestate)),
        extensions: Extensions { cache_salt: salt.map(CacheSalt::new), prompt_logprobs: envelope.prompt_logprobs },
    };
    Ok((envelope, remaining))
}

fn prompt(tokens: Vec<u32>) -> Result<Arc<[u32]>, WireError> {
    if tokens.is_empty() { Err(WireError::Invalid("a prompt")) } else { Ok(tokens.into()) }
}

fn sampling(sampling: &SamplingParams) -> schema::WireSampling {
    schema::WireSampling {
        n: sampling.n,
        seed: sampling.seed,
        max_tokens: sampling.max_tokens,
        min_tokens: sampling.min_tokens,
        temperature: Some(sampling.temperature),
        top_k: sampling.top_k,
        top_p: Some(sampling.top_p),
        min_p: Some(sampling.min_p),
        repetition_penalty: Some(sampling.repetition_penalty),
        presence_penalty: Some(sampling.presence_penalty),
        frequency_penalty: Some(sampling.frequency_penalty),
        biased: sampling.logit_bias.iter().map(|(token, _)| *token).collect(),
        logit_bias: sampling.logit_bias.iter().map(|(_, bias)| *bias).collect(),
        ignore_eos: sampling.ignore_eos,
        stop: sampling.stop.clone(),
        include_stop_str_in_output: sampling.include_stop_str_in_output,
        skip_special_tokens: sampling.skip_special_tokens,
        stop_token_ids: sampling.stop_token_ids.clone(),
        logprobs: sampling.logprobs,
    }
}

fn from_sampling(sampling: Option<schema::WireSampling>) -> Result<Arc<SamplingParams>, WireError> {
    let sampling = sampling.ok_or(WireError::Invalid("no sampling parameters"))?;
    let number = |number: Option<f32>| number.ok_or(WireError::Invalid("a sampling parameter is missing"));
    Ok(Arc::new(SamplingParams {
        n: sampling.n,
        seed: sampling.seed,
        max_tokens: sampling.max_tokens,
        min_tokens: sampling.min_tokens,
        temperature: number(sampling.temperature)?,
        top_k: sampling.top_k,
        top_p: number(sampling.top_p)?,
        min_p: number(sampling.min_p)?,
        repetition_penalty: number(sampling.repetition_penalty)?,
        presence_penalty: number(sampling.presence_penalty)?,
        frequency_penalty: number(sampling.frequency_penalty)?,
        logit_bias: pairs(sampling.biased, sampling.logit_bias)?,
        ignore_eos: sampling.ignore_eos,
        stop: sampling.stop,
        include_stop_str_in_output: sampling.include_stop_str_in_output,
        skip_special_tokens: sampling.skip_special_tokens,
        stop_token_ids: sampling.stop_token_ids,
        logprobs: sampling.logprobs,
    }))
}

impl WireMessage for FollowCall {
    type Schema = schema::WireFollow;

    fn to_schema(&self) -> schema::WireFollow {
        schema::WireFollow { key: self.key.bytes().to_vec(), have: self.have.clone() }
    }

    fn from_schema(call: schema::WireFollow) -> Result<Self, WireError> {
        Ok(Self { key: key(&call.key)?, have: call.have })
    }
}

impl WireMessage for JournalBatch {
    type Schema = schema::WireBatch;

    fn to_schema(&self) -> schema::WireBatch {
        schema::WireBatch { from: self.from.as_str().to_owned(), entries: self.entries.iter().map(entry).collect() }
    }

    fn from_schema(batch: schema::WireBatch) -> Result<Self, WireError> {
        let entries = batch.entries.into_iter().map(from_entry).collect::<Result<_, _>>()?;
        Ok(Self { from: NodeId::new(batch.from), entries })
    }
}

fn entry(entry: &JournalEntry) -> schema::WireEntry {
    let (key, epoch, kind) = match entry {
        JournalEntry::Put(found) => (found.name().key, found.epoch, Some(WireEntryKind::Put(Box::new(record(found))))),
        JournalEntry::Append { key, epoch, choice, start, tokens, finished } => {
            let append = schema::WireAppend {
                choice: *choice,
                start: *start,
                tokens: tokens.clone(),
                finished: finished.as_ref().map(finish),
            };
            (*key, *epoch, Some(WireEntryKind::Append(append)))
        }
        JournalEntry::Drop { key, epoch } => (*key, *epoch, Some(WireEntryKind::Drop(true))),
        JournalEntry::Unreadable(refusal) => (refusal.key(), 0, None),
    };
    schema::WireEntry { key: key.bytes().to_vec(), epoch, kind }
}

/// For an unknown kind of entry, the sender is asked for the whole record. A record that needs what this version does not know is
/// refused as if there were no room.
fn from_entry(entry: schema::WireEntry) -> Result<JournalEntry, WireError> {
    let (key, epoch) = (key(&entry.key)?, entry.epoch);
    Ok(match entry.kind {
        Some(WireEntryKind::Put(record)) => match from_record(*record) {
            Err(WireError::Needs(_)) => JournalEntry::Unreadable(JournalRefusal::Full { key }),
            record => JournalEntry::Put(record?),
        },
        Some(WireEntryKind::Append(append)) => JournalEntry::Append {
            key,
            epoch,
            choice: append.choice,
            start: append.start,
            tokens: append.tokens,
            finished: append.finished.and_then(from_finish),
        },
        Some(WireEntryKind::Drop(_)) => JournalEntry::Drop { key, epoch },
        None => JournalEntry::Unreadable(JournalRefusal::Unknown { key }),
    })
}

fn record(record: &JournalRecord) -> schema::WireRecord {
    let StreamName { key, body } = record.name();
    let head = schema::WireHead {
        key: key.bytes().to_vec(),
        body: body.to_vec(),
        fingerprint: record.fingerprint.as_str().to_owned(),
        // A deadline belongs to one attempt; another one may have more time.
        envelope: Some(envelope(&record.envelope, None)),
    };
    let progress = |choice: &ChoiceProgress| schema::WireProgress {
        tokens: choice.tokens.clone(),
        finished: choice.finished.as_ref().map(finish),
    };
    schema::WireRecord {
        head: Some(head),
        epoch: record.epoch,
        entry: record.entry.as_str().to_owned(),
        choices: record.choices.iter().map(progress).collect(),
    }
}

fn from_record(record: schema::WireRecord) -> Result<JournalRecord, WireError> {
    let head = record.head.ok_or(WireError::Invalid("a record without a head"))?;
    let (envelope, _) = from_envelope(head.envelope)?;
    let name = Some(StreamName { key: key(&head.key)?, body: sixteen(&head.body)? });
    let progress = |choice: schema::WireProgress| ChoiceProgress {
        tokens: choice.tokens,
        finished: choice.finished.and_then(from_finish),
    };
    Ok(JournalRecord {
        envelope: Arc::new(Envelope { name, ..envelope }),
        fingerprint: Fingerprint::new(head.fingerprint),
        epoch: record.epoch,
        entry: NodeId::new(record.entry),
        choices: record.choices.into_iter().map(progress).collect(),
    })
}

impl WireMessage for Vec<JournalRefusal> {
    type Schema = schema::WireRefusals;

    fn to_schema(&self) -> schema::WireRefusals {
        let refusal = |refusal: &JournalRefusal| {
            let (reason, epoch) = match refusal {
                JournalRefusal::Fenced { epoch, .. } => (1, *epoch),
                JournalRefusal::Unknown { .. } => (2, 0),
                JournalRefusal::Full { .. } => (3, 0),
            };
            schema::WireRefusal { key: refusal.key().bytes().to_vec(), reason, epoch }
        };
        schema::WireRefusals { refusals: self.iter().map(refusal).collect() }
    }

    /// An unknown reason means that the node cannot hold the journal.
    fn from_schema(refusals: schema::WireRefusals) -> Result<Self, WireError> {
        let refusal = |refusal: schema::WireRefusal| {
            let key = key(&refusal.key)?;
            Ok(match refusal.reason {
                1 => JournalRefusal::Fenced { key, epoch: refusal.epoch },
                2 => JournalRefusal::Unknown { key },
                _ => JournalRefusal::Full { key },
            })
        };
        refusals.refusals.into_iter().map(refusal).collect()
    }
}

impl WireMessage for JournalKey {
    type Schema = schema::WireLookup;

    fn to_schema(&self) -> schema::WireLookup {
        schema::WireLookup { key: self.bytes().to_vec() }
    }

    fn from_schema(lookup: schema::WireLookup) -> Result<Self, WireError> {
        key(&lookup.key)
    }
}

impl WireMessage for Option<JournalRecord> {
    type Schema = schema::WireFound;

    fn to_schema(&self) -> schema::WireFound {
        schema::WireFound { record: self.as_ref().map(record) }
    }

    fn from_schema(found: schema::WireFound) -> Result<Self, WireError> {
        found.record.map(from_record).transpose()
    }
}

/// The digest of a tokenizer.
impl WireMessage for String {
    type Schema = schema::WireTokenizer;

    fn to_schema(&self) -> schema::WireTokenizer {
        schema::WireTokenizer { digest: self.clone() }
    }

    fn from_schema(tokenizer: schema::WireTokenizer) -> Result<Self, WireError> {
        Ok(tokenizer.digest)
    }
}

pub(super) fn frame(frame: PeerFrame) -> schema::WireFrame {
    let kind = match frame {
        PeerFrame::Event(GenerationEvent::Scheduled { cached_tokens }) => {
            WireFrameKind::Scheduled(schema::WireScheduled { cached_tokens })
        }
        PeerFrame::Event(GenerationEvent::Token { choice, token, logprobs: found }) => {
            WireFrameKind::Token(schema::WireToken {
                choice,
                token,
                logprobs: found.map(|found| Box::new(logprobs(*found))),
            })
        }
        PeerFrame::Event(GenerationEvent::PromptLogprobs { start, logprobs: found }) => {
            let logprobs = found.into_iter().map(logprobs).collect();
            WireFrameKind::PromptLogprobs(schema::WirePromptLogprobs { start, logprobs })
        }
        PeerFrame::Event(GenerationEvent::Finished { choice, reason }) => {
            WireFrameKind::Finished(schema::WireFinished { choice, reason: Some(finish(&reason)) })
        }
        PeerFrame::Event(GenerationEvent::Failed(failure)) => WireFrameKind::Failed(failed(failure)),
        PeerFrame::Heartbeat => WireFrameKind::Heartbeat(true),
        PeerFrame::HandOver => WireFrameKind::HandOver(true),
    };
    schema::WireFrame { kind: Some(kind) }
}

/// Returns none for an unknown kind of frame, which is skipped. An end of an unknown kind becomes a failure of this replica: another
/// one of this version computes the same stream, and ends it in a way that it knows.
pub(super) fn from_frame(frame: schema::WireFrame) -> Result<Option<PeerFrame>, WireError> {
    let Some(kind) = frame.kind else { return Ok(None) };
    let event = match kind {
        WireFrameKind::Heartbeat(_) => return Ok(Some(PeerFrame::Heartbeat)),
        WireFrameKind::HandOver(_) => return Ok(Some(PeerFrame::HandOver)),
        WireFrameKind::Scheduled(schema::WireScheduled { cached_tokens }) => {
            GenerationEvent::Scheduled { cached_tokens }
        }
        WireFrameKind::Token(schema::WireToken { choice, token, logprobs }) => {
            let logprobs = logprobs.map(|found| from_logprobs(*found).map(Box::new)).transpose()?;
            GenerationEvent::Token { choice, token, logprobs }
        }
        WireFrameKind::PromptLogprobs(schema::WirePromptLogprobs { start, logprobs }) => {
            let logprobs = logprobs.into_iter().map(from_logprobs).collect::<Result<_, _>>()?;
            GenerationEvent::PromptLogprobs { start, logprobs }
        }
        WireFrameKind::Finished(schema::WireFinished { choice, reason }) => match reason.and_then(from_finish) {
            Some(reason) => GenerationEvent::Finished { choice, reason },
            None => {
                let message = "The replica ended the stream in a way that this node's version does not know.";
                GenerationEvent::Failed(Failure::new(FailureKind::Internal, message))
            }
        },
        WireFrameKind::Failed(failure) => GenerationEvent::Failed(from_failed(failure)?),
    };
    Ok(Some(PeerFrame::Event(event)))
}

fn logprobs(logprobs: TokenLogprobs) -> schema::WireLogprobs {
    let (top_tokens, top) = logprobs.top.into_iter().unzip();
    schema::WireLogprobs { logprob: Some(logprobs.logprob), rank: logprobs.rank, top_tokens, top }
}

fn from_logprobs(logprobs: schema::WireLogprobs) -> Result<TokenLogprobs, WireError> {
    let logprob = logprobs.logprob.ok_or(WireError::Invalid("no log-probability"))?;
    Ok(TokenLogprobs { logprob, rank: logprobs.rank, top: pairs(logprobs.top_tokens, logprobs.top)? })
}

fn finish(finish: &FinishReason) -> schema::WireFinish {
    let (reason, token, text) = match finish {
        FinishReason::Stop(StopCause::EndOfSequence(token)) => (1, *token, ""),
        FinishReason::Stop(StopCause::Token(token)) => (2, *token, ""),
        FinishReason::Stop(StopCause::String(text)) => (3, 0, text.as_str()),
        FinishReason::Length => (4, 0, ""),
        FinishReason::Deadline => (5, 0, ""),
        FinishReason::Shutdown => (6, 0, ""),
    };
    schema::WireFinish { reason, token, text: text.to_owned() }
}

/// Returns none for an unknown reason: in a journal the choice then counts as unfinished, and its end is computed again.
fn from_finish(finish: schema::WireFinish) -> Option<FinishReason> {
    Some(match finish.reason {
        1 => FinishReason::Stop(StopCause::EndOfSequence(finish.token)),
        2 => FinishReason::Stop(StopCause::Token(finish.token)),
        3 => FinishReason::Stop(StopCause::String(finish.text)),
        4 => FinishReason::Length,
        5 => FinishReason::Deadline,
        6 => FinishReason::Shutdown,
        _ => return None,
    })
}

/// The failure without its source, which is only logged where it happened.
pub(super) fn failed(failure: Failure) -> schema::WireFailed {
    let row = |kind| KINDS.iter().find(|(known, ..)| *known == kind).expect("every kind has a row");
    let (_, exact, older) = row(failure.kind);
    let (kind, code) = match older {
        Some((kind, code)) => (row(*kind).1, failure.code.or(Some(*code))),
        None => (*exact, failure.code),
    };
    schema::WireFailed {
        kind,
        message: shortened(failure.message),
        param: failure.param.map(shortened),
        code: code.map(str::to_owned),
        retry_after: failure.retry_after.map(duration),
        exact_kind: Some(*exact),
    }
}

pub(super) fn from_failed(failed: schema::WireFailed) -> Result<Failure, WireError> {
    let numbered = |wanted: u32| KINDS.iter().find(|(_, number, _)| *number == wanted).map(|(kind, ..)| *kind);
    let older = numbered(failed.kind).unwrap_or(FailureKind::Internal);
    let code = failed.code.as_deref();
    let kind = match failed.exact_kind {
        Some(exact) => numbered(exact).unwrap_or(older),
        None => {
            let known =
                |(_, _, first): &&Kind| first.is_some_and(|first| code.map(|code| (older, code)) == Some(first));
            KINDS.iter().find(known).map_or(older, |(kind, ..)| *kind)
        }
    };
    Ok(Failure {
        kind,
        message: shortened(failed.message),
        param: failed.param.map(shortened),
        code: code.and_then(|code| CODES.iter().find(|known| **known == code).copied()),
        retry_after: failed.retry_after.map(from_duration).transpose()?,
        source: None,
    })
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_FAILURE_TEXT_BYTES));
    text
}
