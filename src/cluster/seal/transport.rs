//! Chitchat's transport over encrypted datagrams. Broken datagrams and addresses never end it; they are counted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chitchat::transport::{Socket, Transport};
use chitchat::{ChitchatMessage, Deserializable, Serializable};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::squeeze::Squeezer;
use super::{DropReason, Introduction, MAX_DATAGRAM_BYTES, Received, SealedEndpoint};
use crate::cluster::KeyRing;
use crate::cluster::problems::{ProblemReason, Problems};
use crate::observability::Metrics;

/// Pause after a socket error, so that a lasting error does not keep a core busy.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Sends and receives datagrams.
pub trait Datagrams: Send + Sync + 'static {
    /// Receives the next datagram and returns its length and sender. Cancel-safe. A datagram longer than the buffer is cut.
    fn receive<'a>(&'a self, buffer: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>>;

    fn send<'a>(&'a self, datagram: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>>;

    fn local_addr(&self) -> io::Result<SocketAddr>;
}

impl Datagrams for UdpSocket {
    fn receive<'a>(&'a self, buffer: &'a mut [u8]) -> BoxFuture<'a, io::Result<(usize, SocketAddr)>> {
        Box::pin(self.recv_from(buffer))
    }

    fn send<'a>(&'a self, datagram: &'a [u8], to: SocketAddr) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { self.send_to(datagram, to).await.map(|_| ()) })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        UdpSocket::local_addr(self)
    }
}

/// Gives chitchat sockets over the same datagrams. If it opens a second one, the second takes over. Cheap to clone.
#[derive(Clone)]
pub struct SealedTransport {
    datagrams: Arc<dyn Datagrams>,
    endpoint: Arc<Mutex<SealedEndpoint>>,
    metrics: Arc<Metrics>,
    problems: Problems,
}

impl SealedTransport {
    /// Draws a random session.
    pub fn new(
        datagrams: Arc<dyn Datagrams>,
        keys: &KeyRing,
        introduction: Introduction,
        metrics: Arc<Metrics>,
        problems: Problems,
    ) -> Result<Self, NoRandomness> {
        let (session, secret) = (random()?, random()?);
        let endpoint = SealedEndpoint::new(keys, introduction, session, secret, Instant::now());
        Ok(Self { datagrams, endpoint: Arc::new(Mutex::new(endpoint)), metrics, problems })
    }

    /// Uses these keys from now on.
    pub fn set_keys(&self, keys: &KeyRing) {
        self.endpoint.lock().set_keys(keys);
    }

    /// Tells whoever is there, and has the key, who this node is.
    pub async fn introduce(&self, to: SocketAddr) {
        let datagram = self.endpoint.lock().introduce(to);
        self.send(&datagram, to).await;
    }

    async fn send(&self, datagram: &[u8], to: SocketAddr) {
        match self.datagrams.send(datagram, to).await {
            Ok(()) => {
                self.metrics.gossip_bytes.with(["sent"]).inc_by(datagram.len() as u64);
            }
            Err(error) => {
                self.count_drop(DropReason::Unsent);
                self.problems.event(ProblemReason::Unsent, to, || error.to_string());
            }
        }
    }

    fn count_drop(&self, reason: DropReason) {
        self.metrics.gossip_drops.with([reason.label()]).inc();
    }

    /// Tells people what a datagram says of the nodes that are there.
    fn note(&self, from: SocketAddr, received: &Received) {
        let heard = received.message.as_ref().map(|_| from);
        heard.into_iter().chain(received.answered).for_each(|addr| self.problems.heard(addr));
        if let Some(Introduction { cluster_id, node_id }) = &received.stranger {
            let detail = || format!("cluster_id `{cluster_id}`, node_id `{node_id}`");
            return self.problems.event(ProblemReason::ForeignCluster, from, detail);
        }
        let reason = match received.dropped {
            Some(DropReason::Unauthenticated) => ProblemReason::ForeignKey,
            Some(DropReason::Malformed) => ProblemReason::Unreadable,
            Some(DropReason::Unproven) => ProblemReason::Unproven,
            Some(DropReason::Replayed) => ProblemReason::Replayed,
            Some(
                DropReason::ForeignCluster
                | DropReason::Own
                | DropReason::Crowded
                | DropReason::Incomplete
                | DropReason::Oversized
                | DropReason::Unsent,
            )
            | None => return,
        };
        self.problems.event(reason, from, String::new);
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the operating system gives no random bytes")]
pub struct NoRandomness;

fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}

#[async_trait]
impl Transport for SealedTransport {
    /// The address has been bound already.
    async fn open(&self, _: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        Ok(Box::new(SealedSocket {
            transport: self.clone(),
            squeezer: Squeezer::new()?,
            // One byte more than allowed shows that a datagram was cut.
            buffer: Box::new([0; MAX_DATAGRAM_BYTES + 1]),
        }))
    }
}

struct SealedSocket {
    transport: SealedTransport,
    squeezer: Squeezer,
    buffer: Box<[u8; MAX_DATAGRAM_BYTES + 1]>,
}

#[async_trait]
impl Socket for SealedSocket {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        let squeezed = self.squeezer.squeeze(&message.serialize_to_vec());
        let sealed = self.transport.endpoint.lock().seal(to, &squeezed);
        let Some(datagrams) = sealed else {
            self.transport.count_drop(DropReason::Oversized);
            return Ok(());
        };
        for datagram in &datagrams {
            self.transport.send(datagram, to).await;
        }
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        loop {
            let (len, from) = match self.transport.datagrams.receive(&mut self.buffer[..]).await {
                Ok(received) => received,
                Err(error) => {
                    tracing::debug!(%error, "error on the gossip socket");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            // No await between here and the return of a message: chitchat may drop this future at any await.
            self.transport.metrics.gossip_bytes.with(["received"]).inc_by(len as u64);
            let (received, incomplete) = {
                let mut endpoint = self.transport.endpoint.lock();
                let received = endpoint.receive(from, &mut self.buffer[..len], Instant::now());
                (received, endpoint.take_incomplete())
            };
            if incomplete > 0 {
                self.transport.metrics.gossip_drops.with([DropReason::Incomplete.label()]).inc_by(incomplete);
            }
            if let Some(reason) = received.dropped {
                self.transport.count_drop(reason);
            }
            self.transport.note(from, &received);
            if let Some(message) = received.message {
                let expanded = self.squeezer.expand(&message);
                match expanded.and_then(|mut message| ChitchatMessage::deserialize(&mut message).ok()) {
                    Some(message) => return Ok((from, message)),
                    None => self.transport.count_drop(DropReason::Malformed),
                }
            }
            if let Some(reply) = received.reply {
                self.transport.send(&reply, from).await;
            }
        }
    }
}
