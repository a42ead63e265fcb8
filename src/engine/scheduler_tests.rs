//! Tests of the scheduler as a whole: who goes first, who waits, who gives way, and that blocks never leak.

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::block_manager::BlockManager;
use super::scheduler::{Limits, Plan, Scheduled, Scheduler};
use super::sequence::{NewSequence, Rank, SequenceId};
use crate::types::TokenId;

const BLOCK_SIZE: usize = 4;

fn scheduler(num_blocks: u32, max_num_seqs: usize, max_num_batched_tokens: usize) -> Scheduler {
    let limits = Limits { max_num_seqs, max_num_batched_tokens, max_scored_tokens: 3 };
    Scheduler::new(limits, BlockManager::new(num_blocks, 0, BLOCK_SIZE), BLOCK_SIZE)
}

fn sequence(arrival: u64, tokens: &[TokenId]) -> NewSequence {
    NewSequence {
        rank: Rank { priority: 0, arrival, choice: 0 },
        tokens: tokens.to_vec(),
        prompt_len: tokens.len(),
        uses_prefix_cache: true,
        cache_salt: None,
        num_scored: 0,
        sibling: None,
    }
}

/// A prompt that shares nothing with those of other arrivals.
fn distinct(arrival: u64, len: usize) -> NewSequence {
    sequence(arrival, &vec![1000 + arrival as TokenId; len])
}

/// Launches an entry and collects it at once.
fn compute(scheduler: &mut Scheduler, entry: Scheduled) {
    scheduler.launched(entry, false);
    if entry.wants_logits {
        scheduler.sampled(entry, 7);
    }
}

/// Computes one step; every sequence that wants logits gets token 7. Returns the lengths scheduled, by sequence.
fn step(scheduler: &mut Scheduler) -> HashMap<SequenceId, usize> {
    let plan = scheduler.schedule(Plan::default(), false);
    plan.entries.iter().for_each(|&entry| compute(scheduler, entry));
    scheduler.assert_consistent();
    plan.entries.iter().map(|entry| (entry.id, entry.len)).collect()
}

#[test]
fn decodes_come_first_and_prompts_share_what_is_left() {
    let mut scheduler = scheduler(64, 4, 10);
    let first = scheduler.add(distinct(1, 8));
    step(&mut scheduler);
    let second = scheduler.add(distinct(2, 14));
    let third = scheduler.add(distinct(3, 5));
    assert_eq!(step(&mut scheduler), HashMap::from([(first, 1), (second, 9)]));
    assert_eq!(step(&mut scheduler), HashMap::from([(first, 1), (second, 5), (third, 4)]));
    assert_eq!(step(&mut scheduler), HashMap::from([(first, 1), (second, 1), (third, 1)]));
}

#[test]
fn priority_goes_before_arrival() {
    let mut scheduler = scheduler(64, 1, 16);
    let plain = scheduler.add(distinct(1, 4));
    let later = scheduler.add(distinct(2, 4));
    let urgent = scheduler.add(NewSequence { rank: Rank { priority: -1, arrival: 3, choice: 0 }, ..distinct(3, 4) });
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        let id = *step(&mut scheduler).keys().next().expect("one slot");
        order.push(id);
        scheduler.remove(id);
    }
    assert_eq!(order, [urgent, plain, later]);
    assert_eq!(scheduler.waiting_tokens(), 0);
}

#[test]
fn the_last_to_arrive_gives_way_when_blocks_run_out() {
    let mut scheduler = scheduler(4, 2, 16);
    let first = scheduler.add(distinct(1, 7));
    let second = scheduler.add(NewSequence { uses_prefix_cache: false, ..distinct(2, 3) });
    assert_eq!(step(&mut scheduler).len(), 2);
    // The first needs a third block at its ninth token, the second then holds two: one of five is too many.
    let mut preempted = 0;
    for _ in 0..3 {
        let plan = scheduler.schedule(Plan::default(), false);
        preempted += plan.num_preempted;
        plan.entries.iter().for_each(|&entry| compute(&mut scheduler, entry));
    }
    assert_eq!(preempted, 1);
    assert_eq!((scheduler.running(), scheduler.num_waiting()), ([first].as_slice(), 1));
    assert_eq!(scheduler.waiting_tokens(), scheduler.sequence(second).tokens().len() as u64);
    scheduler.remove(first);
    assert_eq!(step(&mut scheduler)[&second], 5, "it is computed again, with what it had generated");
    scheduler.assert_consistent();
}

#[test]
fn a_shared_prefix_is_computed_once_by_the_first_that_needs_it() {
    let mut scheduler = scheduler(256, 40, 64);
    let prefix: Vec<TokenId> = (0..48).collect();
    let ids: Vec<SequenceId> = (0..32)
        .map(|index| {
            let tokens: Vec<TokenId> = prefix.iter().copied().chain([500 + index, 600 + index]).collect();
            scheduler.add(sequence(u64::from(index), &tokens))
        })
        .collect();
    assert_eq!(step(&mut scheduler), HashMap::from([(ids[0], 50)]));
    let rest = step(&mut scheduler);
    assert_eq!(rest.len(), 32);
    assert!(ids[1..].iter().all(|id| rest[id] == 2), "{rest:?}");
}

#[test]
fn who_waits_for_a_prefix_goes_on_alone_when_its_claimant_is_gone() {
    let mut scheduler = scheduler(256, 4, 8);
    let prefix: Vec<TokenId> = (0..32).collect();
    let claimant = scheduler.add(sequence(1, &prefix));
    let waiter = scheduler.add(sequence(2, &[prefix.clone(), vec![99]].concat()));
    assert_eq!(step(&mut scheduler), HashMap::from([(claimant, 8)]));
    assert_eq!(step(&mut scheduler), HashMap::from([(claimant, 8)]));
    scheduler.remove(claimant);
    assert_eq!(step(&mut scheduler), HashMap::from([(waiter, 8)]));
    let start = scheduler.schedule(Plan::default(), false).entries[0].start;
    assert_eq!(start, 24, "the two computed chunks were kept");
}

#[test]
fn a_whole_hit_computes_the_last_token_in_a_copy() {
    let mut scheduler = scheduler(16, 4, 32);
    let prompt: Vec<TokenId> = (0..8).collect();
    let first = scheduler.add(sequence(1, &prompt));
    step(&mut scheduler);
    scheduler.remove(first);
    let second = scheduler.add(sequence(2, &prompt));
    let plan = scheduler.schedule(Plan::default(), false);
    assert_eq!((plan.copies.len(), plan.entries[0].start, plan.entries[0].len), (1, 7, 1));
    assert_eq!(plan.started, [(second, 7)]);
    assert_ne!(plan.copies[0].0, scheduler.sequence(second).block_table()[1]);
    compute(&mut scheduler, plan.entries[0]);
    assert_eq!(scheduler.sequence(second).block_table()[1], plan.copies[0].0, "the copy gives way to the original");
    scheduler.assert_consistent();
}

#[test]
fn choices_share_the_blocks_of_their_prompt() {
    let mut scheduler = scheduler(64, 8, 32);
    let first = scheduler.add(NewSequence { uses_prefix_cache: false, ..distinct(1, 10) });
    let others: Vec<SequenceId> = (1..4)
        .map(|choice| {
            let rank = Rank { priority: 0, arrival: 1, choice };
            let sibling = Some(first);
            scheduler.add(NewSequence { rank, sibling, uses_prefix_cache: false, ..distinct(1, 10) })
        })
        .collect();
    assert_eq!(step(&mut scheduler), HashMap::from([(first, 10)]));
    let plan = scheduler.schedule(Plan::default(), false);
    assert_eq!(plan.copies.len(), 3, "the last block of the prompt is half full");
    assert!(plan.entries.iter().all(|entry| entry.len == 1));
    assert_eq!(plan.entries.len(), 4);
    let shared = &scheduler.sequence(first).block_table()[..2];
    assert!(others.iter().all(|&id| &scheduler.sequence(id).block_table()[..2] == shared));
    assert_eq!(scheduler.blocks().num_used(), 2 + 4);
}

#[test]
fn the_probe_runs_when_slots_and_blocks_are_taken() {
    let limits = Limits { max_num_seqs: 1, max_num_batched_tokens: 4, max_scored_tokens: 1 };
    let mut scheduler = Scheduler::new(limits, BlockManager::new(4, 2, BLOCK_SIZE), BLOCK_SIZE);
    let greedy = scheduler.add(distinct(1, 8));
    scheduler.add(distinct(2, 8));
    while scheduler.blocks().num_free() > 0 {
        step(&mut scheduler);
    }
    let probe = scheduler.add_probe(distinct(3, 5)).expect("the slot is free");
    assert_eq!(scheduler.add_probe(distinct(4, 1)), None);
    let mut computed = 0;
    while computed < 8 {
        let lens = step(&mut scheduler);
        assert!(lens.contains_key(&greedy) || scheduler.sequence(greedy).tokens().len() > 8);
        computed += lens[&probe];
    }
    scheduler.remove(probe);
    assert_eq!(scheduler.blocks().num_reserved_free(), 2);
    scheduler.assert_consistent();
}

#[test]
fn a_smaller_budget_takes_slots_away_from_the_last() {
    let mut scheduler = scheduler(64, 4, 32);
    let ids: Vec<SequenceId> = (0..4).map(|arrival| scheduler.add(distinct(arrival, 3))).collect();
    step(&mut scheduler);
    scheduler.set_token_budget(2);
    step(&mut scheduler);
    assert_eq!(scheduler.running(), &ids[..2]);
    scheduler.set_token_budget(usize::MAX);
    for _ in 0..2 {
        step(&mut scheduler);
    }
    assert_eq!(scheduler.running(), &ids[..]);
}

#[derive(Clone, Debug)]
enum Operation {
    Add {
        priority: i32,
        prompt: Vec<TokenId>,
        choices: u32,
        cached: bool,
    },
    Remove(usize),
    Step,
    /// The batch could not be computed.
    FailedStep,
}

fn operation() -> impl Strategy<Value = Operation> {
    let prompt = prop::collection::vec(0u32..2, 1..20);
    prop_oneof![
        2 => (-1..2i32, prompt, 1..4u32, prop::bool::weighted(0.8))
            .prop_map(|(priority, prompt, choices, cached)| Operation::Add { priority, prompt, choices, cached }),
        1 => any::<usize>().prop_map(Operation::Remove),
        6 => Just(Operation::Step),
        1 => Just(Operation::FailedStep),
    ]
}

/// Longest sequence: what the smallest pool holds.
const LONGEST: usize = 24;

/// A sequence whose length and sum of tokens come to this ends earlier, which nobody can know before its last step.
const STOPS_AT: usize = 21;

/// A scheduler, and the steps that it has planned and nobody has collected.
struct World {
    scheduler: Scheduler,
    limits: Limits,
    depth: usize,
    live: Vec<SequenceId>,
    flights: VecDeque<Vec<Scheduled>>,
    /// Positions of each sequence that have been scored.
    scored: HashMap<SequenceId, usize>,
}

impl World {
    fn add(&mut self, arrival: u64, priority: i32, prompt: &[TokenId], choices: u32, cached: bool) {
        let mut sibling = None;
        for choice in 0..choices {
            let rank = Rank { priority, arrival, choice };
            // The first choice of what bypasses the cache scores the prompt.
            let num_scored = if cached || sibling.is_some() { 0 } else { prompt.len() - 1 };
            let new = NewSequence { rank, sibling, num_scored, uses_prefix_cache: cached, ..sequence(arrival, prompt) };
            let id = self.scheduler.add(new);
            sibling = sibling.or(Some(id));
            self.live.push(id);
        }
    }

    /// Plans a step, launches it if it can be, and collects what the pipeline does not hold.
    fn step(&mut self, is_launched: bool) {
        let is_pipelined = !self.flights.is_empty();
        let plan = self.scheduler.schedule(Plan::default(), is_pipelined);
        self.check(&plan);
        assert!(is_pipelined || !plan.is_starved, "with nothing in flight somebody gives way");
        let mut stays_filled = false;
        if is_launched && !plan.entries.is_empty() {
            for &entry in &plan.entries {
                let is_last = self.scheduler.sequence(entry.id).tokens().len() == LONGEST;
                self.scheduler.launched(entry, is_last);
                if entry.num_scored > 0 {
                    let scored = self.scored.entry(entry.id).or_default();
                    assert_eq!(*scored, entry.start + entry.len - entry.num_scored, "in order, and each once");
                    *scored += entry.num_scored;
                }
            }
            self.flights.push_back(plan.entries);
            stays_filled = !plan.is_starved;
        }
        self.scheduler.assert_consistent();
        self.collect_down_to(if stays_filled { self.depth - 1 } else { 0 });
    }

    fn collect_down_to(&mut self, most: usize) {
        while self.flights.len() > most {
            for entry in self.flights.pop_front().expect("not empty") {
                let Some(sequence) = self.scheduler.get(entry.id).filter(|_| entry.wants_logits) else { continue };
                let end = entry.start + entry.len;
                let sum: TokenId = sequence.tokens()[..end].iter().sum();
                self.scheduler.sampled(entry, sum % 2);
                if end == LONGEST || end + sum as usize == STOPS_AT {
                    self.live.retain(|&id| id != entry.id);
                    self.scheduler.remove(entry.id);
                }
                self.scheduler.assert_consistent();
            }
        }
    }

    fn check(&self, plan: &Plan) {
        assert!(plan.num_tokens <= self.limits.max_num_batched_tokens);
        assert_eq!(plan.num_tokens, plan.entries.iter().map(|entry| entry.len).sum::<usize>());
        assert!(self.scheduler.running().len() <= self.limits.max_num_seqs);
        let num_scored: usize = plan.entries.iter().map(|entry| entry.num_scored).sum();
        assert!(num_scored == plan.num_scored && num_scored <= self.limits.max_scored_tokens);
        let mut written = Vec::new();
        for entry in &plan.entries {
            let sequence = self.scheduler.sequence(entry.id);
            let end = entry.start + entry.len;
            assert_eq!(entry.wants_logits, end == sequence.tokens().len());
            assert!(!entry.wants_logits || entry.num_scored == 0, "what is scored is not sampled from");
            let scored = self.scored.get(&entry.id).copied().unwrap_or(0);
            assert!(!entry.wants_logits || scored == sequence.num_scored, "a prompt is scored before its first token");
            assert!(
                sequence.num_pending() == 0 || entry.wants_logits && entry.len == 1,
                "a placeholder is decoded alone"
            );
            written.extend_from_slice(&sequence.block_table()[entry.start / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE)]);
        }
        let blocks = written.len();
        written.sort_unstable();
        written.dedup();
        assert_eq!(blocks, written.len(), "two entries write one block");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever arrives, leaves or fails: limits hold, blocks add up, and everything is served in the end.
    #[test]
    fn limits_hold_and_nothing_starves(
        num_blocks in 6u32..20,
        max_num_seqs in 1usize..6,
        spare_tokens in 1usize..12,
        max_scored_tokens in 1usize..5,
        depth in 1usize..=2,
        operations in prop::collection::vec(operation(), 1..60),
    ) {
        let max_num_batched_tokens = max_num_seqs + spare_tokens;
        let limits = Limits { max_num_seqs, max_num_batched_tokens, max_scored_tokens };
        let scheduler = Scheduler::new(limits, BlockManager::new(num_blocks, 0, BLOCK_SIZE), BLOCK_SIZE);
        let (live, flights, scored) = (Vec::new(), VecDeque::new(), HashMap::new());
        let mut world = World { scheduler, limits, depth, live, flights, scored };
        for (arrival, operation) in operations.into_iter().enumerate() {
            match operation {
                Operation::Add { priority, prompt, choices, cached } => {
                    world.add(arrival as u64, priority, &prompt, choices, cached);
                }
                Operation::Remove(index) if !world.live.is_empty() => {
                    let id = world.live.swap_remove(index % world.live.len());
                    world.scheduler.remove(id);
                    world.scheduler.assert_consistent();
                }
                Operation::Remove(_) => {}
                Operation::Step => world.step(true),
                Operation::FailedStep => world.step(false),
            }
        }
        let mut steps = 0;
        while !world.scheduler.is_idle() || !world.flights.is_empty() {
            world.step(true);
            steps += 1;
            prop_assert!(steps < 20_000, "sequences starve");
        }
        prop_assert_eq!(world.scheduler.blocks().num_free(), num_blocks);
        prop_assert_eq!(world.scheduler.waiting_tokens(), 0);
    }
}
