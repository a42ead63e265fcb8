//! Keeps one HTTP/2 connection per peer: opened when first needed, shared by concurrent calls, and dropped when it breaks or
//! the peer has left. Knows nothing of the contents of calls.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::debug;

use crate::cluster::tls::{CallingStream, PeerTls};
use crate::cluster::view::{ClusterView, Peer};
use crate::types::tasks::spawn_background;
use crate::types::{NodeId, watch};

/// Concurrent connections to peers.
const MAX_CONNECTIONS: usize = 1024;
/// A host that has vanished without closing its connections is detected after both together, also on idle connections. Long
/// enough for a busy machine, where pings wait behind other work.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Unread bytes of one response.
const STREAM_WINDOW: u32 = 2 << 20;
/// The streams' windows already limit memory, so this one can be large. Its size also determines how many small frames of
/// cancelled calls the library accepts over the lifetime of a connection before it treats them as an attack and closes the
/// connection.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Concurrent calls on one connection, until the peer announces its limit.
const INITIAL_CALLS: usize = 1024;
/// Cancelled calls that the library remembers, to ignore frames that still arrive for them.
const CANCELLED_CALLS: usize = 4096;
/// The authority of all calls. It is not used, since TLS has identified the peer.
const AUTHORITY: &str = "peer.outrigger.internal";

/// One process at one address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerAddress {
    id: NodeId,
    incarnation: u64,
    addr: SocketAddr,
}

impl PeerAddress {
    pub fn of(peer: &Peer) -> Self {
        Self { id: peer.id.clone(), incarnation: peer.incarnation, addr: peer.description.peer_addr }
    }

    fn is_in(&self, view: &ClusterView) -> bool {
        view.peers.get(&self.id).is_some_and(|peer| Self::of(peer) == *self)
    }
}

/// Cloneable, since all callers that wait for the connection get the error.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("there are already connections to {MAX_CONNECTIONS} peers")]
    TooMany,
    #[error("cannot connect to the peer")]
    Tcp(#[source] Arc<io::Error>),
    #[error("the TLS handshake with the peer failed")]
    Tls(#[source] Arc<io::Error>),
    #[error("the peer does not speak HTTP/2")]
    Http(#[source] Arc<hyper::Error>),
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    #[error("this node is shutting down")]
    Ended,
}

#[derive(Debug, thiserror::Error)]
#[error("the connection failed")]
pub struct SendError {
    #[source]
    source: hyper::Error,
    /// Whether the request was returned unsent because the connection had ended before.
    unsent: bool,
}

impl SendError {
    pub fn is_unsent(&self) -> bool {
        self.unsent
    }
}

type Sender = SendRequest<Full<Bytes>>;
type Opening = Shared<BoxFuture<'static, Result<Sender, ConnectError>>>;

/// An open connection. It stays open while a clone exists.
pub struct PeerConnection {
    number: u64,
    sender: Sender,
}

impl PeerConnection {
    /// Resolves with the head of the response. Dropping the future, or later the response's body, cancels the call at the peer.
    pub async fn send(&self, path: &str, message: Bytes) -> Result<Response<Incoming>, SendError> {
        let uri = Uri::builder().scheme("https").authority(AUTHORITY).path_and_query(path).build();
        let mut request = Request::new(Full::new(message));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.expect("made of constants");
        let sent = self.sender.clone().try_send_request(request).await;
        sent.map_err(|mut error| SendError { unsent: error.take_message().is_some(), source: error.into_error() })
    }
}

pub struct Connections {
    tls: PeerTls,
    connect_timeout: Duration,
    views: watch::Receiver<Arc<ClusterView>>,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    opened: u64,
    by_peer: BTreeMap<PeerAddress, Slot>,
}

struct Slot {
    /// Distinguishes this connection from later ones to the same peer.
    number: u64,
    /// The revocation count when the connection was opened.
    revision: u64,
    opening: Opening,
}

impl Slot {
    /// Whether the connection has closed, or could not be opened.
    fn is_over(&self) -> bool {
        match self.opening.peek() {
            Some(Ok(sender)) => sender.is_closed(),
            Some(Err(_)) => true,
            None => false,
        }
    }
}

impl Connections {
    pub fn new(tls: PeerTls, connect_timeout: Duration, views: watch::Receiver<Arc<ClusterView>>) -> Self {
        Self { tls, connect_timeout, views, slots: Mutex::default() }
    }

    /// The connection to `peer`; opened if there is none. Callers that arrive while it is being opened get the same result.
    pub async fn get(self: &Arc<Self>, peer: &PeerAddress) -> Result<PeerConnection, ConnectError> {
        let (number, opening) = self.slot(peer)?;
        Ok(PeerConnection { number, sender: opening.await? })
    }

    fn slot(self: &Arc<Self>, peer: &PeerAddress) -> Result<(u64, Opening), ConnectError> {
        let revision = *self.tls.revocations().borrow();
        let mut slots = self.slots.lock();
        let is_usable = |slot: &&Slot| !slot.is_over() && slot.revision == revision;
        if let Some(slot) = slots.by_peer.get(peer).filter(is_usable) {
            return Ok((slot.number, slot.opening.clone()));
        }
        if slots.by_peer.len() >= MAX_CONNECTIONS && !slots.by_peer.contains_key(peer) {
            return Err(ConnectError::TooMany);
        }
        slots.opened += 1;
        let number = slots.opened;
        let (opened, opening) = oneshot::channel();
        let opening = opening.map(|result| result.unwrap_or(Err(ConnectError::Ended))).boxed().shared();
        slots.by_peer.insert(peer.clone(), Slot { number, revision, opening: opening.clone() });
        let task = OpenTask {
            tls: self.tls.clone(),
            connect_timeout: self.connect_timeout,
            views: self.views.clone(),
            owner: Arc::downgrade(self),
            peer: peer.clone(),
            number,
        };
        // A separate task, so that it continues if the caller that started it is dropped.
        spawn_background(task.run(opened));
        Ok((number, opening))
    }

    /// Makes the next call open a new connection, unless that has already happened.
    pub fn forget(&self, peer: &PeerAddress, connection: &PeerConnection) {
        self.remove(peer, connection.number);
    }

    fn remove(&self, peer: &PeerAddress, number: u64) {
        let mut slots = self.slots.lock();
        if slots.by_peer.get(peer).is_some_and(|slot| slot.number == number) {
            slots.by_peer.remove(peer);
        }
    }
}

/// Opens one connection and drives it until it ends.
struct OpenTask {
    tls: PeerTls,
    connect_timeout: Duration,
    views: watch::Receiver<Arc<ClusterView>>,
    owner: Weak<Connections>,
    peer: PeerAddress,
    number: u64,
}

type Driver = http2::Connection<TokioIo<CallingStream>, Full<Bytes>, TokioExecutor>;

impl OpenTask {
    async fn run(self, opened: oneshot::Sender<Result<Sender, ConnectError>>) {
        let opening = timeout(self.connect_timeout, open(&self.tls, self.peer.addr)).await;
        match opening.unwrap_or(Err(ConnectError::Timeout(self.connect_timeout))) {
            Ok((sender, driver)) => {
                let _ = opened.send(Ok(sender));
                self.drive(driver).await;
            }
            Err(error) => {
                // Removed before callers learn of the failure, so that a retry opens a new connection.
                self.forget();
                let _ = opened.send(Err(error));
            }
        }
    }

    /// Ends when the connection breaks, or when nobody holds it and no call uses it.
    async fn drive(&self, driver: Driver) {
        let mut driver = pin!(driver);
        let left = pin!(until_left(self.views.clone(), &self.peer));
        let ended = tokio::select! {
            biased;
            ended = &mut driver => Some(ended),
            () = left => None,
        };
        self.forget();
        let ended = match ended {
            Some(ended) => ended,
            None => driver.await,
        };
        if let Err(error) = ended {
            debug!(peer = %self.peer.id, %error, "a connection to a peer broke");
        }
    }

    fn forget(&self) {
        if let Some(owner) = self.owner.upgrade() {
            owner.remove(&self.peer, self.number);
        }
    }
}

async fn open(tls: &PeerTls, addr: SocketAddr) -> Result<(Sender, Driver), ConnectError> {
    let tcp = |error| ConnectError::Tcp(Arc::new(error));
    let stream = TcpStream::connect(addr).await.map_err(tcp)?;
    // Tokens are small writes that must not be delayed (Nagle's algorithm).
    stream.set_nodelay(true).map_err(tcp)?;
    let stream = tls.connect(stream).await.map_err(|error| ConnectError::Tls(Arc::new(error)))?;
    let handshake = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_max_send_streams(INITIAL_CALLS)
        .max_concurrent_reset_streams(CANCELLED_CALLS)
        // The library counts these over the lifetime of a connection, but frames that cross a cancellation are normal.
        .max_local_error_reset_streams(None)
        .handshake(TokioIo::new(stream));
    handshake.await.map_err(|error| ConnectError::Http(Arc::new(error)))
}

async fn until_left(mut views: watch::Receiver<Arc<ClusterView>>, peer: &PeerAddress) {
    if views.wait_for(|view| !peer.is_in(view)).await.is_err() {
        // The sender of views is gone, since the node is shutting down.
        pending::<()>().await;
    }
}
