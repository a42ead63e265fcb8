//! The journal of a stream: what another node needs to continue it, namely the request and the tokens so far.

use std::sync::Arc;

use crate::types::{Envelope, Fingerprint, FinishReason, JournalKey, NodeId, StreamName, TokenId};

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
    /// It has a name.
    pub envelope: Arc<Envelope>,
    /// Of the tokens so far.
    pub fingerprint: Fingerprint,
    /// Increases by one each time a node takes the stream over.
    pub epoch: u64,
    /// The node that took the stream over last.
    pub entry: NodeId,
    /// One entry per choice.
    pub choices: Vec<ChoiceProgress>,
}

impl JournalRecord {
    pub fn name(&self) -> StreamName {
        self.envelope.name.expect("only streams with a name have journals")
    }

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
