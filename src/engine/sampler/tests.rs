//! The sampler as the engine sees it.

use std::sync::Arc;

use outrigger_kernels::sample::philox;
use outrigger_kernels::vocab;

use super::*;
use crate::types::SamplingParams;

const VOCAB: usize = 1000;

/// A row of logits in [-8, 8), a function of `salt`.
fn row(salt: u64) -> Vec<f32> {
    (0..VOCAB as u64).map(|id| (philox::bits_at(salt, id) >> 40) as f32 / (1 << 20) as f32 - 8.0).collect()
}

fn state(params: SamplingParams) -> SequenceSampler {
    SequenceSampler::new(Arc::new(params), 0, &[1, 2, 3], &[0], VOCAB)
}

fn sample(logits: &[f32], state: &SequenceSampler, position: usize) -> Result<Sampled, NumericsInvalid> {
    Sampler::new(logits.len()).sample(&mut logits.to_vec(), state, position)
}

fn many_parameters() -> Vec<SamplingParams> {
    let base = SamplingParams { seed: 42, ..Default::default() };
    vec![
        base.clone(),
        SamplingParams { temperature: 0.0, ..base.clone() },
        SamplingParams { temperature: 0.7, top_p: 0.9, ..base.clone() },
        SamplingParams { top_k: 40, min_p: 0.05, logprobs: Some(5), ..base.clone() },
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, logprobs: Some(0), ..base.clone() },
        SamplingParams { presence_penalty: 1.0, top_p: 0.5, logit_bias: vec![(7, 3.0)], min_tokens: 5, ..base },
    ]
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_of_equals() {
    let mut logits = row(1);
    logits[600] = 50.0;
    logits[300] = 50.0;
    for temperature in [0.0, 1e-6] {
        let state = state(SamplingParams { temperature, ..Default::default() });
        assert_eq!(sample(&logits, &state, 0).unwrap().token, 300);
    }
    let biased =
        state(SamplingParams { temperature: 0.0, logit_bias: vec![(300, -1.0), (9, 90.0)], ..Default::default() });
    assert_eq!(sample(&logits, &biased, 0).unwrap().token, 9);
}

#[test]
fn top_k_of_one_is_greedy_at_any_temperature() {
    for salt in 0..50 {
        let logits = row(salt);
        let expected = vocab::argmax(&logits).unwrap();
        for temperature in [0.1, 1.0, 1e6] {
            let state = state(SamplingParams { temperature, top_k: 1, seed: salt, ..Default::default() });
            assert_eq!(sample(&logits, &state, 5).unwrap().token, expected);
        }
    }
}

#[test]
fn a_resumed_stream_continues_exactly() {
    for params in many_parameters() {
        let params = Arc::new(params);
        let fresh = || SequenceSampler::new(params.clone(), 2, &[1, 2, 3], &[0], VOCAB);
        let mut sampler = Sampler::new(VOCAB);
        let mut whole = fresh();
        let mut stream = Vec::new();
        for position in 0..40 {
            let sampled = sampler.sample(&mut row(position as u64), &whole, position).unwrap();
            whole.push(sampled.token);
            stream.push(sampled);
        }
        for cut in 0..40 {
            let mut resumed = fresh();
            stream[..cut].iter().for_each(|sampled| resumed.push(sampled.token));
            let next = Sampler::new(VOCAB).sample(&mut row(cut as u64), &resumed, cut).unwrap();
            assert_eq!(next, stream[cut], "resumed at {cut} with {params:?}");
        }
    }
}

#[test]
fn the_scratch_of_other_rows_does_not_leak() {
    let states: Vec<SequenceSampler> = many_parameters().into_iter().map(state).collect();
    let mut shared = Sampler::new(VOCAB);
    for salt in 0..30 {
        for state in &states {
            let together = shared.sample(&mut row(salt), state, salt as usize).unwrap();
            assert_eq!(together, sample(&row(salt), state, salt as usize).unwrap());
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = vec![0.0, 1.0, 2.0, -1.0, f32::NEG_INFINITY];
    let temperature = 0.8;
    let weights: Vec<f64> = logits.iter().map(|logit| libm::exp(f64::from(*logit) / temperature)).collect();
    let total: f64 = weights.iter().sum();
    let draws = 40_000;
    let mut counts = [0_u32; 5];
    let params = Arc::new(SamplingParams { temperature: temperature as f32, seed: 9, ..Default::default() });
    let state = SequenceSampler::new(params, 0, &[], &[], logits.len());
    let mut sampler = Sampler::new(logits.len());
    for position in 0..draws {
        counts[sampler.sample(&mut logits.clone(), &state, position).unwrap().token as usize] += 1;
    }
    let chi_squared: f64 = (0..4)
        .map(|id| {
            let expected = weights[id] / total * draws as f64;
            (f64::from(counts[id]) - expected).powi(2) / expected
        })
        .sum();
    assert!(chi_squared < 16.3, "chi squared {chi_squared} with 3 degrees of freedom (p = 0.001)");
    assert_eq!(counts[4], 0);
}

#[test]
fn choices_and_positions_draw_differently() {
    let logits = vec![0.0; VOCAB];
    let params = Arc::new(SamplingParams { seed: 3, ..Default::default() });
    let stream = |choice| -> Vec<TokenId> {
        let state = SequenceSampler::new(params.clone(), choice, &[], &[], VOCAB);
        (0..8).map(|position| sample(&logits, &state, position).unwrap().token).collect()
    };
    assert_ne!(stream(0), stream(1));
    assert_ne!(stream(1), stream(2));
    assert!(stream(0).windows(2).any(|pair| pair[0] != pair[1]));
}

#[test]
fn logprobs_are_of_the_raw_row() {
    let logits = row(4);
    let max = vocab::max(&logits).unwrap();
    let sum: f64 = logits.iter().map(|logit| libm::exp(f64::from(*logit) - f64::from(max))).sum();
    let expected = |id: TokenId| f64::from(logits[id as usize]) - f64::from(max) - libm::log(sum);
    let params = SamplingParams {
        logprobs: Some(3),
        logit_bias: vec![(17, 100.0)],
        repetition_penalty: 1.5,
        temperature: 0.5,
        ..Default::default()
    };
    let sampled = sample(&logits, &state(params), 0).unwrap();
    let logprobs = sampled.logprobs.unwrap();
    assert_eq!(sampled.token, 17);
    assert!((f64::from(logprobs.logprob) - expected(17)).abs() < 1e-5);

    let mut order: Vec<TokenId> = (0..VOCAB as TokenId).collect();
    order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
    assert_eq!(logprobs.rank as usize, order.iter().position(|id| *id == 17).unwrap() + 1);
    assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..3]);
    for (id, logprob) in logprobs.top {
        assert!((f64::from(logprob) - expected(id)).abs() < 1e-5);
    }
}

#[test]
fn equal_logits_rank_by_id() {
    let state = state(SamplingParams { temperature: 0.0, logprobs: Some(2), ..Default::default() });
    let mut logits = vec![0.0; VOCAB];
    logits[5] = -1.0;
    let logprobs = sample(&logits, &state, 0).unwrap().logprobs.unwrap();
    assert_eq!(logprobs.rank, 1);
    assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn min_tokens_holds_off_the_end() {
    let mut logits = row(2);
    logits[0] = 60.0;
    let state = state(SamplingParams { min_tokens: 3, ..Default::default() });
    for position in 0..3 {
        assert_ne!(sample(&logits, &state, position).unwrap().token, 0);
    }
    assert_eq!(sample(&logits, &state, 3).unwrap().token, 0);
}

#[test]
fn invalid_numbers_are_reported_on_every_path() {
    for params in many_parameters() {
        let state = state(params);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = row(3);
            logits[777] = bad;
            assert_eq!(sample(&logits, &state, 4), Err(NumericsInvalid { position: 4 }));
        }
        let nothing = vec![f32::NEG_INFINITY; VOCAB];
        assert_eq!(sample(&nothing, &state, 4), Err(NumericsInvalid { position: 4 }));
    }
}
