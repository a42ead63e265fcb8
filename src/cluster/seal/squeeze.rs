//! Compresses messages before encryption. Most of a message is a list of all nodes with their counters, which repeats a lot.

use std::io;

use zstd::bulk::{Compressor, Decompressor};

/// The first byte of a message.
const PLAIN: u8 = 0;
const SQUEEZED: u8 = 1;
/// Shorter messages are not compressed: they fit one datagram anyway.
const MIN_BYTES: usize = 128;
/// The largest decompressed message. Chitchat's have at most 64 KiB, except for the node lists of very large clusters.
const MAX_BYTES: usize = 256 << 10;
/// The fastest level; higher ones gain too little for their time.
const LEVEL: i32 = 1;

/// A compressor and a decompressor that reuse their tables between messages.
pub(super) struct Squeezer {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    expanded: Box<[u8]>,
}

impl Squeezer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(LEVEL)?,
            decompressor: Decompressor::new()?,
            expanded: vec![0; MAX_BYTES].into(),
        })
    }

    pub(super) fn squeeze(&mut self, message: &[u8]) -> Vec<u8> {
        let squeezed = (message.len() >= MIN_BYTES).then(|| self.compressor.compress(message).ok()).flatten();
        match squeezed.filter(|squeezed| squeezed.len() < message.len()) {
            Some(squeezed) => [&[SQUEEZED], squeezed.as_slice()].concat(),
            None => [&[PLAIN], message].concat(),
        }
    }

    /// Returns `None` if the bytes were not made by `squeeze`.
    pub(super) fn expand<'a>(&'a mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        match bytes.split_first()? {
            (&PLAIN, message) => Some(message),
            (&SQUEEZED, squeezed) => {
                let len = self.decompressor.decompress_to_buffer(squeezed, &mut self.expanded[..]).ok()?;
                Some(&self.expanded[..len])
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn squeezer() -> Squeezer {
        Squeezer::new().expect("memory")
    }

    #[test]
    fn what_repeats_itself_gets_shorter_and_comes_back() {
        let mut squeezer = squeezer();
        let message: Vec<u8> =
            (0..100u32).flat_map(|node| [&b"node-"[..], &node.to_le_bytes(), &[0; 24]].concat()).collect();
        let squeezed = squeezer.squeeze(&message);
        assert!(squeezed.len() < message.len() / 2, "{} of {}", squeezed.len(), message.len());
        assert_eq!(squeezer.expand(&squeezed), Some(message.as_slice()));
    }

    #[test]
    fn a_message_that_would_grow_beyond_its_bound_is_refused() {
        let mut squeezer = squeezer();
        let fits = squeezer.squeeze(&vec![0; MAX_BYTES]);
        assert_eq!(squeezer.expand(&fits).map(<[u8]>::len), Some(MAX_BYTES));
        let bomb = squeezer.squeeze(&vec![0; MAX_BYTES + 1]);
        assert!(bomb.len() < 1000);
        assert_eq!(squeezer.expand(&bomb), None);
    }

    proptest! {
        #[test]
        fn any_message_comes_back(message in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut squeezer = squeezer();
            let squeezed = squeezer.squeeze(&message);
            prop_assert!(squeezed.len() <= message.len() + 1);
            prop_assert_eq!(squeezer.expand(&squeezed), Some(message.as_slice()));
        }

        #[test]
        fn any_bytes_are_expanded_or_refused(kind in 0u8..4, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut squeezer = squeezer();
            let _ = squeezer.expand(&[&[kind], bytes.as_slice()].concat());
            prop_assert_eq!(squeezer.expand(&[]), None);
        }
    }
}
