//! Splits a message into fragments that fit a datagram, and reassembles them. Every buffer is bounded. Pure; time is passed
//! in.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::keys::SessionId;

/// The most fragments of one message. Chitchat's messages have at most 64 KiB.
pub(super) const MAX_FRAGMENTS: usize = 64;
/// The most incomplete messages, per sender and in all.
const MAX_PER_SENDER: usize = 4;
const MAX_PARTIALS: usize = 128;
/// The most bytes in incomplete messages.
const MAX_BYTES: usize = 2 << 20;
/// An incomplete message is dropped after this long: its fragments are sent at once, so a missing one is lost.
const MAX_AGE: Duration = Duration::from_secs(2);

/// One fragment of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment<'a> {
    /// The number of the message, counted by the sender.
    pub(super) message: u32,
    pub(super) index: u8,
    pub(super) count: u8,
    pub(super) bytes: &'a [u8],
}

impl Fragment<'_> {
    fn is_sound(&self) -> bool {
        (1..=MAX_FRAGMENTS).contains(&usize::from(self.count)) && self.index < self.count
    }
}

/// `None` when the message is too long.
pub(super) fn split(message: u32, bytes: &[u8], size: usize) -> Option<impl Iterator<Item = Fragment<'_>>> {
    let count = bytes.len().div_ceil(size).max(1);
    if count > MAX_FRAGMENTS {
        return None;
    }
    let piece = move |index: usize| &bytes[index * size..bytes.len().min((index + 1) * size)];
    let fragment = move |index| Fragment { message, index: index as u8, count: count as u8, bytes: piece(index) };
    Some((0..count).map(fragment))
}

/// The result of adding a fragment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Joined {
    Message(Vec<u8>),
    /// Other fragments of the message are missing.
    Waiting,
    /// It contradicts the other fragments of its message.
    Unsound,
}

/// Incomplete messages, oldest first.
#[derive(Default)]
pub(super) struct Reassembly {
    partials: VecDeque<Partial>,
    /// Bytes of all partial messages.
    bytes: usize,
    /// Messages dropped since the last `take_given_up`.
    given_up: u64,
}

struct Partial {
    sender: SessionId,
    message: u32,
    since: Instant,
    pieces: Vec<Option<Box<[u8]>>>,
    missing: usize,
    bytes: usize,
}

impl Reassembly {
    pub(super) fn add(&mut self, sender: SessionId, fragment: Fragment<'_>, now: Instant) -> Joined {
        self.give_up_old(now);
        if !fragment.is_sound() {
            return Joined::Unsound;
        }
        if fragment.count == 1 {
            return Joined::Message(fragment.bytes.to_vec());
        }
        while self.bytes + fragment.bytes.len() > MAX_BYTES {
            self.give_up(0);
        }
        let at = match self.position(&sender, fragment.message) {
            Some(at) => at,
            None => self.begin(sender, fragment, now),
        };
        let partial = &mut self.partials[at];
        if partial.pieces.len() != usize::from(fragment.count) {
            self.give_up(at);
            return Joined::Unsound;
        }
        let slot = &mut partial.pieces[usize::from(fragment.index)];
        if slot.is_none() {
            *slot = Some(fragment.bytes.into());
            partial.missing -= 1;
            partial.bytes += fragment.bytes.len();
            self.bytes += fragment.bytes.len();
        }
        if partial.missing == 0 { Joined::Message(self.remove(at)) } else { Joined::Waiting }
    }

    /// The number of messages dropped since the last call.
    pub(super) fn take_given_up(&mut self) -> u64 {
        std::mem::take(&mut self.given_up)
    }

    fn position(&self, sender: &SessionId, message: u32) -> Option<usize> {
        self.partials.iter().position(|partial| partial.message == message && partial.sender == *sender)
    }

    /// Makes room for one more message, dropping the oldest if necessary, and returns its index.
    fn begin(&mut self, sender: SessionId, first: Fragment<'_>, now: Instant) -> usize {
        let of_sender = |partial: &Partial| partial.sender == sender;
        if self.partials.iter().filter(|partial| of_sender(partial)).count() >= MAX_PER_SENDER {
            let oldest = self.partials.iter().position(of_sender).expect("the sender has some");
            self.give_up(oldest);
        }
        if self.partials.len() >= MAX_PARTIALS {
            self.give_up(0);
        }
        let count = usize::from(first.count);
        let pieces = (0..count).map(|_| None).collect();
        self.partials.push_back(Partial {
            sender,
            message: first.message,
            since: now,
            pieces,
            missing: count,
            bytes: 0,
        });
        self.partials.len() - 1
    }

    fn give_up_old(&mut self, now: Instant) {
        while self.partials.front().is_some_and(|partial| now.saturating_duration_since(partial.since) > MAX_AGE) {
            self.give_up(0);
        }
    }

    fn give_up(&mut self, at: usize) {
        self.remove(at);
        self.given_up += 1;
    }

    /// Returns what there is of it.
    fn remove(&mut self, at: usize) -> Vec<u8> {
        let partial = self.partials.remove(at).expect("in range");
        self.bytes -= partial.bytes;
        partial.pieces.into_iter().flatten().collect::<Vec<_>>().concat()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SENDER: SessionId = [1; 16];

    #[test]
    fn a_message_that_is_too_long_is_refused() {
        assert_eq!(split(0, &[0; 10 * MAX_FRAGMENTS], 10).map(Iterator::count), Some(MAX_FRAGMENTS));
        assert!(split(0, &[0; 10 * MAX_FRAGMENTS + 1], 10).is_none());
        assert_eq!(split(0, &[], 10).map(Iterator::count), Some(1));
    }

    #[tokio::test]
    async fn what_stays_incomplete_is_given_up_and_counted() {
        let mut reassembly = Reassembly::default();
        let start = Instant::now();
        let half = |message| Fragment { message, index: 0, count: 2, bytes: &[0; 1000] };
        for message in 0..MAX_PER_SENDER as u32 {
            assert_eq!(reassembly.add(SENDER, half(message), start), Joined::Waiting);
        }
        assert_eq!(reassembly.take_given_up(), 0);
        reassembly.add(SENDER, half(9), start);
        assert_eq!((reassembly.take_given_up(), reassembly.partials.len()), (1, MAX_PER_SENDER));
        for sender in 0..=u8::MAX {
            reassembly.add([sender; 16], half(0), start);
        }
        assert!(reassembly.partials.len() <= MAX_PARTIALS);
        let late = start + MAX_AGE + Duration::from_millis(1);
        let whole = Fragment { message: 0, index: 0, count: 1, bytes: b"x" };
        assert_eq!(reassembly.add(SENDER, whole, late), Joined::Message(b"x".to_vec()));
        assert_eq!((reassembly.partials.len(), reassembly.bytes), (0, 0));
        assert!(reassembly.take_given_up() >= MAX_PARTIALS as u64);
    }

    #[tokio::test]
    async fn a_fragment_that_contradicts_the_others_ends_its_message() {
        let mut reassembly = Reassembly::default();
        let now = Instant::now();
        let fragment = |index, count| Fragment { message: 3, index, count, bytes: b"ab" };
        assert_eq!(reassembly.add(SENDER, fragment(0, 3), now), Joined::Waiting);
        assert_eq!(reassembly.add(SENDER, fragment(1, 4), now), Joined::Unsound);
        assert_eq!(reassembly.add(SENDER, fragment(2, 2), now), Joined::Unsound);
        assert_eq!(reassembly.add(SENDER, fragment(0, 0), now), Joined::Unsound);
        assert_eq!(reassembly.add(SENDER, fragment(0, 255), now), Joined::Unsound);
        assert_eq!(reassembly.bytes, 0);
    }

    proptest! {
        /// In any order, among the pieces of another message of the same number from another sender.
        #[test]
        fn pieces_make_the_message_again(bytes in prop::collection::vec(any::<u8>(), 0..4000), seed in any::<u64>()) {
            let mut pieces: Vec<Fragment<'_>> = split(7, &bytes, 100).expect("short enough").collect();
            let mut state = seed;
            for at in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(at, (state >> 33) as usize % (at + 1));
            }
            let mut reassembly = Reassembly::default();
            let now = Instant::now();
            let last = pieces.pop().expect("at least one");
            for piece in pieces {
                prop_assert_eq!(reassembly.add(SENDER, piece, now), Joined::Waiting);
                reassembly.add([2; 16], Fragment { bytes: b"other", ..piece }, now);
            }
            prop_assert_eq!(reassembly.add(SENDER, last, now), Joined::Message(bytes.clone()));
        }

        #[test]
        fn no_fragments_break_the_bounds(
            fragments in prop::collection::vec((0u8..200, 0u32..8, any::<u8>(), any::<u8>(), 0usize..1200), 0..600)
        ) {
            let mut reassembly = Reassembly::default();
            let now = Instant::now();
            let zeros = [0; 1200];
            for (sender, message, index, count, len) in fragments {
                let fragment = Fragment { message, index, count, bytes: &zeros[..len] };
                reassembly.add([sender; 16], fragment, now);
                prop_assert!(reassembly.partials.len() <= MAX_PARTIALS && reassembly.bytes <= MAX_BYTES + 1200);
                prop_assert_eq!(reassembly.bytes, reassembly.partials.iter().map(|partial| partial.bytes).sum::<usize>());
            }
        }
    }
}
