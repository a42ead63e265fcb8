//! Tracks which prompt beginnings are probably in this node's prefix cache, in a form small enough to gossip. It does not look
//! at the cache: it remembers what was served recently. A wrong guess costs a prefill, never a token.

use std::collections::HashMap;

use smallvec::SmallVec;
use xxhash_rust::xxh3::Xxh3;

use crate::cluster::load_report::MAX_HOT_PREFIXES;
use crate::types::{CacheSalt, TokenId};

/// Shorter beginnings are not worth a hop.
const SHORTEST: usize = 16;
/// Beginnings of 16, 32, 64 … 65,536 tokens are tracked.
const LEVELS: usize = 13;
/// Beginnings that are remembered; the least recently used is dropped first.
const MAX_REMEMBERED: usize = 1024;
/// After this many prompts every use count is halved, so that old favourites fade.
const PROMPTS_PER_HALVING: u32 = 512;

/// Hashes of a prompt's beginnings, the shortest first; empty for a prompt below the shortest.
pub type PrefixHashes = SmallVec<[u32; LEVELS]>;

/// Hashes the beginnings of a prompt. Prompts with different salts share no hashes. The hashes are equal on every machine.
pub fn hashes(prompt: &[TokenId], salt: Option<CacheSalt>) -> PrefixHashes {
    let mut hasher = Xxh3::new();
    if let Some(salt) = salt {
        hasher.update(salt.bytes());
    }
    let mut hashes = PrefixHashes::new();
    let mut hashed = 0;
    for length in lengths().take_while(|&length| length <= prompt.len()) {
        prompt[hashed..length].iter().for_each(|token| hasher.update(&token.to_le_bytes()));
        hashed = length;
        // The lower half. A collision costs an unnecessary hop.
        hashes.push(hasher.digest() as u32);
    }
    hashes
}

/// How many tokens of the prompt with these hashes a node with this digest probably has in its cache.
pub fn matched_tokens(hashes: &[u32], digest: &[u32]) -> usize {
    let levels = hashes.iter().zip(lengths()).rev();
    levels.into_iter().find(|(hash, _)| digest.contains(hash)).map_or(0, |(_, length)| length)
}

fn lengths() -> impl DoubleEndedIterator<Item = usize> + ExactSizeIterator {
    (0..LEVELS).map(|level| SHORTEST << level)
}

#[derive(Debug, Default)]
pub struct HotPrefixes {
    prefixes: HashMap<u32, Heat>,
    /// Counts prompts, as a measure of time.
    prompts: u64,
    until_halving: u32,
}

#[derive(Clone, Copy, Debug)]
struct Heat {
    uses: u32,
    last_used: u64,
    level: u8,
}

impl HotPrefixes {
    /// A prompt with these hashes was served here.
    pub fn record(&mut self, hashes: &[u32]) {
        self.prompts += 1;
        self.cool();
        for (level, &hash) in hashes.iter().enumerate() {
            let heat = self.prefixes.entry(hash).or_insert(Heat { uses: 0, last_used: 0, level: level as u8 });
            heat.uses = heat.uses.saturating_add(1);
            heat.last_used = self.prompts;
        }
        if self.prefixes.len() > MAX_REMEMBERED {
            self.forget_coldest();
        }
    }

    /// The hottest hashes, at most [`MAX_HOT_PREFIXES`]: by use count, then by recency, then shorter first.
    pub fn digest(&self) -> Vec<u32> {
        let mut hottest: Vec<(u32, Heat)> = self.prefixes.iter().map(|(&hash, &heat)| (hash, heat)).collect();
        hottest.sort_unstable_by(|(hash, heat), (other_hash, other)| {
            let by_heat = (other.uses, other.last_used).cmp(&(heat.uses, heat.last_used));
            by_heat.then(heat.level.cmp(&other.level)).then(hash.cmp(other_hash))
        });
        hottest.truncate(MAX_HOT_PREFIXES);
        hottest.into_iter().map(|(hash, _)| hash).collect()
    }

    fn cool(&mut self) {
        self.until_halving += 1;
        if self.until_halving >= PROMPTS_PER_HALVING {
            self.until_halving = 0;
            self.prefixes.values_mut().for_each(|heat| heat.uses = heat.uses.div_ceil(2));
        }
    }

    /// Drops a quarter of the entries, so that this is rarely necessary.
    fn forget_coldest(&mut self) {
        let mut times: Vec<u64> = self.prefixes.values().map(|heat| heat.last_used).collect();
        let (_, oldest_kept, _) = times.select_nth_unstable(self.prefixes.len() - MAX_REMEMBERED * 3 / 4);
        let oldest_kept = *oldest_kept;
        self.prefixes.retain(|_, heat| heat.last_used >= oldest_kept);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hashes(prompt: &[TokenId]) -> PrefixHashes {
        super::hashes(prompt, None)
    }

    #[test]
    fn prompts_of_different_salts_share_no_beginning() {
        let prompt = prompt(1, 300);
        let salted = |byte| super::hashes(&prompt, Some(CacheSalt::new([byte; 16])));
        let mut hot = HotPrefixes::default();
        hot.record(&salted(1));
        assert_eq!(matched_tokens(&salted(1), &hot.digest()), 256);
        assert_eq!(matched_tokens(&salted(2), &hot.digest()), 0);
        assert_eq!(matched_tokens(&hashes(&prompt), &hot.digest()), 0);
    }

    fn prompt(seed: u32, length: usize) -> Vec<TokenId> {
        (0..length as u32).map(|index| seed.wrapping_mul(7919).wrapping_add(index.wrapping_mul(index))).collect()
    }

    #[test]
    fn a_prompt_has_a_hash_for_each_of_its_beginnings() {
        assert_eq!(hashes(&prompt(1, 15)).len(), 0);
        assert_eq!(hashes(&prompt(1, 16)).len(), 1);
        assert_eq!(hashes(&prompt(1, 2047)).len(), 7);
        assert_eq!(hashes(&prompt(1, 2048)).len(), 8);
        assert_eq!(hashes(&prompt(1, 200_000)).len(), LEVELS);
        assert_eq!(hashes(&[0; 16])[0], 0xc12c_256e, "nodes of all machines agree");
    }

    #[test]
    fn the_longest_common_beginning_counts() {
        let mut hot = HotPrefixes::default();
        hot.record(&hashes(&prompt(1, 300)));
        let digest = hot.digest();
        let mut other = prompt(1, 300);
        assert_eq!(matched_tokens(&hashes(&other), &digest), 256);
        other[200] += 1;
        assert_eq!(matched_tokens(&hashes(&other), &digest), 128);
        other[3] += 1;
        assert_eq!(matched_tokens(&hashes(&other), &digest), 0);
        assert_eq!(matched_tokens(&[], &digest), 0);
    }

    #[test]
    fn a_shared_beginning_outlives_the_prompts_that_share_it() {
        let mut hot = HotPrefixes::default();
        let system = prompt(0, 64);
        for user in 1..5000 {
            let whole = [system.as_slice(), &prompt(user, 200)].concat();
            hot.record(&hashes(&whole));
        }
        let digest = hot.digest();
        assert_eq!(digest.len(), MAX_HOT_PREFIXES);
        assert_eq!(digest[..3], hashes(&system)[..], "the shortest first among equals");
        let last = [system.as_slice(), &prompt(4999, 200)].concat();
        assert_eq!(matched_tokens(&hashes(&last), &digest), 256, "what was served last is there as well");
    }

    #[test]
    fn a_favourite_of_long_ago_cools_down() {
        let mut hot = HotPrefixes::default();
        (0..2000).for_each(|_| hot.record(&hashes(&prompt(1, 16))));
        (0..20_000).for_each(|_| hot.record(&hashes(&prompt(2, 16))));
        assert_eq!(hot.digest()[0], hashes(&prompt(2, 16))[0]);
        (0..MAX_REMEMBERED as u32 + 1).for_each(|seed| hot.record(&hashes(&prompt(seed + 10, 16))));
        assert!(!hot.digest().contains(&hashes(&prompt(1, 16))[0]));
    }

    proptest! {
        #[test]
        fn memory_and_digest_are_bounded(seeds in prop::collection::vec((0u32..400, 0usize..3000), 1..400)) {
            let mut hot = HotPrefixes::default();
            for (seed, length) in seeds {
                let own = hashes(&prompt(seed, length));
                hot.record(&own);
                prop_assert!(hot.prefixes.len() <= MAX_REMEMBERED);
                let digest = hot.digest();
                prop_assert!(digest.len() <= MAX_HOT_PREFIXES);
                let matched = matched_tokens(&own, &digest);
                prop_assert!(matched <= length);
            }
        }

        #[test]
        fn a_match_is_a_true_common_beginning(length in 0usize..600, cut in 0usize..600) {
            let mut hot = HotPrefixes::default();
            let served = prompt(3, length);
            hot.record(&hashes(&served));
            let mut other = served.clone();
            let cut = cut.min(length);
            other.truncate(cut);
            other.extend([77; 50]);
            let matched = matched_tokens(&hashes(&other), &hot.digest());
            let common = served.iter().zip(&other).take_while(|(a, b)| a == b).count();
            let expected = lengths().rfind(|&length| length <= common).unwrap_or(0);
            prop_assert_eq!(matched, expected);
        }
    }
}
