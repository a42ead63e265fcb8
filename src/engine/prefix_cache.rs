//! An index from token prefixes to the blocks that hold them. Knows entries and block ids, not references to blocks.
//!
//! Entries form a tree: the key of an entry is its parent's identity and a hash of its own tokens, and a lookup compares
//! the tokens themselves. Identities are never used twice, so by induction from the root a hit means equal prefixes,
//! whatever the hash does; a collision costs a miss. An entry is claimed (a sequence is about to compute it), then ready.

use std::collections::HashMap;

use super::block_manager::BlockId;
use crate::types::{CacheSalt, TokenId};

/// Identity of an entry; never given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryId {
    slot: u32,
    generation: u64,
}

/// The sequence that computes a claimed entry. Unique for the life of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claimant(pub u64);

/// What an entry stands below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parent {
    /// The start of a sequence. Sequences of different salts have different roots, and so nothing in common.
    Root(Option<CacheSalt>),
    Entry(EntryId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    Ready(EntryId, BlockId),
    /// The claimant is computing it.
    Claimed(EntryId, Claimant),
    Absent,
}

/// The result of offering a computed block to the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The block now answers lookups.
    New(EntryId),
    /// Another block with the same prefix does so already.
    Existing(EntryId, BlockId),
    /// Not taken: claimed by another sequence, a hash collision, or below an entry that is gone.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    parent: Parent,
    tokens_hash: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Vacant,
    Claimed(Claimant),
    Ready(BlockId),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    generation: u64,
    key: Key,
    state: State,
    /// Entries whose parent this is.
    children: u32,
}

pub struct PrefixCache {
    block_size: usize,
    hash: fn(&[TokenId]) -> u64,
    index: HashMap<Key, u32>,
    entries: Vec<Entry>,
    /// `block_size` tokens for each slot of `entries`.
    tokens: Vec<TokenId>,
    vacant: Vec<u32>,
    next_generation: u64,
}

impl PrefixCache {
    pub fn new(block_size: usize) -> Self {
        Self::with_hash(block_size, hash_tokens)
    }

    /// With a hash of the caller's choice; the answers do not depend on it.
    pub fn with_hash(block_size: usize, hash: fn(&[TokenId]) -> u64) -> Self {
        assert!(block_size > 0, "a block holds at least one token");
        Self {
            block_size,
            hash,
            index: HashMap::new(),
            entries: Vec::new(),
            tokens: Vec::new(),
            vacant: Vec::new(),
            next_generation: 0,
        }
    }

    /// Claimed and ready entries.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The entry of one full block of tokens below `parent`.
    pub fn find(&self, parent: Parent, tokens: &[TokenId]) -> Lookup {
        match self.slot_of(self.key(parent, tokens)) {
            Some(slot) if self.tokens_of(slot) == tokens => self.describe(slot),
            _ => Lookup::Absent,
        }
    }

    /// Announces that `claimant` will compute this block. `None` when the key is taken or the parent is gone.
    pub fn claim(&mut self, parent: Parent, tokens: &[TokenId], claimant: Claimant) -> Option<EntryId> {
        let key = self.key(parent, tokens);
        if self.slot_of(key).is_some() || !self.is_rooted(parent) {
            return None;
        }
        Some(self.insert(key, tokens, State::Claimed(claimant)))
    }

    /// Offers a computed block. The claimant of an entry makes it ready; an unclaimed key becomes ready at once.
    pub fn publish(&mut self, parent: Parent, tokens: &[TokenId], block: BlockId, claimant: Claimant) -> Published {
        let key = self.key(parent, tokens);
        let Some(slot) = self.slot_of(key) else {
            return match self.is_rooted(parent) {
                true => Published::New(self.insert(key, tokens, State::Ready(block))),
                false => Published::Refused,
            };
        };
        if self.tokens_of(slot) != tokens {
            return Published::Refused;
        }
        match self.describe(slot) {
            Lookup::Ready(id, existing) => Published::Existing(id, existing),
            Lookup::Claimed(id, owner) if owner == claimant => {
                self.entries[slot as usize].state = State::Ready(block);
                Published::New(id)
            }
            Lookup::Claimed(..) | Lookup::Absent => Published::Refused,
        }
    }

    /// Withdraws a claim that was not published. Claims are withdrawn last one first.
    pub fn abandon(&mut self, id: EntryId, claimant: Claimant) {
        match self.entry(id).map(|entry| entry.state) {
            Some(State::Claimed(owner)) if owner == claimant => self.remove(id),
            state => panic!("{claimant:?} abandons {id:?}, which is {state:?}"),
        }
    }

    /// Forgets a ready entry; it must be a leaf.
    pub fn evict(&mut self, id: EntryId) {
        match self.entry(id).map(|entry| entry.state) {
            Some(State::Ready(_)) => self.remove(id),
            state => panic!("eviction of {id:?}, which is {state:?}"),
        }
    }

    fn key(&self, parent: Parent, tokens: &[TokenId]) -> Key {
        assert_eq!(tokens.len(), self.block_size, "only full blocks are cached");
        Key { parent, tokens_hash: (self.hash)(tokens) }
    }

    fn slot_of(&self, key: Key) -> Option<u32> {
        self.index.get(&key).copied()
    }

    fn tokens_of(&self, slot: u32) -> &[TokenId] {
        let start = slot as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    fn entry(&self, id: EntryId) -> Option<&Entry> {
        let entry = &self.entries[id.slot as usize];
        (entry.generation == id.generation && !matches!(entry.state, State::Vacant)).then_some(entry)
    }

    fn is_rooted(&self, parent: Parent) -> bool {
        match parent {
            Parent::Root(_) => true,
            Parent::Entry(id) => self.entry(id).is_some(),
        }
    }

    fn describe(&self, slot: u32) -> Lookup {
        let entry = &self.entries[slot as usize];
        let id = EntryId { slot, generation: entry.generation };
        match entry.state {
            State::Vacant => Lookup::Absent,
            State::Claimed(owner) => Lookup::Claimed(id, owner),
            State::Ready(block) => Lookup::Ready(id, block),
        }
    }

    fn insert(&mut self, key: Key, tokens: &[TokenId], state: State) -> EntryId {
        self.next_generation += 1;
        let entry = Entry { generation: self.next_generation, key, state, children: 0 };
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                let start = slot as usize * self.block_size;
                self.tokens[start..start + self.block_size].copy_from_slice(tokens);
                slot
            }
            None => {
                self.entries.push(entry);
                self.tokens.extend_from_slice(tokens);
                u32::try_from(self.entries.len() - 1).expect("entries are bounded by twice the block count")
            }
        };
        if let Parent::Entry(parent) = key.parent {
            self.entries[parent.slot as usize].children += 1;
        }
        self.index.insert(key, slot);
        EntryId { slot, generation: self.next_generation }
    }

    fn remove(&mut self, id: EntryId) {
        let entry = self.entries[id.slot as usize];
        assert_eq!(entry.children, 0, "an entry outlives its children");
        if let Parent::Entry(parent) = entry.key.parent {
            self.entries[parent.slot as usize].children -= 1;
        }
        self.entries[id.slot as usize].state = State::Vacant;
        self.index.remove(&entry.key);
        self.vacant.push(id.slot);
    }
}

/// A multiply-and-rotate mix. Its quality decides only how rarely a colliding prefix goes uncached.
fn hash_tokens(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(0x9e37_79b9_7f4a_7c15, |hash: u64, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use super::Parent::Entry;
    use super::*;
    use proptest::prelude::*;

    const ME: Claimant = Claimant(1);
    const OTHER: Claimant = Claimant(2);
    const ROOT: Parent = Parent::Root(None);

    #[test]
    fn a_claim_becomes_ready_when_its_claimant_publishes() {
        let mut cache = PrefixCache::new(2);
        let id = cache.claim(ROOT, &[1, 2], ME).expect("the key is free");
        assert_eq!(cache.find(ROOT, &[1, 2]), Lookup::Claimed(id, ME));
        assert_eq!(cache.claim(ROOT, &[1, 2], OTHER), None);
        assert_eq!(cache.publish(ROOT, &[1, 2], 9, OTHER), Published::Refused);
        assert_eq!(cache.publish(ROOT, &[1, 2], 7, ME), Published::New(id));
        assert_eq!(cache.find(ROOT, &[1, 2]), Lookup::Ready(id, 7));
        assert_eq!(cache.publish(ROOT, &[1, 2], 9, OTHER), Published::Existing(id, 7));
    }

    #[test]
    fn equal_blocks_below_different_parents_are_different() {
        let mut cache = PrefixCache::new(2);
        let Published::New(left) = cache.publish(ROOT, &[1, 1], 0, ME) else { panic!("published") };
        let Published::New(right) = cache.publish(ROOT, &[2, 2], 1, ME) else { panic!("published") };
        cache.publish(Entry(left), &[5, 6], 2, ME);
        assert_eq!(cache.find(Entry(right), &[5, 6]), Lookup::Absent);
    }

    #[test]
    fn equal_blocks_of_different_salts_are_different() {
        let mut cache = PrefixCache::new(2);
        let [mine, yours] = [1, 2].map(|byte| Parent::Root(Some(CacheSalt::new([byte; 16]))));
        let Published::New(id) = cache.publish(mine, &[1, 1], 0, ME) else { panic!("published") };
        assert_eq!(cache.find(mine, &[1, 1]), Lookup::Ready(id, 0));
        for other in [yours, ROOT] {
            assert_eq!(cache.find(other, &[1, 1]), Lookup::Absent);
            assert!(matches!(cache.publish(other, &[1, 1], 1, ME), Published::New(_)));
        }
    }

    #[test]
    fn nothing_is_kept_below_an_evicted_entry_even_when_its_prefix_returns() {
        let mut cache = PrefixCache::new(1);
        let Published::New(old) = cache.publish(ROOT, &[1], 0, ME) else { panic!("published") };
        cache.evict(old);
        assert_eq!(cache.publish(Entry(old), &[2], 1, ME), Published::Refused);
        let Published::New(new) = cache.publish(ROOT, &[1], 3, ME) else { panic!("published") };
        assert_ne!(old, new);
        assert_eq!(cache.claim(Entry(old), &[2], ME), None);
        assert_eq!(cache.len(), 1);
    }

    #[test]
    #[should_panic(expected = "outlives its children")]
    fn a_parent_cannot_be_evicted_before_its_child() {
        let mut cache = PrefixCache::new(1);
        let Published::New(parent) = cache.publish(ROOT, &[1], 0, ME) else { panic!("published") };
        cache.publish(Entry(parent), &[2], 1, ME);
        cache.evict(parent);
    }

    /// Follows a prefix as far as blocks are ready.
    fn walk(cache: &PrefixCache, tokens: &[TokenId]) -> Vec<(EntryId, BlockId)> {
        let mut found: Vec<(EntryId, BlockId)> = Vec::new();
        for block in tokens.chunks_exact(2) {
            match cache.find(found.last().map_or(ROOT, |&(id, _)| Entry(id)), block) {
                Lookup::Ready(id, block) => found.push((id, block)),
                _ => break,
            }
        }
        found
    }

    proptest! {
        /// With a hash that collides all the time, a hit still means that the block was computed for this very prefix.
        #[test]
        fn a_hit_implies_the_same_tokens(
            sequences in prop::collection::vec(prop::collection::vec(0u32..3, 0..10), 1..24),
            evictions in prop::collection::vec(any::<u8>(), 0..24),
        ) {
            let mut cache = PrefixCache::with_hash(2, |tokens| u64::from(tokens[0] % 2));
            let mut content: HashMap<BlockId, Vec<TokenId>> = HashMap::new();
            let mut next_block = 0;
            for (index, tokens) in sequences.iter().enumerate() {
                let found = walk(&cache, tokens);
                for (depth, (_, block)) in found.iter().enumerate() {
                    prop_assert_eq!(&content[block][..], &tokens[..(depth + 1) * 2]);
                }
                let mut parent = found.last().map_or(ROOT, |&(id, _)| Entry(id));
                for depth in found.len()..tokens.len() / 2 {
                    let block = &tokens[depth * 2..depth * 2 + 2];
                    let Published::New(id) = cache.publish(parent, block, next_block, ME) else { break };
                    content.insert(next_block, tokens[..(depth + 1) * 2].to_vec());
                    next_block += 1;
                    parent = Entry(id);
                }
                if let Some(&choice) = evictions.get(index) {
                    evict_some_leaf(&mut cache, usize::from(choice));
                }
            }
        }
    }

    fn evict_some_leaf(cache: &mut PrefixCache, choice: usize) {
        let leaves: Vec<EntryId> = (0..cache.entries.len() as u32)
            .filter(|&slot| matches!(cache.entries[slot as usize].state, State::Ready(_)))
            .filter(|&slot| cache.entries[slot as usize].children == 0)
            .map(|slot| EntryId { slot, generation: cache.entries[slot as usize].generation })
            .collect();
        if let Some(&leaf) = leaves.get(choice % leaves.len().max(1)) {
            cache.evict(leaf);
        }
    }
}
