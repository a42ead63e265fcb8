//! Probabilities as integers, and what is decided with them: top-k, min-p, top-p and the draw.
//!
//! A weight exp((l - max) / T) in [0, 1] becomes an integer mass in units of 2^-44. Integer sums do not depend on their
//! order, so a cumulative sum over a partially sorted row is exactly that of the fully sorted one, and the draw can neither
//! fall off the end of the row nor depend on how it was summed. What is lost are tokens less likely than the most likely
//! one by a factor of 2^45.

use crate::vocab;

use super::TokenId;

/// The mass of the most likely token.
pub(crate) const UNIT: u64 = 1 << UNIT_BITS;
const UNIT_BITS: u32 = 44;
/// Bits of a candidate that hold the token id. The sum over a whole vocabulary of this size stays below 2^64.
const ID_BITS: u32 = 20;
pub const MAX_VOCAB_SIZE: usize = (1 << ID_BITS) - 1;

/// Tokens whose masses are summed as a unit, before the draw examines single tokens.
const CHUNK: usize = 512;
/// Tokens that share one maximum in the search for the top k, and that a scan for candidates can skip together.
const GROUP: usize = 64;
/// Below this many candidates, sorting is faster than further partitioning.
const SORT_BELOW: usize = 48;

/// A weight's integer mass. Adding 256 leaves the mass in the low mantissa bits, rounded to nearest.
fn mass(weight: f32) -> u64 {
    const SHIFT: f64 = 256.0; // 2^(52 - UNIT_BITS)
    let weight = if weight < 1.0 { weight } else { 1.0 };
    (f64::from(weight) + SHIFT).to_bits() - SHIFT.to_bits()
}

/// A token of positive mass, packed so that ascending order is descending mass, then ascending id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate(u64);

impl Candidate {
    fn new(mass: u64, id: usize) -> Self {
        debug_assert!((1..=UNIT).contains(&mass) && id <= MAX_VOCAB_SIZE);
        Self((UNIT - mass) << ID_BITS | id as u64)
    }

    fn mass(self) -> u64 {
        UNIT - (self.0 >> ID_BITS)
    }

    fn id(self) -> TokenId {
        (self.0 & MAX_VOCAB_SIZE as u64) as TokenId
    }
}

/// Truncation of a distribution before the draw.
#[derive(Clone, Copy, Debug)]
pub struct Truncation {
    /// Keep the k highest logits, ties by lower id; 0 is off.
    pub top_k: u32,
    /// Keep what is at least this fraction of the most likely token; 0 is off.
    pub min_p: f32,
    /// Of what the other two leave, keep the fewest most likely tokens that reach this share; 1 is off.
    pub top_p: f32,
}

impl Truncation {
    pub const OFF: Self = Self { top_k: 0, min_p: 0.0, top_p: 1.0 };

    /// The least mass that `min_p` leaves: 1 when it is off, since a token without mass is never drawn.
    pub fn min_mass(&self) -> u64 {
        ((f64::from(self.min_p) * UNIT as f64).ceil() as u64).clamp(1, UNIT)
    }
}

/// ln of the sum of exp(logit - max) over a row whose masses at temperature 1 sum to `total`.
pub fn ln_sum_exp(total: u64) -> f64 {
    vocab::ln(total as f64 / UNIT as f64)
}

/// Scratch memory for rows of one vocabulary, so that a step does not allocate.
pub struct Masses {
    weights: Vec<f32>,
    chunk_masses: Vec<u64>,
    group_keys: Vec<u32>,
    top_keys: Vec<u64>,
    candidates: Vec<Candidate>,
    partition: Vec<Candidate>,
}

impl Masses {
    pub fn new(vocab_size: usize) -> Self {
        assert!((1..=MAX_VOCAB_SIZE).contains(&vocab_size), "the vocabulary must have 1 to {MAX_VOCAB_SIZE} tokens");
        Self {
            weights: vec![0.0; vocab_size],
            chunk_masses: Vec::with_capacity(vocab_size.div_ceil(CHUNK)),
            group_keys: Vec::with_capacity(vocab_size.div_ceil(GROUP)),
            top_keys: Vec::with_capacity(vocab_size),
            candidates: Vec::with_capacity(vocab_size),
            partition: Vec::with_capacity(vocab_size),
        }
    }

    /// The mass of the whole row at temperature 1; [`ln_sum_exp`] takes its logarithm.
    pub fn total(&mut self, logits: &[f32], max: f32) -> u64 {
        vocab::exp_scaled(logits, max, 1.0, &mut self.weights);
        self.sum_chunks()
    }

    /// Draws a token with the given uniform bits. `max` is the row's maximum, finite; `scale` is 1 / temperature, finite.
    pub fn draw(&mut self, logits: &[f32], max: f32, scale: f32, truncation: Truncation, bits: u64) -> TokenId {
        vocab::exp_scaled(logits, max, scale, &mut self.weights);
        let min_mass = truncation.min_mass();
        let top_k = truncation.top_k as usize;
        if top_k > 0 && top_k < logits.len() {
            self.gather_top_k(logits, top_k, min_mass);
        } else if truncation.min_p > 0.0 {
            self.gather(min_mass);
        } else if truncation.top_p < 1.0 {
            let total = self.sum_chunks();
            // All tokens dropped here together have less mass than the tail that top-p cuts off, so the cut lies among the
            // gathered ones.
            let tail = total - top_p_mass(truncation.top_p, total);
            self.gather(tail / logits.len() as u64 + 1);
            self.cut_top_p(top_p_mass(truncation.top_p, total));
            return self.draw_candidate(bits);
        } else {
            return self.draw_any(bits);
        }
        if truncation.top_p < 1.0 {
            let total = self.candidates.iter().map(|candidate| candidate.mass()).sum();
            self.cut_top_p(top_p_mass(truncation.top_p, total));
        }
        self.draw_candidate(bits)
    }

    /// Fills `top` with the `k` tokens of the highest logits, best first, ties by lower id.
    pub fn top(&mut self, logits: &[f32], k: usize, top: &mut Vec<TokenId>) {
        self.select_top_keys(logits, k);
        self.top_keys.sort_unstable();
        top.clear();
        top.extend(self.top_keys.iter().map(|&key| key as u32));
    }

    /// Sums the masses of all tokens, chunk by chunk.
    fn sum_chunks(&mut self) -> u64 {
        self.chunk_masses.clear();
        self.chunk_masses
            .extend(self.weights.chunks(CHUNK).map(|chunk| chunk.iter().map(|&weight| mass(weight)).sum::<u64>()));
        self.chunk_masses.iter().sum()
    }

    /// The candidates of at least `min_mass`, by ascending id.
    fn gather(&mut self, min_mass: u64) {
        // A weight that rounds to `min_mass` is at least half a unit below it; the margin covers the rounding to f32.
        let bound = ((min_mass as f64 - 0.5) / UNIT as f64 * (1.0 - 1e-6)) as f32;
        self.candidates.clear();
        for (group, weights) in self.weights.chunks(GROUP).enumerate() {
            if !weights.iter().fold(false, |any, &weight| any | (weight >= bound)) {
                continue;
            }
            for (offset, &weight) in weights.iter().enumerate() {
                let mass = mass(weight);
                if mass >= min_mass {
                    self.candidates.push(Candidate::new(mass, group * GROUP + offset));
                }
            }
        }
    }

    /// The candidates among the `k` highest logits of at least `min_mass`, by ascending id.
    fn gather_top_k(&mut self, logits: &[f32], k: usize, min_mass: u64) {
        self.select_top_keys(logits, k);
        self.candidates.clear();
        for &key in &self.top_keys {
            let id = key as u32 as usize;
            let mass = mass(self.weights[id]);
            if mass >= min_mass {
                self.candidates.push(Candidate::new(mass, id));
            }
        }
        self.candidates.sort_unstable_by_key(|candidate| candidate.id());
    }

    /// Leaves the keys of the `k` highest logits in `top_keys`, in no particular order.
    fn select_top_keys(&mut self, logits: &[f32], k: usize) {
        self.top_keys.clear();
        if k == 0 {
            return;
        }
        // Each of the k groups with the largest maxima holds a logit at least as large as the smallest of those maxima,
        // so no logit below that bound is among the top k.
        self.group_keys.clear();
        self.group_keys.extend(logits.chunks(GROUP).map(|group| descending(group_max(group))));
        let bound = if k < self.group_keys.len() {
            self.partition.clear();
            self.partition.extend(self.group_keys.iter().map(|&key| Candidate(u64::from(key))));
            self.partition.select_nth_unstable(k - 1).1.0 as u32
        } else {
            u32::MAX
        };
        for (group, logits) in logits.chunks(GROUP).enumerate() {
            if self.group_keys[group] > bound {
                continue;
            }
            for (offset, &logit) in logits.iter().enumerate() {
                let key = descending(logit);
                if key <= bound {
                    self.top_keys.push(u64::from(key) << 32 | (group * GROUP + offset) as u64);
                }
            }
        }
        if k < self.top_keys.len() {
            self.top_keys.select_nth_unstable(k - 1);
            self.top_keys.truncate(k);
        }
    }

    /// Keeps the fewest most likely candidates whose mass reaches `target`. All candidates together reach it.
    fn cut_top_p(&mut self, target: u64) {
        self.partition.clear();
        self.partition.extend_from_slice(&self.candidates);
        let last = last_within(&mut self.partition, target);
        self.candidates.retain(|&candidate| candidate <= last);
    }

    fn draw_candidate(&self, bits: u64) -> TokenId {
        let total = self.candidates.iter().map(|candidate| candidate.mass()).sum();
        let mut left = point(bits, total);
        for candidate in &self.candidates {
            if left < candidate.mass() {
                return candidate.id();
            }
            left -= candidate.mass();
        }
        unreachable!("the point lies within the total mass, and the most likely token is always a candidate")
    }

    fn draw_any(&mut self, bits: u64) -> TokenId {
        let total = self.sum_chunks();
        let mut left = point(bits, total);
        for (chunk, &chunk_mass) in self.chunk_masses.iter().enumerate() {
            if left >= chunk_mass {
                left -= chunk_mass;
                continue;
            }
            for (id, &weight) in self.weights.iter().enumerate().skip(chunk * CHUNK) {
                let mass = mass(weight);
                if left < mass {
                    return id as TokenId;
                }
                left -= mass;
            }
        }
        unreachable!("the point lies within the total mass")
    }
}

/// The mass that a nucleus of share `top_p` must reach: at least 1, below `total` unless rounded up to it.
fn top_p_mass(top_p: f32, total: u64) -> u64 {
    ((f64::from(top_p) * total as f64).ceil() as u64).clamp(1, total)
}

/// A point in `0..total`, uniform.
fn point(bits: u64, total: u64) -> u64 {
    ((u128::from(bits) * u128::from(total)) >> 64) as u64
}

/// The candidate at which the masses, summed in ascending order of candidates, reach `target`. Partitions like
/// quickselect, in linear time. The sum of all reaches it.
fn last_within(mut candidates: &mut [Candidate], target: u64) -> Candidate {
    let mut before = 0;
    while candidates.len() > SORT_BELOW {
        let middle = candidates.len() / 2;
        let (left, &mut pivot, right) = candidates.select_nth_unstable(middle);
        let with_left = before + left.iter().map(|candidate| candidate.mass()).sum::<u64>();
        if with_left >= target {
            candidates = left;
        } else if with_left + pivot.mass() >= target {
            return pivot;
        } else {
            before = with_left + pivot.mass();
            candidates = right;
        }
    }
    candidates.sort_unstable();
    for &candidate in candidates.iter() {
        before += candidate.mass();
        if before >= target {
            return candidate;
        }
    }
    unreachable!("all candidates together reach the target")
}

fn group_max(group: &[f32]) -> f32 {
    group.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// A key whose ascending order is the logits' descending one; both zeros have the same key.
fn descending(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    !ascending
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, implemented by a full sort.
    fn reference(logits: &[f32], scale: f32, truncation: Truncation, bits: u64) -> TokenId {
        let max = vocab::max(logits).unwrap();
        let mut weights = vec![0.0; logits.len()];
        vocab::exp_scaled(logits, max, scale, &mut weights);
        let mut masses: Vec<u64> = weights.iter().map(|&weight| mass(weight)).collect();
        if truncation.top_k > 0 {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap());
            order.iter().skip(truncation.top_k as usize).for_each(|&id| masses[id] = 0);
        }
        let least = f64::from(truncation.min_p) * UNIT as f64;
        masses.iter_mut().filter(|mass| (**mass as f64) < least).for_each(|mass| *mass = 0);
        if truncation.top_p < 1.0 {
            let limit = f64::from(truncation.top_p) * masses.iter().sum::<u64>() as f64;
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by_key(|&id| std::cmp::Reverse(masses[id]));
            let mut before = 0;
            for id in order {
                let mass = masses[id];
                if before as f64 >= limit {
                    masses[id] = 0;
                }
                before += mass;
            }
        }
        let mut left = point(bits, masses.iter().sum());
        for (id, &mass) in masses.iter().enumerate() {
            if left < mass {
                return id as TokenId;
            }
            left -= mass;
        }
        panic!("nothing drawn");
    }

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            4 => -8.0_f32..8.0,
            2 => (-6_i8..6).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
            1 => Just(-0.0_f32),
        ];
        prop::collection::vec(value, 1..700).prop_map(|mut row| {
            row[0] = row[0].max(-8.0);
            row
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn draws_what_the_full_sort_draws(
            logits in logits(),
            temperature in prop_oneof![Just(1.0_f32), 0.05_f32..3.0, Just(1e-4_f32), Just(1e4_f32)],
            top_k in prop_oneof![Just(0_u32), 1_u32..12, 1_u32..800],
            min_p in prop_oneof![Just(0.0_f32), 0.0_f32..1.0, Just(1.0_f32)],
            top_p in prop_oneof![Just(1.0_f32), 0.001_f32..0.999, Just(1e-9_f32), Just(0.999_999_94_f32)],
            bits in prop::collection::vec(prop_oneof![any::<u64>(), Just(0_u64), Just(u64::MAX)], 8),
        ) {
            let truncation = Truncation { top_k, min_p, top_p };
            let max = vocab::max(&logits).unwrap();
            let mut masses = Masses::new(logits.len());
            for bits in bits {
                let drawn = masses.draw(&logits, max, 1.0 / temperature, truncation, bits);
                prop_assert_eq!(drawn, reference(&logits, 1.0 / temperature, truncation, bits));
            }
        }

        #[test]
        fn top_is_the_head_of_the_full_sort(logits in logits(), k in 0_usize..800) {
            let mut order: Vec<TokenId> = (0..logits.len() as TokenId).collect();
            order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
            order.truncate(k);
            let mut top = Vec::new();
            Masses::new(logits.len()).top(&logits, k, &mut top);
            prop_assert_eq!(top, order);
        }
    }

    #[test]
    fn masses_are_exact_at_their_ends() {
        assert_eq!(mass(0.0), 0);
        assert_eq!(mass(1.0), UNIT);
        assert_eq!(mass(0.5), UNIT / 2);
        assert_eq!(mass(1.000_001), UNIT);
        let mut weights = [0.0; 2];
        vocab::exp_scaled(&[3.0, f32::NEG_INFINITY], 3.0, 0.7, &mut weights);
        assert_eq!(weights.map(mass), [UNIT, 0], "min_p counts on the most likely token's mass");
        let candidate = Candidate::new(12_345, 49_151);
        assert_eq!((candidate.mass(), candidate.id()), (12_345, 49_151));
    }

    #[test]
    fn the_largest_vocabulary_of_equals_does_not_overflow() {
        let row = vec![1.0; MAX_VOCAB_SIZE];
        let mut masses = Masses::new(row.len());
        assert_eq!(masses.draw(&row, 1.0, 1.0, Truncation::OFF, u64::MAX), MAX_VOCAB_SIZE as TokenId - 1);
        let nucleus = Truncation { top_p: 0.5, ..Truncation::OFF };
        assert_eq!(masses.draw(&row, 1.0, 1.0, nucleus, u64::MAX), (MAX_VOCAB_SIZE as TokenId).div_ceil(2) - 1);
    }
}
