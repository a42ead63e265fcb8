//! Byte-pair merging, shared by byte-level BPE and SentencePiece: of all adjacent pairs that can be joined, the one with the
//! best priority is joined first (of equals, the leftmost), until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A piece of the text during merging.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// Length in bytes. Zero once the symbol has been merged into its left neighbour.
    pub length: u32,
    pub start: u32,
    /// The token, or another identifier that the merge rule uses.
    pub token: u32,
    previous: u32,
    next: u32,
}

/// The result of joining a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Joined {
    /// The lowest value is joined first.
    pub priority: u32,
    pub token: u32,
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    left: u32,
    right: u32,
    /// Length of both symbols. A candidate whose length no longer matches is outdated, since symbols only grow.
    length: u32,
    token: u32,
}

/// Buffers that are reused between calls.
#[derive(Debug, Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    candidates: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    pub fn clear(&mut self) {
        self.symbols.clear();
        self.candidates.clear();
    }

    /// Appends a symbol that follows the last one in the text. Texts must be shorter than 4 GiB.
    pub fn push(&mut self, start: usize, length: usize, token: u32) {
        let index = self.symbols.len() as u32;
        if let Some(last) = self.symbols.last_mut() {
            last.next = index;
        }
        let previous = index.checked_sub(1).unwrap_or(NONE);
        self.symbols.push(Symbol { length: length as u32, start: start as u32, token, previous, next: NONE });
    }

    /// Merges until no pair can be joined, in O(n log n). `join` must depend only on the two symbols.
    pub fn merge(&mut self, join: impl Fn(&Symbol, &Symbol) -> Option<Joined>) -> impl Iterator<Item = &Symbol> {
        for left in 1..self.symbols.len() as u32 {
            self.consider(left - 1, left, &join);
        }
        while let Some(Reverse(candidate)) = self.candidates.pop() {
            if !self.is_current(&candidate) {
                continue;
            }
            let merged = self.apply(&candidate);
            if merged.previous != NONE {
                self.consider(merged.previous, candidate.left, &join);
            }
            if merged.next != NONE {
                self.consider(candidate.left, merged.next, &join);
            }
        }
        self.symbols.iter().filter(|symbol| symbol.length > 0)
    }

    fn consider(&mut self, left: u32, right: u32, join: &impl Fn(&Symbol, &Symbol) -> Option<Joined>) {
        let (first, second) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        if let Some(Joined { priority, token }) = join(first, second) {
            let length = first.length + second.length;
            self.candidates.push(Reverse(Candidate { priority, left, right, length, token }));
        }
    }

    fn is_current(&self, candidate: &Candidate) -> bool {
        let (left, right) = (&self.symbols[candidate.left as usize], &self.symbols[candidate.right as usize]);
        left.length > 0 && right.length > 0 && left.length + right.length == candidate.length
    }

    fn apply(&mut self, candidate: &Candidate) -> Symbol {
        let right = std::mem::replace(&mut self.symbols[candidate.right as usize].length, 0);
        let next = self.symbols[candidate.right as usize].next;
        let left = &mut self.symbols[candidate.left as usize];
        left.length += right;
        left.token = candidate.token;
        left.next = next;
        let merged = *left;
        if next != NONE {
            self.symbols[next as usize].previous = candidate.left;
        }
        merged
    }
}
