//! Checks the device sampler against the CPU's: the same tokens, and the same bits of every log-probability.

use half::bf16;

use super::{Check, CheckFailure, Random, equal};
use crate::gpu::sample::{DeviceRow, DeviceSampler, Ticket};
use crate::gpu::{Device, DeviceBuffer};
use crate::sample::{Changes, InvalidRow, Occurrence, Penalties, RowParams, RowSampler, SampledRow, Truncation};

pub const CHECKS: &[Check] = &[
    Check { name: "sample, all kinds of rows", run: kinds },
    Check { name: "sample, odd vocabularies", run: vocabularies },
    Check { name: "sample, a large vocabulary", run: large },
    Check { name: "sample, more candidates than are listed", run: wide },
    Check { name: "sample, invalid rows", run: invalid },
    Check { name: "sample, pending tokens", run: pending },
    Check { name: "sample, growing lists", run: growing },
    Check { name: "sample, a step given up", run: given_up },
];

const MAX_LOGPROBS: usize = 20;

/// The parameters of a row, with its lists.
#[derive(Clone, Debug)]
struct Asked {
    temperature: f32,
    truncation: Truncation,
    bits: u64,
    logprobs: Option<u32>,
    bias: Vec<(u32, f32)>,
    barred: Vec<u32>,
    penalties: Penalties,
    occurrences: Vec<Occurrence>,
    allowed: Option<Vec<u32>>,
}

impl Asked {
    fn greedy() -> Self {
        Self {
            temperature: 0.0,
            truncation: Truncation::OFF,
            bits: 0,
            logprobs: None,
            bias: Vec::new(),
            barred: Vec::new(),
            penalties: Penalties::OFF,
            occurrences: Vec::new(),
            allowed: None,
        }
    }

    fn random(random: &mut Random, vocab: usize) -> Self {
        let mut asked = Self::cut(random, vocab);
        if random.below(3) == 0 {
            asked.logprobs = Some(random.below(MAX_LOGPROBS + 1) as u32);
        }
        if random.below(3) == 0 {
            let len = random.below(60.min(vocab)) + 1;
            asked.bias = ids(random, vocab, len).into_iter().map(|id| (id, random.normal() * 8.0)).collect();
        }
        if random.below(4) == 0 {
            let len = random.below(4.min(vocab));
            asked.barred = ids(random, vocab + 2, len);
        }
        if random.below(2) == 0 {
            asked.penalise(random, vocab);
        }
        if random.below(5) == 0 {
            let keep = [1.0, 0.5, 0.01][random.below(3)];
            let bit = |random: &mut Random| u32::from(random.uniform() < keep);
            let mut mask: Vec<u32> =
                (0..vocab.div_ceil(32)).map(|_| (0..32).fold(0, |bits, _| bits << 1 | bit(random))).collect();
            mask[random.below(vocab / 32 + 1).min(vocab.div_ceil(32) - 1)] |= 1;
            asked.allowed = Some(mask);
        }
        asked
    }

    /// Temperature and truncation.
    fn cut(random: &mut Random, vocab: usize) -> Self {
        let temperature = [1.0, 0.05 + 3.0 * random.uniform(), 1e-4, 1e4, 0.0, 0.7][random.below(6)];
        let top_k = [0, 0, 1 + random.below(60), 1 + random.below(vocab + 10)][random.below(4)] as u32;
        let min_p = [0.0, 0.0, random.uniform(), 1.0, 1e-6][random.below(5)];
        let top_p = [1.0, 0.95, 0.001 + 0.998 * random.uniform(), 1e-9, 0.999_999_94][random.below(5)];
        let bits = [random.next_u64(), random.next_u64(), 0, u64::MAX][random.below(4)];
        Self { temperature, truncation: Truncation { top_k, min_p, top_p }, bits, ..Self::greedy() }
    }

    fn penalise(&mut self, random: &mut Random, vocab: usize) {
        self.penalties = Penalties {
            repetition: [1.0, 1.3, 0.8][random.below(3)],
            frequency: [0.0, 0.3, -0.2][random.below(3)],
            presence: [0.0, 1.5][random.below(2)],
        };
        let len = random.below(200.min(vocab) + 1);
        let count = |random: &mut Random| [0, 1, 2, 7][random.below(4)];
        let tokens = ids(random, vocab + 1, len);
        self.occurrences = tokens.into_iter().map(|token| Occurrence { token, count: count(random) }).collect();
    }

    fn params(&self) -> RowParams<'_> {
        RowParams {
            temperature: self.temperature,
            truncation: self.truncation,
            bits: self.bits,
            logprobs: self.logprobs,
            changes: Changes {
                bias: &self.bias,
                barred: &self.barred,
                penalties: self.penalties,
                occurrences: &self.occurrences,
                allowed: self.allowed.as_deref(),
            },
        }
    }

    fn row(&self) -> DeviceRow<'_> {
        DeviceRow { params: self.params(), pending: None }
    }

    /// The same row after one more emitted token.
    fn after(&self, token: u32) -> Self {
        let mut after = self.clone();
        match after.occurrences.iter_mut().find(|occurrence| occurrence.token == token) {
            Some(occurrence) => occurrence.count += 1,
            None => after.occurrences.push(Occurrence { token, count: 1 }),
        }
        after
    }
}

fn device_rows(asked: &[Asked]) -> Vec<DeviceRow<'_>> {
    asked.iter().map(Asked::row).collect()
}

/// Different ids.
fn ids(random: &mut Random, vocab: usize, len: usize) -> Vec<u32> {
    random.permutation(vocab)[..len].iter().map(|&id| id as u32).collect()
}

const SHAPES: usize = 9;

/// Rows as models produce them, and rows whose values are hard to distinguish.
fn logits(random: &mut Random, vocab: usize, shape: usize) -> Vec<f32> {
    let mut row: Vec<f32> = (0..vocab).map(|_| random.normal() * 3.0).collect();
    match shape {
        0 => (0..40).for_each(|rank| row[random.below(vocab)] = 18.0 - 0.2 * rank as f32),
        1 => row.iter_mut().for_each(|logit| *logit = bf16::from_f32(*logit).to_f32()),
        2 => row.fill(random.normal()),
        3 => row.iter_mut().for_each(|logit| *logit = logit.round()),
        4 => row.iter_mut().step_by(3).for_each(|logit| *logit = f32::NEG_INFINITY),
        5 => row.iter_mut().for_each(|logit| *logit *= 0.003),
        6 => row.iter_mut().for_each(|logit| *logit += 1e4),
        7 => row[random.below(vocab)] = 60.0,
        _ => row.iter_mut().for_each(|logit| *logit = if *logit < 1.0 { -0.0 } else { 0.0 }),
    }
    // At least one value is finite: rows without any belong to the check of invalid rows.
    let finite = random.below(vocab);
    row[finite] = if row[finite].is_finite() { row[finite] } else { 0.5 };
    row
}

/// A result with floats as their bits.
type Bits = Result<(u32, Option<(u32, u32, Vec<(u32, u32)>)>), InvalidRow>;

fn bits(result: Result<SampledRow, InvalidRow>) -> Bits {
    result.map(|row| {
        let logprobs = row.logprobs.map(|logprobs| {
            let top = logprobs.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect();
            (logprobs.logprob.to_bits(), logprobs.rank, top)
        });
        (row.token, logprobs)
    })
}

fn on_host(rows: &[f32], asked: &[Asked]) -> Vec<Bits> {
    let vocab = rows.len() / asked.len();
    let mut sampler = RowSampler::new(vocab);
    let sample = |(row, asked): (&[f32], &Asked)| bits(sampler.sample(&mut row.to_vec(), &asked.params()));
    rows.chunks(vocab).zip(asked).map(sample).collect()
}

fn read(sampler: &mut DeviceSampler, ticket: Ticket) -> Result<Vec<Bits>, CheckFailure> {
    Ok(sampler.read(ticket)?.into_iter().map(bits).collect())
}

fn compare(got: &[Bits], expected: &[Bits], asked: &[Asked]) -> Result<(), CheckFailure> {
    equal("rows", &[got.len()], &[expected.len()])?;
    for (row, asked) in asked.iter().enumerate() {
        if got[row] != expected[row] {
            equal(&format!("row {row}, {asked:?}"), &got[row..=row], &expected[row..=row])?;
        }
    }
    Ok(())
}

/// One step of these rows, against the host.
fn step(device: &Device, sampler: &mut DeviceSampler, rows: &[f32], asked: &[Asked]) -> Result<(), CheckFailure> {
    let logits = DeviceBuffer::from_slice(device, rows)?;
    let ticket = sampler.queue(logits.view(), &device_rows(asked))?;
    let got = read(sampler, ticket)?;
    compare(&got, &on_host(rows, asked), asked)
}

fn kinds(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let vocab = 4500 + random.below(500);
    let mut sampler = DeviceSampler::new(device, vocab, 2 * SHAPES, MAX_LOGPROBS)?;
    for _ in 0..4 {
        let rows: Vec<f32> = (0..2 * SHAPES).flat_map(|row| logits(&mut random, vocab, row % SHAPES)).collect();
        let asked: Vec<Asked> = (0..2 * SHAPES).map(|_| Asked::random(&mut random, vocab)).collect();
        step(device, &mut sampler, &rows, &asked)?;
    }
    Ok(())
}

fn vocabularies(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    for vocab in [1, 2, 31, 33, 255, 257, 1000, 4095, 4096, 4097, 12_289] {
        let rows = 4;
        let mut sampler = DeviceSampler::new(device, vocab, rows, MAX_LOGPROBS)?;
        let shape = random.below(SHAPES);
        let values: Vec<f32> = (0..rows).flat_map(|row| logits(&mut random, vocab, (shape + row) % SHAPES)).collect();
        let asked: Vec<Asked> = (0..rows)
            .map(|_| Asked { logprobs: Some(MAX_LOGPROBS as u32), ..Asked::random(&mut random, vocab) })
            .collect();
        step(device, &mut sampler, &values, &asked)?;
    }
    Ok(())
}

fn large(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let vocab = 128_256 + random.below(100);
    let mut sampler = DeviceSampler::new(device, vocab, 4, MAX_LOGPROBS)?;
    let rows: Vec<f32> = [0, 1, 5, 0].iter().flat_map(|&shape| logits(&mut random, vocab, shape)).collect();
    let cut = |top_k, min_p, top_p| Asked {
        temperature: 0.8,
        truncation: Truncation { top_k, min_p, top_p },
        bits: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        logprobs: Some(4),
        ..Asked::greedy()
    };
    step(device, &mut sampler, &rows, &[cut(50, 0.0, 0.9), cut(0, 0.0, 0.95), cut(0, 0.0, 0.5), cut(0, 0.0, 1.0)])
}

/// Rows whose candidates do not fit the list, by each of the cuts.
fn wide(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let vocab = 9000 + random.below(3000);
    let cuts = [
        Truncation { top_k: 5000, min_p: 0.0, top_p: 1.0 },
        Truncation { top_k: vocab as u32 - 1, min_p: 0.01, top_p: 0.9 },
        Truncation { top_k: 0, min_p: 1e-5, top_p: 0.5 },
        Truncation { top_k: 0, min_p: 0.0, top_p: 0.97 },
        Truncation { top_k: 0, min_p: 0.0, top_p: 0.3 },
    ];
    let mut sampler = DeviceSampler::new(device, vocab, cuts.len(), 0)?;
    for shape in [1, 2, 4, 5, 8] {
        let rows: Vec<f32> = (0..cuts.len()).flat_map(|_| logits(&mut random, vocab, shape)).collect();
        let temperature = [1.0, 4.0, 50.0][random.below(3)];
        let asked = |truncation: &Truncation| Asked {
            temperature,
            truncation: *truncation,
            bits: random.next_u64(),
            ..Asked::greedy()
        };
        step(device, &mut sampler, &rows, &cuts.iter().map(asked).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Invalid rows must be reported: NaN and +inf anywhere, and rows without any allowed token; valid rows beside them must not.
fn invalid(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let vocab = 5000;
    let bad = [f32::NAN, f32::from_bits(0xffc0_0001), f32::INFINITY];
    let num_rows = 2 * bad.len() + 4;
    let mut sampler = DeviceSampler::new(device, vocab, num_rows, MAX_LOGPROBS)?;
    let mut rows: Vec<f32> = (0..num_rows).flat_map(|_| logits(&mut random, vocab, 0)).collect();
    let mut asked: Vec<Asked> = (0..num_rows).map(|_| Asked::cut(&mut random, vocab)).collect();
    for row in 0..2 * bad.len() {
        rows[row * vocab + random.below(vocab)] = bad[row / 2];
        // Changing the token must not hide it.
        asked[row].logprobs = (row % 2 == 0).then_some(3);
        asked[row].allowed = (row % 2 == 1).then(|| vec![1; vocab.div_ceil(32)]);
    }
    let nothing = 2 * bad.len();
    rows[nothing * vocab..][..vocab].fill(f32::NEG_INFINITY);
    asked[nothing + 1].allowed = Some(vec![0; vocab.div_ceil(32)]);
    step(device, &mut sampler, &rows, &asked)?;
    // The next step is not affected by it.
    let asked: Vec<Asked> = (0..num_rows).map(|_| Asked::random(&mut random, vocab)).collect();
    let rows: Vec<f32> = (0..num_rows).flat_map(|_| logits(&mut random, vocab, 0)).collect();
    step(device, &mut sampler, &rows, &asked)
}

/// Steps that are queued before the previous one is read: each row's penalties must count the token that is still on the
/// device.
fn pending(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (vocab, num_rows) = (4200, 6);
    let mut sampler = DeviceSampler::new(device, vocab, num_rows, 2)?;
    let asked: Vec<Asked> = (0..num_rows)
        .map(|row| {
            let mut asked = Asked::random(&mut random, vocab);
            asked.penalise(&mut random, vocab);
            asked.penalties.presence = 1.5;
            asked.logprobs = (row % 2 == 0).then_some(2);
            asked
        })
        .collect();
    let mut before: Option<(Ticket, Vec<f32>, Vec<Asked>)> = None;
    for _ in 0..5 {
        // One row prefers the same few tokens, so that the pending token is already in its list.
        let rows: Vec<f32> = (0..num_rows).flat_map(|row| logits(&mut random, vocab, [7, 0, 3][row % 3])).collect();
        let buffer = DeviceBuffer::from_slice(device, &rows)?;
        // Rows move up one place per step.
        let place_before = |at: usize| (at + num_rows - 1) % num_rows;
        let known = before.as_ref().map_or(&asked, |(_, _, asked)| asked);
        let mut by_place: Vec<Asked> = (0..num_rows).map(|at| known[place_before(at)].clone()).collect();
        let slot = |at: usize| before.as_ref().map(|(ticket, ..)| ticket.slot(place_before(at)));
        let pending_rows: Vec<DeviceRow<'_>> =
            by_place.iter().enumerate().map(|(at, asked)| DeviceRow { pending: slot(at), ..asked.row() }).collect();
        let ticket = sampler.queue(buffer.view(), &pending_rows)?;
        if let Some((ticket, rows, asked)) = before.take() {
            let expected = on_host(&rows, &asked);
            compare(&read(&mut sampler, ticket)?, &expected, &asked)?;
            for (at, asked) in by_place.iter_mut().enumerate() {
                let (token, _) = expected[place_before(at)].as_ref().expect("the rows are valid");
                *asked = asked.after(*token);
            }
        }
        before = Some((ticket, rows, by_place));
    }
    let (ticket, rows, asked) = before.expect("five steps");
    compare(&read(&mut sampler, ticket)?, &on_host(&rows, &asked), &asked)
}

/// Lists that exceed their initial space, between steps without lists.
fn growing(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (vocab, num_rows) = (9000, 3);
    let mut sampler = DeviceSampler::new(device, vocab, num_rows, 5)?;
    for len in [0, 10, 8900, 4, 3000] {
        let rows: Vec<f32> = (0..num_rows).flat_map(|row| logits(&mut random, vocab, row)).collect();
        let asked: Vec<Asked> = (0..num_rows)
            .map(|_| {
                let mut asked = Asked::cut(&mut random, vocab);
                asked.logprobs = Some(5);
                asked.penalties = Penalties { repetition: 1.2, frequency: 0.1, presence: 0.0 };
                let tokens = ids(&mut random, vocab, len);
                asked.occurrences = tokens.into_iter().map(|token| Occurrence { token, count: token % 3 }).collect();
                asked
            })
            .collect();
        step(device, &mut sampler, &rows, &asked)?;
    }
    Ok(())
}

/// A step that is staged while another one runs, and is then abandoned: the earlier one can still be read, and the next step
/// takes its place.
fn given_up(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    let (vocab, num_rows) = (700, 3);
    let mut sampler = DeviceSampler::new(device, vocab, num_rows, MAX_LOGPROBS)?;
    for _ in 0..3 {
        let mut step = || -> (Vec<f32>, Vec<Asked>) {
            let rows = (0..num_rows).flat_map(|row| logits(&mut random, vocab, row)).collect();
            (rows, (0..num_rows).map(|_| Asked::random(&mut random, vocab)).collect())
        };
        let ((rows, asked), (_, abandoned), (next_rows, next_asked)) = (step(), step(), step());
        let buffers = [DeviceBuffer::from_slice(device, &rows)?, DeviceBuffer::from_slice(device, &next_rows)?];
        let first = sampler.queue(buffers[0].view(), &device_rows(&asked))?;
        let slots = sampler.stage(&device_rows(&abandoned))?.slot(&sampler, 0);
        let next = sampler.queue(buffers[1].view(), &device_rows(&next_asked))?;
        equal("slots", &[next.slot(0)], &[slots])?;
        compare(&read(&mut sampler, first)?, &on_host(&rows, &asked), &asked)?;
        compare(&read(&mut sampler, next)?, &on_host(&next_rows, &next_asked), &next_asked)?;
    }
    Ok(())
}
