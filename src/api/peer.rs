//! The endpoint that peers call: HTTP/2 over mutual TLS, on an address of its own.
//!
//! Knows the wire format of a call (`cluster::wire`), not how it is answered: that is `PeerService`'s. A refused call gets a
//! status other than 200, and the failure as its body.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::listener::AcceptErrors;
use crate::cluster::problems::ProblemReason;
use crate::cluster::tls::{self, CalledStream, PeerTls};
use crate::cluster::wire::{self, CallKind, WireError, WireMessage};
use crate::cluster::{PeerFrame, PeerService, PeerStream, Problems};
use crate::observability::Metrics;
use crate::types::{Failure, FailureKind, GenerationEvent};

/// One connection per peer, and old connections of restarted peers that have not ended yet.
const MAX_CONNECTIONS: usize = 1024;
/// Connections whose TLS handshake is not complete. They have a limit of their own, so that strangers cannot use up the peers'
/// connections.
const MAX_HANDSHAKES: usize = 128;
/// Time limit of the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that has vanished without closing its connection is detected after both together, and its calls are cancelled.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Concurrent calls on one connection.
const MAX_CALLS: u32 = 4096;
/// Flow control: unread bytes of one call, and of all calls on a connection.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
/// Bytes of one response that are buffered for the network.
const SEND_BUFFER: usize = 256 << 10;
/// Memory for request bodies that are being read, of all calls together. Reserved in units of `MEMORY_UNIT`.
const CALL_MEMORY: usize = 256 << 20;
const MEMORY_UNIT: usize = 1 << 10;
/// A call fails if no part of its body arrives for this long.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Sent to the peer when there is no memory for a call.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Frames that are ready are sent together, up to about this size.
const BATCH_BYTES: usize = 64 << 10;

/// Serves peers until `shutdown`. Then accepts no connections and no calls, and returns when running calls have ended. The
/// caller limits that time: dropping the future closes all connections.
pub async fn serve(
    listener: TcpListener,
    tls: &PeerTls,
    service: Arc<dyn PeerService>,
    metrics: Arc<Metrics>,
    problems: Problems,
    shutdown: CancellationToken,
) {
    let server = Server {
        tls: tls.clone(),
        calls: Calls { service, memory: Arc::new(Semaphore::new(CALL_MEMORY / MEMORY_UNIT)) },
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
        metrics,
        problems,
        shutdown,
    };
    let mut connections = JoinSet::new();
    let mut errors = AcceptErrors::new("peers");
    loop {
        let accepted = tokio::select! {
            biased;
            () = server.shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => match server.handshakes.clone().try_acquire_owned() {
                Ok(place) => drop(connections.spawn(server.clone().connection(stream, address, place))),
                Err(_) => server.refuse("full"),
            },
            Err(error) => drop(errors.note(&error).await),
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

#[derive(Clone)]
struct Server {
    tls: PeerTls,
    calls: Calls,
    places: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    problems: Problems,
    shutdown: CancellationToken,
}

impl Server {
    fn refuse(&self, reason: &'static str) {
        self.metrics.peer_connections_refused.with([reason]).inc();
    }

    async fn connection(self, stream: TcpStream, address: SocketAddr, handshake: OwnedSemaphorePermit) {
        let mut revocations = self.tls.revocations();
        let handshaken = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => return,
            handshaken = timeout(HANDSHAKE_TIMEOUT, self.handshake(stream)) => handshaken,
        };
        drop(handshake);
        let stream = match handshaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => stream,
            Err(error) => {
                // Anybody who finds the port can cause this, so it is counted and only logged at debug level.
                debug!(%address, %error, "rejected a connection that is not from a peer");
                if tls::is_distrust(&error) {
                    // Counted by host, since the caller's port is random.
                    let host = address.ip().to_string();
                    self.problems.event_at(ProblemReason::Untrusted, &host, || error.to_string());
                }
                return self.refuse("handshake");
            }
        };
        let Ok(_place) = self.places.clone().try_acquire_owned() else { return self.refuse("full") };
        let _open = OpenConnection::count(&self.metrics);
        let calls = self.calls.clone();
        let service = service_fn(move |request| calls.clone().answer(request));
        let mut connection = pin!(http2_builder().serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            biased;
            ended = &mut connection => Some(ended),
            () = self.shutdown.cancelled() => None,
            // A peer whose certificate is still accepted connects again.
            Ok(()) = revocations.changed() => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(%address, %error, "a peer's connection broke");
        }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<CalledStream> {
        // Tokens are small writes that must not be delayed (Nagle's algorithm).
        stream.set_nodelay(true)?;
        self.tls.accept(stream).await
    }
}

fn http2_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_CALLS)
        .max_send_buf_size(SEND_BUFFER)
        // Peers may cancel any number of calls. The library's limits, meant against attackers, would close the connection and
        // end all other calls on it.
        .max_pending_accept_reset_streams(MAX_CALLS as usize)
        .max_local_error_reset_streams(None)
        .auto_date_header(false);
    builder
}

/// Counts a connection for as long as it is open.
struct OpenConnection(Arc<Metrics>);

impl OpenConnection {
    fn count(metrics: &Arc<Metrics>) -> Self {
        metrics.peer_connections.inc();
        Self(metrics.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.peer_connections.dec();
    }
}

/// Why a call is refused before it reaches the service.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("no such call")]
    Unknown,
    #[error("there is no room for the call")]
    Crowded,
    #[error("the call's body stopped arriving")]
    Stalled,
    #[error("the connection broke during the call")]
    Broken(#[source] hyper::Error),
    #[error("the call cannot be read")]
    Wire(#[from] WireError),
}

/// A refusal, from the service or from this module.
struct Refusal(StatusCode, Failure);

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        let (status, kind, message) = match &error {
            CallError::Unknown => {
                (StatusCode::NOT_FOUND, FailureKind::Internal, "The replica does not know this call.")
            }
            CallError::Crowded => {
                (StatusCode::SERVICE_UNAVAILABLE, FailureKind::Overloaded, "The replica has no room for the request.")
            }
            CallError::Stalled | CallError::Broken(_) => {
                (StatusCode::BAD_REQUEST, FailureKind::PeerDisconnected, "The connection to the replica broke.")
            }
            CallError::Wire(WireError::TooLarge { .. }) => {
                let message = "The request is too large to pass to another replica.";
                (StatusCode::PAYLOAD_TOO_LARGE, FailureKind::InvalidRequest, message)
            }
            CallError::Wire(WireError::Needs(_)) => {
                let message = "No replica that is left has a version that knows all of the request's parameters.";
                (StatusCode::CONFLICT, FailureKind::VersionTooOld, message)
            }
            CallError::Wire(_) => {
                (StatusCode::BAD_REQUEST, FailureKind::Internal, "The replica could not read the request.")
            }
        };
        debug!(%error, "refused a peer's call");
        let mut failure = Failure::new(kind, message);
        let may_pass = matches!(error, CallError::Crowded | CallError::Wire(WireError::Needs(_)));
        failure.retry_after = may_pass.then_some(RETRY_AFTER);
        Self(status, failure)
    }
}

impl From<Failure> for Refusal {
    /// The status is only for tools that watch the traffic. The caller reads the failure in the body.
    fn from(failure: Failure) -> Self {
        Self(StatusCode::CONFLICT, failure)
    }
}

#[derive(Clone)]
struct Calls {
    service: Arc<dyn PeerService>,
    memory: Arc<Semaphore>,
}

impl Calls {
    async fn answer(self, request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
        let mut response = Response::new(Answer::Whole(None));
        match self.dispatch(request).await {
            Ok(answer) => *response.body_mut() = answer,
            Err(Refusal(status, failure)) => {
                *response.status_mut() = status;
                *response.body_mut() = Answer::Whole(Some(wire::encode_failure(failure)));
            }
        }
        Ok(response)
    }

    async fn dispatch(&self, request: Request<Incoming>) -> Result<Answer, Refusal> {
        let (head, body) = request.into_parts();
        if head.method != Method::POST {
            return Err(CallError::Unknown.into());
        }
        let call = CallKind::at(head.uri.path()).ok_or(CallError::Unknown)?;
        match call {
            CallKind::Generate => Ok(Answer::stream(self.service.generate(self.read(call, body).await?)?)),
            CallKind::Follow => Ok(Answer::stream(self.service.follow(self.read(call, body).await?)?)),
            CallKind::Journal => Answer::message(&self.service.journal(self.read(call, body).await?)),
            CallKind::Lookup => Answer::message(&self.service.lookup(self.read(call, body).await?)),
            CallKind::Tokenizer => {
                let digest: String = self.read(call, body).await?;
                let unknown = || Failure::invalid("tokenizer", "The replica does not have this tokenizer.");
                Ok(Answer::Whole(Some(self.service.tokenizer(&digest).ok_or_else(unknown)?)))
            }
        }
    }

    /// Reads and decodes the call's body.
    async fn read<T: WireMessage>(&self, call: CallKind, body: Incoming) -> Result<T, CallError> {
        // Our own client announces the size of its calls.
        let limit = call.max_bytes();
        let size = body.size_hint().upper().map_or(limit, |size| size as usize);
        if size > limit {
            return Err(WireError::TooLarge { bytes: size, limit }.into());
        }
        let units = size.div_ceil(MEMORY_UNIT) as u32;
        let _memory = self.memory.try_acquire_many(units).map_err(|_| CallError::Crowded)?;
        Ok(wire::decode_message(&collect(body, size).await?)?)
    }
}

/// Reads a body of at most `limit` bytes.
async fn collect(mut body: Incoming, limit: usize) -> Result<Bytes, CallError> {
    let mut bytes = BytesMut::new();
    loop {
        let piece = timeout(READ_TIMEOUT, body.frame()).await.map_err(|_| CallError::Stalled)?;
        let Some(piece) = piece else { return Ok(bytes.freeze()) };
        let Ok(data) = piece.map_err(CallError::Broken)?.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(WireError::TooLarge { bytes: bytes.len() + data.len(), limit }.into());
        }
        bytes.extend_from_slice(&data);
    }
}

/// The body of a response. When the peer cancels the call, this is dropped, and the stream with it.
enum Answer {
    Whole(Option<Bytes>),
    Stream(PeerStream),
    /// The stream has failed; nothing follows.
    Ended,
}

impl Answer {
    fn stream(stream: PeerStream) -> Self {
        Self::Stream(stream)
    }

    fn message<T: WireMessage>(message: &T) -> Result<Self, Refusal> {
        Ok(Self::Whole(Some(wire::encode_message(message).map_err(CallError::from)?)))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut *self {
            Self::Whole(bytes) => bytes.take(),
            Self::Stream(stream) => ready!(poll_batch(stream, context)).map(|batch| {
                if batch.is_last {
                    *self = Self::Ended;
                }
                batch.bytes
            }),
            Self::Ended => None,
        };
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None) | Self::Ended)
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(_) => SizeHint::default(),
            Self::Ended => SizeHint::with_exact(0),
        }
    }
}

struct Batch {
    bytes: Bytes,
    is_last: bool,
}

/// Collects the frames that are ready into one write, without waiting for more.
fn poll_batch(stream: &mut PeerStream, context: &mut Context<'_>) -> Poll<Option<Batch>> {
    let Some(mut frame) = ready!(stream.poll_next(context)) else { return Poll::Ready(None) };
    let mut buffer = Vec::with_capacity(64);
    loop {
        let is_last = matches!(frame, PeerFrame::Event(GenerationEvent::Failed(_)));
        wire::encode_frame(frame, &mut buffer);
        let next = if is_last || buffer.len() >= BATCH_BYTES { None } else { stream.try_next() };
        match next {
            Some(next) => frame = next,
            None => return Poll::Ready(Some(Batch { bytes: buffer.into(), is_last })),
        }
    }
}
