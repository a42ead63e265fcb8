//! Encrypts and authenticates gossip. Without a cluster key, nobody can read, forge or replay a datagram.
//!
//! *Key and nonce.* Each run of a process is a session with a random 128-bit id. The session's key is derived from the
//! cluster key, the purpose and the id (HKDF-SHA256). Its datagrams are numbered, and the number is the nonce of
//! ChaCha20-Poly1305. So a nonce repeats under a key only if two sessions draw the same id (probability 2^-49 after 2^40
//! starts), or if a virtual machine is resumed twice from one snapshot, which this does not protect against. The header and
//! the cluster id are authenticated with each datagram.
//!
//! *Replay.* A known session has a window of numbers, and each number is accepted once. A session becomes known when it
//! answers this process's challenge: its datagrams carry a cookie that this process issued within the last minute, by its own
//! clock. A datagram recorded before this process started, or from a session that it has forgotten since (the table is
//! bounded and drops idle sessions), gets a challenge that a recording cannot answer. Clocks of two nodes are never compared.
//! What remains: an attacker on the path can delay datagrams and deliver each once within the window, until the session has
//! been silent for five minutes. Gossip is versioned, so late news changes nothing, but a node that has just died can be made
//! to look alive for as many datagrams as were delayed.
//!
//! *Several keys.* The first key encrypts, and any of them decrypts. A session that changes its key keeps its id, its numbers
//! and so its replay window. No nonce repeats under a key, because the numbers go on.
//!
//! *Senders without the key* cost one key derivation and one failed tag check per datagram and key, and no memory. They get no
//! answer.
//!
//! *Introductions.* Nodes with the same key and different cluster ids cannot decrypt each other's gossip. A node whose
//! configured peers do not answer sends them its ids, encrypted without the cluster id; a node of another cluster replies
//! with its own.
//!
//! Messages are compressed before encryption. Their length then shows how well they compress, which is not a secret here.
//!
//! `SealedEndpoint` is sans-IO: bytes in, bytes out, time passed in. `transport` moves the bytes.

mod fragments;
mod frame;
mod introduction;
mod keys;
mod replay;
mod sessions;
mod squeeze;
#[cfg(test)]
mod tests;
pub mod transport;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use self::fragments::{Joined, Reassembly};
use self::frame::{Challenge, Content, FRAGMENT_OVERHEAD, Frame};
pub use self::introduction::Introduction;
pub use self::keys::SessionId;
use self::keys::{HEADER_BYTES, Header, Keys, Purpose, SessionKey, TAG_BYTES};
use self::sessions::{Cookie, NO_COOKIE, Sessions};
use super::KeyRing;

/// Fits every network without fragmentation: with its headers it is within IPv6's minimum packet of 1280 bytes.
pub const MAX_DATAGRAM_BYTES: usize = 1200;
/// Bytes of a message that one datagram carries.
const FRAGMENT_BYTES: usize = MAX_DATAGRAM_BYTES - HEADER_BYTES - TAG_BYTES - FRAGMENT_OVERHEAD;
/// The most addresses whose cookie is remembered.
const MAX_COOKIES: usize = 1024;
/// The most sent datagrams whose address is remembered, to match the challenges that they cause.
const MAX_RECENT: usize = 1024;
/// Limits what this node sends in reply to a flood of replayed datagrams.
const MAX_CHALLENGES_PER_SECOND: u32 = 256;

/// Why a datagram or a message was not delivered. The label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Not a datagram of this protocol, or malformed by its sender.
    Malformed,
    /// Encrypted with another key or for another cluster, or changed in transit.
    Unauthenticated,
    /// An introduction from a node of another cluster.
    ForeignCluster,
    /// Sent by this node itself.
    Own,
    Replayed,
    /// The session has not answered a challenge yet.
    Unproven,
    /// Too many sessions.
    Crowded,
    /// Fragments of the message did not arrive.
    Incomplete,
    /// The message is too long to send.
    Oversized,
    /// The operating system refused to send it.
    Unsent,
}

impl DropReason {
    pub const ALL: [DropReason; 10] = [
        DropReason::Malformed,
        DropReason::Unauthenticated,
        DropReason::ForeignCluster,
        DropReason::Own,
        DropReason::Replayed,
        DropReason::Unproven,
        DropReason::Crowded,
        DropReason::Incomplete,
        DropReason::Oversized,
        DropReason::Unsent,
    ];

    pub fn label(self) -> &'static str {
        match self {
            DropReason::Malformed => "malformed",
            DropReason::Unauthenticated => "unauthenticated",
            DropReason::ForeignCluster => "foreign_cluster",
            DropReason::Own => "own",
            DropReason::Replayed => "replayed",
            DropReason::Unproven => "unproven",
            DropReason::Crowded => "crowded",
            DropReason::Incomplete => "incomplete",
            DropReason::Oversized => "oversized",
            DropReason::Unsent => "unsent",
        }
    }
}

/// The result of receiving a datagram.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// The message that this datagram completed, if any.
    pub message: Option<Vec<u8>>,
    /// A datagram to send back to the sender.
    pub reply: Option<Vec<u8>>,
    pub dropped: Option<DropReason>,
    /// Where a datagram was sent to that a node of this cluster has answered.
    pub answered: Option<SocketAddr>,
    /// A node of another cluster.
    pub stranger: Option<Introduction>,
}

impl Received {
    fn dropped(reason: DropReason) -> Self {
        Self { dropped: Some(reason), ..Self::default() }
    }
}

/// This process's side of the encrypted gossip with all nodes.
pub struct SealedEndpoint {
    keys: Keys,
    introduction: Introduction,
    own: SessionId,
    own_key: SessionKey,
    /// The number of the next datagram.
    next_number: u64,
    next_message: u32,
    sessions: Sessions,
    /// The cookies that other nodes expect from us, by address.
    cookies: BTreeMap<SocketAddr, Cookie>,
    /// Where the last datagrams went; the newest has number `next_number - 1`.
    recent: VecDeque<SocketAddr>,
    reassembly: Reassembly,
    challenges: ChallengeBudget,
}

impl SealedEndpoint {
    /// `session` and `secret` must be random and never used before.
    pub fn new(keys: &KeyRing, introduction: Introduction, session: SessionId, secret: [u8; 32], now: Instant) -> Self {
        let keys = Keys::new(keys, &introduction.cluster_id);
        Self {
            own_key: keys.sealing(&session, Purpose::Gossip),
            keys,
            introduction,
            own: session,
            next_number: 0,
            next_message: 0,
            sessions: Sessions::new(secret, now),
            cookies: BTreeMap::new(),
            recent: VecDeque::new(),
            reassembly: Reassembly::default(),
            challenges: ChallengeBudget { since: now, spent: 0 },
        }
    }

    /// Uses these keys from now on.
    pub fn set_keys(&mut self, keys: &KeyRing) {
        self.keys.replace(keys);
        self.own_key = self.keys.sealing(&self.own, Purpose::Gossip);
        self.sessions.drop_keys(|id| self.keys.has(id));
    }

    /// A datagram that tells who this node is, for whoever has the key.
    pub fn introduce(&mut self, to: SocketAddr) -> Vec<u8> {
        self.seal_introduction(to, false)
    }

    fn seal_introduction(&mut self, to: SocketAddr, is_reply: bool) -> Vec<u8> {
        let header = self.next_header(to, Purpose::Introduction);
        let key = self.keys.sealing(&self.own, Purpose::Introduction);
        self.keys.seal(&key, header, &self.introduction.encode(is_reply))
    }

    /// The datagrams of one message; `None` when it is too long.
    pub fn seal(&mut self, to: SocketAddr, message: &[u8]) -> Option<Vec<Vec<u8>>> {
        let fragments = fragments::split(self.next_message, message, FRAGMENT_BYTES)?;
        self.next_message = self.next_message.wrapping_add(1);
        Some(fragments.map(|fragment| self.seal_frame(to, Content::Fragment(fragment))).collect())
    }

    fn seal_frame(&mut self, to: SocketAddr, content: Content<'_>) -> Vec<u8> {
        let cookie = self.cookies.get(&to).copied().unwrap_or(NO_COOKIE);
        let header = self.next_header(to, Purpose::Gossip);
        self.keys.seal(&self.own_key, header, &Frame { cookie, content }.encode())
    }

    fn next_header(&mut self, to: SocketAddr, purpose: Purpose) -> Header {
        let header = Header { purpose, session: self.own, number: self.next_number };
        self.next_number += 1;
        if self.recent.len() == MAX_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(to);
        header
    }

    /// `datagram` is overwritten.
    pub fn receive(&mut self, from: SocketAddr, datagram: &mut [u8], now: Instant) -> Received {
        let Some(header) = Header::decode(datagram).filter(|_| datagram.len() <= MAX_DATAGRAM_BYTES) else {
            return Received::dropped(DropReason::Malformed);
        };
        if header.session == self.own {
            return Received::dropped(DropReason::Own);
        }
        if header.purpose == Purpose::Introduction {
            return self.receive_introduction(from, header, datagram, now);
        }
        let is_known = self.sessions.is_known(&header.session, now);
        let usual = self.sessions.key(&header.session).filter(|_| is_known);
        match self.keys.open(usual, header, datagram) {
            Some((frame, key)) if is_known => self.receive_known(from, header, key, frame, now),
            Some((frame, Some(key))) => self.receive_unknown(from, header, key, frame, now),
            Some((_, None)) => unreachable!("an unknown session has no usual key"),
            None => Received::dropped(DropReason::Unauthenticated),
        }
    }

    fn receive_introduction(
        &mut self,
        from: SocketAddr,
        header: Header,
        datagram: &mut [u8],
        now: Instant,
    ) -> Received {
        let Some((bytes, _)) = self.keys.open(None, header, datagram) else {
            return Received::dropped(DropReason::Unauthenticated);
        };
        let Some((stranger, is_reply)) = Introduction::decode(bytes) else {
            return Received::dropped(DropReason::Malformed);
        };
        if stranger.cluster_id == self.introduction.cluster_id {
            // It is met by way of gossip.
            return Received::default();
        }
        let reply = (!is_reply && self.challenges.take(now)).then(|| self.seal_introduction(from, true));
        Received { reply, stranger: Some(stranger), ..Received::dropped(DropReason::ForeignCluster) }
    }

    /// The number of messages dropped since the last call because fragments did not arrive.
    pub fn take_incomplete(&mut self) -> u64 {
        self.reassembly.take_given_up()
    }

    /// `key` is another one than it had before.
    fn receive_known(
        &mut self,
        from: SocketAddr,
        header: Header,
        key: Option<SessionKey>,
        frame: &[u8],
        now: Instant,
    ) -> Received {
        if !self.sessions.accept(&header.session, header.number, now) {
            return Received::dropped(DropReason::Replayed);
        }
        if let Some(key) = key {
            self.sessions.change_key(&header.session, key);
        }
        match Frame::decode(frame) {
            Some(frame) => self.deliver(from, header, frame.content, now),
            None => Received::dropped(DropReason::Malformed),
        }
    }

    fn receive_unknown(
        &mut self,
        from: SocketAddr,
        header: Header,
        key: SessionKey,
        frame: &[u8],
        now: Instant,
    ) -> Received {
        let Some(frame) = Frame::decode(frame) else { return Received::dropped(DropReason::Malformed) };
        if self.sessions.is_good(&frame.cookie, &header.session, now) {
            if !self.sessions.admit(header.session, key, header.number, now) {
                return Received::dropped(DropReason::Crowded);
            }
            return self.deliver(from, header, frame.content, now);
        }
        // A challenge from an unknown session is accepted, because it names a recent datagram of this process. The reply
        // below carries our own challenge along.
        let answered = match frame.content {
            Content::Challenge(challenge) => self.note_cookie(from, &challenge),
            Content::Fragment(_) | Content::Answer => None,
        };
        let reply = self.challenges.take(now).then(|| {
            let cookie = self.sessions.cookie(&header.session, now);
            let challenge = Challenge { session: header.session, number: header.number, cookie };
            self.seal_frame(from, Content::Challenge(challenge))
        });
        Received { reply, answered, ..Received::dropped(DropReason::Unproven) }
    }

    fn deliver(&mut self, from: SocketAddr, header: Header, content: Content<'_>, now: Instant) -> Received {
        match content {
            Content::Fragment(fragment) => match self.reassembly.add(header.session, fragment, now) {
                Joined::Message(message) => Received { message: Some(message), ..Received::default() },
                Joined::Waiting => Received::default(),
                Joined::Unsound => Received::dropped(DropReason::Malformed),
            },
            Content::Challenge(challenge) => {
                let answered = self.note_cookie(from, &challenge);
                let may_answer = answered.is_some() && self.challenges.take(now);
                let reply = may_answer.then(|| self.seal_frame(from, Content::Answer));
                Received { reply, answered, ..Received::default() }
            }
            Content::Answer => Received::default(),
        }
    }

    /// Remembers the cookie of a challenge, if the challenge answers a recent datagram of this process, and returns where
    /// that datagram went. The peer may be reachable at another address than the one that it sends from, so both are
    /// remembered.
    fn note_cookie(&mut self, from: SocketAddr, challenge: &Challenge) -> Option<SocketAddr> {
        let age = self.next_number.checked_sub(challenge.number).filter(|_| challenge.session == self.own);
        let sent = age.and_then(|age| self.recent.len().checked_sub(usize::try_from(age).ok()?));
        let to = *self.recent.get(sent?)?;
        for address in [to, from] {
            if self.cookies.len() >= MAX_COOKIES && !self.cookies.contains_key(&address) {
                self.cookies.pop_first();
            }
            self.cookies.insert(address, challenge.cookie);
        }
        Some(to)
    }
}

/// The number of challenges sent in the current second.
struct ChallengeBudget {
    since: Instant,
    spent: u32,
}

impl ChallengeBudget {
    fn take(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.spent) = (now, 0);
        }
        self.spent += 1;
        self.spent <= MAX_CHALLENGES_PER_SECOND
    }
}
