//! Versions of the protocol between nodes.
//!
//! Every node publishes the oldest and the newest version that it speaks, and two nodes use the newest that both speak. New
//! optional fields and variants need no new version (`wire::schema`); a new version is for changes that an older node would not
//! survive, and is spoken beside the older one for at least one release. So nodes of neighbouring releases always work together.
//!
//! Nodes learn the versions through gossip, so the version cannot cover what gossip itself rests on: the layout of datagrams
//! (`seal::keys`), chitchat's own format, the keys of values, and the writing of bytes as text. A change there needs a release that
//! reads both before one that writes the new. The same holds for the set of tokenizer files, which decides the tokenizer's digest.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Version 1 was never released; its nodes are not understood.
pub const PROTOCOL: ProtocolRange = ProtocolRange { oldest: 2, newest: 2 };
/// What nodes of version 1 publish in a format of their own.
pub const VERSION_1: ProtocolRange = ProtocolRange { oldest: 1, newest: 1 };

/// Versions from the oldest to the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolRange {
    pub oldest: u16,
    pub newest: u16,
}

impl ProtocolRange {
    pub const fn contains(self, version: u16) -> bool {
        self.oldest <= version && version <= self.newest
    }

    /// The newest version that both speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (self.contains(newest) && other.contains(newest)).then_some(newest)
    }
}

impl fmt::Display for ProtocolRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "version {}", self.newest),
            false => write!(f, "versions {} to {}", self.oldest, self.newest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(oldest: u16, newest: u16) -> ProtocolRange {
        ProtocolRange { oldest, newest }
    }

    #[test]
    fn two_nodes_speak_the_newest_version_that_both_know() {
        assert_eq!(range(2, 2).common(range(2, 2)), Some(2));
        assert_eq!(range(2, 3).common(range(2, 2)), Some(2));
        assert_eq!(range(2, 3).common(range(3, 4)), Some(3));
        assert_eq!(range(2, 5).common(range(3, 4)), Some(4));
        assert_eq!(range(2, 2).common(range(3, 4)), None);
        assert_eq!(range(5, 3).common(range(2, 9)), None, "nonsense");
        assert_eq!((range(2, 2).to_string(), range(2, 3).to_string()), ("version 2".into(), "versions 2 to 3".into()));
    }
}
