//! The messages between nodes, as Protocol Buffers (proto3). Field numbers and their meaning are fixed for ever.
//!
//! How to change a message, so that the versions before and after understand it:
//!
//! - A new field gets a new number. Absent means: as before the field existed. Older nodes skip it.
//! - If a node that skips the field would compute other tokens or break a promise, the sender also lists a new number in the
//!   envelope's `needs`. A node that does not know a number in `needs` refuses the message.
//! - A removed field's number is not used again.
//! - A new variant (of a frame, an entry, an end) is skipped, refused or replaced by older nodes as said in `convert`. A request
//!   that may end in a new way lists that in `needs`.
//!
//! Floating-point numbers are optional everywhere: proto3 does not send an ordinary field that equals zero, and loses the sign of
//! a negative zero.

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireDuration {
    #[prost(uint64, tag = "1")]
    pub seconds: u64,
    #[prost(uint32, tag = "2")]
    pub nanos: u32,
}

/// A request, wherever it goes: to a peer that computes it, and into journals.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireEnvelope {
    #[prost(string, tag = "1")]
    pub id: String,
    /// An earlier version sent `created` and `model` only in journals, and the fields from `priority` to `prompt_logprobs` only in
    /// calls.
    #[prost(uint64, tag = "2")]
    pub created: u64,
    #[prost(string, tag = "3")]
    pub model: String,
    #[prost(uint32, repeated, tag = "4")]
    pub prompt: Vec<u32>,
    #[prost(message, optional, tag = "5")]
    pub sampling: Option<WireSampling>,
    #[prost(sint32, tag = "6")]
    pub priority: i32,
    /// Only in calls: time left until the deadline. Nodes never exchange wall-clock times.
    #[prost(message, optional, tag = "7")]
    pub remaining: Option<WireDuration>,
    /// Sixteen bytes.
    #[prost(bytes = "vec", optional, tag = "8")]
    pub cache_salt: Option<Vec<u8>>,
    #[prost(uint32, optional, tag = "9")]
    pub prompt_logprobs: Option<u32>,
    /// Digest of the tokenizer that made the prompt. Absent: not known, like an absent `model`.
    #[prost(string, tag = "10")]
    pub tokenizer: String,
    /// A digest that stands for the client. Absent: the client is anonymous.
    #[prost(string, tag = "11")]
    pub tenant: String,
    /// The header `traceparent` of W3C Trace Context. Absent or not understood: no trace.
    #[prost(string, tag = "12")]
    pub traceparent: String,
    /// The header `tracestate`.
    #[prost(string, tag = "13")]
    pub tracestate: String,
    #[prost(uint32, repeated, tag = "15")]
    pub needs: Vec<u32>,
}

/// `GenerateCall`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireGenerate {
    #[prost(message, optional, tag = "1")]
    pub envelope: Option<WireEnvelope>,
    #[prost(string, tag = "2")]
    pub fingerprint: String,
    #[prost(message, repeated, tag = "3")]
    pub choices: Vec<WireChoice>,
    #[prost(bool, tag = "4")]
    pub is_continuation: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireChoice {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(uint32, repeated, tag = "2")]
    pub emitted: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireSampling {
    #[prost(uint32, tag = "1")]
    pub n: u32,
    #[prost(fixed64, tag = "2")]
    pub seed: u64,
    #[prost(uint32, tag = "3")]
    pub max_tokens: u32,
    #[prost(uint32, tag = "4")]
    pub min_tokens: u32,
    #[prost(float, optional, tag = "5")]
    pub temperature: Option<f32>,
    #[prost(uint32, tag = "6")]
    pub top_k: u32,
    #[prost(float, optional, tag = "7")]
    pub top_p: Option<f32>,
    #[prost(float, optional, tag = "8")]
    pub min_p: Option<f32>,
    #[prost(float, optional, tag = "9")]
    pub repetition_penalty: Option<f32>,
    #[prost(float, optional, tag = "10")]
    pub presence_penalty: Option<f32>,
    #[prost(float, optional, tag = "11")]
    pub frequency_penalty: Option<f32>,
    /// As many as `logit_bias`.
    #[prost(uint32, repeated, tag = "12")]
    pub biased: Vec<u32>,
    #[prost(float, repeated, tag = "13")]
    pub logit_bias: Vec<f32>,
    #[prost(bool, tag = "14")]
    pub ignore_eos: bool,
    #[prost(string, repeated, tag = "15")]
    pub stop: Vec<String>,
    #[prost(bool, tag = "16")]
    pub include_stop_str_in_output: bool,
    #[prost(bool, tag = "17")]
    pub skip_special_tokens: bool,
    #[prost(uint32, repeated, tag = "18")]
    pub stop_token_ids: Vec<u32>,
    #[prost(uint32, optional, tag = "19")]
    pub logprobs: Option<u32>,
}

/// `FollowCall`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFollow {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(uint32, repeated, tag = "2")]
    pub have: Vec<u32>,
}

/// `JournalBatch`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireBatch {
    #[prost(string, tag = "1")]
    pub from: String,
    #[prost(message, repeated, tag = "2")]
    pub entries: Vec<WireEntry>,
}

/// `JournalEntry`. Its key stands outside of the variants, so that an unknown one can be refused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireEntry {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    #[prost(oneof = "WireEntryKind", tags = "3, 4, 5")]
    pub kind: Option<WireEntryKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum WireEntryKind {
    #[prost(message, boxed, tag = "3")]
    Put(Box<WireRecord>),
    #[prost(message, tag = "4")]
    Append(WireAppend),
    #[prost(bool, tag = "5")]
    Drop(bool),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireAppend {
    #[prost(uint32, tag = "1")]
    pub choice: u32,
    #[prost(uint32, tag = "2")]
    pub start: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub tokens: Vec<u32>,
    #[prost(message, optional, tag = "4")]
    pub finished: Option<WireFinish>,
}

/// `JournalRecord`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireRecord {
    #[prost(message, optional, tag = "1")]
    pub head: Option<WireHead>,
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    #[prost(string, tag = "3")]
    pub entry: String,
    #[prost(message, repeated, tag = "4")]
    pub choices: Vec<WireProgress>,
}

/// The part of a `JournalRecord` that does not change while the stream runs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireHead {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub body: Vec<u8>,
    #[prost(string, tag = "3")]
    pub fingerprint: String,
    #[prost(message, optional, tag = "4")]
    pub envelope: Option<WireEnvelope>,
}

/// `ChoiceProgress`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireProgress {
    #[prost(uint32, repeated, tag = "1")]
    pub tokens: Vec<u32>,
    #[prost(message, optional, tag = "2")]
    pub finished: Option<WireFinish>,
}

/// The answer to a batch: what was rejected.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireRefusals {
    #[prost(message, repeated, tag = "1")]
    pub refusals: Vec<WireRefusal>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireRefusal {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// 1: fenced, 2: unknown, 3: full; others as 3.
    #[prost(uint32, tag = "2")]
    pub reason: u32,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
}

/// Asks for a journal.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireLookup {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFound {
    #[prost(message, optional, tag = "1")]
    pub record: Option<WireRecord>,
}

/// Asks for the files of a tokenizer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireTokenizer {
    #[prost(string, tag = "1")]
    pub digest: String,
}

/// `PeerFrame`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFrame {
    #[prost(oneof = "WireFrameKind", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub kind: Option<WireFrameKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum WireFrameKind {
    #[prost(message, tag = "1")]
    Token(WireToken),
    #[prost(message, tag = "2")]
    Scheduled(WireScheduled),
    #[prost(message, tag = "3")]
    Finished(WireFinished),
    #[prost(message, tag = "4")]
    Failed(WireFailed),
    #[prost(bool, tag = "5")]
    Heartbeat(bool),
    #[prost(bool, tag = "6")]
    HandOver(bool),
    #[prost(message, tag = "7")]
    PromptLogprobs(WirePromptLogprobs),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireToken {
    #[prost(uint32, tag = "1")]
    pub choice: u32,
    #[prost(uint32, tag = "2")]
    pub token: u32,
    #[prost(message, optional, boxed, tag = "3")]
    pub logprobs: Option<Box<WireLogprobs>>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireScheduled {
    #[prost(uint32, tag = "1")]
    pub cached_tokens: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFinished {
    #[prost(uint32, tag = "1")]
    pub choice: u32,
    #[prost(message, optional, tag = "2")]
    pub reason: Option<WireFinish>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WirePromptLogprobs {
    #[prost(uint32, tag = "1")]
    pub start: u32,
    #[prost(message, repeated, tag = "2")]
    pub logprobs: Vec<WireLogprobs>,
}

/// `TokenLogprobs`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireLogprobs {
    #[prost(float, optional, tag = "1")]
    pub logprob: Option<f32>,
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// As many as `top`.
    #[prost(uint32, repeated, tag = "3")]
    pub top_tokens: Vec<u32>,
    #[prost(float, repeated, tag = "4")]
    pub top: Vec<f32>,
}

/// `FinishReason`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFinish {
    /// A number of `convert::finish`.
    #[prost(uint32, tag = "1")]
    pub reason: u32,
    #[prost(uint32, tag = "2")]
    pub token: u32,
    #[prost(string, tag = "3")]
    pub text: String,
}

/// The part of a `Failure` that is sent to other nodes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireFailed {
    /// A number of `convert::KINDS` that the first nodes of protocol 2 know.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(string, tag = "2")]
    pub message: String,
    #[prost(string, optional, tag = "3")]
    pub param: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub code: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub retry_after: Option<WireDuration>,
    /// The number of the kind itself, which may be a later one. Counts where it is known; absent from the first nodes.
    #[prost(uint32, optional, tag = "6")]
    pub exact_kind: Option<u32>,
}

/// `NodeDescription`, in gossip. The first byte of version 1 was 1, which no message begins with.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireDescription {
    #[prost(uint32, tag = "1")]
    pub oldest_protocol: u32,
    #[prost(uint32, tag = "2")]
    pub newest_protocol: u32,
    #[prost(string, tag = "3")]
    pub version: String,
    #[prost(string, tag = "4")]
    pub peer_addr: String,
    #[prost(string, tag = "5")]
    pub zone: String,
    #[prost(message, repeated, tag = "6")]
    pub models: Vec<WireModel>,
    #[prost(fixed64, optional, tag = "7")]
    pub tenants: Option<u64>,
}

/// `ModelReport`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireModel {
    #[prost(string, repeated, tag = "1")]
    pub names: Vec<String>,
    #[prost(string, tag = "2")]
    pub fingerprint: String,
    #[prost(string, tag = "3")]
    pub tokenizer: String,
    #[prost(uint32, tag = "4")]
    pub max_model_len: u32,
    #[prost(uint64, tag = "5")]
    pub created: u64,
}

/// `LoadReport` without its pace and prefixes, in gossip. Numbers are in the steps of `gossip`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WireReport {
    /// Differs from the previous report's, so that an unchanged report counts as a new value.
    #[prost(uint32, tag = "1")]
    pub sequence: u32,
    /// A number of `gossip::STATES`.
    #[prost(uint32, tag = "2")]
    pub state: u32,
    #[prost(bool, tag = "3")]
    pub ready: bool,
    /// Codes of `NodeReason`.
    #[prost(string, repeated, tag = "4")]
    pub reasons: Vec<String>,
    #[prost(uint32, tag = "5")]
    pub running: u32,
    #[prost(uint32, tag = "6")]
    pub waiting: u32,
    #[prost(uint64, tag = "7")]
    pub waiting_tokens: u64,
    #[prost(uint32, tag = "8")]
    pub seats: u32,
    #[prost(uint32, tag = "9")]
    pub queue_saturation: u32,
    #[prost(uint32, tag = "10")]
    pub kv_usage: u32,
    #[prost(uint32, tag = "11")]
    pub memory_pressure: u32,
    #[prost(uint32, tag = "12")]
    pub time_to_first_token: u32,
    #[prost(uint32, tag = "13")]
    pub inter_token_latency: u32,
    #[prost(uint32, tag = "14")]
    pub drain_tokens_per_second: u32,
    #[prost(uint64, tag = "15")]
    pub free_token_budget: u64,
    #[prost(uint32, optional, tag = "16")]
    pub memory_share: Option<u32>,
}

/// `PaceReport`, in gossip.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WirePace {
    /// Differs from the previous one's, so that an unchanged pace counts as a new value.
    #[prost(uint32, tag = "1")]
    pub sequence: u32,
    #[prost(uint64, tag = "2")]
    pub unit_nanos: u64,
    #[prost(uint32, tag = "3")]
    pub age_millis: u32,
}
