//! A sliding window of the datagram numbers that a session has used, like IPsec's (RFC 6479). Pure.

/// How far datagrams may arrive out of order.
const WINDOW: u64 = 1024;
const WORDS: usize = (WINDOW / 64) as usize;

/// Which of the last `WINDOW` numbers of a session have been seen.
pub(super) struct ReplayWindow {
    highest: u64,
    /// Bit `n % WINDOW` says whether number `n` has been seen.
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// Starts at `number`. All earlier numbers count as seen: an earlier window may have accepted them before the session was
    /// forgotten, and they must not be accepted again.
    pub(super) fn starting_at(number: u64) -> Self {
        Self { highest: number, seen: [u64::MAX; WORDS] }
    }

    /// Returns whether `number` is new, and marks it as seen.
    pub(super) fn accept(&mut self, number: u64) -> bool {
        if number > self.highest {
            let passed = (number - self.highest).min(WINDOW);
            for between in 1..passed {
                self.clear(self.highest.wrapping_add(between));
            }
            if passed == WINDOW {
                self.seen = [0; WORDS];
            }
            self.highest = number;
        } else if self.highest - number >= WINDOW || self.has(number) {
            return false;
        }
        let (word, bit) = place(number);
        self.seen[word] |= bit;
        true
    }

    fn has(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        self.seen[word] & bit != 0
    }

    fn clear(&mut self, number: u64) {
        let (word, bit) = place(number);
        self.seen[word] &= !bit;
    }
}

fn place(number: u64) -> (usize, u64) {
    ((number % WINDOW / 64) as usize, 1 << (number % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_came_before_the_window_counts_as_seen() {
        let mut window = ReplayWindow::starting_at(5000);
        assert!(!window.accept(5000) && !window.accept(4999) && !window.accept(0));
        assert!(window.accept(5002) && window.accept(5001));
        assert!(!window.accept(5001) && !window.accept(5002));
        assert!(window.accept(u64::MAX) && !window.accept(5003));
    }

    proptest! {
        /// Against a set of everything that was ever accepted: each number once, and none that is too old.
        #[test]
        fn it_agrees_with_a_set(start in 0u64..3000, steps in prop::collection::vec((0u64..1500, any::<bool>()), 1..200)) {
            let mut window = ReplayWindow::starting_at(start);
            let (mut accepted, mut highest) = (HashSet::new(), start);
            for (distance, is_ahead) in steps {
                let number = if is_ahead { highest + distance } else { highest.saturating_sub(distance) };
                let is_new = number > start && highest.saturating_sub(number) < WINDOW && accepted.insert(number);
                prop_assert_eq!(window.accept(number), is_new, "{} at {}", number, highest);
                highest = highest.max(number);
            }
        }
    }
}
