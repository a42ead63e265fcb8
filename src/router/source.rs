//! Where a stream's tokens come from at present: this node's engine, or a peer.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::breaker::Attempt;
use super::meter::Meter;
use super::stream_log::Cursor;
use crate::admission::Permit;
use crate::cluster::{PeerFrame, PeerStream};
use crate::types::{Backend, Failure, FailureKind, GenerationEvent, GenerationStream, NodeId};

/// What generates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Replica {
    Here,
    At(NodeId),
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Replica::Here => f.write_str("this node"),
            Replica::At(node) => node.fmt(f),
        }
    }
}

/// A running generation, and how far it is. Dropping it cancels the work.
pub struct Source {
    pub replica: Replica,
    pub cursor: Cursor,
    /// What the peer's breaker wants to hear of.
    pub attempt: Option<Attempt>,
    /// The replica asked for its work to be taken over.
    pub is_leaving: bool,
    /// The attempt's success has been reported.
    is_reported: bool,
    opened_at: Instant,
    last_sign: Instant,
    /// It has scored a part of the prompt.
    has_scored: bool,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    tokens: u32,
    origin: Origin,
}

enum Origin {
    Engine { stream: GenerationStream, engine: Arc<dyn Backend>, permit: Permit, meter: Meter },
    Peer { stream: PeerStream, _in_flight: Box<dyn Send + Sync> },
}

/// What a source lets be heard.
#[derive(Debug)]
pub enum Sign {
    Event(GenerationEvent),
    Heartbeat,
    HandOver,
}

impl Source {
    pub fn engine(
        stream: GenerationStream,
        engine: Arc<dyn Backend>,
        permit: Permit,
        meter: Meter,
        cursor: Cursor,
        now: Instant,
    ) -> Self {
        Self::new(Replica::Here, None, Origin::Engine { stream, engine, permit, meter }, cursor, now)
    }

    /// `in_flight` is dropped with the source.
    pub fn peer(
        node: NodeId,
        stream: PeerStream,
        attempt: Option<Attempt>,
        in_flight: impl Send + Sync + 'static,
        cursor: Cursor,
        now: Instant,
    ) -> Self {
        Self::new(Replica::At(node), attempt, Origin::Peer { stream, _in_flight: Box::new(in_flight) }, cursor, now)
    }

    fn new(replica: Replica, attempt: Option<Attempt>, origin: Origin, cursor: Cursor, now: Instant) -> Self {
        Self {
            replica,
            cursor,
            attempt,
            is_leaving: false,
            is_reported: false,
            opened_at: now,
            last_sign: now,
            has_scored: false,
            first_token: None,
            last_token: None,
            tokens: 0,
            origin,
        }
    }

    /// Cancel-safe.
    pub async fn next(&mut self) -> Sign {
        let sign = match &mut self.origin {
            Origin::Engine { stream, .. } => Sign::Event(stream.next().await.unwrap_or_else(engine_gone)),
            Origin::Peer { stream, .. } => sign_of(stream.next().await),
        };
        self.heard(&sign);
        sign
    }

    pub fn try_next(&mut self) -> Option<Sign> {
        let sign = match &mut self.origin {
            Origin::Engine { stream, .. } => Sign::Event(stream.try_next()?),
            Origin::Peer { stream, .. } => sign_of(stream.try_next()?),
        };
        self.heard(&sign);
        Some(sign)
    }

    /// The last sign of life: of the engine's step loop, or of the peer's.
    pub fn last_sign(&self) -> Instant {
        match &self.origin {
            Origin::Engine { engine, .. } => engine.status().heartbeat.max(self.last_sign),
            Origin::Peer { .. } => self.last_sign,
        }
    }

    /// The attempt, the first time that it is asked for.
    pub fn unreported(&mut self) -> Option<Attempt> {
        self.attempt.filter(|_| !std::mem::replace(&mut self.is_reported, true))
    }

    /// The stream has numbers of it, or may have.
    pub fn has_spoken(&self) -> bool {
        self.first_token.is_some() || self.has_scored
    }

    /// From opening to the first token, and from token to token on average.
    pub fn latencies(&self) -> Option<(Duration, Option<Duration>)> {
        let (first, last) = (self.first_token?, self.last_token?);
        let steps = self.tokens.checked_sub(1).filter(|&steps| steps > 0);
        Some((first.saturating_duration_since(self.opened_at), steps.map(|steps| (last - first) / steps)))
    }

    fn heard(&mut self, sign: &Sign) {
        self.last_sign = tokio::time::Instant::now().into_std();
        if let (Origin::Engine { meter, .. }, Sign::Event(event)) = (&mut self.origin, sign) {
            meter.hear(event, self.last_sign);
        }
        match sign {
            Sign::Event(GenerationEvent::Scheduled { .. }) => {
                if let Origin::Engine { permit, .. } = &mut self.origin {
                    permit.scheduled();
                }
            }
            Sign::Event(GenerationEvent::PromptLogprobs { .. }) => self.has_scored = true,
            Sign::Event(GenerationEvent::Token { .. }) => {
                self.tokens += 1;
                self.first_token.get_or_insert(self.last_sign);
                self.last_token = Some(self.last_sign);
            }
            Sign::Event(GenerationEvent::Finished { .. } | GenerationEvent::Failed(_))
            | Sign::Heartbeat
            | Sign::HandOver => {}
        }
    }
}

fn sign_of(frame: PeerFrame) -> Sign {
    match frame {
        PeerFrame::Event(event) => Sign::Event(event),
        PeerFrame::Heartbeat => Sign::Heartbeat,
        PeerFrame::HandOver => Sign::HandOver,
    }
}

fn engine_gone() -> GenerationEvent {
    GenerationEvent::Failed(Failure::new(FailureKind::EngineFailed, "The engine stopped while generating."))
}
