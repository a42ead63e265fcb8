//! Converts the rows' parameters to the words that the kernels read: `SampleRow` of sample.cuh.

use super::{DeviceRow, Passes};
use crate::sample::{Changes, Occurrence};

pub(super) const HEADER_WORDS: usize = 8;
pub(super) const ROW_WORDS: usize = 20;

const DRAW: u32 = 1;
const GATHER: u32 = 2;
const NUCLEUS: u32 = 4;
const LOGPROBS: u32 = 8;
const ALLOWED: u32 = 16;
const PENALTIES: u32 = 32;
const NONE: u32 = u32::MAX;

/// The lists of all rows, one behind the other.
pub(super) struct RowList<'a> {
    words: &'a mut [u32],
    len: usize,
}

impl<'a> RowList<'a> {
    pub(super) fn new(words: &'a mut [u32]) -> Self {
        Self { words, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The index of the next pushed word.
    fn place(&self) -> u32 {
        u32::try_from(self.len).expect("the lists of a step have less than 2^32 words")
    }

    fn push(&mut self, words: &[u32]) {
        self.words[self.len..][..words.len()].copy_from_slice(words);
        self.len += words.len();
    }
}

/// Words that the lists of a row take.
pub(super) fn list_words(row: &DeviceRow<'_>, vocab_size: usize) -> usize {
    let changes = &row.params.changes;
    let mask = if changes.allowed.is_some() { vocab_size.div_ceil(32) } else { 0 };
    2 * changes.bias.len() + changes.barred.len() + 2 * occurrences(changes).len() + mask
}

fn occurrences<'a>(changes: &Changes<'a>) -> &'a [Occurrence] {
    if changes.penalties.is_off() { &[] } else { changes.occurrences }
}

/// One row's words, its lists pushed to `list`, and the passes it needs.
pub(super) fn row_words(
    row: &DeviceRow<'_>,
    vocab_size: usize,
    logprobs: Option<usize>,
    list: &mut RowList<'_>,
) -> ([u32; ROW_WORDS], Passes) {
    let params = &row.params;
    let (mut flags, top_k) = draw_flags(row, vocab_size);
    let passes = Passes {
        masses: flags & DRAW != 0,
        nucleus: flags & NUCLEUS != 0,
        pick: flags & (GATHER | NUCLEUS) != 0,
        logprobs: logprobs.is_some(),
    };
    if logprobs.is_some() {
        flags |= LOGPROBS;
    }
    let penalties = params.changes.penalties;
    if !penalties.is_off() {
        flags |= PENALTIES;
    }
    if params.changes.allowed.is_some() {
        flags |= ALLOWED;
    }
    let [bias, barred, occurrences, allowed] = push_lists(&params.changes, vocab_size, list);
    let min_mass = params.truncation.min_mass();
    let scale = if params.is_greedy() { 0.0 } else { params.scale() };
    let words = [
        params.bits as u32,
        (params.bits >> 32) as u32,
        min_mass as u32,
        (min_mass >> 32) as u32,
        scale.to_bits(),
        share(params.truncation.top_p).to_bits(),
        penalties.repetition.to_bits(),
        penalties.frequency.to_bits(),
        penalties.presence.to_bits(),
        flags,
        top_k,
        logprobs.unwrap_or(0) as u32,
        row.pending.unwrap_or(NONE),
        bias.first,
        bias.num,
        barred.first,
        barred.num,
        occurrences.first,
        occurrences.num,
        allowed.first,
    ];
    (words, passes)
}

/// How the row is drawn, and its top-k if that has an effect.
fn draw_flags(row: &DeviceRow<'_>, vocab_size: usize) -> (u32, u32) {
    let truncation = &row.params.truncation;
    if row.params.is_greedy() {
        return (0, 0);
    }
    let top_k = if (truncation.top_k as usize) < vocab_size { truncation.top_k } else { 0 };
    if top_k > 0 || truncation.min_p > 0.0 {
        (DRAW | GATHER, top_k)
    } else if truncation.top_p < 1.0 {
        (DRAW | NUCLEUS, 0)
    } else {
        (DRAW, 0)
    }
}

/// 1 if there is no cut, and at least 0, as on the CPU.
fn share(top_p: f32) -> f32 {
    if top_p < 1.0 { top_p.max(0.0) } else { 1.0 }
}

struct Stretch {
    first: u32,
    num: u32,
}

/// Bias, barred tokens, occurrences, mask.
fn push_lists(changes: &Changes<'_>, vocab_size: usize, list: &mut RowList<'_>) -> [Stretch; 4] {
    let bias = Stretch { first: list.place(), num: changes.bias.len() as u32 };
    changes.bias.iter().for_each(|&(token, bias)| list.push(&[token, bias.to_bits()]));
    let barred = Stretch { first: list.place(), num: changes.barred.len() as u32 };
    list.push(changes.barred);
    let emitted = occurrences(changes);
    let occurrences = Stretch { first: list.place(), num: emitted.len() as u32 };
    emitted.iter().for_each(|occurrence| list.push(&[occurrence.token, occurrence.count]));
    let allowed = Stretch { first: list.place(), num: 0 };
    if let Some(mask) = changes.allowed {
        assert!(mask.len() * 32 >= vocab_size, "the mask of allowed tokens must cover the vocabulary");
        list.push(&mask[..vocab_size.div_ceil(32)]);
    }
    [bias, barred, occurrences, allowed]
}
