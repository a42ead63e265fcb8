//! Session keys, and the plaintext header of an encrypted datagram.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk};

use crate::cluster::ClusterKey;

/// The version of the datagram's layout.
const VERSION: u8 = 1;
const SESSION_BYTES: usize = 16;
/// The header: version, session, number.
pub(super) const HEADER_BYTES: usize = 1 + SESSION_BYTES + 8;
/// The size of a Poly1305 tag.
pub(super) const TAG_BYTES: usize = 16;

/// Identifies one run of one process. Drawn at random when it starts.
pub type SessionId = [u8; SESSION_BYTES];

/// Derives session keys, and decrypts the datagrams of every session.
pub(super) struct Keys {
    prk: Prk,
    cluster_id: Box<[u8]>,
}

impl Keys {
    pub(super) fn new(key: &ClusterKey, cluster_id: &str) -> Self {
        let prk = Prk::new_less_safe(HKDF_SHA256, &key.derive("gossip datagrams v1"));
        Self { prk, cluster_id: cluster_id.as_bytes().into() }
    }

    pub(super) fn session(&self, session: &SessionId) -> SessionKey {
        let info = [session.as_slice()];
        let expanded = self.prk.expand(&info, &CHACHA20_POLY1305).expect("a key is within HKDF's limit");
        SessionKey(LessSafeKey::new(UnboundKey::from(expanded)))
    }

    /// The header and the cluster id are authenticated; the rest is encrypted.
    fn associated_data(&self, header: &[u8]) -> Aad<Vec<u8>> {
        Aad::from([header, &self.cluster_id].concat())
    }

    /// Encrypts `frame` into a datagram.
    pub(super) fn seal(&self, key: &SessionKey, header: Header, frame: &[u8]) -> Vec<u8> {
        let header_bytes = header.encode();
        let mut datagram = Vec::with_capacity(HEADER_BYTES + frame.len() + TAG_BYTES);
        datagram.extend_from_slice(&header_bytes);
        datagram.extend_from_slice(frame);
        let tag = key
            .0
            .seal_in_place_separate_tag(
                header.nonce(),
                self.associated_data(&header_bytes),
                &mut datagram[HEADER_BYTES..],
            )
            .expect("a datagram is within the cipher's limit");
        datagram.extend_from_slice(tag.as_ref());
        datagram
    }

    /// Decrypts the frame of a datagram whose header has been read. Returns `None` if it was not encrypted with this key.
    pub(super) fn open<'a>(&self, key: &SessionKey, header: Header, datagram: &'a mut [u8]) -> Option<&'a [u8]> {
        let (header_bytes, sealed) = datagram.split_at_mut_checked(HEADER_BYTES)?;
        let frame = key.0.open_in_place(header.nonce(), self.associated_data(header_bytes), sealed).ok()?;
        Some(frame)
    }
}

/// Encrypts and decrypts the datagrams of one session.
pub(super) struct SessionKey(LessSafeKey);

/// The part of a datagram that is not encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) session: SessionId,
    /// The number of the datagram within its session. It never repeats, so neither does the nonce under the session's key.
    pub(super) number: u64,
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = VERSION;
        bytes[1..=SESSION_BYTES].copy_from_slice(&self.session);
        bytes[1 + SESSION_BYTES..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Returns `None` if the bytes are not a datagram of this protocol.
    pub(super) fn decode(datagram: &[u8]) -> Option<Self> {
        let (header, sealed) = datagram.split_first_chunk::<HEADER_BYTES>()?;
        if header[0] != VERSION || sealed.len() < TAG_BYTES {
            return None;
        }
        let (session, number) = header[1..].split_first_chunk::<SESSION_BYTES>()?;
        Some(Self { session: *session, number: u64::from_le_bytes(number.try_into().ok()?) })
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

    fn keys(secret: u8, cluster_id: &str) -> Keys {
        Keys::new(&ClusterKey::from_secret(&[secret; 32]).expect("long enough"), cluster_id)
    }

    #[test]
    fn only_the_same_secret_cluster_session_and_header_open_a_datagram() {
        let ours = keys(1, "c");
        let header = Header { session: [7; SESSION_BYTES], number: 42 };
        let sealed = ours.seal(&ours.session(&header.session), header, b"a frame");
        assert_eq!(sealed.len(), HEADER_BYTES + 7 + TAG_BYTES);
        assert_eq!(Header::decode(&sealed), Some(header));
        let open = |keys: &Keys, session: SessionId, header: Header, mut datagram: Vec<u8>| {
            keys.open(&keys.session(&session), header, &mut datagram).map(<[u8]>::to_vec)
        };
        assert_eq!(open(&ours, header.session, header, sealed.clone()).as_deref(), Some(b"a frame".as_slice()));
        assert_eq!(open(&keys(2, "c"), header.session, header, sealed.clone()), None);
        assert_eq!(open(&keys(1, "d"), header.session, header, sealed.clone()), None);
        assert_eq!(open(&ours, [8; SESSION_BYTES], header, sealed.clone()), None);
        assert_eq!(open(&ours, header.session, Header { number: 43, ..header }, sealed.clone()), None);
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&ours, header.session, header, changed), None, "bit {bit}");
        }
    }

    #[test]
    fn the_frame_is_not_readable_in_a_datagram() {
        let ours = keys(1, "c");
        let header = Header { session: [7; SESSION_BYTES], number: 0 };
        let sealed = ours.seal(&ours.session(&header.session), header, &[b'x'; 64]);
        assert!(!sealed.windows(4).any(|window| window == b"xxxx"));
    }

    #[test]
    fn what_is_too_short_or_of_another_version_has_no_header() {
        assert_eq!(Header::decode(&[VERSION; HEADER_BYTES + TAG_BYTES - 1]), None);
        assert_eq!(Header::decode(&[VERSION + 1; HEADER_BYTES + TAG_BYTES]), None);
        assert!(Header::decode(&[VERSION; HEADER_BYTES + TAG_BYTES]).is_some());
    }
}
