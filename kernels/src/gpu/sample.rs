//! Sampling on the device: from the same logits the same tokens and log-probabilities as [`RowSampler`], bit for bit; the
//! kernels are in `kernels/cuda/sample*.cu`.
//!
//! A step goes through a [`DeviceSampler`] in four parts, so that each can stand where it costs least:
//!
//! 1. [`stage`](DeviceSampler::stage) uploads what the rows ask for. It needs no logits, so it belongs before the forward
//!    pass, outside of any graph.
//! 2. [`launch`](DeviceSampler::launch) queues the kernels. Their arguments and grids depend on the logits' address, the
//!    number of rows and the staged [`Passes`] only, so a graph may hold them.
//! 3. [`collect`](DeviceSampler::collect) queues the copy of the results to the host.
//! 4. [`read`](DeviceSampler::read) waits for it.
//!
//! Two steps may be under way: the next is staged before the last is read. What the host cannot know by then is the token
//! that the last step sampled; it stays on the device, in a slot of [`sampled`](DeviceSampler::sampled) that the next
//! step's embedding reads ([`Ticket::slot`]) and that [`DeviceRow::pending`] names for the penalties. Steps write the two
//! halves of that array in turn, so no step overwrites what it reads.
//!
//! [`RowSampler`]: crate::sample::RowSampler

mod staging;

use super::{Address, Device, DeviceBuffer, DeviceError, EventId, HostBuffer, Launch, View};
use crate::sample::{InvalidRow, MAX_VOCAB_SIZE, RawRow, RowLogprobs, RowParams, SampledRow};
use staging::{HEADER_WORDS, ROW_WORDS, RowList, row_words};

/// Tokens that one block processes; also its number of threads. This and the following are as in sample.cuh.
const SLICE: usize = 4096;
const SLICE_THREADS: usize = 256;
const PICK_THREADS: usize = 512;
/// Candidates listed for a row. Rows with more are searched completely.
const LISTED: usize = 4096;
const STATE_WORDS: usize = 14;
const RESULT_WORDS: usize = 8;
const TOP_WORDS: usize = 2;
/// Initial space for lists (biases, occurrences, masks), in words. It doubles when it is too small.
const FIRST_WORDS: usize = 1 << 14;

/// The parameters of one row.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRow<'a> {
    /// At most `max_logprobs` log-probabilities are returned, even if more are requested.
    pub params: RowParams<'a>,
    /// The slot into which the previous step sampled this row's token ([`Ticket::slot`]). The token counts as emitted once more
    /// than the occurrences say, because the host has not seen it yet.
    pub pending: Option<u32>,
}

impl DeviceRow<'_> {
    /// For rows that only pad a graph: whatever their logits, they have no effect.
    pub const PADDING: Self = Self { params: RowParams::GREEDY, pending: None };
}

/// The kernels that a step needs beyond the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Passes {
    /// Some row is not greedy.
    pub masses: bool,
    /// Some row is cut by top-p alone.
    pub nucleus: bool,
    /// Some row is cut.
    pub pick: bool,
    pub logprobs: bool,
}

/// A step whose parameters are being uploaded.
#[derive(Debug)]
#[must_use]
pub struct Staged {
    number: u64,
    rows: usize,
    passes: Passes,
}

impl Staged {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Where in [`DeviceSampler::sampled`] this step puts the token of its `row`-th row.
    pub fn slot(&self, sampler: &DeviceSampler, row: usize) -> u32 {
        assert!(row < self.rows, "row {row} of a step of {}", self.rows);
        sampler.slot(self.number, row)
    }
}

/// A step whose results are being copied to the host.
#[derive(Debug)]
#[must_use]
pub struct Ticket {
    number: u64,
    rows: usize,
    first_slot: u32,
}

impl Ticket {
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The index in [`DeviceSampler::sampled`] of the token of this step's `row`-th row. It stays valid until the step after
    /// the next.
    pub fn slot(&self, row: usize) -> u32 {
        assert!(row < self.rows, "row {row} of a step of {}", self.rows);
        self.first_slot + row as u32
    }
}

/// The page-locked memory of one of the two steps that may be running.
struct Turn {
    head: HostBuffer<u32>,
    words: HostBuffer<u32>,
    results: HostBuffer<u32>,
    /// After the results' copy.
    event: EventId,
    progress: Progress,
    /// The step it is for.
    number: u64,
    /// How many log-probabilities each row wants.
    logprobs: Vec<Option<usize>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The device does not use the memory.
    Idle,
    Staged,
    Collected,
}

/// Samples on one device from rows of one vocabulary.
pub struct DeviceSampler {
    device: Device,
    vocab_size: usize,
    slices: usize,
    max_rows: usize,
    max_logprobs: usize,
    /// The header, then the rows.
    head: DeviceBuffer<u32>,
    words: DeviceBuffer<u32>,
    /// A place a word: the raw logit of the token that the word names.
    saved: DeviceBuffer<f32>,
    states: DeviceBuffer<u32>,
    sampled: DeviceBuffer<u32>,
    results: DeviceBuffer<u32>,
    slice_counts: DeviceBuffer<u32>,
    slice_sums: DeviceBuffer<u64>,
    groups: DeviceBuffer<u32>,
    slice_tops: DeviceBuffer<u64>,
    list: DeviceBuffer<u64>,
    turns: [Turn; 2],
    /// The number of the step to collect next.
    next: u64,
}

impl DeviceSampler {
    /// For steps of up to `max_rows` rows (65535) over `vocab_size` tokens, which may ask for up to `max_logprobs`
    /// log-probabilities besides the token's own. All memory is allocated here, but for lists that grow.
    ///
    /// # Panics
    /// When the vocabulary is empty or larger than [`MAX_VOCAB_SIZE`], or there are no rows or too many.
    pub fn new(device: &Device, vocab_size: usize, max_rows: usize, max_logprobs: usize) -> Result<Self, DeviceError> {
        assert!((1..=MAX_VOCAB_SIZE).contains(&vocab_size), "a vocabulary has 1 to {MAX_VOCAB_SIZE} tokens");
        assert!((1..=0xffff).contains(&max_rows), "a step has 1 to 65535 rows");
        let slices = vocab_size.div_ceil(SLICE);
        let max_logprobs = max_logprobs.min(vocab_size);
        let head_words = HEADER_WORDS + max_rows * ROW_WORDS;
        let result_words = max_rows * (RESULT_WORDS + max_logprobs * TOP_WORDS);
        let turn = || -> Result<Turn, DeviceError> {
            Ok(Turn {
                head: HostBuffer::zeroed(device, head_words)?,
                words: HostBuffer::zeroed(device, FIRST_WORDS)?,
                results: HostBuffer::zeroed(device, result_words)?,
                event: device.driver().new_event()?,
                progress: Progress::Idle,
                number: 0,
                logprobs: Vec::with_capacity(max_rows),
            })
        };
        Ok(Self {
            vocab_size,
            slices,
            max_rows,
            max_logprobs,
            head: DeviceBuffer::new(device, head_words)?,
            words: DeviceBuffer::new(device, FIRST_WORDS)?,
            saved: DeviceBuffer::new(device, FIRST_WORDS)?,
            states: DeviceBuffer::zeroed(device, max_rows * STATE_WORDS)?,
            sampled: DeviceBuffer::zeroed(device, 2 * max_rows)?,
            results: DeviceBuffer::new(device, result_words)?,
            slice_counts: DeviceBuffer::new(device, max_rows * slices)?,
            slice_sums: DeviceBuffer::new(device, max_rows * slices)?,
            groups: DeviceBuffer::new(device, max_rows * slices * SLICE_THREADS)?,
            slice_tops: DeviceBuffer::new(device, max_rows * slices * max_logprobs)?,
            list: DeviceBuffer::new(device, max_rows * LISTED)?,
            turns: [turn()?, turn()?],
            next: 0,
            device: device.clone(),
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// The tokens of the last two steps, `2 * max_rows` slots. A row whose logits were invalid has token 0.
    pub fn sampled(&self) -> View<u32> {
        self.sampled.view()
    }

    /// Uploads what is asked of the next step's rows. At most one step before it is still to be read; the results of an
    /// earlier one that was never read are lost. A step that was staged and not collected, because what should have given
    /// its logits failed, is as if it had never been.
    ///
    /// # Panics
    /// When there are more than `max_rows` rows, a mask does not cover the vocabulary, or a pending slot is not one of the
    /// step before.
    pub fn stage(&mut self, rows: &[DeviceRow<'_>]) -> Result<Staged, DeviceError> {
        assert!(rows.len() <= self.max_rows, "{} rows in a step of at most {}", rows.len(), self.max_rows);
        let number = self.next;
        self.free_turn(number)?;
        self.make_room(number, rows)?;
        let first_pending = self.slot(number + 1, 0);
        let turn = &mut self.turns[(number % 2) as usize];
        turn.number = number;
        turn.logprobs.clear();
        turn.head[..HEADER_WORDS].copy_from_slice(&header_words(&self.words, &self.saved, number));
        let mut passes = Passes::default();
        let mut list = RowList::new(&mut turn.words);
        for (index, row) in rows.iter().enumerate() {
            if let Some(slot) = row.pending {
                let is_previous = slot >= first_pending && ((slot - first_pending) as usize) < self.max_rows;
                assert!(is_previous, "slot {slot} is not one of the step before");
            }
            let logprobs = row.params.logprobs.map(|count| (count as usize).min(self.max_logprobs));
            let (words, needs) = row_words(row, self.vocab_size, logprobs, &mut list);
            turn.head[HEADER_WORDS + index * ROW_WORDS..][..ROW_WORDS].copy_from_slice(&words);
            turn.logprobs.push(logprobs);
            passes.masses |= needs.masses;
            passes.nucleus |= needs.nucleus;
            passes.pick |= needs.pick;
            passes.logprobs |= needs.logprobs;
        }
        let num_words = list.len();
        turn.progress = Progress::Staged;
        turn.head.upload(&mut self.head, HEADER_WORDS + rows.len() * ROW_WORDS)?;
        if num_words > 0 {
            turn.words.upload(&mut self.words, num_words)?;
        }
        Ok(Staged { number, rows: rows.len(), passes })
    }

    /// Queues the kernels for the step staged last (or, in a graph, for any that is staged with as many rows and these
    /// passes). `logits` is `[rows, vocab_size]`; its content is lost.
    ///
    /// # Panics
    /// When there are too few logits, or too many rows.
    pub fn launch(&self, logits: View<f32>, rows: usize, passes: Passes) -> Result<(), DeviceError> {
        assert!(rows <= self.max_rows && logits.len() >= rows * self.vocab_size, "logits of {rows} rows");
        let slices = [self.slices as u32, rows as u32, 1];
        let params = self.params(logits);
        let launch = |name, grid, threads: usize| {
            let launch = Launch { overlap: true, ..Launch::new(grid, threads as u32) };
            // SAFETY: every buffer has room for `max_rows` rows, what the rows name was checked when they were staged, and
            // the kernels bound ids by the vocabulary.
            unsafe { self.device.launch(name, &launch, &params) }
        };
        launch("sample_scan", slices, SLICE_THREADS)?;
        if passes.masses {
            launch("sample_masses", slices, SLICE_THREADS)?;
        }
        if passes.nucleus {
            launch("sample_nucleus", slices, SLICE_THREADS)?;
        }
        if passes.pick {
            launch("sample_pick", [1, rows as u32, 1], PICK_THREADS)?;
        }
        if passes.logprobs {
            launch("sample_logprobs", slices, SLICE_THREADS)?;
        }
        Ok(())
    }

    /// Queues the copy of the results of the step staged last to the host.
    pub fn collect(&mut self, staged: Staged) -> Result<Ticket, DeviceError> {
        let Staged { number, rows, passes } = staged;
        assert_eq!(number, self.next, "a step is collected once");
        let turn = &mut self.turns[(number % 2) as usize];
        let tops = if passes.logprobs { self.max_rows * self.max_logprobs * TOP_WORDS } else { 0 };
        let headers = if passes.logprobs { self.max_rows } else { rows } * RESULT_WORDS;
        if rows > 0 {
            turn.results.download(&self.results, headers + tops)?;
        }
        self.device.driver().record(turn.event)?;
        turn.progress = Progress::Collected;
        self.next += 1;
        Ok(Ticket { number, rows, first_slot: self.slot(number, 0) })
    }

    /// [`stage`](Self::stage), [`launch`](Self::launch) and [`collect`](Self::collect) in one.
    pub fn queue(&mut self, logits: View<f32>, rows: &[DeviceRow<'_>]) -> Result<Ticket, DeviceError> {
        let staged = self.stage(rows)?;
        self.launch(logits, staged.rows(), staged.passes())?;
        self.collect(staged)
    }

    /// Waits for a step and gives a result for each of its rows.
    ///
    /// # Panics
    /// When two steps have been staged since.
    pub fn read(&mut self, ticket: Ticket) -> Result<Vec<Result<SampledRow, InvalidRow>>, DeviceError> {
        let turn = &mut self.turns[(ticket.number % 2) as usize];
        let is_there = turn.number == ticket.number && turn.progress == Progress::Collected;
        assert!(is_there, "the results of step {} are gone", ticket.number);
        self.device.driver().wait(turn.event)?;
        turn.progress = Progress::Idle;
        let (headers, tops) = turn.results.split_at(self.max_rows * RESULT_WORDS);
        let headers = headers.as_chunks::<RESULT_WORDS>().0;
        let result = |row: usize, header: &[u32; RESULT_WORDS]| {
            let [token, is_valid, rank, raw, raw_max, total_low, total_high, _] = *header;
            if is_valid == 0 {
                return Err(InvalidRow);
            }
            let logprobs = turn.logprobs[row].map(|count| {
                let total = u64::from(total_high) << 32 | u64::from(total_low);
                let raw_row = RawRow::new(f32::from_bits(raw_max), total);
                let tops = tops[row * self.max_logprobs * TOP_WORDS..].as_chunks::<TOP_WORDS>().0;
                let top = tops[..count].iter().map(|&[id, raw]| (id, raw_row.logprob(f32::from_bits(raw))));
                RowLogprobs { logprob: raw_row.logprob(f32::from_bits(raw)), rank, top: top.collect() }
            });
            Ok(SampledRow { token, logprobs })
        };
        Ok(headers[..ticket.rows].iter().enumerate().map(|(row, header)| result(row, header)).collect())
    }

    /// What the device reaches when the step's results are on the host.
    pub fn done(&self, ticket: &Ticket) -> EventId {
        self.turns[(ticket.number % 2) as usize].event
    }

    fn slot(&self, number: u64, row: usize) -> u32 {
        ((number % 2) as usize * self.max_rows + row) as u32
    }

    /// Waits until the device no longer uses the memory of the step that had this turn before.
    fn free_turn(&mut self, number: u64) -> Result<(), DeviceError> {
        let turn = &mut self.turns[(number % 2) as usize];
        match turn.progress {
            Progress::Idle => {}
            Progress::Staged => self.device.synchronize()?,
            Progress::Collected => self.device.driver().wait(turn.event)?,
        }
        turn.progress = Progress::Idle;
        Ok(())
    }

    /// Makes room for the rows' lists. Kernels find them through the header, so that graphs stay valid.
    fn make_room(&mut self, number: u64, rows: &[DeviceRow<'_>]) -> Result<(), DeviceError> {
        let needed = rows.iter().map(|row| staging::list_words(row, self.vocab_size)).sum::<usize>();
        let room = needed.next_power_of_two();
        if room > self.words.len() {
            let words = DeviceBuffer::new(&self.device, room)?;
            self.saved = DeviceBuffer::new(&self.device, room)?;
            self.words = words;
        }
        let turn = &mut self.turns[(number % 2) as usize];
        if room > turn.words.len() {
            turn.words = HostBuffer::zeroed(&self.device, room)?;
        }
        Ok(())
    }

    fn params(&self, logits: View<f32>) -> SampleParams {
        SampleParams {
            logits: logits.address(),
            header: self.head.address(),
            rows: self.head.at(HEADER_WORDS),
            states: self.states.address(),
            sampled: self.sampled.address(),
            results: self.results.address(),
            tops: self.results.at(self.max_rows * RESULT_WORDS),
            slice_counts: self.slice_counts.address(),
            slice_sums: self.slice_sums.address(),
            groups: self.groups.address(),
            slice_tops: self.slice_tops.address(),
            list: self.list.address(),
            vocab: self.vocab_size as u32,
            slices: self.slices as u32,
            max_rows: self.max_rows as u32,
            max_logprobs: self.max_logprobs as u32,
        }
    }
}

/// `SampleHeader` of sample.cuh.
fn header_words(words: &DeviceBuffer<u32>, saved: &DeviceBuffer<f32>, number: u64) -> [u32; HEADER_WORDS] {
    let (words, saved) = (words.address().0, saved.address().0);
    [words as u32, (words >> 32) as u32, saved as u32, (saved >> 32) as u32, (number % 2) as u32, 0, 0, 0]
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SampleParams {
    logits: Address,
    header: Address,
    rows: Address,
    states: Address,
    sampled: Address,
    results: Address,
    tops: Address,
    slice_counts: Address,
    slice_sums: Address,
    groups: Address,
    slice_tops: Address,
    list: Address,
    vocab: u32,
    slices: u32,
    max_rows: u32,
    max_logprobs: u32,
}
