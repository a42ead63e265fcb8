//! Decides what each step computes (decodes first, then prompt chunks, within a token budget), which sequences wait, and which
//! are preempted when blocks run out. Pure: knows sequences and blocks, but no thread, clock or tensor.
//!
//! Ranks (priority, then arrival) order the queue, the prompt chunks, and (in reverse) the victims of preemption. A preempted
//! sequence gives up all blocks and is computed again from its tokens, mostly from the prefix cache. The cost of planning a
//! step grows with the running sequences, not with the queue.

use std::collections::BTreeMap;

use slab::Slab;

use super::attachment::Attachment;
use super::block_manager::{BlockId, BlockManager};
use super::prefix_cache::Claimant;
use super::sequence::{NewSequence, PLACEHOLDER, Phase, Rank, Sequence, SequenceId};
use crate::types::TokenId;

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences that have a slot at one time, the probe not counted.
    pub max_num_seqs: usize,
    /// Tokens in a batch, those of the probe included. More than `max_num_seqs`, so that every decode and the probe fit.
    pub max_num_batched_tokens: usize,
    /// Positions in a batch whose logits are wanted to score a prompt, at least one.
    pub max_scored_tokens: usize,
}

/// A stretch of one sequence to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    pub id: SequenceId,
    pub start: usize,
    pub len: usize,
    /// A token is sampled after the last one. A stretch that is scored wants none.
    pub wants_logits: bool,
    /// Of so many of the last tokens the logits are wanted, to score what follows each.
    pub num_scored: usize,
}

impl Scheduled {
    /// Rows of logits.
    pub fn num_rows(&self) -> usize {
        self.num_scored + usize::from(self.wants_logits)
    }
}

/// What one step does: the copies in their order, then the batch.
#[derive(Debug, Default)]
pub struct Plan {
    pub copies: Vec<(BlockId, BlockId)>,
    pub entries: Vec<Scheduled>,
    /// Sequences that are computed for the first time, and how many of their tokens were found computed.
    pub started: Vec<(SequenceId, usize)>,
    pub num_tokens: usize,
    pub num_scored: usize,
    pub num_preempted: usize,
    /// A sequence found no block, and none may be taken from others while a step is in flight: the next plan is to be made
    /// when none is.
    pub is_starved: bool,
}

impl Plan {
    fn clear(&mut self) {
        self.copies.clear();
        self.entries.clear();
        self.started.clear();
        self.num_tokens = 0;
        self.num_scored = 0;
        self.num_preempted = 0;
        self.is_starved = false;
    }
}

pub struct Scheduler {
    limits: Limits,
    /// At most `limits.max_num_batched_tokens`; less after the runner ran out of memory.
    token_budget: usize,
    pub(super) block_size: usize,
    pub(super) blocks: BlockManager,
    pub(super) sequences: Slab<Sequence>,
    waiting: BTreeMap<Rank, SequenceId>,
    waiting_tokens: u64,
    /// By rank, best first.
    running: Vec<SequenceId>,
    probe: Option<SequenceId>,
    next_claimant: u64,
    /// Whether the plan in the making will be launched behind a step that is not collected.
    is_pipelined: bool,
    pub(super) plan: Plan,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: BlockManager, block_size: usize) -> Self {
        assert!(limits.max_num_seqs > 0, "at least one sequence runs");
        assert!(limits.max_num_batched_tokens > limits.max_num_seqs, "every decode and the probe fit into a batch");
        assert!(limits.max_scored_tokens > 0, "a prompt that is scored goes on");
        Self {
            limits,
            token_budget: limits.max_num_batched_tokens,
            block_size,
            blocks,
            sequences: Slab::new(),
            waiting: BTreeMap::new(),
            waiting_tokens: 0,
            running: Vec::with_capacity(limits.max_num_seqs),
            probe: None,
            next_claimant: 0,
            is_pipelined: false,
            plan: Plan::default(),
        }
    }

    /// Puts a sequence into the queue. The caller has checked that it can ever fit.
    pub fn add(&mut self, new: NewSequence) -> SequenceId {
        let sibling = new.sibling;
        let id = self.insert(new);
        self.sequences[id.slot].sibling = sibling;
        self.enqueue(id);
        id
    }

    /// Starts the synthetic inference in its own slot and blocks. `None` while one is there already.
    pub fn add_probe(&mut self, new: NewSequence) -> Option<SequenceId> {
        if self.probe.is_some() {
            return None;
        }
        let id = self.insert(NewSequence { uses_prefix_cache: false, ..new });
        let sequence = &mut self.sequences[id.slot];
        sequence.phase = Phase::Active;
        for _ in 0..sequence.tokens.len().div_ceil(self.block_size) {
            sequence.blocks.push(self.blocks.allocate_reserved().expect("the probe fits into the reserve"));
        }
        self.probe = Some(id);
        Some(id)
    }

    fn insert(&mut self, new: NewSequence) -> SequenceId {
        self.next_claimant += 1;
        let claimant = Claimant(self.next_claimant);
        SequenceId { slot: self.sequences.insert(Sequence::new(new, claimant)), claimant }
    }

    /// `None` once it was removed.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(id.slot).filter(|sequence| sequence.claimant == id.claimant)
    }

    pub fn sequence(&self, id: SequenceId) -> &Sequence {
        self.get(id).expect("the sequence was not removed")
    }

    /// Sequences in slots, the probe not counted, best rank first.
    pub fn running(&self) -> &[SequenceId] {
        &self.running
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Tokens of the waiting sequences that are still to be computed.
    pub fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Tokens in a batch from now on, at least one; never above the configured limit.
    pub fn set_token_budget(&mut self, tokens: usize) {
        self.token_budget = tokens.clamp(1, self.limits.max_num_batched_tokens);
    }

    pub fn token_budget(&self) -> usize {
        self.token_budget
    }

    /// Plans the next step, in the memory of an old plan. When it is launched, call [`Self::launched`] for each entry; when
    /// it could not be, do not, and the same tokens are planned again. `is_pipelined` tells of a step in flight: then
    /// nobody is preempted, and what samples in that step goes on behind its placeholder.
    pub fn schedule(&mut self, reuse: Plan, is_pipelined: bool) -> Plan {
        self.plan = reuse;
        self.plan.clear();
        self.is_pipelined = is_pipelined;
        while self.running.len() > self.num_slots() {
            self.preempt_last();
        }
        self.schedule_probe();
        self.attach_running();
        self.schedule_decodes();
        self.schedule_prefills();
        if self.plan.num_preempted == 0 && !self.plan.is_starved {
            self.admit();
        }
        let stuck = self.plan.entries.is_empty() && self.plan.num_preempted == 0 && !self.is_idle();
        assert!(!stuck || is_pipelined, "there are sequences, yet none can go on");
        std::mem::take(&mut self.plan)
    }

    /// The entry will be computed before anything that is launched later. Where it samples, a placeholder for its token is
    /// appended, unless the sequence is known to end with that token.
    pub fn launched(&mut self, entry: Scheduled, is_last: bool) {
        let sequence = &mut self.sequences[entry.id.slot];
        assert_eq!(sequence.computed, entry.start, "an entry is launched once");
        sequence.computed += entry.len;
        if entry.num_scored > 0 {
            sequence.scored = sequence.computed;
        }
        if !entry.wants_logits {
            self.publish(entry.id, entry.start + entry.len);
        } else if !is_last {
            sequence.tokens.push(PLACEHOLDER);
            sequence.num_pending += 1;
        }
    }

    /// The entry's token is known, and no sign that its numbers were wrong: it takes the place of its placeholder, and full
    /// blocks are offered to the prefix cache. Entries are collected in the order of their launches.
    pub fn sampled(&mut self, entry: Scheduled, token: TokenId) {
        self.publish(entry.id, entry.start + entry.len);
        let sequence = &mut self.sequences[entry.id.slot];
        if sequence.num_pending > 0 {
            let place = sequence.tokens.len() - sequence.num_pending;
            assert_eq!(place, entry.start + entry.len, "tokens become known in their order");
            sequence.tokens[place] = token;
            sequence.num_pending -= 1;
        }
    }

    /// Takes a sequence out, wherever it is, and frees what it holds.
    pub fn remove(&mut self, id: SequenceId) {
        self.detach(id);
        if self.probe == Some(id) {
            self.probe = None;
        } else if self.sequences[id.slot].phase == Phase::Waiting {
            self.dequeue(id);
        } else {
            self.leave_slot(id);
        }
        self.sequences.remove(id.slot);
    }

    /// Panics unless blocks, counts and tables agree.
    pub fn assert_consistent(&self) {
        self.blocks.assert_consistent(self.sequences.iter().map(|(_, sequence)| sequence.block_table()));
    }

    fn num_slots(&self) -> usize {
        self.limits.max_num_seqs.min(self.token_budget)
    }

    fn budget_left(&self) -> usize {
        self.token_budget - self.plan.num_tokens
    }

    fn enqueue(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id.slot];
        sequence.phase = Phase::Waiting;
        self.waiting_tokens += sequence.queued_tokens();
        let before = self.waiting.insert(sequence.rank, id);
        assert!(before.is_none(), "ranks are unique");
    }

    fn dequeue(&mut self, id: SequenceId) {
        let sequence = &self.sequences[id.slot];
        self.waiting_tokens -= sequence.queued_tokens();
        self.waiting.remove(&sequence.rank).expect("a waiting sequence is in the queue");
    }

    fn enter_slot(&mut self, id: SequenceId) {
        let rank = self.sequences[id.slot].rank;
        let position = self.running.partition_point(|other| self.sequences[other.slot].rank < rank);
        self.running.insert(position, id);
    }

    fn leave_slot(&mut self, id: SequenceId) {
        let rank = self.sequences[id.slot].rank;
        let position = self.running.binary_search_by(|other| self.sequences[other.slot].rank.cmp(&rank));
        self.running.remove(position.expect("a running sequence has a slot"));
    }

    /// The probe goes first, but leaves a token of the budget to every running sequence where it can.
    fn schedule_probe(&mut self) {
        let Some(id) = self.probe else { return };
        let share = self.budget_left().saturating_sub(self.running.len()).max(1);
        let sequence = &mut self.sequences[id.slot];
        while sequence.blocks.len() * self.block_size < sequence.tokens.len() {
            sequence.blocks.push(self.blocks.allocate_reserved().expect("the probe fits into the reserve"));
        }
        self.schedule_stretch(id, share);
    }

    /// Lets sequences that wait in slots for a shared prefix go on where they can.
    fn attach_running(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            let id = self.running[index];
            if !self.sequences[id.slot].is_active() && self.attach(id, self.running.len() > 1) == Attachment::NoRoom {
                self.running.remove(index);
                self.enqueue(id);
            } else {
                index += 1;
            }
        }
    }

    fn schedule_decodes(&mut self) {
        let mut index = 0;
        while index < self.running.len() && self.budget_left() > 0 {
            let id = self.running[index];
            let sequence = &self.sequences[id.slot];
            if sequence.is_active() && sequence.remaining() == 1 && self.make_room_to_decode(id) {
                self.schedule_stretch(id, 1);
            }
            index += 1;
        }
    }

    /// A block for the next position, preempting from the worst rank on. False when the sequence itself had to give way, or
    /// has to wait until preempting is allowed.
    fn make_room_to_decode(&mut self, id: SequenceId) -> bool {
        loop {
            let sequence = &mut self.sequences[id.slot];
            if sequence.blocks.len() * self.block_size >= sequence.tokens.len() {
                return true;
            }
            if let Some(block) = self.blocks.allocate() {
                sequence.blocks.push(block);
                return true;
            }
            if self.is_pipelined {
                self.plan.is_starved = true;
                return false;
            }
            if self.preempt_last() == id {
                return false;
            }
        }
    }

    fn preempt_last(&mut self) -> SequenceId {
        // Its last token could be unknown, and then it could not be computed again from its tokens.
        assert!(!self.is_pipelined, "nobody is preempted while a step is in flight");
        let victim = self.running.pop().expect("a victim is running");
        self.detach(victim);
        self.enqueue(victim);
        self.plan.num_preempted += 1;
        victim
    }

    fn schedule_prefills(&mut self) {
        for index in 0..self.running.len() {
            let id = self.running[index];
            let sequence = &self.sequences[id.slot];
            if sequence.is_active() && sequence.remaining() > 1 {
                self.schedule_stretch(id, self.budget_left());
            }
            if self.budget_left() == 0 {
                break;
            }
        }
    }

    /// Gives slots to the head of the queue while there are slots, budget and blocks. Nobody overtakes the head.
    fn admit(&mut self) {
        while self.running.len() < self.num_slots() && self.budget_left() > 0 {
            let Some((_, &id)) = self.waiting.first_key_value() else { break };
            let attachment = self.attach(id, !self.running.is_empty());
            if attachment == Attachment::NoRoom {
                break;
            }
            self.dequeue(id);
            self.enter_slot(id);
            if attachment == Attachment::Complete {
                self.schedule_stretch(id, self.budget_left());
            }
        }
    }

    fn schedule_stretch(&mut self, id: SequenceId, most: usize) {
        let scored_budget = self.limits.max_scored_tokens - self.plan.num_scored;
        let sequence = &mut self.sequences[id.slot];
        let (start, mut len, mut num_scored) = (sequence.computed, sequence.remaining().min(most), 0);
        let is_scored = sequence.left_to_score() > 0;
        if is_scored {
            // What was scored before a preemption is only computed again.
            let known = sequence.scored.saturating_sub(start);
            len = len.min(sequence.left_to_score()).min(known + scored_budget);
            num_scored = len.saturating_sub(known);
        }
        if len == 0 {
            return;
        }
        for block in &sequence.blocks[start / self.block_size..(start + len).div_ceil(self.block_size)] {
            assert!(self.blocks.is_private(*block), "a shared block is about to be written");
        }
        if !std::mem::replace(&mut sequence.has_started, true) {
            self.plan.started.push((id, start));
        }
        let wants_logits = !is_scored && len == sequence.remaining();
        self.plan.num_tokens += len;
        self.plan.num_scored += num_scored;
        self.plan.entries.push(Scheduled { id, start, len, wants_logits, num_scored });
    }
}
