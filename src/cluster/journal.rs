//! The journal of a stream: what another node needs to continue it, namely the request and the tokens so far.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::types::{Fingerprint, FinishReason, NodeId, RequestId, SamplingParams, TokenId};

/// Identifies a stream in the whole cluster: a digest of tenant, key and prompt index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JournalKey([u8; 16]);

impl JournalKey {
    /// `part` is the index of the prompt in its request.
    pub fn new(tenant: &str, key: &str, part: usize) -> Self {
        let mut digest = Sha256::new();
        for piece in [tenant.as_bytes(), key.as_bytes(), &(part as u64).to_le_bytes()] {
            digest.update((piece.len() as u64).to_le_bytes());
            digest.update(piece);
        }
        let digest = digest.finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for JournalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The part of a journal that does not change while the stream runs.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalHead {
    pub key: JournalKey,
    /// Digest of the request body. The same key with another body is the client's mistake.
    pub body: [u8; 16],
    /// The id that the client sees.
    pub id: RequestId,
    /// The creation time that the client sees, in seconds since the epoch.
    pub created: u64,
    pub model: String,
    pub fingerprint: Fingerprint,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
}

impl JournalHead {
    /// If two streams have the same key and different bodies, the one with the lower value keeps the key, on every node. Clock
    /// differences may make the younger one win, but all nodes agree.
    pub fn seniority(&self) -> (u64, [u8; 16]) {
        (self.created, self.body)
    }
}

/// The progress of one choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChoiceProgress {
    pub tokens: Vec<TokenId>,
    pub finished: Option<FinishReason>,
}

impl ChoiceProgress {
    /// Without an end that applies to one attempt only, such as a deadline: another attempt may have more time.
    pub fn lasting(&self) -> Self {
        let finished = self.finished.clone().filter(FinishReason::is_of_the_generation);
        Self { tokens: self.tokens.clone(), finished }
    }
}

/// A stream as known to a node that holds its journal.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalRecord {
    pub head: Arc<JournalHead>,
    /// Increases by one each time a node takes the stream over.
    pub epoch: u64,
    /// The node that took the stream over last.
    pub entry: NodeId,
    /// One entry per choice.
    pub choices: Vec<ChoiceProgress>,
}

impl JournalRecord {
    pub fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished.is_some())
    }
}

/// A change to a journal.
#[derive(Clone, Debug, PartialEq)]
pub enum JournalEntry {
    /// The whole stream so far. Replaces the holder's record, unless that has a later epoch.
    Put(JournalRecord),
    /// Tokens from position `start` on.
    Append {
        key: JournalKey,
        epoch: u64,
        choice: u32,
        start: u32,
        tokens: Vec<TokenId>,
        finished: Option<FinishReason>,
    },
    /// The stream has wrong tokens, and must not be continued from this journal.
    Drop { key: JournalKey, epoch: u64 },
    /// From a node of a later version, in a way that this version does not understand. It is answered with this.
    Unreadable(JournalRefusal),
}

/// Why a holder rejects an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalRefusal {
    /// Another node has taken the stream over.
    Fenced { key: JournalKey, epoch: u64 },
    /// The holder does not have the stream, or lacks tokens before `start`. Send the whole record.
    Unknown { key: JournalKey },
    /// The holder has no memory left for it.
    Full { key: JournalKey },
}

impl JournalRefusal {
    pub fn key(&self) -> JournalKey {
        match self {
            JournalRefusal::Fenced { key, .. } | JournalRefusal::Unknown { key } | JournalRefusal::Full { key } => *key,
        }
    }
}
