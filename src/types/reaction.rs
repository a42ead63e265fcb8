//! What each kind of failure leads to: one table, which every layer reads. No other place decides by the kind.
//!
//! The table is printed in `docs/errors.md`.

use super::FailureKind;
use Avoid::{Briefly, ByThisStream};
use Elsewhere::{Always, Never, OnceAccepted, UnlessItSpoke};
use Lesson::{Broken, Busy, Doubt, Nothing, ShortOfMemory, Silent, Unreachable, WrongNumbers};
use Log::{Fault, Refusal};
use Loss::{Failover, HandOver};
use Retry::{Counts, Free};

/// What a kind of failure leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reaction {
    /// The label of metrics and logs, and the client's `code` where a failure has none that is more exact.
    pub label: &'static str,
    /// The HTTP status, and the `type` of the error's body.
    pub status: u16,
    pub error_type: &'static str,
    pub log: Log,
    pub elsewhere: Elsewhere,
    pub retry: Retry,
    pub loss: Loss,
    pub avoid: Avoid,
    pub lesson: Lesson,
}

/// How the failure of a request is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// At level DEBUG: the request was refused or ended early, as it should be. Its message may quote the request, and is left out.
    Refusal,
    /// At level ERROR: a replica has failed.
    Fault,
}

/// Whether another replica may serve the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// Every replica would answer the same.
    Never,
    /// Only if some replica has accepted the request before, so that the refusal of another is not final.
    OnceAccepted,
    Always,
    /// Unless the stream has tokens of the replica that failed, which may be wrong.
    UnlessItSpoke,
}

/// Whether asking another replica for a new request is taken from the retry budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The caller could not have known, or the replica is gone: the retry does not add to a replica's load.
    Free,
    /// The others may be as busy, or may fail at the request too.
    Counts,
}

/// How the loss of a running stream's replica is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Towards `max_failovers`: the request itself may break replicas.
    Failover,
    /// The replica left in order.
    HandOver,
}

/// For how long the stream does not use the replica again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Avoid {
    Briefly,
    ByThisStream,
}

/// What the breaker learns about the peer, and whether it counts as reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lesson {
    /// The failure says nothing about the peer.
    Nothing,
    /// It takes no new request for a moment.
    Busy,
    /// It has too little memory for its share of requests.
    ShortOfMemory,
    /// It failed at this request. Several in a row are a failure of the peer.
    Doubt,
    /// It answered that it has failed.
    Broken,
    /// It stopped answering.
    Silent,
    /// It could not be connected to.
    Unreachable,
    WrongNumbers,
}

impl Elsewhere {
    /// `was_accepted`: some replica has accepted the request before.
    pub const fn allows(self, was_accepted: bool) -> bool {
        match self {
            Never => false,
            OnceAccepted => was_accepted,
            Always | UnlessItSpoke => true,
        }
    }
}

impl Lesson {
    /// Whether the peer answered the call, if only with a failure.
    pub const fn has_answered(self) -> bool {
        match self {
            Silent | Unreachable => false,
            Nothing | Busy | ShortOfMemory | Doubt | Broken | WrongNumbers => true,
        }
    }
}

type Client = (u16, &'static str, Log);
type Stream = (Elsewhere, Retry, Loss, Avoid);

/// The request is at fault, if the first replica says so.
const REFUSED: Stream = (OnceAccepted, Free, Failover, Briefly);
/// The replica is at fault, or gone.
const LOST: Stream = (Always, Free, Failover, Briefly);
/// The replica would do the same again.
const LOST_FOR_GOOD: Stream = (Always, Free, Failover, ByThisStream);
const SPOILED: Stream = (UnlessItSpoke, Free, Failover, ByThisStream);

const fn row(label: &'static str, client: Client, stream: Stream, lesson: Lesson) -> Reaction {
    let (status, error_type, log) = client;
    let (elsewhere, retry, loss, avoid) = stream;
    Reaction { label, status, error_type, log, elsewhere, retry, loss, avoid, lesson }
}

impl FailureKind {
    pub const fn reaction(self) -> Reaction {
        match self {
            Self::InvalidRequest => row("invalid_request", (400, "invalid_request_error", Refusal), REFUSED, Nothing),
            Self::Unauthenticated => row("unauthenticated", (401, "authentication_error", Refusal), REFUSED, Nothing),
            Self::KeyReused => row("idempotency_key_reused", (422, "invalid_request_error", Refusal), REFUSED, Nothing),
            Self::StreamNotFound => row("stream_not_found", (404, "invalid_request_error", Refusal), REFUSED, Nothing),
            Self::Overloaded => {
                row("overloaded", (429, "overloaded_error", Refusal), (Always, Counts, Failover, Briefly), Busy)
            }
            Self::DeadlineExceeded => {
                row("deadline_exceeded", (504, "timeout_error", Refusal), (Never, Free, Failover, Briefly), Nothing)
            }
            Self::Unavailable => {
                row("unavailable", (503, "unavailable_error", Refusal), (Always, Free, HandOver, Briefly), Busy)
            }
            Self::VersionTooOld => row("version_too_old", (503, "unavailable_error", Refusal), LOST_FOR_GOOD, Nothing),
            Self::EngineFailed => row("engine_failed", (503, "engine_error", Fault), LOST, Broken),
            Self::NumericsInvalid => row("numerics_invalid", (500, "engine_error", Fault), LOST_FOR_GOOD, WrongNumbers),
            Self::NumericsSuspect => row("numerics_suspect", (500, "engine_error", Fault), SPOILED, WrongNumbers),
            Self::OutOfMemory => row("out_of_memory", (503, "engine_error", Fault), LOST, ShortOfMemory),
            Self::PeerUnreachable => row("peer_unreachable", (502, "peer_error", Fault), LOST, Unreachable),
            Self::PeerDisconnected => row("peer_disconnected", (502, "peer_error", Fault), LOST, Silent),
            Self::PeerStalled => row("peer_stalled", (504, "peer_error", Fault), LOST, Silent),
            Self::Internal => {
                row("internal", (500, "internal_error", Fault), (Always, Counts, Failover, Briefly), Doubt)
            }
        }
    }
}

/// The table as Markdown, for the documentation.
pub fn markdown_table() -> String {
    let mut text = String::from(
        "| kind | status, `type` | another replica may serve it | takes from the retry budget | a running stream counts it as \
         | the stream avoids the replica | the peer's breaker | logged |\n|---|---|---|---|---|---|---|---|\n",
    );
    for kind in FailureKind::ALL {
        let Reaction { label, status, error_type, log, elsewhere, retry, loss, avoid, lesson } = kind.reaction();
        let elsewhere = match elsewhere {
            Never => "no",
            OnceAccepted => "only once a replica has accepted it",
            Always => "yes",
            UnlessItSpoke => "unless the stream has tokens of the replica that failed",
        };
        let retry = match retry {
            Free => "no",
            Counts => "yes",
        };
        let loss = match loss {
            _ if elsewhere == "no" => "–",
            Failover => "failover",
            HandOver => "hand-over",
        };
        let avoid = match avoid {
            _ if elsewhere == "no" => "–",
            Briefly => "1 s",
            ByThisStream => "to its end",
        };
        let lesson = match lesson {
            Nothing => "learns nothing",
            Busy => "no new request for 0.2 s",
            ShortOfMemory => "half the share of requests, which recovers",
            Doubt => "opens after 3 in a row",
            Broken => "opens",
            Silent => "opens; the peer did not answer",
            Unreachable => "opens briefly; the peer did not answer",
            WrongNumbers => "opens for a minute or more",
        };
        let log = match log {
            Refusal => "DEBUG",
            Fault => "ERROR",
        };
        text += &format!(
            "| `{label}` | {status}, `{error_type}` | {elsewhere} | {retry} | {loss} | {avoid} | {lesson} | {log} |\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_has_a_label_of_its_own_and_an_error_status() {
        let labels: BTreeSet<&str> = FailureKind::ALL.iter().map(|kind| kind.label()).collect();
        assert_eq!(labels.len(), FailureKind::ALL.len());
        for kind in FailureKind::ALL {
            assert!((400..600).contains(&kind.reaction().status), "{kind:?}");
        }
    }

    /// What is not the request's fault must be retried and told to the node's operator.
    #[test]
    fn columns_agree_with_each_other() {
        for kind in FailureKind::ALL {
            let Reaction { status, log, elsewhere, lesson, loss, .. } = kind.reaction();
            let is_requests_fault = status < 500 && lesson == Nothing;
            assert_eq!(elsewhere == OnceAccepted, is_requests_fault, "{kind:?}");
            assert!(log == Fault || !matches!(lesson, Broken | Silent | Unreachable | WrongNumbers), "{kind:?}");
            assert!(loss == Failover || elsewhere == Always, "{kind:?}: a replica that leaves is followed by another");
            assert!(elsewhere.allows(true) || !elsewhere.allows(false), "{kind:?}");
        }
    }
}
