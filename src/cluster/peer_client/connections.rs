//! One HTTP/2 connection per peer: opened when first wanted, shared by concurrent calls, thrown away when it breaks or when
//! the peer has left. Knows nothing of what the calls carry.

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
use crate::types::{NodeId, watch};

/// Peers that connections stand to at one time.
const MAX_CONNECTIONS: usize = 1024;
/// A host that vanished without a word is noticed after the sum of both, on idle connections too. Long enough for a machine
/// that is busy: a ping is answered between other work.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of one answer that may wait here unread.
const STREAM_WINDOW: u32 = 2 << 20;
/// The windows of the streams bound memory, so this one need not. Its size also sets how many small frames the library
/// ignores on cancelled calls, over the whole life of a connection, before it takes them for an attack and hangs up.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Calls on one connection, until the peer says how many it takes.
const INITIAL_CALLS: usize = 1024;
/// Cancelled calls that the library remembers, to ignore what still comes for them.
const CANCELLED_CALLS: usize = 4096;
/// What calls are addressed to. TLS has made sure of the peer, so nobody reads it.
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

/// Cloneable: everybody who waited for the connection gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("connections to {MAX_CONNECTIONS} peers stand already")]
    TooMany,
    #[error("the peer does not take the connection")]
    Tcp(#[source] Arc<io::Error>),
    #[error("no trust between this node and the peer")]
    Tls(#[source] Arc<io::Error>),
    #[error("the peer does not speak HTTP/2")]
    Http(#[source] Arc<hyper::Error>),
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    #[error("the runtime ends")]
    Ended,
}

#[derive(Debug, thiserror::Error)]
#[error("the connection failed")]
pub struct SendError {
    #[source]
    source: hyper::Error,
    /// The request came back: the connection had ended before.
    unsent: bool,
}

impl SendError {
    pub fn is_unsent(&self) -> bool {
        self.unsent
    }
}

type Sender = SendRequest<Full<Bytes>>;
type Opening = Shared<BoxFuture<'static, Result<Sender, ConnectError>>>;

/// An open connection. While a clone is held, it stays open.
pub struct Connection {
    number: u64,
    sender: Sender,
}

impl Connection {
    /// Resolves with the head of the answer. Dropping the future, or later the answer's body, cancels the call at the peer.
    pub async fn send(&self, path: &'static str, message: Bytes) -> Result<Response<Incoming>, SendError> {
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
    /// Tells this connection from later ones to the same peer.
    number: u64,
    /// The revocations that had happened before.
    revision: u64,
    opening: Opening,
}

impl Slot {
    /// Whether there is no use in waiting for it.
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

    /// The connection to `peer`, opened if there is none. Whoever asks while it is being opened shares its fate.
    pub async fn get(self: &Arc<Self>, peer: &PeerAddress) -> Result<Connection, ConnectError> {
        let (number, opening) = self.slot(peer)?;
        Ok(Connection { number, sender: opening.await? })
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
        // A task of its own, so that it goes on when the call that asked for it is dropped.
        tokio::spawn(task.run(opened));
        Ok((number, opening))
    }

    /// The next call opens a connection anew, unless another has done so already.
    pub fn forget(&self, peer: &PeerAddress, connection: &Connection) {
        self.remove(peer, connection.number);
    }

    fn remove(&self, peer: &PeerAddress, number: u64) {
        let mut slots = self.slots.lock();
        if slots.by_peer.get(peer).is_some_and(|slot| slot.number == number) {
            slots.by_peer.remove(peer);
        }
    }
}

/// Opens one connection and drives it to its end.
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
                // Before anybody learns of the failure, so that who tries again does not meet it a second time.
                self.forget();
                let _ = opened.send(Err(error));
            }
        }
    }

    /// The connection ends when it breaks, or when nobody holds it and no call runs on it.
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
    // Tokens are small writes that must not wait for one another.
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
        // Counted over the whole life of a connection; frames that cross a cancellation are no attack.
        .max_local_error_reset_streams(None)
        .handshake(TokioIo::new(stream));
    handshake.await.map_err(|error| ConnectError::Http(Arc::new(error)))
}

async fn until_left(mut views: watch::Receiver<Arc<ClusterView>>, peer: &PeerAddress) {
    if views.wait_for(|view| !peer.is_in(view)).await.is_err() {
        // Nobody says any more who is a peer: the node ends.
        pending::<()>().await;
    }
}
