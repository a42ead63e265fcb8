//! Counter-based randomness: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC
//! 2011). The random bits of a position are a function of (seed, position); there is no generator state.

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
/// The golden ratio and the square root of three minus one, as fractions of 2^32.
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;
const ROUNDS: u32 = 10;

/// The last counter word separates the uses of the generator: positions of a stream, and seeds of choices.
const DOMAIN_POSITION: u32 = 0;
const DOMAIN_CHOICE: u32 = 1;

/// 64 uniform bits for the token at `position` (counted from the end of the prompt) of the stream with this seed.
pub fn bits_at(seed: u64, position: u64) -> u64 {
    draw(seed, position, DOMAIN_POSITION)
}

/// The seed of choice `choice` of a request. Choice 0 keeps the request's own seed, so that `n = 1` and the first of
/// several choices are the same stream.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    if choice == 0 { seed } else { draw(seed, u64::from(choice), DOMAIN_CHOICE) }
}

fn draw(key: u64, counter: u64, domain: u32) -> u64 {
    let words = philox4x32_10([counter as u32, (counter >> 32) as u32, 0, domain], [key as u32, (key >> 32) as u32]);
    u64::from(words[0]) | u64::from(words[1]) << 32
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let product_0 = u64::from(MULTIPLIER_0) * u64::from(counter[0]);
        let product_1 = u64::from(MULTIPLIER_1) * u64::from(counter[2]);
        counter = [
            (product_1 >> 32) as u32 ^ counter[1] ^ key[0],
            product_1 as u32,
            (product_0 >> 32) as u32 ^ counter[3] ^ key[1],
            product_0 as u32,
        ];
        key = [key[0].wrapping_add(WEYL_0), key[1].wrapping_add(WEYL_1)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three vectors for philox4x32 with 10 rounds that the authors publish with Random123.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn choice_zero_keeps_the_seed_and_others_differ() {
        assert_eq!(choice_seed(7, 0), 7);
        let seeds: std::collections::HashSet<u64> = (0..1000).map(|choice| choice_seed(7, choice)).collect();
        assert_eq!(seeds.len(), 1000);
        assert_ne!(choice_seed(7, 1), choice_seed(8, 1));
        assert_ne!(choice_seed(7, 1), bits_at(7, 1), "the two uses must not share bits");
    }

    #[test]
    fn all_bits_of_seed_and_position_count() {
        let base = bits_at(0, 0);
        for bit in 0..64 {
            assert_ne!(bits_at(1 << bit, 0), base);
            assert_ne!(bits_at(0, 1 << bit), base);
        }
    }
}
