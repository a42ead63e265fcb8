//! The envelope: one request from the socket to the engine. The API makes it once; router, peer calls, journals and engine hand it
//! on whole, behind an `Arc`. What only one step needs stands beside it: `router::Dispatch`, `cluster::GenerateCall`,
//! `cluster::JournalRecord`, `GenerateRequest`.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tracing::Span;

use super::ids::{JournalKey, RequestId, Tenant, TokenId};
use super::request::SamplingParams;
use super::trace::{TraceContext, TraceId, request_span};

/// A client's request for one prompt, as token ids. With the model's fingerprint it decides every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// The id that the client sees.
    pub id: RequestId,
    /// The creation time that the client sees, in seconds since the epoch. 0 if a node of an earlier version did not say.
    pub created: u64,
    /// Under which the stream can be found again. `None` if it cannot be, and on a node that only computes it.
    pub name: Option<StreamName>,
    pub tenant: Tenant,
    /// A name of the model.
    pub model: Arc<str>,
    /// Digest of the tokenizer that made the prompt.
    pub tokenizer: Arc<str>,
    /// Never empty.
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    /// Lower is served first; equal priorities are served in order of arrival.
    pub priority: i32,
    /// By this process's clock. Other nodes are told the time that is left; journals are not told.
    pub deadline: Option<Instant>,
    pub extensions: Extensions,
    /// Under which the request is found in the logs of every node. `None` for what no client asked for, and from nodes of an
    /// earlier version.
    pub trace: Option<TraceContext>,
}

/// The name of a stream in the whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamName {
    pub key: JournalKey,
    /// Digest of the request body. The same key with another body is the client's mistake.
    pub body: [u8; 16],
}

/// What may be asked beside the sampling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    pub cache_salt: Option<CacheSalt>,
    /// `Some(k)`: report the log-probability of every token of the prompt but the first, and the `k` most likely tokens at
    /// its place, before the first token is generated. The prefix cache is bypassed then: it holds no logits.
    pub prompt_logprobs: Option<u32>,
}

/// Digest of a client's salt: prompts of different salts share nothing in the prefix cache, so that nobody learns from the
/// time of an answer what others have asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CacheSalt([u8; 16]);

impl CacheSalt {
    pub fn new(digest: [u8; 16]) -> Self {
        Self(digest)
    }

    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl Envelope {
    /// A request of nobody in particular that asks for nothing special.
    pub fn new(id: RequestId, prompt: Arc<[TokenId]>, sampling: SamplingParams) -> Self {
        Self {
            id,
            created: 0,
            name: None,
            tenant: Tenant::default(),
            model: Arc::default(),
            tokenizer: Arc::default(),
            prompt,
            sampling: Arc::new(sampling),
            priority: 0,
            deadline: None,
            extensions: Extensions::default(),
            trace: None,
        }
    }

    /// A copy with a change. Everything long is shared with the original.
    pub fn with(&self, change: impl FnOnce(&mut Self)) -> Arc<Self> {
        let mut changed = self.clone();
        change(&mut changed);
        Arc::new(changed)
    }

    /// This request as an attempt at a stream that exists. Its seed may be only in the journal, and the client knows it by its
    /// first id and time. It stays in its trace, so that the whole life of the stream is found under one id.
    pub fn resuming(&self, stream: &Self) -> Arc<Self> {
        self.with(|envelope| {
            envelope.id = stream.id.clone();
            envelope.created = stream.created;
            envelope.sampling = stream.sampling.clone();
            envelope.trace = stream.trace.clone().or(envelope.trace.take());
        })
    }

    /// If two streams have the same key and different bodies, the one with the lower value keeps the key, on every node. Clock
    /// differences may make the younger one win, but all nodes agree.
    pub fn seniority(&self) -> (u64, Option<[u8; 16]>) {
        (self.created, self.name.map(|name| name.body))
    }

    /// For the log lines of whoever works on the request.
    pub fn span(&self) -> Span {
        request_span(Some(&self.id), Some(&self.tenant), self.trace_id())
    }

    pub fn trace_id(&self) -> Option<TraceId> {
        self.trace.as_ref().map(TraceContext::trace_id)
    }

    /// Whether the prompt's log-probabilities are wanted.
    pub fn scores_prompt(&self) -> bool {
        self.extensions.prompt_logprobs.is_some()
    }
}
