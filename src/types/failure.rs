//! The closed set of failures. What a kind leads to is in one table, `reaction`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FailureKind {
    InvalidRequest,
    Unauthenticated,
    /// The idempotency key belongs to a request with another body.
    KeyReused,
    /// No node knows the stream that the client wants to resume.
    StreamNotFound,
    Overloaded,
    DeadlineExceeded,
    /// The replica, or every replica, takes no requests now: it loads, leaves or is stalled. `Failure::code` says which.
    Unavailable,
    /// The request needs something that the replica's version does not know.
    VersionTooOld,
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
    pub const ALL: [FailureKind; 16] = [
        FailureKind::InvalidRequest,
        FailureKind::Unauthenticated,
        FailureKind::KeyReused,
        FailureKind::StreamNotFound,
        FailureKind::Overloaded,
        FailureKind::DeadlineExceeded,
        FailureKind::Unavailable,
        FailureKind::VersionTooOld,
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
    pub const fn label(self) -> &'static str {
        self.reaction().label
    }
}

/// `ALL` lists every kind, in order.
const _: () = {
    let mut index = 0;
    while index < FailureKind::ALL.len() {
        assert!(FailureKind::ALL[index] as usize == index);
        index += 1;
    }
    assert!(index == FailureKind::Internal as usize + 1, "`Internal` is the last kind");
};

/// A failure as it crosses layers. `message` is written for the client and names the field and the limit where there is
/// one; `source` is for the log.
#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
    /// The request field at fault, as the client spelled it.
    pub param: Option<String>,
    /// A machine-readable code for the client that is more exact than the kind, e.g. `context_length_exceeded`. Nothing
    /// decides by it.
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

    /// `code` says why no request is taken now.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(FailureKind::Unavailable, message).with_code(code)
    }

    /// The node is leaving, or has left.
    pub fn shutting_down(message: impl Into<String>) -> Self {
        Self::unavailable("shutting_down", message)
    }

    /// The code that the client gets.
    pub fn shown_code(&self) -> &'static str {
        self.code.unwrap_or(self.kind.label())
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
