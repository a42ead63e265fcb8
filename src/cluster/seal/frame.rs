//! The content of an encrypted datagram. Pure.

use super::fragments::Fragment;
use super::keys::SessionId;
use super::sessions::Cookie;

const KIND_FRAGMENT: u8 = 0;
const KIND_CHALLENGE: u8 = 1;
const KIND_ANSWER: u8 = 2;

/// Bytes that a frame adds to those of a fragment.
pub(super) const FRAGMENT_OVERHEAD: usize = 1 + size_of::<Cookie>() + 4 + 1 + 1;

/// A frame: the cookie that the receiver gave to the sender, and the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    /// Zeros if the receiver has given none.
    pub(super) cookie: Cookie,
    pub(super) content: Content<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content<'a> {
    Fragment(Fragment<'a>),
    Challenge(Challenge),
    /// Only the cookie.
    Answer,
}

/// Tells the sender of a datagram that its session is not known here, and which cookie it must send to prove that it is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// The session and number of that datagram.
    pub(super) session: SessionId,
    pub(super) number: u64,
    pub(super) cookie: Cookie,
}

impl<'a> Frame<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        match &self.content {
            Content::Fragment(fragment) => {
                bytes.push(KIND_FRAGMENT);
                bytes.extend_from_slice(&self.cookie);
                bytes.extend_from_slice(&fragment.message.to_le_bytes());
                bytes.extend_from_slice(&[fragment.index, fragment.count]);
                bytes.extend_from_slice(fragment.bytes);
            }
            Content::Challenge(challenge) => {
                bytes.push(KIND_CHALLENGE);
                bytes.extend_from_slice(&self.cookie);
                bytes.extend_from_slice(&challenge.session);
                bytes.extend_from_slice(&challenge.number.to_le_bytes());
                bytes.extend_from_slice(&challenge.cookie);
            }
            Content::Answer => {
                bytes.push(KIND_ANSWER);
                bytes.extend_from_slice(&self.cookie);
            }
        }
        bytes
    }

    /// Returns `None` if the bytes are not a frame.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        let (&cookie, rest) = rest.split_first_chunk()?;
        let content = match kind {
            KIND_FRAGMENT => {
                let (message, rest) = rest.split_first_chunk()?;
                let (&[index, count], bytes) = rest.split_first_chunk()?;
                Content::Fragment(Fragment { message: u32::from_le_bytes(*message), index, count, bytes })
            }
            KIND_CHALLENGE => {
                let (&session, rest) = rest.split_first_chunk()?;
                let (number, rest) = rest.split_first_chunk()?;
                let cookie = rest.try_into().ok()?;
                Content::Challenge(Challenge { session, number: u64::from_le_bytes(*number), cookie })
            }
            KIND_ANSWER if rest.is_empty() => Content::Answer,
            _ => return None,
        };
        Some(Self { cookie, content })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_come_back(
            cookie: Cookie, session: SessionId, number: u64, message: u32, index: u8, count: u8,
            bytes in prop::collection::vec(any::<u8>(), 0..100)
        ) {
            for content in [
                Content::Fragment(Fragment { message, index, count, bytes: &bytes }),
                Content::Challenge(Challenge { session, number, cookie }),
                Content::Answer,
            ] {
                let frame = Frame { cookie, content };
                let encoded = frame.encode();
                prop_assert_eq!(Frame::decode(&encoded), Some(frame));
                if let Content::Fragment(_) = content {
                    prop_assert_eq!(encoded.len(), FRAGMENT_OVERHEAD + bytes.len());
                }
            }
        }

        /// Whatever decodes encodes to the same bytes: nothing is left over or read twice.
        #[test]
        fn any_bytes_decode_or_do_not(bytes in prop::collection::vec(any::<u8>(), 0..100), kind in 0u8..4) {
            for bytes in [bytes.clone(), [&[kind][..], &bytes[..]].concat()] {
                if let Some(frame) = Frame::decode(&bytes) {
                    prop_assert_eq!(frame.encode(), bytes);
                }
            }
        }
    }
}
