//! The closed set of failures. Three exhaustive matches map a kind: to an HTTP status, to retry and breaker, to a metric
//! label.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FailureKind {
    InvalidRequest,
    Unauthenticated,
    RateLimited,
    Overloaded,
    DeadlineExceeded,
    Cancelled,
    EngineFailed,
    /// The model computed NaN or infinity.
    NumericsInvalid,
    /// The replica was found to compute wrong numbers after it had sent tokens of this stream.
    NumericsSuspect,
    OutOfMemory,
    PeerUnreachable,
    PeerDisconnected,
    PeerStalled,
    Internal,
}

impl FailureKind {
    pub const ALL: [FailureKind; 14] = [
        FailureKind::InvalidRequest,
        FailureKind::Unauthenticated,
        FailureKind::RateLimited,
        FailureKind::Overloaded,
        FailureKind::DeadlineExceeded,
        FailureKind::Cancelled,
        FailureKind::EngineFailed,
        FailureKind::NumericsInvalid,
        FailureKind::NumericsSuspect,
        FailureKind::OutOfMemory,
        FailureKind::PeerUnreachable,
        FailureKind::PeerDisconnected,
        FailureKind::PeerStalled,
        FailureKind::Internal,
    ];

    /// The label of metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            FailureKind::InvalidRequest => "invalid_request",
            FailureKind::Unauthenticated => "unauthenticated",
            FailureKind::RateLimited => "rate_limited",
            FailureKind::Overloaded => "overloaded",
            FailureKind::DeadlineExceeded => "deadline_exceeded",
            FailureKind::Cancelled => "cancelled",
            FailureKind::EngineFailed => "engine_failed",
            FailureKind::NumericsInvalid => "numerics_invalid",
            FailureKind::NumericsSuspect => "numerics_suspect",
            FailureKind::OutOfMemory => "out_of_memory",
            FailureKind::PeerUnreachable => "peer_unreachable",
            FailureKind::PeerDisconnected => "peer_disconnected",
            FailureKind::PeerStalled => "peer_stalled",
            FailureKind::Internal => "internal",
        }
    }
}

/// A failure as it crosses layers. `message` is written for the client and names the field and the limit where there is
/// one; `source` is for the log.
#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
    /// The request field at fault, as the client spelled it.
    pub param: Option<String>,
    /// OpenAI's machine-readable code, e.g. `context_length_exceeded`.
    pub code: Option<&'static str>,
    pub retry_after: Option<Duration>,
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Failure {
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, code: None, retry_after: None, source: None }
    }

    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(FailureKind::InvalidRequest, message) }
    }

    /// The deadline passed before the request had a token.
    pub fn deadline_passed() -> Self {
        Self::new(FailureKind::DeadlineExceeded, "The deadline passed before the first token.")
    }

    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }
}

impl PartialEq for Failure {
    /// Compares what the client sees, not the source.
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.message == other.message && self.param == other.param && self.code == other.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.label(), self.message)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}
