//! The interface for calls between nodes. `PeerTransport` makes calls, `PeerService` answers them. Between them is HTTP/2
//! (`peer_client` and the API's `peer`), or the simulator's network.
//!
//! Calls are never forwarded: a peer serves a call itself or refuses it.

use std::any::Any;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::journal::{JournalEntry, JournalRecord, JournalRefusal};
use super::view::Peer;
use crate::types::{ChoiceStart, Envelope, Failure, FailureKind, Fingerprint, GenerationEvent, JournalKey, NodeId};

/// Asks a peer to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateCall {
    pub envelope: Arc<Envelope>,
    /// The replica's fingerprint. A peer whose replica has another one refuses.
    pub fingerprint: Fingerprint,
    pub choices: Vec<ChoiceStart>,
    /// Time left until the envelope's deadline, which does not cross: nodes have no clock in common.
    pub remaining: Option<Duration>,
    /// Whether this continues a stream that has started; then queue limits do not apply.
    pub is_continuation: bool,
}

/// Asks the entry node of a running stream for its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowCall {
    pub key: JournalKey,
    /// For each choice, the tokens that the caller already has.
    pub have: Vec<u32>,
}

/// Journal entries for a holder, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalBatch {
    pub from: NodeId,
    pub entries: Vec<JournalEntry>,
}

/// One item of a peer's stream.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerFrame {
    Event(GenerationEvent),
    /// The engine's step loop has made progress since the last frame. Sent for queued and preempted requests too.
    Heartbeat,
    /// The peer is draining. The caller should continue the stream elsewhere; the peer continues until the stream is dropped.
    HandOver,
}

/// The frames of one call. Dropping it cancels the call.
pub struct PeerStream {
    frames: Frames,
    guard: Option<Box<dyn Any + Send + Sync>>,
}

enum Frames {
    Unbounded(mpsc::UnboundedReceiver<PeerFrame>),
    Bounded(mpsc::Receiver<PeerFrame>),
}

impl PeerStream {
    /// For a sender that limits itself: it sends at most what the request may generate, and a heartbeat now and then.
    #[expect(clippy::disallowed_methods, reason = "bounded by what its sender may send, as said above")]
    pub fn channel() -> (mpsc::UnboundedSender<PeerFrame>, Self) {
        let (sender, frames) = mpsc::unbounded_channel();
        (sender, Self { frames: Frames::Unbounded(frames), guard: None })
    }

    /// For a sender that waits while `capacity` frames are unread.
    pub fn bounded_channel(capacity: usize) -> (mpsc::Sender<PeerFrame>, Self) {
        let (sender, frames) = mpsc::channel(capacity);
        (sender, Self { frames: Frames::Bounded(frames), guard: None })
    }

    /// Drops `guard` together with the stream.
    pub fn guarded_by(self, guard: impl Any + Send + Sync) -> Self {
        Self { guard: Some(Box::new((self.guard, guard))), ..self }
    }

    /// The next frame. If the stream ends before its last choice has finished, that is a `PeerDisconnected` failure.
    pub async fn next(&mut self) -> PeerFrame {
        poll_fn(|context| self.poll_next(context)).await.unwrap_or_else(|| {
            let failure = Failure::new(FailureKind::PeerDisconnected, "The connection to the replica broke.");
            PeerFrame::Event(GenerationEvent::Failed(failure))
        })
    }

    /// Like `next`, but returns `None` when the sender is gone.
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

/// Makes calls to peers. A failure of the connection is `PeerUnreachable` or `PeerDisconnected`; all others come from the peer.
pub trait PeerTransport: Send + Sync + 'static {
    /// Resolves when the peer has accepted or refused the call.
    fn generate(&self, peer: &Peer, call: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>>;

    fn follow(&self, peer: &Peer, call: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>>;

    /// Returns the entries that were rejected.
    fn journal(&self, peer: &Peer, batch: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>>;

    fn lookup(&self, peer: &Peer, key: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>>;

    /// Fetches the tokenizer files with this digest (`ModelReport::tokenizer`).
    fn tokenizer(&self, peer: &Peer, digest: String) -> BoxFuture<'static, Result<Bytes, Failure>>;
}

/// Answers calls from peers. Must not block.
pub trait PeerService: Send + Sync + 'static {
    fn generate(&self, call: GenerateCall) -> Result<PeerStream, Failure>;

    fn follow(&self, call: FollowCall) -> Result<PeerStream, Failure>;

    fn journal(&self, batch: JournalBatch) -> Vec<JournalRefusal>;

    fn lookup(&self, key: JournalKey) -> Option<JournalRecord>;

    fn tokenizer(&self, digest: &str) -> Option<Bytes>;
}
