//! The current source of a stream's tokens: this node's engine, or a peer.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::breaker::Attempt;
use super::meter::Meter;
use super::pace::progress::ProgressPart;
use super::stream_log::Cursor;
use crate::admission::Permit;
use crate::cluster::{PeerFrame, PeerStream};
use crate::types::{Backend, Failure, FailureKind, GenerationEvent, GenerationStream, NodeId};

/// The replica that generates.
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

/// A running generation and its position. Dropping it cancels the work.
pub struct StreamSource {
    pub replica: Replica,
    pub cursor: Cursor,
    /// For reporting the outcome to the peer's breaker.
    pub attempt: Option<Attempt>,
    /// Whether the attempt's success has been reported.
    is_reported: bool,
    opened_at: Instant,
    last_sign: Instant,
    /// Whether it has scored part of the prompt.
    has_scored: bool,
    has_token: bool,
    /// What this node's streams observe of the replica; none for a stream that another node runs.
    progress: Option<ProgressPart>,
    origin: Origin,
}

enum Origin {
    Engine { stream: GenerationStream, engine: Arc<dyn Backend>, permit: Permit, meter: Meter },
    Peer { stream: PeerStream, _in_flight: Box<dyn Send + Sync> },
}

/// What a source delivers.
#[derive(Debug)]
pub enum Sign {
    Event(GenerationEvent),
    Heartbeat,
    HandOver,
}

impl StreamSource {
    pub fn engine(
        stream: GenerationStream,
        engine: Arc<dyn Backend>,
        permit: Permit,
        meter: Meter,
        cursor: Cursor,
        progress: ProgressPart,
        now: Instant,
    ) -> Self {
        let origin = Origin::Engine { stream, engine, permit, meter };
        Self::new(Replica::Here, None, origin, cursor, Some(progress), now)
    }

    /// `in_flight` is dropped with the source.
    pub fn peer(
        node: NodeId,
        stream: PeerStream,
        attempt: Option<Attempt>,
        in_flight: impl Send + Sync + 'static,
        cursor: Cursor,
        progress: Option<ProgressPart>,
        now: Instant,
    ) -> Self {
        let origin = Origin::Peer { stream, _in_flight: Box::new(in_flight) };
        Self::new(Replica::At(node), attempt, origin, cursor, progress, now)
    }

    fn new(
        replica: Replica,
        attempt: Option<Attempt>,
        origin: Origin,
        cursor: Cursor,
        progress: Option<ProgressPart>,
        now: Instant,
    ) -> Self {
        Self {
            replica,
            cursor,
            attempt,
            is_reported: false,
            opened_at: now,
            last_sign: now,
            has_scored: false,
            has_token: false,
            progress,
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

    /// The time of the last sign of life, of the engine's step loop or of the peer.
    pub fn last_sign(&self) -> Instant {
        match &self.origin {
            Origin::Engine { engine, .. } => engine.status().heartbeat.max(self.last_sign),
            Origin::Peer { .. } => self.last_sign,
        }
    }

    /// The attempt, if its outcome has not been reported yet.
    pub fn unreported(&mut self) -> Option<Attempt> {
        self.attempt.filter(|_| !std::mem::replace(&mut self.is_reported, true))
    }

    /// Whether the stream has tokens from this source, or may have.
    pub fn has_spoken(&self) -> bool {
        self.has_token || self.has_scored
    }

    /// Time since it was opened, while no token has come.
    pub fn waited(&self, now: Instant) -> Option<Duration> {
        (!self.has_token).then(|| now.saturating_duration_since(self.opened_at))
    }

    fn heard(&mut self, sign: &Sign) {
        self.last_sign = tokio::time::Instant::now().into_std();
        if let (Origin::Engine { meter, .. }, Sign::Event(event)) = (&mut self.origin, sign) {
            meter.hear(event, self.last_sign);
        }
        if let Some(progress) = &self.progress {
            progress.heard(self.last_sign);
        }
        match sign {
            Sign::Event(GenerationEvent::Scheduled { .. }) => {
                if let Origin::Engine { permit, .. } = &mut self.origin {
                    permit.scheduled();
                }
            }
            Sign::Event(GenerationEvent::PromptLogprobs { .. }) => self.has_scored = true,
            Sign::Event(GenerationEvent::Token { choice, .. }) => {
                let is_first = !std::mem::replace(&mut self.has_token, true);
                if let Some(progress) = &mut self.progress {
                    if is_first {
                        progress.first_token(self.last_sign.saturating_duration_since(self.opened_at));
                    }
                    progress.token(*choice, self.last_sign);
                }
            }
            Sign::Event(GenerationEvent::Finished { choice, .. }) => {
                self.progress.iter_mut().for_each(|progress| progress.finished(*choice));
            }
            Sign::Heartbeat => self.progress.iter_mut().for_each(ProgressPart::heartbeat),
            Sign::Event(GenerationEvent::Failed(_)) | Sign::HandOver => {}
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
    GenerationEvent::Failed(Failure::new(FailureKind::EngineFailed, "The engine stopped during the request."))
}
