//! The paths of a sequence through a runner: whole, in chunks, token by token, in a batch with others, and on top of blocks
//! that are already filled. All must give the same bits.

use outrigger::engine::fake_runner::{FakeModel, FakeRunner};
use outrigger::engine::{LogitsEntry, LogitsRunner};

/// Chunk sizes at and around vector widths, the block size (16) and the length of attention stretches (64), and others.
pub const CHUNKS: [usize; 8] = [3, 7, 16, 17, 33, 64, 100, 128];

/// Logits after the token at a position.
pub type Row = (usize, Vec<f32>);

/// Feeds `ids[start..]` in chunks of `chunk` tokens. Returns the logits at the end of each chunk.
pub fn feed(runner: &mut dyn LogitsRunner, table: &[u32], ids: &[u32], start: usize, chunk: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut position = start;
    while position < ids.len() {
        let end = ids.len().min(position + chunk);
        let entry = LogitsEntry { tokens: &ids[position..end], start: position, block_table: table, num_logits: 1 };
        runner.forward(&[entry], &|| ()).unwrap();
        rows.push((end - 1, runner.logits_mut(0).to_vec()));
        position = end;
    }
    rows
}

/// A sequence in a batch of several. It has its own blocks and is fed in chunks of these sizes (the last size repeats).
pub struct Fed<'a> {
    pub ids: &'a [u32],
    pub table: &'a [u32],
    pub chunks: &'a [usize],
}

/// Feeds all sequences together, one chunk of each in every batch, until each has ended. Returns the rows of each.
pub fn feed_together(runner: &mut dyn LogitsRunner, sequences: &[Fed<'_>]) -> Vec<Vec<Row>> {
    let mut rows = vec![Vec::new(); sequences.len()];
    let mut fed = vec![0; sequences.len()];
    for step in 0.. {
        let mut batch = Vec::new();
        let mut members = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let start: usize = fed[index];
            if start == sequence.ids.len() {
                continue;
            }
            let chunk = *sequence.chunks.get(step).or(sequence.chunks.last()).unwrap();
            let end = sequence.ids.len().min(start + chunk);
            fed[index] = end;
            members.push((index, end - 1));
            batch.push(LogitsEntry {
                tokens: &sequence.ids[start..end],
                start,
                block_table: sequence.table,
                num_logits: 1,
            });
        }
        if batch.is_empty() {
            return rows;
        }
        runner.forward(&batch, &|| ()).unwrap();
        for (row, (index, position)) in members.into_iter().enumerate() {
            rows[index].push((position, runner.logits_mut(row).to_vec()));
        }
    }
    unreachable!()
}

/// Allocates block tables whose blocks are scattered over the pool.
pub struct Blocks {
    free: Vec<u32>,
    block_size: usize,
}

impl Blocks {
    pub fn new(runner: &dyn LogitsRunner) -> Self {
        let count = runner.num_blocks();
        // Tables take blocks from the end: first odd blocks, then even ones, so that a table's blocks are scattered.
        let odd = (0..count).filter(|block| block % 2 == 1);
        let even = (0..count).rev().filter(|block| block % 2 == 0);
        Self { free: even.chain(odd).collect(), block_size: runner.block_size() }
    }

    pub fn table(&mut self, tokens: usize) -> Vec<u32> {
        let blocks = tokens.div_ceil(self.block_size);
        self.free.split_off(self.free.len() - blocks)
    }

    pub fn give_back(&mut self, table: Vec<u32>) {
        self.free.extend(table);
    }
}

/// Asserts that every row has the bits of the reference at its position.
pub fn assert_same_bits(what: &str, rows: &[Row], reference: &[Row]) {
    assert!(!rows.is_empty(), "{what}: nothing was computed");
    for (position, logits) in rows {
        let (_, expected) = reference.iter().find(|row| row.0 == *position).expect("the reference has all positions");
        assert_eq!(logits.len(), expected.len(), "{what}");
        let differing = logits.iter().zip(expected).filter(|(ours, other)| ours.to_bits() != other.to_bits()).count();
        assert_eq!(differing, 0, "{what}: {differing} of {} logits differ at position {position}", logits.len());
    }
}

/// Checks every path with one runner. Returns the logits of all positions, computed token by token.
pub fn check_every_path(what: &str, runner: &mut dyn LogitsRunner, ids: &[u32]) -> Vec<Row> {
    let mut blocks = Blocks::new(runner);
    let table = blocks.table(ids.len());
    let reference = feed(runner, &table, ids, 0, 1);
    check_whole_and_chunked(what, runner, &mut blocks, ids, &reference);
    check_prefix_hit(what, runner, &mut blocks, &table, ids);
    check_copied_block(what, runner, &mut blocks, ids, &reference);
    check_among_others(what, runner, &mut blocks, ids, &reference);
    reference
}

fn check_whole_and_chunked(
    what: &str,
    runner: &mut dyn LogitsRunner,
    blocks: &mut Blocks,
    ids: &[u32],
    reference: &[Row],
) {
    for end in [1, 2, 15, 16, 17, 64, 65, 127, 130, ids.len()] {
        let table = blocks.table(end);
        assert_same_bits(&format!("{what}, whole"), &feed(runner, &table, &ids[..end], 0, end), reference);
        blocks.give_back(table);
    }
    let table = blocks.table(ids.len());
    for chunk in CHUNKS {
        assert_same_bits(&format!("{what}, chunks of {chunk}"), &feed(runner, &table, ids, 0, chunk), reference);
    }
    blocks.give_back(table);
}

/// A second sequence shares the first one's blocks as its prefix, continues differently, and does not change them.
fn check_prefix_hit(what: &str, runner: &mut dyn LogitsRunner, blocks: &mut Blocks, table: &[u32], ids: &[u32]) {
    let shared = 5 * runner.block_size();
    let other: Vec<u32> = ids[..shared].iter().chain(ids.iter().rev()).copied().take(ids.len()).collect();
    let own = blocks.table(other.len());
    let alone = feed(runner, &own, &other, 0, 1);
    blocks.give_back(own);
    let hit = share_prefix(runner, blocks, table, shared);
    assert_same_bits(&format!("{what}, prefix hit"), &feed(runner, &hit, &other, shared, 40), &alone);
    blocks.give_back(hit[5..].to_vec());
}

/// A sequence continues in a copy of its last, half-filled block; the original sequence continues in its own block.
fn check_copied_block(what: &str, runner: &mut dyn LogitsRunner, blocks: &mut Blocks, ids: &[u32], reference: &[Row]) {
    let fork = 4 * runner.block_size() + 5;
    let original = blocks.table(ids.len());
    let _ = feed(runner, &original, &ids[..fork], 0, fork);
    let mut copy = original[..5].to_vec();
    copy[4] = blocks.table(1)[0];
    copy.extend(blocks.table(ids.len() - 5 * runner.block_size()));
    runner.copy_block(original[4], copy[4]);
    let astray: Vec<u32> = ids[..fork].iter().chain(ids[..20].iter()).copied().collect();
    let _ = feed(runner, &original, &astray, fork, 1);
    assert_same_bits(&format!("{what}, copied block"), &feed(runner, &copy, ids, fork, 9), reference);
    assert_same_bits(&format!("{what}, original block"), &feed(runner, &original, ids, fork, 9), reference);
    blocks.give_back(copy[4..].to_vec());
    blocks.give_back(original);
}

/// Prefill and decode of several sequences in one batch give each sequence the same bits as alone.
fn check_among_others(what: &str, runner: &mut dyn LogitsRunner, blocks: &mut Blocks, ids: &[u32], reference: &[Row]) {
    let backwards: Vec<u32> = ids.iter().rev().copied().collect();
    let short = &backwards[20..37];
    let tables: Vec<Vec<u32>> = (0..5).map(|_| blocks.table(ids.len())).collect();
    let alone = feed(runner, &tables[0], &backwards, 0, 1);
    let short_alone = feed(runner, &tables[0], short, 0, 1);
    let rows = feed_together(
        runner,
        &[
            Fed { ids: short, table: &tables[0], chunks: &[1] },
            Fed { ids, table: &tables[1], chunks: &[100, 1] },
            Fed { ids: &backwards, table: &tables[2], chunks: &[1, 1, 64, 31, 1] },
            Fed { ids, table: &tables[3], chunks: &[5, 1, 1, 70, 2] },
            Fed { ids: &backwards, table: &tables[4], chunks: &[150, 7] },
        ],
    );
    for (rows, reference) in rows.iter().zip([&short_alone[..], reference, &alone, reference, &alone]) {
        assert_same_bits(&format!("{what}, among others"), rows, reference);
    }
    tables.into_iter().for_each(|table| blocks.give_back(table));
}

/// A table that begins with the blocks of the first `shared` tokens (full blocks) and continues with new ones.
pub fn share_prefix(runner: &dyn LogitsRunner, blocks: &mut Blocks, table: &[u32], shared: usize) -> Vec<u32> {
    assert_eq!(shared % runner.block_size(), 0);
    let full = shared / runner.block_size();
    let mut hit = table[..full].to_vec();
    hit.extend(blocks.table((table.len() - full) * runner.block_size()));
    hit
}

#[test]
fn the_fake_runner_takes_every_path() {
    let model = FakeModel { block_size: 16, num_blocks: 100, vocab_size: 8, ..FakeModel::default() };
    let ids: Vec<u32> = (0..192).map(|position| position * 7 % 101).collect();
    check_every_path("fake", &mut FakeRunner::new(model), &ids);
}
