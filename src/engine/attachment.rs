//! Gives blocks to sequences: shared ones from the prefix cache and from an earlier choice of the same request, and new ones
//! for the rest. Part of the scheduler, and pure as it is.
//!
//! A sequence whose next prefix block is claimed waits for the claimant. A claimant is always running and holds no claim
//! while it waits itself, so there are no cycles.

use super::block_manager::BlockId;
use super::prefix_cache::Lookup;
use super::scheduler::Scheduler;
use super::sequence::{Phase, SequenceId};

/// Steps without progress after which a sequence no longer waits for a claimed prefix but computes it itself.
const MAX_WAITED_STEPS: u32 = 64;

/// The share of the pool (at least one block) that must stay free for running sequences to grow when another is admitted.
const WATERMARK_DIVISOR: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    /// It owns blocks for all its tokens.
    Complete,
    /// It waits for a prefix that is being computed.
    Waiting,
    /// Too few blocks are free; it holds none.
    NoRoom,
}

enum Sibling {
    Computing,
    Ready(SequenceId),
    Gone,
}

impl Scheduler {
    /// Gives the sequence as many blocks as possible, and sets its phase accordingly.
    pub(super) fn attach(&mut self, id: SequenceId, others_run: bool) -> Attachment {
        let watermark = if others_run { self.blocks.num_blocks().div_ceil(WATERMARK_DIVISOR) } else { 0 };
        let attachment = match self.sibling_of(id) {
            Sibling::Computing => Attachment::Waiting,
            Sibling::Ready(sibling) => self.fork(id, sibling, watermark),
            Sibling::Gone if self.follow_prefix(id) => Attachment::Waiting,
            Sibling::Gone => self.settle(id, watermark),
        };
        let phase = &mut self.sequences[id.slot].phase;
        match (attachment, *phase) {
            (Attachment::Complete, _) => *phase = Phase::Active,
            (Attachment::Waiting, Phase::Waiting) => *phase = Phase::Attaching { waited_steps: 0 },
            (Attachment::Waiting, _) => {}
            (Attachment::NoRoom, _) => self.detach(id),
        }
        attachment
    }

    /// Gives back all blocks and claims, the last ones first.
    pub(super) fn detach(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.slot];
        while sequence.chain.len() > sequence.published {
            let entry = sequence.chain.pop().expect("not empty");
            self.blocks.abandon(entry, sequence.claimant);
        }
        while let Some(block) = sequence.blocks.pop() {
            self.blocks.release(block);
        }
        sequence.chain.clear();
        sequence.published = 0;
        sequence.computed = 0;
        sequence.chain_is_open = sequence.uses_prefix_cache;
    }

    /// Offers the full blocks of the first `end` positions to the prefix cache. All their tokens must be known.
    pub(super) fn publish(&mut self, id: SequenceId, end: usize) {
        let sequence = &mut self.sequences[id.slot];
        while sequence.chain_is_open && (sequence.published + 1) * self.block_size <= end {
            let index = sequence.published;
            let parent = sequence.parent_of(index);
            let tokens = sequence.block_tokens(index, self.block_size);
            match self.blocks.publish(parent, tokens, sequence.blocks[index], sequence.claimant) {
                Some((entry, block)) => {
                    sequence.blocks[index] = block;
                    match sequence.chain.get(index) {
                        Some(claimed) => assert_eq!(*claimed, entry, "a claim is published by its claimant"),
                        None => sequence.chain.push(entry),
                    }
                    sequence.published += 1;
                }
                None => sequence.chain_is_open = false,
            }
        }
    }

    fn sibling_of(&self, id: SequenceId) -> Sibling {
        let sequence = &self.sequences[id.slot];
        let Some(sibling_id) = sequence.sibling.filter(|_| sequence.blocks.is_empty()) else {
            return Sibling::Gone;
        };
        match self.get(sibling_id) {
            None => Sibling::Gone,
            Some(sibling) if sibling.phase == Phase::Waiting => Sibling::Gone,
            Some(sibling) if sibling.is_active() && sibling.has_settled_prompt(self.block_size) => {
                Sibling::Ready(sibling_id)
            }
            Some(_) => Sibling::Computing,
        }
    }

    /// Shares the sibling's blocks of the prompt, and copies the one that this sequence will write into. A fresh choice
    /// computes the prompt's last token again, for its logits.
    fn fork(&mut self, id: SequenceId, sibling_id: SequenceId, watermark: u32) -> Attachment {
        let (sequence, sibling) =
            self.sequences.get2_mut(id.slot, sibling_id.slot).expect("a sequence and its sibling are two");
        let computed = sequence.prompt_len.min(sequence.tokens.len() - 1);
        let num_shared = computed / self.block_size;
        let num_fresh = sequence.tokens.len().div_ceil(self.block_size) - num_shared;
        if self.blocks.num_free() < num_fresh as u32 + watermark {
            return Attachment::NoRoom;
        }
        sequence.blocks.extend_from_slice(&sibling.blocks[..num_shared]);
        sequence.blocks.iter().for_each(|&block| self.blocks.share(block));
        sequence.published = num_shared.min(sibling.published);
        sequence.chain.extend_from_slice(&sibling.chain[..sequence.published]);
        sequence.chain_is_open &= sequence.published == num_shared;
        sequence.computed = computed;
        let copied = (computed % self.block_size > 0).then(|| sibling.blocks[num_shared]);
        self.allocate_rest(id);
        if let Some(from) = copied {
            self.plan.copies.push((from, self.sequences[id.slot].blocks[num_shared]));
        }
        self.claim_rest(id);
        Attachment::Complete
    }

    /// Shares the ready blocks of the prefix. Returns true if the next one is claimed and worth waiting for.
    fn follow_prefix(&mut self, id: SequenceId) -> bool {
        let sequence = &mut self.sequences[id.slot];
        let held = sequence.blocks.len();
        while sequence.chain_is_open && (sequence.blocks.len() + 1) * self.block_size <= sequence.tokens.len() {
            let index = sequence.blocks.len();
            let tokens = sequence.block_tokens(index, self.block_size);
            match self.blocks.find(sequence.parent_of(sequence.chain.len()), tokens) {
                Lookup::Ready(entry, block) => {
                    self.blocks.share(block);
                    sequence.blocks.push(block);
                    sequence.chain.push(entry);
                    sequence.published += 1;
                }
                Lookup::Claimed(..) => return sequence.phase.wait(sequence.blocks.len() > held),
                Lookup::Absent => return false,
            }
        }
        false
    }

    /// Allocates blocks for the tokens after the shared prefix. If the prefix covers everything, the last token is computed
    /// again for its logits, into a copy of the last block.
    fn settle(&mut self, id: SequenceId, watermark: u32) -> Attachment {
        let sequence = &mut self.sequences[id.slot];
        let num_tokens = sequence.tokens.len();
        let total = num_tokens.div_ceil(self.block_size);
        let is_whole = sequence.blocks.len() * self.block_size == num_tokens;
        let free = self.blocks.num_free();
        let copied = match is_whole.then(|| drop_last(sequence)) {
            // If no block is free for the copy, the whole last block is computed again.
            Some(last) if free < 1 + watermark => {
                self.blocks.release(last);
                None
            }
            other => other,
        };
        let num_fresh = (total - sequence.blocks.len()) as u32;
        if self.blocks.num_free() < num_fresh + watermark {
            return Attachment::NoRoom;
        }
        sequence.computed = if copied.is_some() { num_tokens - 1 } else { sequence.blocks.len() * self.block_size };
        self.allocate_rest(id);
        if let Some(from) = copied {
            let to = *self.sequences[id.slot].blocks.last().expect("just allocated");
            self.plan.copies.push((from, to));
            self.blocks.release(from);
        }
        self.claim_rest(id);
        Attachment::Complete
    }

    fn allocate_rest(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.slot];
        while sequence.blocks.len() * self.block_size < sequence.tokens.len() {
            sequence.blocks.push(self.blocks.allocate().expect("enough blocks were free"));
        }
    }

    /// Claims the full blocks that this sequence is about to compute, so that others wait for them.
    fn claim_rest(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.slot];
        while sequence.chain_is_open && (sequence.chain.len() + 1) * self.block_size <= sequence.tokens.len() {
            let tokens = sequence.block_tokens(sequence.chain.len(), self.block_size);
            match self.blocks.claim(sequence.parent_of(sequence.chain.len()), tokens, sequence.claimant) {
                Some(entry) => sequence.chain.push(entry),
                None => break,
            }
        }
    }
}

/// Removes the last shared block from the table and passes its reference to the caller.
fn drop_last(sequence: &mut super::sequence::Sequence) -> BlockId {
    sequence.chain.pop();
    sequence.published -= 1;
    sequence.blocks.pop().expect("a shared prefix is not empty")
}

impl Phase {
    /// Counts a step of waiting. Returns false if there was no progress for too long.
    fn wait(&mut self, progressed: bool) -> bool {
        match self {
            Phase::Attaching { waited_steps } => {
                *waited_steps = if progressed { 0 } else { *waited_steps + 1 };
                *waited_steps < MAX_WAITED_STEPS
            }
            Phase::Waiting | Phase::Active => true,
        }
    }
}
