//! Paged attention, the same for prefill and decode.
//!
//! A row's scores are computed over *stretches* of 64 absolute positions, whatever the block size. Each stretch gives a partial
//! result (maximum, sum, weighted values), and partials are merged in ascending order (online softmax, arXiv 1805.02867,
//! 2205.14135). So a row's result does not depend on how its sequence was split into chunks, on its neighbours, or on which
//! thread computed which stretch.

mod cache;
mod stretch;

pub use cache::{KvCache, KvShape, KvType, MAX_HEAD_DIM, Slot};

use std::cell::Cell;
use std::ops::Range;

use crate::buffer::SharedOut;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Level, Simd, dispatch};
use stretch::{Partial, Rows, merge, stretch_partials};

/// Positions whose scores are reduced together.
pub const STRETCH: usize = 64;
/// Tokens of a prefill chunk that share a gathered stretch.
const TOKEN_TILE: usize = 32;
/// A single row is split over tasks in pieces of at least this many stretches.
const SPLIT_STRETCHES: usize = 2;

/// New tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug)]
pub struct AttentionEntry<'a> {
    /// Row of its first token in the batch.
    pub first_row: usize,
    pub num_tokens: usize,
    /// Absolute position of its first token.
    pub start: usize,
    /// Blocks of the sequence, in order of position; they cover `start + num_tokens` positions.
    pub block_table: &'a [u32],
}

/// The shape of a layer's queries.
#[derive(Clone, Copy, Debug)]
pub struct QueryShape {
    pub num_heads: usize,
    /// A position sees itself and the `window - 1` positions before it.
    pub sliding_window: Option<usize>,
}

/// One task: tokens of an entry, for one KV head.
#[derive(Clone)]
struct Item {
    entry: usize,
    kv_head: usize,
    tokens: Range<usize>,
    /// The stretches to compute and, if the row is split into several pieces, where the partials are stored.
    stretches: Range<usize>,
    partials: Option<usize>,
}

/// Plans and runs attention; keeps its buffers between steps.
#[derive(Default)]
pub struct Attention {
    items: Vec<Item>,
    /// Split rows: entry, KV head, all stretches, first partial.
    splits: Vec<Item>,
    partials: Vec<f32>,
    /// Floats per partial.
    partial_len: usize,
}

impl Attention {
    /// Divides the work of a batch into tasks, once for all layers.
    pub fn plan(&mut self, threads: usize, cache: &KvCache, shape: QueryShape, entries: &[AttentionEntry<'_>]) {
        self.items.clear();
        self.splits.clear();
        self.partial_len = LANES + cache.padded_dim();
        let group = shape.num_heads / cache.num_kv_heads();
        let tiles: usize = entries.iter().map(|entry| entry.num_tokens.div_ceil(TOKEN_TILE)).sum();
        let split = threads > 1 && tiles * cache.num_kv_heads() < 4 * threads;
        let mut floats = 0;
        for (index, entry) in entries.iter().enumerate() {
            for kv_head in 0..cache.num_kv_heads() {
                for first in (0..entry.num_tokens).step_by(TOKEN_TILE) {
                    let tokens = first..(first + TOKEN_TILE).min(entry.num_tokens);
                    let stretches = visible(entry.start + tokens.start, entry.start + tokens.end - 1, shape);
                    let item = Item { entry: index, kv_head, tokens, stretches, partials: None };
                    let pieces = (item.stretches.len() / SPLIT_STRETCHES).min(2 * threads);
                    if split && entry.num_tokens == 1 && pieces > 1 {
                        self.push_split(item, pieces, &mut floats, group);
                    } else {
                        self.items.push(item);
                    }
                }
            }
        }
        // Long items first, so that the last ones to finish are short.
        self.items.sort_by_key(|item| std::cmp::Reverse(item.stretches.len() * item.tokens.len()));
        if self.partials.len() < floats {
            self.partials.resize(floats, 0.0);
        }
    }

    fn push_split(&mut self, item: Item, pieces: usize, floats: &mut usize, group: usize) {
        let (first, count) = (item.stretches.start, item.stretches.len());
        for piece in 0..pieces {
            let stretches = first + count * piece / pieces..first + count * (piece + 1) / pieces;
            let offset = *floats + (stretches.start - first) * group * self.partial_len;
            self.items.push(Item { stretches, partials: Some(offset), ..item.clone() });
        }
        self.splits.push(Item { partials: Some(*floats), ..item });
        *floats += count * group * self.partial_len;
    }

    /// Attention of one layer over the planned batch. `queries` are `[tokens, heads, padded_dim]`, rotated and scaled; `out` is
    /// `[tokens, heads, head_dim]`. The new tokens' keys and values are already in the cache.
    ///
    /// # Panics
    /// When a shape does not fit or a block table is too short.
    #[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
    pub fn run(
        &mut self,
        pool: &Pool,
        level: Level,
        cache: &KvCache,
        layer: usize,
        shape: QueryShape,
        entries: &[AttentionEntry<'_>],
        queries: &[f32],
        out: &mut [f32],
    ) {
        let tokens = queries.len() / (shape.num_heads * cache.padded_dim());
        assert_eq!(queries.len(), tokens * shape.num_heads * cache.padded_dim(), "queries are [tokens, heads, dim]");
        assert_eq!(out.len(), tokens * shape.num_heads * cache.head_dim(), "out is [tokens, heads, dim]");
        assert!(layer < cache.num_layers() && shape.num_heads.is_multiple_of(cache.num_kv_heads()));
        for entry in entries {
            assert!(entry.first_row + entry.num_tokens <= tokens, "entries lie within the batch");
            cache.check_table(entry.block_table, entry.start + entry.num_tokens);
        }
        let job = Job {
            cache,
            layer,
            shape,
            entries,
            queries,
            out: SharedOut(out.as_mut_ptr()),
            partials: SharedOut(self.partials.as_mut_ptr()),
            partial_len: self.partial_len,
        };
        let (items, splits) = (&self.items, &self.splits);
        pool.run(items.len(), &|index| dispatch(level, RunItem { job: &job, item: &items[index] }));
        pool.run(splits.len(), &|index| dispatch(level, MergeSplit { job: &job, item: &splits[index] }));
    }
}

/// The stretches that positions `first..=last` see.
fn visible(first: usize, last: usize, shape: QueryShape) -> Range<usize> {
    let oldest = shape.sliding_window.map_or(0, |window| (first + 1).saturating_sub(window));
    oldest / STRETCH..last / STRETCH + 1
}

struct Job<'a> {
    cache: &'a KvCache,
    layer: usize,
    shape: QueryShape,
    entries: &'a [AttentionEntry<'a>],
    queries: &'a [f32],
    out: SharedOut<f32>,
    partials: SharedOut<f32>,
    partial_len: usize,
}

impl Job<'_> {
    fn group(&self) -> usize {
        self.shape.num_heads / self.cache.num_kv_heads()
    }

    /// The rows of an item: `group` query heads for each of its tokens.
    fn rows(&self, item: &Item) -> Rows<'_> {
        let entry = &self.entries[item.entry];
        let dim = self.cache.padded_dim();
        let first = (entry.first_row + item.tokens.start) * self.shape.num_heads + item.kv_head * self.group();
        Rows {
            queries: &self.queries[first * dim..],
            group: self.group(),
            token_stride: self.shape.num_heads * dim,
            dim,
            count: item.tokens.len() * self.group(),
            first_position: entry.start + item.tokens.start,
            sliding_window: self.shape.sliding_window,
        }
    }

    /// Writes `o / l` for row `row` of `item`.
    unsafe fn finish(&self, item: &Item, row: usize, state: &[f32]) {
        let dim = self.cache.head_dim();
        let entry = &self.entries[item.entry];
        let token = entry.first_row + item.tokens.start + row / self.group();
        let head = item.kv_head * self.group() + row % self.group();
        let sum = state[Partial::SUM];
        // SAFETY: token and head are in range, and this row is this task's own.
        let out = unsafe {
            let start = self.out.get().add((token * self.shape.num_heads + head) * dim);
            std::slice::from_raw_parts_mut(start, dim)
        };
        for (out, value) in out.iter_mut().zip(&state[LANES..]) {
            *out = value / sum;
        }
    }
}

thread_local! {
    /// Stretches as f32, running states and partials of the current task.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

struct RunItem<'a> {
    job: &'a Job<'a>,
    item: &'a Item,
}

impl Kernel for RunItem<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { job, item } = self;
        let rows = job.rows(item);
        let table = job.entries[item.entry].block_table;
        let len = job.partial_len;
        let gathered = job.cache.gather_len();
        let scores = rows.count.min(stretch::MAX_TILE) * STRETCH;
        let mut scratch = SCRATCH.take();
        let needed = gathered + scores + 2 * rows.count * len;
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (gather, rest) = scratch.split_at_mut(gathered);
        let (scores, rest) = rest.split_at_mut(scores);
        let (states, partials) = rest.split_at_mut(rows.count * len);
        for state in states.chunks_exact_mut(len) {
            Partial::clear(state);
        }
        for stretch in item.stretches.clone() {
            let view = job.cache.view::<S>(job.layer, item.kv_head, table, stretch, rows.count, gather);
            match item.partials {
                None => {
                    let partials = &mut partials[..rows.count * len];
                    // SAFETY: the view covers the stretch's blocks and the buffers hold all rows.
                    unsafe {
                        stretch_partials::<S>(&view, &rows, stretch, scores, partials, len);
                        for (state, partial) in states.chunks_exact_mut(len).zip(partials.chunks_exact(len)) {
                            merge::<S>(state, partial);
                        }
                    }
                }
                Some(offset) => {
                    let offset = offset + (stretch - item.stretches.start) * rows.count * len;
                    // SAFETY: as above; the planner gave each stretch its own partials.
                    unsafe {
                        let own = job.partials.get().add(offset);
                        let partials = std::slice::from_raw_parts_mut(own, rows.count * len);
                        stretch_partials::<S>(&view, &rows, stretch, scores, partials, len);
                    }
                }
            }
        }
        if item.partials.is_none() {
            for (row, state) in states.chunks_exact(len).take(rows.count).enumerate() {
                // SAFETY: this task owns the item's rows.
                unsafe { job.finish(item, row, state) };
            }
        }
        SCRATCH.set(scratch);
    }
}

struct MergeSplit<'a> {
    job: &'a Job<'a>,
    item: &'a Item,
}

impl Kernel for MergeSplit<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { job, item } = self;
        let (len, rows) = (job.partial_len, job.group());
        let offset = item.partials.expect("a split has partials");
        let mut scratch = SCRATCH.take();
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        for row in 0..rows {
            let state = &mut scratch[..len];
            Partial::clear(state);
            for stretch in 0..item.stretches.len() {
                // SAFETY: `plan` made room for every stretch, and the pieces have written them all.
                unsafe {
                    let partial = job.partials.get().add(offset + (stretch * rows + row) * len);
                    merge::<S>(state, std::slice::from_raw_parts(partial, len));
                }
            }
            // SAFETY: this task owns the item's rows.
            unsafe { job.finish(item, row, state) };
        }
        SCRATCH.set(scratch);
    }
}

#[cfg(test)]
mod tests;
