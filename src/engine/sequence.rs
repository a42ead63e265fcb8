//! A sequence: one choice of one request as the scheduler sees it, with its tokens, how many are computed, and its blocks.
//! Knows no sampling, text or channels.

use std::cmp::Ordering;

use super::block_manager::BlockId;
use super::prefix_cache::{Claimant, EntryId, Parent};
use crate::types::{CacheSalt, TokenId};

/// Identifies a sequence. Slots are reused, claimants are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    pub(super) slot: usize,
    pub(super) claimant: Claimant,
}

impl SequenceId {
    /// A dense index, for tables beside the scheduler's own.
    pub fn index(self) -> usize {
        self.slot
    }
}

/// Stands in a sequence for a token that is sampled by a step in flight. No vocabulary has it.
pub const PLACEHOLDER: TokenId = TokenId::MAX;

/// The order of service: lower priority, then earlier arrival, then lower choice. Unique and constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rank {
    pub priority: i32,
    /// Numbers the requests in order of arrival.
    pub arrival: u64,
    pub choice: u32,
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |rank: &Self| (rank.priority, rank.arrival, rank.choice);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The properties of a new sequence.
#[derive(Clone, Debug)]
pub struct NewSequence {
    pub rank: Rank,
    /// The prompt and the tokens that were already emitted.
    pub tokens: Vec<TokenId>,
    pub prompt_len: usize,
    /// Reads and fills the prefix cache.
    pub uses_prefix_cache: bool,
    /// Of the prefix cache only what has the same salt.
    pub cache_salt: Option<CacheSalt>,
    /// So many of the first tokens are scored: the logits after each of them are wanted, once. Fewer than all tokens if a
    /// token is to be sampled after them; with all scored, none is.
    pub num_scored: usize,
    /// An earlier choice of the same request, whose blocks of the prompt may be shared.
    pub sibling: Option<SequenceId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// In the queue; holds no block.
    Waiting,
    /// Has a slot, and waits for a prefix that another sequence is computing. Holds what is ready of it.
    Attaching { waited_steps: u32 },
    /// Owns blocks for all its tokens.
    Active,
}

#[derive(Debug)]
pub struct Sequence {
    pub(super) rank: Rank,
    pub(super) claimant: Claimant,
    pub(super) tokens: Vec<TokenId>,
    /// How many of the last tokens are placeholders.
    pub(super) num_pending: usize,
    pub(super) prompt_len: usize,
    pub(super) sibling: Option<SequenceId>,
    pub(super) phase: Phase,
    /// Block of each stretch of `block_size` positions.
    pub(super) blocks: Vec<BlockId>,
    /// Positions whose keys and values are in `blocks`, or will be when the steps in flight have run.
    pub(super) computed: usize,
    /// Cache entries of the leading blocks; the first `published` are ready, the others claimed by this sequence.
    pub(super) chain: Vec<EntryId>,
    pub(super) published: usize,
    /// Whether blocks after the chain may still join it.
    pub(super) chain_is_open: bool,
    pub(super) uses_prefix_cache: bool,
    cache_salt: Option<CacheSalt>,
    /// See [`NewSequence::num_scored`], and how many of these are scored already, or will be by the steps in flight.
    pub(super) num_scored: usize,
    pub(super) scored: usize,
    /// Was scheduled at least once, before a preemption perhaps.
    pub(super) has_started: bool,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, claimant: Claimant) -> Self {
        assert!(new.prompt_len > 0 && new.prompt_len <= new.tokens.len(), "a sequence starts with its prompt");
        assert!(new.num_scored == 0 || !new.uses_prefix_cache, "the prefix cache has no logits");
        Self {
            rank: new.rank,
            claimant,
            tokens: new.tokens,
            num_pending: 0,
            prompt_len: new.prompt_len,
            sibling: None,
            phase: Phase::Waiting,
            blocks: Vec::new(),
            computed: 0,
            chain: Vec::new(),
            published: 0,
            chain_is_open: new.uses_prefix_cache,
            uses_prefix_cache: new.uses_prefix_cache,
            cache_salt: new.cache_salt,
            num_scored: new.num_scored,
            scored: 0,
            has_started: false,
        }
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Prompt and output so far, placeholders included.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    pub fn block_table(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens after the prompt, emitted elsewhere or generated here.
    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens sampled by steps in flight, which follow the known ones.
    pub fn num_pending(&self) -> usize {
        self.num_pending
    }

    /// Tokens that are still to be computed before the next one can be sampled. None only while the last token of all is
    /// being sampled.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What it adds to the work in the queue. Later choices share the prompt of the first.
    pub(super) fn queued_tokens(&self) -> u64 {
        match self.sibling {
            Some(_) => self.num_generated() as u64 + 1,
            None => self.tokens.len() as u64,
        }
    }

    /// Whether later choices may share the prompt: it is computed, and its blocks are where the prefix cache wants them.
    pub(super) fn has_settled_prompt(&self, block_size: usize) -> bool {
        let is_published = self.published >= self.prompt_len / block_size || !self.chain_is_open;
        self.computed >= self.prompt_len && is_published
    }

    pub(super) fn is_active(&self) -> bool {
        self.phase == Phase::Active
    }

    /// Positions from `computed` on that are computed before the scored ones end.
    pub(super) fn left_to_score(&self) -> usize {
        self.num_scored.saturating_sub(self.computed)
    }

    /// What the cache entry of the block of this index stands below.
    pub(super) fn parent_of(&self, index: usize) -> Parent {
        index.checked_sub(1).map_or(Parent::Root(self.cache_salt), |above| Parent::Entry(self.chain[above]))
    }

    /// The tokens of one full block.
    pub(super) fn block_tokens(&self, index: usize, block_size: usize) -> &[TokenId] {
        &self.tokens[index * block_size..(index + 1) * block_size]
    }
}
