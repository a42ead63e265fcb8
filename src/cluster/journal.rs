//! What is needed to continue a stream elsewhere: the request, and the tokens that it has got so far.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::types::{Fingerprint, FinishReason, NodeId, RequestId, SamplingParams, TokenId};

/// Names a stream in the whole cluster: a digest of tenant, key and prompt index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JournalKey([u8; 16]);

impl JournalKey {
    /// `part` numbers the prompts of one request.
    pub fn new(tenant: &str, key: &str, part: usize) -> Self {
        let mut digest = Sha256::new();
        for piece in [tenant.as_bytes(), key.as_bytes(), &(part as u64).to_le_bytes()] {
            digest.update((piece.len() as u64).to_le_bytes());
            digest.update(piece);
        }
        let digest = digest.finalize();
        Self(std::array::from_fn(|index| digest[index]))
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

/// What does not change while a stream runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalHead {
    pub key: JournalKey,
    /// Digest of the client's body: the same key with another body is a mistake of the client's.
    pub body: [u8; 16],
    /// As the client sees it.
    pub id: RequestId,
    /// Seconds since the epoch, as the client sees it.
    pub created: u64,
    pub model: String,
    pub fingerprint: Fingerprint,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
}

impl JournalHead {
    /// Of two streams with one key and different bodies, the lesser one keeps the key, on every node. Clocks that differ make
    /// another one the older, but the same one everywhere.
    pub fn seniority(&self) -> (u64, [u8; 16]) {
        (self.created, self.body)
    }
}

/// How far one choice has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceProgress {
    pub tokens: Vec<TokenId>,
    pub finished: Option<FinishReason>,
}

impl ChoiceProgress {
    /// Without an end that belongs to one attempt only: another one may have more time.
    pub fn lasting(&self) -> Self {
        let finished = self.finished.clone().filter(FinishReason::is_of_the_generation);
        Self { tokens: self.tokens.clone(), finished }
    }
}

/// A stream as a holder knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalRecord {
    pub head: Arc<JournalHead>,
    /// Grows by one with every node that takes the stream over.
    pub epoch: u64,
    /// The node that took it over last.
    pub entry: NodeId,
    /// One per choice.
    pub choices: Vec<ChoiceProgress>,
}

impl JournalRecord {
    pub fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished.is_some())
    }
}

/// One change to a journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum JournalEntry {
    /// The whole stream so far; replaces what the holder has, unless that has a later epoch.
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
    /// The stream has wrong tokens: nobody is to go on with them.
    Drop { key: JournalKey, epoch: u64 },
}

/// Why a holder did not take an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JournalRefusal {
    /// Another node has taken the stream over since.
    Fenced { key: JournalKey, epoch: u64 },
    /// The holder does not have the stream (any more), or misses tokens before `start`: put it again.
    Unknown { key: JournalKey },
    /// The holder's bound on memory does not let it in.
    Full { key: JournalKey },
}
