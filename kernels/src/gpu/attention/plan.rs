//! Divides a batch's attention into items for the two kernels. Pure: its input is lengths, its output is words that the host
//! uploads with the rest of the batch's description.
//!
//! Entries with few rows go to the kernel that processes items on a fixed grid. An item covers sixteen rows over all positions
//! that they see; if such an item would keep its block busy much longer than the others, each of its splits becomes an item.
//! Entries with many rows go to the kernel for tiles. Neither choice affects a result.

use std::ops::Range;

use crate::attention::{KvShape, STRETCH};
use crate::gpu::Device;

use super::geometry::{Geometry, TILE_ROWS, UnsupportedAttention};
use super::{GpuKvType, MAX_SPLITS, QueryShape, partial_rows};

/// As in attention.cuh.
const SPLIT_STRETCHES: usize = 4;
/// Entries of more than one token with at most this many rows per KV head are processed sixteen rows at a time.
const FEW_ROWS: usize = 64;
/// Each block gets about this many of the longest items, so that the blocks' shares are even.
const ITEMS_PER_BLOCK: usize = 4;
/// As `WHOLE` in attention.cuh.
const WHOLE: u32 = u32::MAX;
const ITEM_WORDS: usize = size_of::<Item>() / size_of::<u32>();
/// Index of `table` among the words of an item.
const TABLE_WORD: usize = std::mem::offset_of!(Item, table) / size_of::<u32>();

/// New tokens of one sequence in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AttentionEntry {
    /// Row of its first token in the batch.
    pub first_row: u32,
    pub num_tokens: u32,
    /// Absolute position of its first token.
    pub start: u32,
    /// Where its blocks begin in the block tables; they cover `start + num_tokens` positions.
    pub table_offset: u32,
}

/// The largest batch that can be planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionLimits {
    pub max_rows: usize,
    pub max_entries: usize,
}

/// As `Item` in attention.cuh.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Item {
    first_row: u32,
    start: u32,
    tile_row: u32,
    rows: u32,
    table: u32,
    kv_head: u32,
    first_stretch: u32,
    end_stretch: u32,
    partial: u32,
    split: u32,
    splits: u32,
    counter: u32,
}

impl Item {
    fn stretches(&self) -> usize {
        (self.end_stretch - self.first_stretch) as usize
    }

    fn words(&self) -> [u32; ITEM_WORDS] {
        [
            self.first_row,
            self.start,
            self.tile_row,
            self.rows,
            self.table,
            self.kv_head,
            self.first_stretch,
            self.end_stretch,
            self.partial,
            self.split,
            self.splits,
            self.counter,
        ]
    }
}

/// The attention of a batch, for all layers of one [`QueryShape`]. Keeps its buffers between steps.
pub struct AttentionPlan {
    kv: KvShape,
    ty: GpuKvType,
    shape: QueryShape,
    limits: AttentionLimits,
    geometry: Geometry,
    items: Vec<Item>,
    tiles: Vec<Item>,
    /// For each block of the fixed grid its first item, then the end; then the items; then the tiles.
    words: Vec<u32>,
    /// Number of split tiles, and of the rows for their partials.
    num_counters: usize,
    num_partials: usize,
    num_splits: usize,
    num_rows: usize,
    table_len: usize,
}

impl AttentionPlan {
    pub fn new(
        device: &Device,
        kv: KvShape,
        ty: GpuKvType,
        shape: QueryShape,
        limits: AttentionLimits,
    ) -> Result<Self, UnsupportedAttention> {
        Ok(Self::of_geometry(Geometry::new(device.properties(), &kv, ty, &shape)?, kv, ty, shape, limits))
    }

    fn of_geometry(geometry: Geometry, kv: KvShape, ty: GpuKvType, shape: QueryShape, limits: AttentionLimits) -> Self {
        let mut plan = Self {
            kv,
            ty,
            shape,
            limits,
            geometry,
            items: Vec::new(),
            tiles: Vec::new(),
            words: Vec::new(),
            num_counters: 0,
            num_partials: 0,
            num_splits: 0,
            num_rows: 0,
            table_len: 0,
        };
        plan.plan(&[], &[]);
        plan
    }

    /// The maximum number of words of a plan within the limits.
    pub fn max_words(&self) -> usize {
        let group = self.group();
        let tiles_an_entry = group.max(FEW_ROWS).div_ceil(TILE_ROWS);
        let items = self.limits.max_entries * self.kv.num_kv_heads * tiles_an_entry + MAX_SPLITS;
        let tiles = self.limits.max_rows * group / self.geometry.tile_rows() + self.limits.max_entries;
        self.first_item() as usize + (items + tiles) * ITEM_WORDS
    }

    /// The words that the device needs when the plan is run.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Number of tiles of many rows. Zero in a step that only decodes.
    pub fn num_tiles(&self) -> u32 {
        self.tiles.len() as u32
    }

    pub fn shape(&self) -> QueryShape {
        self.shape
    }

    pub(super) fn kv_shape(&self) -> KvShape {
        self.kv
    }

    pub(super) fn kv_type(&self) -> GpuKvType {
        self.ty
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Number of rows of the batch that belong to entries.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Number of block table entries that are read.
    pub(super) fn table_len(&self) -> usize {
        self.table_len
    }

    /// Index of the first item, aligned to 16 bytes.
    pub(super) fn first_item(&self) -> u32 {
        (self.geometry.split_blocks + 1).next_multiple_of(4)
    }

    pub(super) fn first_tile(&self) -> u32 {
        self.first_item() + (self.items.len() * ITEM_WORDS) as u32
    }

    fn group(&self) -> usize {
        self.shape.num_heads / self.kv.num_kv_heads
    }

    /// Plans a batch whose entries' blocks stand in `block_tables`.
    ///
    /// # Panics
    /// When the batch is beyond the limits, a block table is too short or names a block beyond the pool.
    pub fn plan(&mut self, entries: &[AttentionEntry], block_tables: &[u32]) {
        let few = entries.iter().filter(|entry| self.is_few(entry));
        let stretches: usize = few.flat_map(|entry| self.tiles_of(entry, TILE_ROWS)).map(|item| item.stretches()).sum();
        let share = stretches * self.kv.num_kv_heads / self.geometry.split_blocks as usize;
        self.plan_with(entries, block_tables, share / ITEMS_PER_BLOCK);
    }

    /// The same, with items of more than `longest` stretches split.
    pub(crate) fn plan_with(&mut self, entries: &[AttentionEntry], block_tables: &[u32], longest: usize) {
        assert!(entries.len() <= self.limits.max_entries, "{} entries are beyond the limit", entries.len());
        self.items.clear();
        self.tiles.clear();
        (self.num_counters, self.num_partials, self.num_splits) = (0, 0, 0);
        (self.num_rows, self.table_len) = (0, 0);
        for entry in entries {
            self.check_entry(entry, block_tables);
            if self.is_few(entry) {
                self.push_items(entry, longest);
            } else {
                let tiles: Vec<Item> = self.tiles_of(entry, self.geometry.tile_rows()).collect();
                self.tiles.extend(tiles);
            }
        }
        // Long ones first, so that the last ones to finish are short.
        self.tiles.sort_by_key(|tile| std::cmp::Reverse(tile.stretches()));
        self.write_words();
    }

    /// Sets where the block tables are on the device: after `offset` other words.
    pub fn place_tables(&mut self, offset: usize) {
        let first_item = self.first_item() as usize;
        let shift = u32::try_from(offset).expect("a step is described in less than 2^32 words");
        for item in self.words[first_item..].chunks_exact_mut(ITEM_WORDS) {
            item[TABLE_WORD] += shift;
        }
        self.table_len += offset;
    }

    fn check_entry(&mut self, entry: &AttentionEntry, block_tables: &[u32]) {
        let rows = entry.first_row as usize + entry.num_tokens as usize;
        assert!(rows <= self.limits.max_rows, "{rows} rows are beyond the limit of {}", self.limits.max_rows);
        let positions = entry.start as usize + entry.num_tokens as usize;
        assert!(u32::try_from(positions).is_ok(), "positions are numbered in 32 bits");
        let first = entry.table_offset as usize;
        let end = first + positions.div_ceil(self.kv.block_size);
        assert!(end <= block_tables.len(), "block tables of {} entries end before {end}", block_tables.len());
        let known = block_tables[first..end].iter().all(|&block| (block as usize) < self.kv.num_blocks);
        assert!(known, "a block table names a block beyond the pool");
        self.num_rows = self.num_rows.max(rows);
        self.table_len = self.table_len.max(end);
    }

    fn is_few(&self, entry: &AttentionEntry) -> bool {
        entry.num_tokens == 1 || entry.num_tokens as usize * self.group() <= FEW_ROWS
    }

    /// An entry's rows, `tile_rows` at a time, over all that they see; for any KV head.
    fn tiles_of(&self, entry: &AttentionEntry, tile_rows: usize) -> impl Iterator<Item = Item> + use<> {
        let (entry, group, window) = (*entry, self.group(), self.shape.sliding_window);
        let rows = entry.num_tokens as usize * group;
        (0..rows).step_by(tile_rows).map(move |first| {
            let rows = tile_rows.min(rows - first);
            let start = entry.start as usize;
            let stretches = visible(start + first / group, start + (first + rows - 1) / group, window);
            Item {
                first_row: entry.first_row,
                start: entry.start,
                tile_row: first as u32,
                rows: rows as u32,
                table: entry.table_offset,
                first_stretch: stretches.start as u32,
                end_stretch: stretches.end as u32,
                partial: WHOLE,
                ..Item::default()
            }
        })
    }

    /// Items of an entry of few rows; those longer than `longest` stretches are split while there is room for partials.
    fn push_items(&mut self, entry: &AttentionEntry, longest: usize) {
        for kv_head in 0..self.kv.num_kv_heads as u32 {
            for tile in self.tiles_of(entry, TILE_ROWS) {
                let item = Item { kv_head, ..tile };
                let splits = splits_of(&item);
                let rows = splits.len() * item.rows as usize;
                let room = self.num_splits + splits.len() <= MAX_SPLITS
                    && self.num_partials + rows <= partial_rows(self.kv.head_dim);
                if splits.len() > 1 && item.stretches() > longest && room {
                    self.push_splits(item, splits);
                } else {
                    self.items.push(item);
                }
            }
        }
    }

    fn push_splits(&mut self, item: Item, splits: Range<u32>) {
        let per_split = SPLIT_STRETCHES as u32;
        for (split, absolute) in (0..).zip(splits.clone()) {
            self.items.push(Item {
                first_stretch: item.first_stretch.max(absolute * per_split),
                end_stretch: item.end_stretch.min((absolute + 1) * per_split),
                partial: self.num_partials as u32,
                split,
                splits: splits.len() as u32,
                counter: self.num_counters as u32,
                ..item
            });
        }
        self.num_splits += splits.len();
        self.num_partials += splits.len() * item.rows as usize;
        self.num_counters += 1;
    }

    /// Gives each block of the fixed grid consecutive items of about the same total length.
    fn write_words(&mut self) {
        // One more stretch, for the fixed cost of an item.
        let cost = |item: &Item| item.stretches() as u64 + 1;
        let blocks = u64::from(self.geometry.split_blocks);
        let total: u64 = self.items.iter().map(cost).sum();
        let first_item = self.first_item() as usize;
        self.words.clear();
        self.words.resize(first_item, self.items.len() as u32);
        let (mut before, mut next_block) = (0, 0);
        for (index, item) in self.items.iter().enumerate() {
            // The block in whose share the middle of the item lies.
            let block = ((2 * before + cost(item)) * blocks / (2 * total)) as usize;
            while next_block <= block {
                self.words[next_block] = index as u32;
                next_block += 1;
            }
            before += cost(item);
        }
        for item in self.items.iter().chain(&self.tiles) {
            self.words.extend_from_slice(&item.words());
        }
        assert!(self.words.len() <= self.max_words(), "a plan within the limits");
    }
}

/// Stretches that positions `first..=last` see.
fn visible(first: usize, last: usize, window: Option<usize>) -> Range<usize> {
    let oldest = window.map_or(0, |window| (first + 1).saturating_sub(window));
    oldest / STRETCH..last / STRETCH + 1
}

/// Absolute splits that an item's stretches lie in.
fn splits_of(item: &Item) -> Range<u32> {
    let per_split = SPLIT_STRETCHES as u32;
    item.first_stretch / per_split..item.end_stretch.div_ceil(per_split)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
