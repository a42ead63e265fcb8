//! Manages a fixed pool of KV blocks: reference counts, and an LRU list of cached blocks without references. Knows block ids
//! and the prefix cache, but no sequences and no tensors.
//!
//! A block is in exactly one of four places: referenced, idle (unreferenced but cached), free, or in the reserve that only
//! the synthetic inference may use. Idle blocks count as free: they are evicted when the free ones run out.

use super::prefix_cache::{Claimant, EntryId, Lookup, Parent, PrefixCache, Published};
use crate::types::TokenId;

/// Index of a block in the runner's pool. An alias rather than a newtype: tables of it cross into the kernels.
pub type BlockId = u32;

pub struct BlockManager {
    /// How many tables hold each block.
    references: Vec<u32>,
    cached_as: Vec<Option<EntryId>>,
    free: Vec<BlockId>,
    idle: IdleBlocks,
    cache: PrefixCache,
    /// Blocks from this number on belong to the reserve.
    first_reserved: BlockId,
    reserve: Vec<BlockId>,
}

impl BlockManager {
    /// A pool of `num_blocks`, the last `num_reserved` of which are kept for [`Self::allocate_reserved`].
    pub fn new(num_blocks: u32, num_reserved: u32, block_size: usize) -> Self {
        Self::with_cache(num_blocks, num_reserved, PrefixCache::new(block_size))
    }

    fn with_cache(num_blocks: u32, num_reserved: u32, cache: PrefixCache) -> Self {
        assert!(num_reserved < num_blocks, "the reserve leaves no block to serve with");
        let first_reserved = num_blocks - num_reserved;
        Self {
            references: vec![0; num_blocks as usize],
            cached_as: vec![None; num_blocks as usize],
            free: (0..first_reserved).rev().collect(),
            idle: IdleBlocks::new(num_blocks),
            cache,
            first_reserved,
            reserve: (first_reserved..num_blocks).rev().collect(),
        }
    }

    /// Blocks that ordinary sequences share.
    pub fn num_blocks(&self) -> u32 {
        self.first_reserved
    }

    /// Blocks that can be allocated now, idle ones included.
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32 + self.idle.len
    }

    pub fn num_used(&self) -> u32 {
        self.num_blocks() - self.num_free()
    }

    pub fn num_reserved_free(&self) -> u32 {
        self.reserve.len() as u32
    }

    /// Whether exactly one table holds the block, so that it may be written.
    pub fn is_private(&self, block: BlockId) -> bool {
        self.references[block as usize] == 1
    }

    /// A block of undefined content, referenced once. Evicts the least recently used idle block when none is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| self.evict())?;
        self.references[block as usize] = 1;
        Some(block)
    }

    /// Like `allocate`, from the reserve.
    pub fn allocate_reserved(&mut self) -> Option<BlockId> {
        let block = self.reserve.pop()?;
        self.references[block as usize] = 1;
        Some(block)
    }

    /// Adds a reference to the block.
    pub fn share(&mut self, block: BlockId) {
        if self.references[block as usize] == 0 {
            assert!(self.cached_as[block as usize].is_some(), "only a cached block comes back to use");
            self.idle.remove(block);
        }
        self.references[block as usize] += 1;
    }

    /// Drops a reference to the block. Tables are released from the tail, so that a prefix is evicted after what follows it.
    pub fn release(&mut self, block: BlockId) {
        let references = &mut self.references[block as usize];
        assert!(*references > 0, "block {block} is released more often than it was taken");
        *references -= 1;
        if *references > 0 {
            return;
        }
        if block >= self.first_reserved {
            self.reserve.push(block);
        } else if self.cached_as[block as usize].is_some() {
            self.idle.push_newest(block);
        } else {
            self.free.push(block);
        }
    }

    pub fn find(&self, parent: Parent, tokens: &[TokenId]) -> Lookup {
        self.cache.find(parent, tokens)
    }

    pub fn claim(&mut self, parent: Parent, tokens: &[TokenId], claimant: Claimant) -> Option<EntryId> {
        self.cache.claim(parent, tokens, claimant)
    }

    pub fn abandon(&mut self, entry: EntryId, claimant: Claimant) {
        self.cache.abandon(entry, claimant);
    }

    /// Offers a computed, referenced block to the cache. When another block holds the same prefix already, the caller's
    /// reference moves to that one: equal prefixes have equal content, so one copy is enough. Returns the entry and the
    /// block to hold from now on, or `None` when the block stays private.
    pub fn publish(
        &mut self,
        parent: Parent,
        tokens: &[TokenId],
        block: BlockId,
        claimant: Claimant,
    ) -> Option<(EntryId, BlockId)> {
        assert!(block < self.first_reserved, "reserved blocks are never cached");
        match self.cache.publish(parent, tokens, block, claimant) {
            Published::New(entry) => {
                self.cached_as[block as usize] = Some(entry);
                Some((entry, block))
            }
            Published::Existing(entry, existing) => {
                self.share(existing);
                self.release(block);
                Some((entry, existing))
            }
            Published::Refused => None,
        }
    }

    fn evict(&mut self) -> Option<BlockId> {
        let block = self.idle.pop_oldest()?;
        let entry = self.cached_as[block as usize].take().expect("idle blocks are cached");
        self.cache.evict(entry);
        Some(block)
    }

    /// Panics unless the reference counts are those of `tables` and every block is in exactly one place.
    pub fn assert_consistent<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut held = vec![0u32; self.references.len()];
        tables.flatten().for_each(|&block| held[block as usize] += 1);
        assert_eq!(held, self.references, "reference counts differ from the tables");
        let mut places = vec![0u32; held.len()];
        self.free.iter().chain(&self.reserve).for_each(|&block| places[block as usize] += 1);
        let mut idle = 0;
        let mut next = self.idle.oldest;
        while let Some(block) = next {
            assert!(self.cached_as[block as usize].is_some(), "an idle block is not cached");
            places[block as usize] += 1;
            idle += 1;
            next = self.idle.links[block as usize].newer;
        }
        assert_eq!(idle, self.idle.len, "the idle list and its length differ");
        for (block, place) in places.iter_mut().enumerate() {
            *place += u32::from(held[block] > 0);
            assert_eq!(*place, 1, "block {block} is in {place} places");
        }
    }
}

/// A doubly linked list over block numbers, least recently used first.
struct IdleBlocks {
    links: Vec<Link>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    len: u32,
}

#[derive(Clone, Copy, Default)]
struct Link {
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

impl IdleBlocks {
    fn new(num_blocks: u32) -> Self {
        Self { links: vec![Link::default(); num_blocks as usize], oldest: None, newest: None, len: 0 }
    }

    fn push_newest(&mut self, block: BlockId) {
        self.links[block as usize] = Link { older: self.newest, newer: None };
        match self.newest.replace(block) {
            Some(previous) => self.links[previous as usize].newer = Some(block),
            None => self.oldest = Some(block),
        }
        self.len += 1;
    }

    fn remove(&mut self, block: BlockId) {
        let Link { older, newer } = std::mem::take(&mut self.links[block as usize]);
        match older {
            Some(older) => self.links[older as usize].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.links[newer as usize].older = older,
            None => self.newest = older,
        }
        self.len -= 1;
    }

    fn pop_oldest(&mut self) -> Option<BlockId> {
        let block = self.oldest?;
        self.remove(block);
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: Claimant = Claimant(0);
    const ROOT: Parent = Parent::Root(None);

    #[test]
    fn idle_blocks_count_as_free_and_the_oldest_is_evicted_first() {
        let mut blocks = BlockManager::new(3, 0, 1);
        for token in 0..3 {
            let block = blocks.allocate().expect("three blocks");
            blocks.publish(ROOT, &[token], block, ME).expect("published");
            blocks.release(block);
        }
        assert_eq!((blocks.num_free(), blocks.num_used()), (3, 0));
        let Lookup::Ready(_, oldest) = blocks.find(ROOT, &[0]) else { panic!("still cached") };
        blocks.share(oldest);
        blocks.release(oldest);
        blocks.allocate().expect("evicts");
        assert_eq!(blocks.find(ROOT, &[1]), Lookup::Absent, "token 1 was used least recently");
        assert!(matches!(blocks.find(ROOT, &[0]), Lookup::Ready(..)));
    }

    #[test]
    fn a_second_copy_of_a_prefix_gives_way_to_the_first() {
        let mut blocks = BlockManager::new(2, 0, 1);
        let (first, second) = (blocks.allocate().expect("free"), blocks.allocate().expect("free"));
        let (entry, kept) = blocks.publish(ROOT, &[7], first, ME).expect("published");
        assert_eq!(kept, first);
        assert_eq!(blocks.publish(ROOT, &[7], second, Claimant(1)), Some((entry, first)));
        blocks.assert_consistent([[first].as_slice(), [first].as_slice()].into_iter());
        assert_eq!(blocks.num_free(), 1);
    }

    #[test]
    fn the_reserve_is_out_of_reach_of_ordinary_sequences() {
        let mut blocks = BlockManager::new(3, 1, 4);
        assert!(blocks.allocate().is_some() && blocks.allocate().is_some());
        assert_eq!(blocks.allocate(), None);
        let reserved = blocks.allocate_reserved().expect("kept back");
        blocks.release(reserved);
        assert_eq!((blocks.allocate(), blocks.num_reserved_free()), (None, 1));
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_free_is_noticed() {
        let mut blocks = BlockManager::new(1, 0, 1);
        let block = blocks.allocate().expect("free");
        blocks.release(block);
        blocks.release(block);
    }

    /// What random callers do: grow a table by tokens (through the cache), fork one, drop one.
    #[derive(Clone, Debug)]
    enum Operation {
        Start(Vec<TokenId>),
        Fork(usize),
        Grow(usize, TokenId),
        Drop(usize),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            3 => prop::collection::vec(0u32..2, 1..6).prop_map(Operation::Start),
            1 => any::<usize>().prop_map(Operation::Fork),
            4 => (any::<usize>(), 0u32..2).prop_map(|(index, token)| Operation::Grow(index, token)),
            3 => any::<usize>().prop_map(Operation::Drop),
        ]
    }

    #[derive(Clone, Default)]
    struct Table {
        blocks: Vec<BlockId>,
        /// Entry of the last block, while all blocks are cached.
        tail: Option<Parent>,
    }

    /// Appends one block of one token, cached when it can be; false when the pool is empty.
    fn grow(blocks: &mut BlockManager, table: &mut Table, token: TokenId) -> bool {
        let tail = table.tail.take();
        if let Some(parent) = tail
            && let Lookup::Ready(entry, block) = blocks.find(parent, &[token])
        {
            blocks.share(block);
            table.blocks.push(block);
            table.tail = Some(Parent::Entry(entry));
            return true;
        }
        let Some(block) = blocks.allocate() else {
            table.tail = tail;
            return false;
        };
        let published = tail.and_then(|parent| blocks.publish(parent, &[token], block, ME));
        table.blocks.push(published.map_or(block, |(_, kept)| kept));
        table.tail = published.map(|(entry, _)| Parent::Entry(entry));
        true
    }

    proptest! {
        #[test]
        fn no_leak_no_double_free_and_counts_match_tables(
            num_blocks in 1u32..12,
            operations in prop::collection::vec(operation(), 1..80),
        ) {
            let mut blocks = BlockManager::new(num_blocks, 0, 1);
            let mut tables: Vec<Table> = Vec::new();
            for operation in operations {
                match operation {
                    Operation::Start(tokens) => {
                        let mut table = Table { blocks: Vec::new(), tail: Some(ROOT) };
                        let _ = tokens.iter().all(|&token| grow(&mut blocks, &mut table, token));
                        tables.push(table);
                    }
                    Operation::Fork(index) if !tables.is_empty() => {
                        let table = tables[index % tables.len()].clone();
                        table.blocks.iter().for_each(|&block| blocks.share(block));
                        tables.push(table);
                    }
                    Operation::Grow(index, token) if !tables.is_empty() => {
                        let index = index % tables.len();
                        grow(&mut blocks, &mut tables[index], token);
                    }
                    Operation::Drop(index) if !tables.is_empty() => {
                        let table = tables.swap_remove(index % tables.len());
                        table.blocks.iter().rev().for_each(|&block| blocks.release(block));
                    }
                    _ => {}
                }
                blocks.assert_consistent(tables.iter().map(|table| table.blocks.as_slice()));
            }
            for table in tables {
                table.blocks.iter().rev().for_each(|&block| blocks.release(block));
            }
            prop_assert_eq!(blocks.num_free(), num_blocks);
        }
    }
}
