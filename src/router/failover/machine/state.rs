//! The states of a stream, and the moves between them. When to move is decided by the machine.

use std::mem::take;
use std::time::Instant;

use super::messages::{Relief, Slot};
use crate::router::source::Replica;
use crate::types::Failure;

#[derive(Debug, Default)]
pub enum StreamState {
    /// `since`: when this was first seen.
    Searching {
        since: Option<Instant>,
    },
    /// `since` is that of the search.
    Asking {
        asked: Asked,
        since: Option<Instant>,
    },
    Running {
        primary: Source,
    },
    Relieved {
        primary: Source,
        why: Relief,
        second: Second,
    },
    /// Waits for the holders of the journal.
    Spoiled {
        failure: Failure,
    },
    #[default]
    Ended,
}

/// A replica that computes the stream.
#[derive(Debug)]
pub struct Source {
    pub replica: Replica,
    /// It has asked to be replaced.
    pub is_leaving: bool,
}

/// A replica that was asked to compute the stream.
#[derive(Debug)]
pub struct Asked {
    pub replica: Replica,
    pub at: Instant,
}

#[derive(Debug)]
pub enum Second {
    Wanted,
    Asked(Asked),
    Computes(Source),
}

impl Source {
    pub fn new(replica: Replica) -> Self {
        Self { replica, is_leaving: false }
    }
}

impl Second {
    pub fn slot(&self) -> Option<Slot> {
        match self {
            Second::Wanted => None,
            Second::Asked(_) => Some(Slot::Asked),
            Second::Computes(_) => Some(Slot::Successor),
        }
    }
}

impl StreamState {
    pub fn primary(&self) -> Option<&Source> {
        match self {
            StreamState::Running { primary } | StreamState::Relieved { primary, .. } => Some(primary),
            StreamState::Searching { .. }
            | StreamState::Asking { .. }
            | StreamState::Spoiled { .. }
            | StreamState::Ended => None,
        }
    }

    pub fn relief(&self) -> Option<Relief> {
        match self {
            StreamState::Relieved { why, .. } => Some(*why),
            _ => None,
        }
    }

    /// The replica in the slot.
    pub fn replica(&self, slot: Slot) -> Option<&Replica> {
        match (slot, self) {
            (Slot::Primary, _) => self.primary().map(|primary| &primary.replica),
            (
                Slot::Asked,
                StreamState::Asking { asked, .. } | StreamState::Relieved { second: Second::Asked(asked), .. },
            ) => Some(&asked.replica),
            (Slot::Successor, StreamState::Relieved { second: Second::Computes(source), .. }) => Some(&source.replica),
            (Slot::Asked | Slot::Successor, _) => None,
        }
    }

    pub fn ask(&mut self, asked: Asked) {
        match self {
            StreamState::Searching { since } => *self = StreamState::Asking { asked, since: *since },
            StreamState::Relieved { second: second @ Second::Wanted, .. } => *second = Second::Asked(asked),
            _ => panic!("nobody was to be asked: {self:?}"),
        }
    }

    /// Returns who was asked, if anybody was.
    pub fn end_asking(&mut self) -> Option<Asked> {
        let (next, asked) = match take(self) {
            StreamState::Asking { asked, since } => (StreamState::Searching { since }, Some(asked)),
            StreamState::Relieved { primary, why, second: Second::Asked(asked) } => {
                (StreamState::Relieved { primary, why, second: Second::Wanted }, Some(asked))
            }
            state => (state, None),
        };
        *self = next;
        asked
    }

    pub fn accept(&mut self, replica: Replica) {
        let source = Source::new(replica);
        match self {
            StreamState::Searching { .. } | StreamState::Asking { .. } => {
                *self = StreamState::Running { primary: source }
            }
            StreamState::Relieved { second: second @ (Second::Wanted | Second::Asked(_)), .. } => {
                *second = Second::Computes(source);
            }
            _ => panic!("nobody was asked: {self:?}"),
        }
    }

    /// Sets why a second is wanted. One that was asked before serves any purpose.
    pub fn want_second(&mut self, why: Relief) {
        *self = match take(self) {
            StreamState::Running { primary } => StreamState::Relieved { primary, why, second: Second::Wanted },
            StreamState::Relieved { primary, second, .. } => StreamState::Relieved { primary, why, second },
            state => panic!("there is no primary: {state:?}"),
        }
    }

    /// The primary needs no second any more. Returns the slot of the one that there was.
    pub fn dismiss_second(&mut self) -> Option<Slot> {
        let StreamState::Relieved { primary, second, .. } = take(self) else { panic!("no second was wanted") };
        *self = StreamState::Running { primary };
        second.slot()
    }

    /// Returns the successor's replica, if there is a successor.
    pub fn end_successor(&mut self) -> Option<Replica> {
        let (next, successor) = match take(self) {
            StreamState::Relieved { primary, why, second: Second::Computes(source) } => {
                (StreamState::Relieved { primary, why, second: Second::Wanted }, Some(source.replica))
            }
            state => (state, None),
        };
        *self = next;
        successor
    }

    /// Ends the primary. Returns it with the second, if there was a primary; the next state is the caller's to set.
    pub fn end_primary(&mut self) -> Option<(Source, Second)> {
        match take(self) {
            StreamState::Running { primary } => Some((primary, Second::Wanted)),
            StreamState::Relieved { primary, second, .. } => Some((primary, second)),
            state => {
                *self = state;
                None
            }
        }
    }
}
