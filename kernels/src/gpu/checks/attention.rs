//! Checks paged attention and the writing of the cache: against the textbook formula, against the CPU, and for invariance.

mod cpu;
mod harness;
mod reference;

use super::{Check, CheckFailure, Random, equal, near};
use crate::attention::KvShape;
use crate::gpu::attention::{GpuKvType, NO_SLOT};
use crate::gpu::{Device, Element};
use harness::{Harness, Model, Sequence, Splitting};

pub const CHECKS: &[Check] = &[
    Check { name: "rope_append", run: append },
    Check { name: "attention", run: against_the_textbook },
    Check { name: "attention_long", run: long_sequences },
    Check { name: "attention_cpu", run: against_the_cpu },
    Check { name: "attention_invariance", run: the_same_however_it_is_run },
    Check { name: "attention_split_invariance", run: the_same_wherever_splits_are_merged },
    Check { name: "attention_copied_blocks", run: copied_blocks },
];

const BLOCK_SIZES: [usize; 4] = [16, 32, 64, 128];

/// Allowed error of attention whose weights and outputs are rounded to this type.
fn bound(element: Element) -> f64 {
    match element {
        Element::F32 => 1e-5,
        Element::F16 => 1.5e-3,
        Element::BF16 => 1e-2,
    }
}

/// A type of cache for each type of activations.
const TYPES: [(Element, GpuKvType); 4] = [
    (Element::BF16, GpuKvType::BF16),
    (Element::F16, GpuKvType::F16),
    (Element::BF16, GpuKvType::Fp8),
    (Element::F16, GpuKvType::Fp8),
];

fn append(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (index, (element, ty)) in TYPES.into_iter().enumerate() {
        let dim = [64, 80, 16 * (1 + random.below(16)), 256][index];
        let mut model = Model::random(&mut random, element, ty, dim);
        for norm in [false, true] {
            model.norm = norm;
            model.qkv_element = [Element::F32, element][random.below(2)];
            let tokens = 1 + random.below(20);
            let block_size = BLOCK_SIZES[random.below(4)];
            let sequences = vec![Sequence::random(&mut random, &model, tokens)];
            let mut harness = Harness::new(device, model, block_size, sequences, &mut random)?;
            harness.step(&[(0, tokens)], Splitting::Planned)?;
            reference::check_appended(&harness, &format!("rope_append {model:?}"))?;
        }
    }
    Ok(())
}

/// Prefill, then some decoding, over random shapes.
fn against_the_textbook(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (index, (element, ty)) in TYPES.into_iter().cycle().take(8).enumerate() {
        let dim = [64, 128, 96, 80, 256, 112, 16 * (1 + random.below(16)), 128][index];
        let mut model = Model::random(&mut random, element, ty, dim);
        model.window = (index % 3 == 1).then(|| 1 + random.below(100));
        model.soft_cap = (index % 4 == 2).then_some(2.0);
        let lengths = [1 + random.below(150), 2 + random.below(100), 65 + random.below(20)];
        let sequences = lengths.iter().map(|&tokens| Sequence::random(&mut random, &model, tokens)).collect();
        let block_size = BLOCK_SIZES[random.below(4)];
        let mut harness = Harness::new(device, model, block_size, sequences, &mut random)?;
        let what = format!("attention, blocks of {block_size}, {model:?}");
        // The second sequence is one token behind, which it decodes beside the third one's second chunk.
        let chunk = 1 + random.below(lengths[2] - 1);
        for feeds in [&[(0, lengths[0]), (1, lengths[1] - 1), (2, chunk)][..], &[(1, 1), (2, lengths[2] - chunk)]] {
            let rows = harness.step(feeds, Splitting::Planned)?;
            for (rows, (sequence, _)) in rows.iter().zip(feeds) {
                reference::check_rows(&harness, *sequence, rows, bound(element), &what)?;
            }
        }
    }
    Ok(())
}

/// Several splits, merged by a block of the grid, within an item and within a tile.
fn long_sequences(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (index, (element, ty)) in TYPES.into_iter().take(3).enumerate() {
        let mut model = Model::random(&mut random, element, ty, 64);
        model.window = (index == 1).then(|| 260 + random.below(200));
        let tokens = 2300 + random.below(300);
        let sequences = vec![Sequence::random(&mut random, &model, tokens)];
        let mut harness = Harness::new(device, model, BLOCK_SIZES[index], sequences, &mut random)?;
        // Only the last rows are computed and compared; the others' keys and values have to be there.
        harness.append_only(0, tokens - 20)?;
        for (splitting, count) in [(Splitting::Always, 1), (Splitting::Never, 1), (Splitting::Planned, 18)] {
            let rows = harness.step(&[(0, count)], splitting)?;
            let what = format!("attention over {tokens} positions, {splitting:?}, {model:?}");
            reference::check_rows(&harness, 0, &rows[0], bound(element), &what)?;
        }
    }
    Ok(())
}

fn against_the_cpu(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (element, ty) in TYPES.into_iter().take(2) {
        let dim = 16 * (2 + random.below(7));
        let mut model = Model::random(&mut random, element, ty, dim);
        model.window = (random.below(2) == 0).then(|| 1 + random.below(80));
        let tokens = 70 + random.below(70);
        let block_size = BLOCK_SIZES[random.below(4)];
        let sequences = vec![Sequence::random(&mut random, &model, tokens)];
        let mut harness = Harness::new(device, model, block_size, sequences, &mut random)?;
        let rows = harness.step(&[(0, tokens)], Splitting::Planned)?;
        let expected = cpu::attend(&harness.sequence(0).qkv, &model, block_size);
        // There queries are not rounded.
        near(
            &format!("attention against the CPU's, {model:?}"),
            &model.widen(&rows[0]),
            &expected,
            2.0 * bound(element),
        )?;
    }
    Ok(())
}

/// The invariant: the same bits whatever shares the batch, however the sequence was split, and wherever its blocks are.
fn the_same_however_it_is_run(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for (index, (element, ty)) in TYPES.into_iter().enumerate() {
        let dim = [128, 64, 64, 96][index];
        let mut model = Model::random(&mut random, element, ty, dim);
        model.window = (index % 2 == 1).then(|| 1 + random.below(300));
        let tokens = 270 + random.below(80);
        let sequence = Sequence::random(&mut random, &model, tokens);
        let other = Sequence::random(&mut random, &model, 90);
        let what = format!("attention cut otherwise, {model:?}");

        let mut whole = Harness::new(device, model, 64, vec![sequence.clone()], &mut random)?;
        let expected = whole.step(&[(0, tokens)], Splitting::Planned)?.remove(0);

        let block_size = BLOCK_SIZES[random.below(4)];
        let mut cut = Harness::new(device, model, block_size, vec![other, sequence], &mut random)?;
        let mut rows = Vec::new();
        let mut left = tokens;
        for splitting in [Splitting::Always, Splitting::Never].into_iter().cycle() {
            // A large chunk, then small ones, then single tokens; the other sequence decodes beside them.
            let chunk = match left {
                0 => break,
                1..=6 => 1,
                7..=60 => 1 + random.below(8),
                _ => 1 + random.below(left - 40),
            };
            rows.extend(cut.step(&[(0, 1), (1, chunk.min(left))], splitting)?.swap_remove(1));
            left -= chunk.min(left);
        }
        equal(&what, &rows, &expected)?;
    }
    Ok(())
}

/// Many splits, merged within a tile, within an item, and by the block that finishes last. Enough values are compared that
/// another order of addition would show in the rounding.
fn the_same_wherever_splits_are_merged(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let model = Model::random(&mut random, Element::F16, GpuKvType::F16, 64);
    // More rows than are taken sixteen at a time.
    let (tokens, last) = (1100 + random.below(200), 70);
    let sequences = vec![Sequence::random(&mut random, &model, tokens)];
    let mut harness = Harness::new(device, model, 32, sequences, &mut random)?;
    harness.append_only(0, tokens - last)?;
    let expected = harness.step(&[(0, last)], Splitting::Planned)?.remove(0);
    let chunk = 64 * model.num_kv_heads / model.num_heads;
    for splitting in [Splitting::Always, Splitting::Never] {
        harness.rewind(0, last);
        let mut rows = Vec::new();
        for first in (0..last).step_by(chunk) {
            rows.extend(harness.step(&[(0, chunk.min(last - first))], splitting)?.remove(0));
        }
        equal(&format!("attention over {tokens} positions, {splitting:?}, {model:?}"), &rows, &expected)?;
    }
    Ok(())
}

fn copied_blocks(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let model = Model::random(&mut random, Element::BF16, GpuKvType::BF16, 64);
    let sequence = Sequence::random(&mut random, &model, 40);
    let mut harness = Harness::new(device, model, 16, vec![sequence], &mut random)?;
    harness.step(&[(0, 38)], Splitting::Planned)?;
    let mut copy = Harness::new(device, model, 16, vec![harness.sequence(0).clone()], &mut random)?;
    copy.step(&[(0, 38)], Splitting::Planned)?;
    copy.move_blocks(0)?;
    let expected = harness.step(&[(0, 2)], Splitting::Planned)?;
    equal("attention over copied blocks", &copy.step(&[(0, 2)], Splitting::Planned)?, &expected)
}
