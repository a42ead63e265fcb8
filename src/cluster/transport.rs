//! The calls between nodes. `PeerTransport` makes them, `PeerService` answers them; HTTP/2 lies between (`peer_client`, and
//! the API's `peer`), or the simulator's links.
//!
//! One hop, no loops: what a peer asks for is served here, or refused.

use std::any::Any;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::journal::{JournalEntry, JournalKey, JournalRecord, JournalRefusal};
use super::view::Peer;
use crate::types::{
    ChoiceStart, Extensions, Failure, FailureKind, Fingerprint, GenerationEvent, NodeId, RequestId, SamplingParams,
    TokenId,
};

/// Asks a peer to generate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateCall {
    pub id: RequestId,
    /// The replica that is meant; a peer with another one refuses.
    pub fingerprint: Fingerprint,
    pub prompt: Arc<[TokenId]>,
    pub choices: Vec<ChoiceStart>,
    pub sampling: Arc<SamplingParams>,
    pub priority: i32,
    /// What is left of the deadline: nodes exchange no wall-clock times.
    pub remaining: Option<Duration>,
    /// Continues a stream that has begun: queue caps do not apply.
    pub is_continuation: bool,
    /// See `wire::encode_call` for how it crosses.
    #[serde(skip)]
    pub extensions: Extensions,
}

/// Asks the entry node of a running stream for its events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowCall {
    pub key: JournalKey,
    /// Tokens of each choice that are not wanted again.
    pub have: Vec<u32>,
}

/// Journal entries for a holder, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalBatch {
    pub from: NodeId,
    pub entries: Vec<JournalEntry>,
}

/// What a peer's stream carries.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerFrame {
    Event(GenerationEvent),
    /// The engine's step loop has moved since the last frame. Comes for queued and preempted requests too.
    Heartbeat,
    /// The peer drains: continue elsewhere; it goes on until the stream is dropped.
    HandOver,
}

/// Frames of one call. Dropping it cancels the call.
pub struct PeerStream {
    frames: Frames,
    _guard: Option<Box<dyn Any + Send + Sync>>,
}

enum Frames {
    Unbounded(mpsc::UnboundedReceiver<PeerFrame>),
    Bounded(mpsc::Receiver<PeerFrame>),
}

impl PeerStream {
    /// For a sender that bounds itself: it holds at most what the request may generate, and a heartbeat now and then.
    pub fn channel() -> (mpsc::UnboundedSender<PeerFrame>, Self) {
        let (sender, frames) = mpsc::unbounded_channel();
        (sender, Self { frames: Frames::Unbounded(frames), _guard: None })
    }

    /// For a sender that waits while `capacity` frames have not been taken.
    pub fn bounded_channel(capacity: usize) -> (mpsc::Sender<PeerFrame>, Self) {
        let (sender, frames) = mpsc::channel(capacity);
        (sender, Self { frames: Frames::Bounded(frames), _guard: None })
    }

    /// Drops `guard` together with the stream.
    pub fn guarded_by(self, guard: impl Any + Send + Sync) -> Self {
        Self { _guard: Some(Box::new((self._guard, guard))), ..self }
    }

    /// The next frame. A stream that ends before its last choice has finished is broken: `PeerDisconnected`.
    pub async fn next(&mut self) -> PeerFrame {
        poll_fn(|context| self.poll_next(context)).await.unwrap_or_else(|| {
            let failure = Failure::new(FailureKind::PeerDisconnected, "The connection to the replica broke.");
            PeerFrame::Event(GenerationEvent::Failed(failure))
        })
    }

    /// As `next`, but `None` when the sender is gone, whatever that means.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<PeerFrame>> {
        match &mut self.frames {
            Frames::Unbounded(frames) => frames.poll_recv(context),
            Frames::Bounded(frames) => frames.poll_recv(context),
        }
    }

    pub fn try_next(&mut self) -> Option<PeerFrame> {
        match &mut self.frames {
            Frames::Unbounded(frames) => frames.try_recv().ok(),
            Frames::Bounded(frames) => frames.try_recv().ok(),
        }
    }
}

/// Calls peers. A failure of the way there is `PeerUnreachable` or `PeerDisconnected`; any other is the peer's own word.
pub trait PeerTransport: Send + Sync + 'static {
    /// Resolves when the peer has accepted the call or refused it.
    fn generate(&self, peer: &Peer, call: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>>;

    fn follow(&self, peer: &Peer, call: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>>;

    /// Entries that were not taken come back.
    fn journal(&self, peer: &Peer, batch: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>>;

    fn lookup(&self, peer: &Peer, key: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>>;

    /// The files that make the tokenizer of this digest (`ModelReport::tokenizer`).
    fn tokenizer(&self, peer: &Peer, digest: String) -> BoxFuture<'static, Result<Bytes, Failure>>;
}

/// Answers the calls of peers. Never blocks.
pub trait PeerService: Send + Sync + 'static {
    fn generate(&self, call: GenerateCall) -> Result<PeerStream, Failure>;

    fn follow(&self, call: FollowCall) -> Result<PeerStream, Failure>;

    fn journal(&self, batch: JournalBatch) -> Vec<JournalRefusal>;

    fn lookup(&self, key: JournalKey) -> Option<JournalRecord>;

    fn tokenizer(&self, digest: &str) -> Option<Bytes>;
}
