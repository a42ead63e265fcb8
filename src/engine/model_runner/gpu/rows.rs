//! What a step is, on its way to the device: tokens, positions and slots of its rows, where a token comes from that the host
//! does not know yet, block tables, and the plan of attention.

use outrigger_kernels::gpu::attention::{AttentionEntry, AttentionPlan, NO_SLOT};
use outrigger_kernels::gpu::{Device, DeviceBuffer, DeviceError, HostBuffer, View};

use crate::engine::model::gpu_decoder::{DeviceAttention, DeviceRows};

/// The source of a token that the host knows.
const KNOWN: u32 = u32::MAX;

/// Arrays a step: tokens, positions, slots, sources, output rows.
const ARRAYS: usize = 5;

/// A stretch of one sequence's tokens, as the device is told of it.
#[derive(Clone, Copy)]
pub(super) struct RowsEntry<'a> {
    pub tokens: &'a [u32],
    pub start: usize,
    pub block_table: &'a [u32],
    /// Where on the device the only token is found, when the host does not know it yet.
    pub source: Option<u32>,
    /// Wants the logits after so many of its last tokens.
    pub num_outputs: usize,
}

/// The largest step.
#[derive(Clone, Copy)]
pub(super) struct RowLimits {
    pub rows: usize,
    pub entries: usize,
    pub block_size: usize,
    /// Blocks of the longest sequence.
    pub blocks: usize,
}

/// The host's and the device's memory for the description of steps.
pub(super) struct StepRows {
    limits: RowLimits,
    plan: AttentionPlan,
    /// Page-locked; one for each step that may be in flight: a copy may still be reading the other.
    host: Vec<HostBuffer<u32>>,
    turn: usize,
    /// Arrays of rows, the plan, and block tables, behind one another, so that one copy brings them.
    words: DeviceBuffer<u32>,
    /// Memory for the next step's entries and their tables.
    entries: Vec<AttentionEntry>,
    tables: Vec<u32>,
}

/// A step as it was laid out.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub num_rows: usize,
    pub num_outputs: usize,
    num_words: usize,
}

/// Where a step of `num_rows` rows lies: the same for every such step, so that a graph can name it.
#[derive(Clone, Copy)]
pub(super) struct RowViews {
    pub sources: View<u32>,
    pub rows: DeviceRows,
}

impl StepRows {
    /// For `depth` steps in flight.
    pub fn new(device: &Device, limits: RowLimits, plan: AttentionPlan, depth: usize) -> Result<Self, DeviceError> {
        let words = plan_offset(limits.rows) + plan.max_words() + limits.entries * limits.blocks;
        let mut step = Self {
            limits,
            plan,
            host: (0..depth).map(|_| HostBuffer::zeroed(device, words)).collect::<Result<_, _>>()?,
            turn: 0,
            words: DeviceBuffer::zeroed(device, words)?,
            entries: Vec::with_capacity(limits.entries),
            tables: Vec::new(),
        };
        step.upload(&[], 0)?;
        Ok(step)
    }

    /// [`Self::lay_out`] and [`Self::send`].
    pub fn upload(&mut self, batch: &[RowsEntry<'_>], padded: usize) -> Result<Layout, DeviceError> {
        let layout = self.lay_out(batch, padded);
        self.send(layout)?;
        Ok(layout)
    }

    /// Lays out a batch in rows, and those up to `padded` for nothing, and plans its attention.
    pub fn lay_out(&mut self, batch: &[RowsEntry<'_>], padded: usize) -> Layout {
        let num_rows: usize = batch.iter().map(|entry| entry.tokens.len()).sum();
        let padded = padded.max(num_rows);
        assert!(padded <= self.limits.rows, "a step of {padded} rows, where {} were planned for", self.limits.rows);
        self.plan_attention(batch);
        self.turn = (self.turn + 1) % self.host.len();
        let host = &mut self.host[self.turn];
        let num_outputs = fill_rows(&mut host[..ARRAYS * padded], padded, self.limits.block_size, batch);
        let plan_offset = plan_offset(padded);
        let table_offset = plan_offset + self.plan.words().len();
        self.plan.place_tables(table_offset);
        host[plan_offset..table_offset].copy_from_slice(self.plan.words());
        let end = table_offset + self.tables.len();
        host[table_offset..end].copy_from_slice(&self.tables);
        Layout { num_rows: padded, num_outputs, num_words: end }
    }

    /// Queues the upload of what was laid out last.
    pub fn send(&mut self, layout: Layout) -> Result<(), DeviceError> {
        self.host[self.turn].upload(&mut self.words, layout.num_words)
    }

    fn plan_attention(&mut self, batch: &[RowsEntry<'_>]) {
        self.entries.clear();
        self.tables.clear();
        let mut first_row = 0;
        for entry in batch {
            let blocks = (entry.start + entry.tokens.len()).div_ceil(self.limits.block_size);
            self.entries.push(AttentionEntry {
                first_row: first_row as u32,
                num_tokens: entry.tokens.len() as u32,
                start: entry.start as u32,
                table_offset: self.tables.len() as u32,
            });
            self.tables.extend_from_slice(&entry.block_table[..blocks]);
            first_row += entry.tokens.len();
        }
        self.plan.plan(&self.entries, &self.tables);
    }

    /// Where a step of `num_rows` rows lies. With `num_outputs`, the logits of so many listed rows are wanted, else of all.
    pub fn views(&self, num_rows: usize, num_outputs: Option<usize>) -> RowViews {
        let array = |index: usize, len: usize| self.words.slice(index * num_rows, len);
        RowViews {
            sources: array(3, num_rows),
            rows: DeviceRows {
                num_rows,
                tokens: array(0, num_rows),
                positions: array(1, num_rows),
                slots: array(2, num_rows),
                output_rows: num_outputs.map(|count| array(4, count)),
            },
        }
    }

    /// What the step uploaded last, of `num_rows` rows, attends to.
    pub fn attention(&self, num_rows: usize) -> DeviceAttention<'_> {
        let offset = plan_offset(num_rows);
        let words = self.words.slice(offset, self.words.len() - offset);
        DeviceAttention { plan: &self.plan, words, block_tables: self.words.view() }
    }
}

/// Where the plan of a step of `num_rows` rows stands: at a multiple of 16 bytes.
fn plan_offset(num_rows: usize) -> usize {
    (ARRAYS * num_rows).next_multiple_of(4)
}

/// Writes the arrays, `[rows]` each, and gives the number of outputs.
fn fill_rows(arrays: &mut [u32], num_rows: usize, block_size: usize, batch: &[RowsEntry<'_>]) -> usize {
    if num_rows == 0 {
        return 0;
    }
    let [tokens, positions, slots, sources, outputs] = split(arrays, num_rows);
    tokens.fill(0);
    positions.fill(0);
    slots.fill(NO_SLOT);
    sources.fill(KNOWN);
    outputs.fill(0);
    let (mut row, mut num_outputs) = (0, 0);
    for entry in batch {
        sources[row] = entry.source.unwrap_or(KNOWN);
        for (offset, &token) in entry.tokens.iter().enumerate() {
            let position = entry.start + offset;
            let slot = entry.block_table[position / block_size] as usize * block_size + position % block_size;
            // A token that is put in place on the device is a placeholder here.
            tokens[row] = if entry.source.is_some() { 0 } else { token };
            positions[row] = position as u32;
            slots[row] = slot as u32;
            row += 1;
        }
        for output in row - entry.num_outputs..row {
            outputs[num_outputs] = output as u32;
            num_outputs += 1;
        }
    }
    num_outputs
}

fn split(arrays: &mut [u32], len: usize) -> [&mut [u32]; ARRAYS] {
    let mut parts = arrays.chunks_exact_mut(len);
    std::array::from_fn(|_| parts.next().expect("as many arrays as there is room for"))
}
