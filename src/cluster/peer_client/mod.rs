//! Calls peers over HTTP/2 with mutual TLS, with one connection per peer that all calls share.
//!
//! Errors before the peer has answered are `PeerUnreachable`, later ones `PeerDisconnected`; a refusal by the peer is passed on
//! unchanged. The only retry is for a call that was never sent, once. The router decides whether a request is tried elsewhere.

mod connections;
mod relay;

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Response, StatusCode};
use tokio::time::timeout;

use self::connections::{ConnectError, Connections, PeerAddress, SendError};
use self::relay::relay;
use super::journal::{JournalRecord, JournalRefusal};
use super::tls::PeerTls;
use super::transport::{FollowCall, GenerateCall, JournalBatch, PeerStream, PeerTransport};
use super::view::{ClusterView, Peer};
use super::wire::{self, CallKind, WireError, WireMessage};
use crate::types::{Failure, FailureKind, JournalKey, tasks, watch};

/// Time limit for a peer to begin its answer, and for pauses in an answer that is not a stream. A healthy peer answers at once,
/// even on a busy machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// A large call gets an additional second per this many bytes.
const SLOWEST_BYTES_PER_SECOND: usize = 8 << 20;
/// Unread frames of one stream. Further ones wait at the peer.
const UNREAD_FRAMES: usize = 1024;

/// Makes calls to peers.
pub struct HttpPeerTransport {
    connections: Arc<Connections>,
}

/// Why a call got no answer.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("no connection")]
    Connect(#[from] ConnectError),
    #[error("the connection broke before the answer")]
    Send(#[from] SendError),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("the connection broke during the answer")]
    Read(#[source] hyper::Error),
    #[error("the answer cannot be read")]
    Wire(#[from] WireError),
}

impl HttpPeerTransport {
    /// `views` lists the current peers. Connections to other nodes are kept only while calls use them.
    pub fn new(tls: PeerTls, connect_timeout: Duration, views: watch::Receiver<Arc<ClusterView>>) -> Self {
        Self { connections: Arc::new(Connections::new(tls, connect_timeout, views)) }
    }

    /// A call with a streamed response.
    fn stream(
        &self,
        peer: &Peer,
        call: CallKind,
        message: Result<Bytes, WireError>,
    ) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        let answer = self.call(peer, call, message);
        async move {
            let body = answer.await?.into_body();
            let (frames, stream) = PeerStream::bounded_channel(UNREAD_FRAMES);
            tasks::spawn("reads what a peer generates", relay(body, frames));
            Ok(stream)
        }
        .boxed()
    }

    /// A call with a response that is read as a whole.
    fn ask<T: WireMessage>(
        &self,
        peer: &Peer,
        call: CallKind,
        message: &T,
    ) -> BoxFuture<'static, Result<Bytes, Failure>> {
        let answer = self.call(peer, call, wire::encode_message(message));
        async move {
            let body = answer.await?.into_body();
            collect(body, wire::MAX_MESSAGE_BYTES).await.map_err(disconnected)
        }
        .boxed()
    }

    /// Resolves with the head of a response that accepts the call.
    fn call(
        &self,
        peer: &Peer,
        call: CallKind,
        message: Result<Bytes, WireError>,
    ) -> impl Future<Output = Result<Response<Incoming>, Failure>> + Send + 'static + use<> {
        let (connections, path, peer) = (self.connections.clone(), call.path(peer.protocol), PeerAddress::of(peer));
        async move {
            let message = message.map_err(unsendable)?;
            let response = send(&connections, &peer, &path, message).await.map_err(unreachable)?;
            if response.status() == StatusCode::OK {
                return Ok(response);
            }
            let refusal = collect(response.into_body(), wire::MAX_FRAME_BYTES).await.map_err(disconnected)?;
            Err(wire::decode_failure(&refusal).unwrap_or_else(|error| disconnected(error.into())))
        }
    }
}

impl PeerTransport for HttpPeerTransport {
    fn generate(&self, peer: &Peer, call: GenerateCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        self.stream(peer, CallKind::Generate, wire::encode_message(&call))
    }

    fn follow(&self, peer: &Peer, call: FollowCall) -> BoxFuture<'static, Result<PeerStream, Failure>> {
        self.stream(peer, CallKind::Follow, wire::encode_message(&call))
    }

    fn journal(&self, peer: &Peer, batch: JournalBatch) -> BoxFuture<'static, Result<Vec<JournalRefusal>, Failure>> {
        let answer = self.ask(peer, CallKind::Journal, &batch);
        async move { decode_answer(&answer.await?) }.boxed()
    }

    fn lookup(&self, peer: &Peer, key: JournalKey) -> BoxFuture<'static, Result<Option<JournalRecord>, Failure>> {
        let answer = self.ask(peer, CallKind::Lookup, &key);
        async move { decode_answer(&answer.await?) }.boxed()
    }

    fn tokenizer(&self, peer: &Peer, digest: String) -> BoxFuture<'static, Result<Bytes, Failure>> {
        self.ask(peer, CallKind::Tokenizer, &digest)
    }
}

/// Sends the call. If an old connection turns out to be broken and the call was not sent, uses a new connection.
async fn send(
    connections: &Arc<Connections>,
    peer: &PeerAddress,
    path: &str,
    message: Bytes,
) -> Result<Response<Incoming>, CallError> {
    let limit = answer_timeout(message.len());
    let connection = connections.get(peer).await?;
    let first = timeout(limit, connection.send(path, message.clone())).await.map_err(|_| CallError::Silent(limit))?;
    match first {
        Err(error) if error.is_unsent() => {
            connections.forget(peer, &connection);
            let connection = connections.get(peer).await?;
            Ok(timeout(limit, connection.send(path, message)).await.map_err(|_| CallError::Silent(limit))??)
        }
        answered => Ok(answered?),
    }
}

fn answer_timeout(bytes: usize) -> Duration {
    ANSWER_TIMEOUT + Duration::from_secs((bytes / SLOWEST_BYTES_PER_SECOND) as u64)
}

/// Reads a body of at most `limit` bytes.
async fn collect(mut body: Incoming, limit: usize) -> Result<Bytes, CallError> {
    let mut bytes = BytesMut::new();
    loop {
        let piece = timeout(ANSWER_TIMEOUT, body.frame()).await.map_err(|_| CallError::Silent(ANSWER_TIMEOUT))?;
        let Some(piece) = piece else { return Ok(bytes.freeze()) };
        let Ok(data) = piece.map_err(CallError::Read)?.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(WireError::TooLarge { bytes: bytes.len() + data.len(), limit }.into());
        }
        bytes.extend_from_slice(&data);
    }
}

fn decode_answer<T: WireMessage>(bytes: &[u8]) -> Result<T, Failure> {
    wire::decode_message(bytes).map_err(|error| disconnected(error.into()))
}

fn unsendable(error: WireError) -> Failure {
    Failure::new(FailureKind::InvalidRequest, "The request is too large to pass to another replica.").with_source(error)
}

fn unreachable(error: CallError) -> Failure {
    Failure::new(FailureKind::PeerUnreachable, "The replica cannot be reached.").with_source(error)
}

fn disconnected(error: CallError) -> Failure {
    Failure::new(FailureKind::PeerDisconnected, "The connection to the replica broke.").with_source(error)
}
