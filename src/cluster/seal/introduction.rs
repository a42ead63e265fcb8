//! What a node says of itself to whoever has the key, so that two that cannot gossip learn why. Pure.

/// Bytes of each name.
const MAX_NAME_BYTES: usize = 64;

/// Who sends it, and in which cluster it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Introduction {
    pub cluster_id: String,
    pub node_id: String,
}

impl Introduction {
    /// `is_reply`: it answers another one, and is not to be answered.
    pub(super) fn encode(&self, is_reply: bool) -> Vec<u8> {
        let mut bytes = vec![u8::from(is_reply)];
        for name in [&self.cluster_id, &self.node_id] {
            let name = &name[..name.floor_char_boundary(MAX_NAME_BYTES)];
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }

    /// With whether it is a reply. What follows the names is for later versions.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, bool)> {
        fn name(bytes: &[u8]) -> Option<(String, &[u8])> {
            let (&len, rest) = bytes.split_first()?;
            let (name, rest) = rest.split_at_checked(len.into()).filter(|(name, _)| name.len() <= MAX_NAME_BYTES)?;
            Some((std::str::from_utf8(name).ok()?.to_owned(), rest))
        }
        let (&is_reply, rest) = bytes.split_first()?;
        let (cluster_id, rest) = name(rest)?;
        let (node_id, _) = name(rest)?;
        Some((Self { cluster_id, node_id }, is_reply != 0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn introductions_come_back(cluster_id in "\\PC{0,16}", node_id in "\\PC{0,16}", is_reply: bool) {
            let introduction = Introduction { cluster_id, node_id };
            prop_assert_eq!(Introduction::decode(&introduction.encode(is_reply)), Some((introduction, is_reply)));
        }

        #[test]
        fn any_bytes_decode_or_do_not(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some((introduction, _)) = Introduction::decode(&bytes) {
                prop_assert!(introduction.cluster_id.len() <= MAX_NAME_BYTES);
            }
        }
    }
}
