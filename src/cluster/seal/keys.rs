//! Session keys, and the plaintext header of an encrypted datagram.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk};

use crate::cluster::KeyRing;
use crate::cluster::key::KeyId;

/// The version of the layout of a datagram that carries gossip.
const GOSSIP: u8 = 1;
/// The version of the layout of an introduction. Older nodes drop it.
const INTRODUCTION: u8 = 2;
const SESSION_BYTES: usize = 16;
/// The header: version, session, number.
pub(super) const HEADER_BYTES: usize = 1 + SESSION_BYTES + 8;
/// The size of a Poly1305 tag.
pub(super) const TAG_BYTES: usize = 16;

/// Identifies one run of one process. Drawn at random when it starts.
pub type SessionId = [u8; SESSION_BYTES];

/// Derives session keys, and decrypts the datagrams of every session.
pub(super) struct Keys {
    /// Never empty; the first seals.
    ring: Vec<RingKey>,
    cluster_id: Box<[u8]>,
}

/// What is derived from one cluster key.
struct RingKey {
    id: KeyId,
    gossip: Prk,
    introductions: Prk,
}

/// What a datagram is for. Each purpose has keys of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For nodes of this cluster alone: its name is authenticated.
    Gossip,
    /// For every node with the key.
    Introduction,
}

impl RingKey {
    fn session(&self, session: &SessionId, purpose: Purpose) -> SessionKey {
        let prk = match purpose {
            Purpose::Gossip => &self.gossip,
            Purpose::Introduction => &self.introductions,
        };
        let info = [session.as_slice()];
        let expanded = prk.expand(&info, &CHACHA20_POLY1305).expect("a key is within HKDF's limit");
        SessionKey { id: self.id, key: LessSafeKey::new(UnboundKey::from(expanded)) }
    }
}

impl Keys {
    pub(super) fn new(keys: &KeyRing, cluster_id: &str) -> Self {
        let mut new = Self { ring: Vec::new(), cluster_id: cluster_id.as_bytes().into() };
        new.replace(keys);
        new
    }

    /// Uses these keys from now on.
    pub(super) fn replace(&mut self, keys: &KeyRing) {
        let prk = |key: [u8; 32]| Prk::new_less_safe(HKDF_SHA256, &key);
        let derived = keys.iter().map(|key| RingKey {
            id: key.id(),
            gossip: prk(key.derive("gossip datagrams v1")),
            introductions: prk(key.derive("gossip introductions v1")),
        });
        self.ring = derived.collect();
    }

    pub(super) fn has(&self, id: KeyId) -> bool {
        self.ring.iter().any(|key| key.id == id)
    }

    /// The key to encrypt a session's own datagrams with.
    pub(super) fn sealing(&self, session: &SessionId, purpose: Purpose) -> SessionKey {
        self.ring[0].session(session, purpose)
    }

    /// The header and, for gossip, the cluster id are authenticated; the rest is encrypted.
    fn associated_data(&self, header: &[u8], purpose: Purpose) -> Aad<Vec<u8>> {
        Aad::from(match purpose {
            Purpose::Gossip => [header, &self.cluster_id].concat(),
            Purpose::Introduction => header.to_vec(),
        })
    }

    /// Encrypts `frame` into a datagram.
    pub(super) fn seal(&self, key: &SessionKey, header: Header, frame: &[u8]) -> Vec<u8> {
        let header_bytes = header.encode();
        let mut datagram = Vec::with_capacity(HEADER_BYTES + frame.len() + TAG_BYTES);
        datagram.extend_from_slice(&header_bytes);
        datagram.extend_from_slice(frame);
        let tag = key
            .key
            .seal_in_place_separate_tag(
                header.nonce(),
                self.associated_data(&header_bytes, header.purpose),
                &mut datagram[HEADER_BYTES..],
            )
            .expect("a datagram is within the cipher's limit");
        datagram.extend_from_slice(tag.as_ref());
        datagram
    }

    /// Decrypts the frame of a datagram whose header has been read, with `usual` or any key of the ring. Returns the key as
    /// well if it is not `usual`, and `None` if no key fits.
    pub(super) fn open<'a>(
        &self,
        usual: Option<&SessionKey>,
        header: Header,
        datagram: &'a mut [u8],
    ) -> Option<(&'a [u8], Option<SessionKey>)> {
        // A failed attempt overwrites the datagram.
        let sealed = (self.ring.len() > 1).then(|| datagram.to_vec());
        if let Some(usual) = usual
            && let Some(end) = self.open_with(usual, header, datagram)
        {
            return Some((&datagram[HEADER_BYTES..end], None));
        }
        let others = self.ring.iter().filter(|key| usual.is_none_or(|usual| usual.id != key.id));
        for key in others {
            if let Some(sealed) = &sealed {
                datagram.copy_from_slice(sealed);
            }
            let key = key.session(&header.session, header.purpose);
            if let Some(end) = self.open_with(&key, header, datagram) {
                return Some((&datagram[HEADER_BYTES..end], Some(key)));
            }
        }
        None
    }

    /// Where the frame ends.
    fn open_with(&self, key: &SessionKey, header: Header, datagram: &mut [u8]) -> Option<usize> {
        let (header_bytes, sealed) = datagram.split_at_mut_checked(HEADER_BYTES)?;
        let associated = self.associated_data(header_bytes, header.purpose);
        let frame = key.key.open_in_place(header.nonce(), associated, sealed).ok()?;
        Some(HEADER_BYTES + frame.len())
    }
}

/// Encrypts and decrypts the datagrams of one session.
pub(super) struct SessionKey {
    /// The cluster key that it is derived from.
    pub(super) id: KeyId,
    key: LessSafeKey,
}

/// The part of a datagram that is not encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) purpose: Purpose,
    pub(super) session: SessionId,
    /// The number of the datagram within its session. It never repeats, so neither does the nonce under any of the session's
    /// keys.
    pub(super) number: u64,
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = match self.purpose {
            Purpose::Gossip => GOSSIP,
            Purpose::Introduction => INTRODUCTION,
        };
        bytes[1..=SESSION_BYTES].copy_from_slice(&self.session);
        bytes[1 + SESSION_BYTES..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Returns `None` if the bytes are not a datagram of this protocol.
    pub(super) fn decode(datagram: &[u8]) -> Option<Self> {
        let (header, sealed) = datagram.split_first_chunk::<HEADER_BYTES>()?;
        let purpose = match header[0] {
            GOSSIP => Purpose::Gossip,
            INTRODUCTION => Purpose::Introduction,
            _ => return None,
        };
        if sealed.len() < TAG_BYTES {
            return None;
        }
        let (session, number) = header[1..].split_first_chunk::<SESSION_BYTES>()?;
        Some(Self { purpose, session: *session, number: u64::from_le_bytes(number.try_into().ok()?) })
    }

    fn nonce(self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ClusterKey;

    const SESSION: SessionId = [7; SESSION_BYTES];
    const HEADER: Header = Header { purpose: Purpose::Gossip, session: SESSION, number: 42 };

    fn keys(secret: u8, cluster_id: &str) -> Keys {
        Keys::new(&ClusterKey::from_secret(&[secret; 32]).expect("long enough").into(), cluster_id)
    }

    fn sealed(keys: &Keys, header: Header, frame: &[u8]) -> Vec<u8> {
        keys.seal(&keys.sealing(&header.session, header.purpose), header, frame)
    }

    fn opened(keys: &Keys, header: Header, datagram: &[u8]) -> Option<Vec<u8>> {
        keys.open(None, header, &mut datagram.to_vec()).map(|(frame, _)| frame.to_vec())
    }

    #[test]
    fn only_the_same_secret_cluster_session_and_header_open_a_datagram() {
        let ours = keys(1, "c");
        let datagram = sealed(&ours, HEADER, b"a frame");
        assert_eq!(datagram.len(), HEADER_BYTES + 7 + TAG_BYTES);
        assert_eq!(Header::decode(&datagram), Some(HEADER));
        assert_eq!(opened(&ours, HEADER, &datagram).as_deref(), Some(b"a frame".as_slice()));
        assert_eq!(opened(&keys(2, "c"), HEADER, &datagram), None);
        assert_eq!(opened(&keys(1, "d"), HEADER, &datagram), None);
        assert_eq!(opened(&ours, Header { session: [8; SESSION_BYTES], ..HEADER }, &datagram), None);
        assert_eq!(opened(&ours, Header { number: 43, ..HEADER }, &datagram), None);
        assert_eq!(opened(&ours, Header { purpose: Purpose::Introduction, ..HEADER }, &datagram), None);
        for bit in 0..datagram.len() * 8 {
            let mut changed = datagram.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(opened(&ours, HEADER, &changed), None, "bit {bit}");
        }
    }

    #[test]
    fn an_introduction_opens_whatever_the_clusters_name() {
        let header = Header { purpose: Purpose::Introduction, ..HEADER };
        let datagram = sealed(&keys(1, "c"), header, b"it is me");
        assert_eq!(Header::decode(&datagram), Some(header));
        assert_eq!(opened(&keys(1, "d"), header, &datagram).as_deref(), Some(b"it is me".as_slice()));
        assert_eq!(opened(&keys(2, "c"), header, &datagram), None);
    }

    #[test]
    fn any_key_of_the_ring_opens_and_the_first_one_seals() {
        let ring = |secrets: &[u8]| {
            use base64::Engine;
            let line = |secret: &u8| base64::engine::general_purpose::STANDARD.encode([*secret; 32]);
            let lines: Vec<String> = secrets.iter().map(line).collect();
            let list = format!("{}\n{}", crate::cluster::key::LIST_HEAD, lines.join("\n"));
            Keys::new(&KeyRing::parse(list.as_bytes()).expect("a list"), "c")
        };
        let both = ring(&[1, 2]);
        for secret in [1, 2] {
            let single = keys(secret, "c");
            let datagram = sealed(&single, HEADER, b"a frame");
            assert_eq!(opened(&both, HEADER, &datagram).as_deref(), Some(b"a frame".as_slice()), "{secret}");
            // A session that has had the other key so far.
            let other = keys(3 - secret, "c").sealing(&SESSION, Purpose::Gossip);
            let mut datagram = datagram.clone();
            let (frame, better) = both.open(Some(&other), HEADER, &mut datagram).expect("the other one fits");
            assert_eq!(frame, b"a frame");
            assert_eq!(better.expect("another one").id, single.ring[0].id);
        }
        assert_eq!(opened(&both, HEADER, &sealed(&keys(3, "c"), HEADER, b"a frame")), None);
        let ours = sealed(&both, HEADER, b"a frame");
        assert!(opened(&keys(1, "c"), HEADER, &ours).is_some() && opened(&keys(2, "c"), HEADER, &ours).is_none());
    }

    #[test]
    fn the_frame_is_not_readable_in_a_datagram() {
        let datagram = sealed(&keys(1, "c"), HEADER, &[b'x'; 64]);
        assert!(!datagram.windows(4).any(|window| window == b"xxxx"));
    }

    #[test]
    fn what_is_too_short_or_of_another_version_has_no_header() {
        assert_eq!(Header::decode(&[GOSSIP; HEADER_BYTES + TAG_BYTES - 1]), None);
        assert_eq!(Header::decode(&[INTRODUCTION + 1; HEADER_BYTES + TAG_BYTES]), None);
        assert!(Header::decode(&[GOSSIP; HEADER_BYTES + TAG_BYTES]).is_some());
    }
}
