//! What goes into the stream machine, and what comes out of it.

use std::time::{Duration, Instant};

use crate::router::source::Replica;
use crate::types::{Failure, FailureKind};

/// What holds for the whole stream.
#[derive(Clone, Copy, Debug)]
pub(in crate::router::failover) struct Rules {
    /// There can be other nodes.
    pub can_move: bool,
    pub peer_stall_timeout: Duration,
    pub failover_timeout: Duration,
    pub max_failovers: u32,
    pub deadline: Option<Instant>,
}

/// How a stream begins.
#[derive(Clone, Debug)]
pub(in crate::router::failover) enum Start {
    /// A new one, which this replica has accepted.
    Accepted(Replica),
    /// A new one, to be placed.
    New,
    /// Continue the known tokens at any replica.
    Resumed,
    /// Follow a stream that another node answers for.
    Following(Replica),
}

/// The places for sources of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router::failover) enum Slot {
    Primary,
    /// A replica that was asked and has not answered.
    Asked,
    /// The second, once it computes.
    Successor,
}

/// What a source has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router::failover) enum Heard {
    /// Only that it lives.
    Life,
    /// A token or an end. `is_new`: no other source brought it before.
    Output { is_new: bool },
}

/// What can be seen at an input.
#[derive(Clone, Copy, Debug)]
pub(in crate::router::failover) struct Seen {
    pub now: Instant,
    pub primary: Option<SourceSeen>,
    pub successor: Option<SourceSeen>,
    /// The primary's replica is slow.
    pub is_slow: bool,
    /// Anything was emitted: a token, or scores of the prompt.
    pub has_begun: bool,
    /// Other nodes are known.
    pub has_peers: bool,
    /// This node hands over what it computes.
    pub leaves: bool,
    /// This node computes nothing any more.
    pub only_relays: bool,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::router::failover) struct SourceSeen {
    pub last_sign: Instant,
    /// The stream has tokens from it, or may have.
    pub has_spoken: bool,
}

#[derive(Clone, Debug)]
pub(in crate::router::failover) enum Input {
    /// The first input.
    Begin,
    /// The time of [`super::StreamMachine::wake`] has come.
    Alarm,
    /// Something has changed, so another replica may be there.
    Changed,
    /// A source asks to be replaced.
    HandOver(Slot),
    /// A source has failed.
    Lost(Slot, Failure),
    /// A peer was asked.
    Asked(Replica),
    /// A replica has accepted the stream. It is the primary if there is none, else the successor.
    Accepted(Replica),
    /// A replica has refused the stream. `random` gives the jitter of the pause before the next one.
    Refused { replica: Replica, failure: Failure, random: u64 },
    /// No replica was asked, since all queues are full.
    Shed(Failure),
    /// No replica was asked, since none can serve the stream. `may_come`: this node still starts, and may find one.
    Nowhere { failure: Failure, may_come: bool },
    /// Whether the retry budget allows a retry.
    Retry { is_allowed: bool },
    /// A much faster replica was found. `is_allowed`: the retry budget allows a race.
    Faster { is_allowed: bool },
    /// The journal has its holders; or they have forgotten it, if that was asked for.
    GateOpened,
    /// This node's engine has failed.
    NodeFailed(Failure),
    /// The node ends, and waits no longer.
    Cut,
    /// The stream is complete, or nobody listens.
    End,
}

/// What is to be done. The actions that follow from one input are to be done in their order.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::router::failover) enum Action {
    /// Choose a replica and ask it. Answered by `Asked`, `Accepted`, `Refused`, `Shed` or `Nowhere`.
    Open(Terms),
    /// Look for a replica, none of these, that would bring the rest much sooner. If there is one, answered by `Faster`.
    SeekFaster {
        excluded: Vec<Replica>,
    },
    /// Open the replica that was found.
    OpenFaster(Terms),
    /// Take a retry from the budget. Answered by `Retry`.
    TakeRetry,
    /// Tell the breaker of the replica.
    Blame(Slot, FailureKind),
    /// End the source.
    Drop(Slot),
    /// The successor is the primary from now on. The primary, if there is one, ends.
    Promote,
    /// This node answers for the stream from now on: replicate its journal.
    TakeOver,
    /// Let the holders of the journal forget the stream. Answered by `GateOpened`.
    Forget,
    /// Send what was held back.
    OpenGate,
    /// End the choices because of the deadline.
    FinishLate,
    Fail(Failure),
    /// For logs and metrics.
    Note(Note),
}

/// Which replica is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::router::failover) struct Terms {
    /// These are not asked.
    pub excluded: Vec<Replica>,
    /// The stream was accepted before: it is in a hurry, and not refused because of load.
    pub is_continuation: bool,
    /// A replica with another fingerprint will do if there is no other.
    pub allows_other_numbers: bool,
    /// The stream has no other source.
    pub is_only_source: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(in crate::router::failover) enum Note {
    Lost { from: Replica, failure: Failure },
    LostTooMany { failovers: u32 },
    Moved { from: Replica, to: Replica, why: Relief },
    Retried,
    RaceLost,
    RaceWithoutBudget,
}

/// Why a second replica is wanted while the primary still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router::failover) enum Relief {
    /// The primary is silent.
    Stall,
    /// The primary is leaving.
    HandOver,
    /// The primary is slow: a race.
    Slow,
}
