//! Compares our numbers on the fixtures with those of transformers, for every path that a sequence can take.

use crate::fixtures::{DIRECTORIES, FLOAT32_TOLERANCE, GGUF_FILES, Golden, PROMPT_LENGTH, relative_error};
use crate::paths::{Blocks, CHUNKS, Row, assert_same_bits, check_every_path, feed, share_prefix};
use crate::runners::{Numbers, Setup, fixture_runner};

/// Dense weights are multiplied in float32, but keys and values are stored in float16, and so are weights of types that the
/// kernels do not support: the relative error of each is up to 2^-11 = 5e-4. Up to 2.2e-3 of the largest logit was measured.
const HALF_TOLERANCE: f32 = 4e-3;

/// Quantized weights are multiplied with 8-bit activations, scaled to the largest of a group. The rms error of every input is
/// about 0.6 %, which adds up to about 2 % of the logits' standard deviation. The largest error of 10,000 logits is four to
/// five times that, relative to a largest logit of four standard deviations. Up to 5.5e-2 was measured; a wrong scale or
/// nibble gives about 1.
const INTEGER_TOLERANCE: f32 = 8e-2;

fn all_fixtures() -> impl Iterator<Item = &'static str> {
    DIRECTORIES.into_iter().chain(GGUF_FILES)
}

/// Checks whole prefill, chunked prefill with decode after it, and a prefix-cache hit, all in float32.
#[test]
fn float32_agrees_with_transformers_on_every_path() {
    for name in all_fixtures() {
        let golden = Golden::load(name);
        let mut runner = fixture_runner(name, Setup::new(Numbers::Float32));
        let runner = runner.as_mut();
        let mut blocks = Blocks::new(runner);
        for (position, _) in &golden.rows {
            let table = blocks.table(position + 1);
            let rows = feed(runner, &table, &golden.ids[..=*position], 0, usize::MAX / 2);
            check_golden(name, "whole prefill", &golden, &rows, FLOAT32_TOLERANCE);
            blocks.give_back(table);
        }
        let table = blocks.table(golden.ids.len());
        for chunk in CHUNKS {
            let rows = feed(runner, &table, &golden.ids[..PROMPT_LENGTH], 0, chunk);
            check_golden(name, "chunked prefill", &golden, &rows, FLOAT32_TOLERANCE);
            let rows = feed(runner, &table, &golden.ids, PROMPT_LENGTH, 1);
            assert_eq!(rows.len(), golden.ids.len() - PROMPT_LENGTH);
            check_golden(name, "decode", &golden, &rows, FLOAT32_TOLERANCE);
        }
        let hit = share_prefix(runner, &mut blocks, &table, 96);
        let rows = feed(runner, &hit, &golden.ids, 96, usize::MAX / 2);
        check_golden(name, "prefix-cache hit", &golden, &rows, FLOAT32_TOLERANCE);
    }
}

/// The bits of the logits depend only on the tokens, in float32 and in the default arithmetic.
#[test]
fn every_path_gives_the_same_bits() {
    for name in all_fixtures() {
        for numbers in [Numbers::Float32, Numbers::Default] {
            let what = format!("{name}, {numbers:?}");
            let ids = Golden::load(name).ids;
            let reference = check_every_path(&what, fixture_runner(name, Setup::new(numbers)).as_mut(), &ids);
            for setup in [Setup { block_size: 32, ..Setup::new(numbers) }, Setup { threads: 1, ..Setup::new(numbers) }]
            {
                let mut other = fixture_runner(name, setup);
                let table = Blocks::new(other.as_ref()).table(ids.len());
                let rows = feed(other.as_mut(), &table, &ids, 0, 50);
                assert_same_bits(&format!("{what}, {setup:?}"), &rows, &reference);
            }
        }
    }
}

/// The default arithmetic rounds more than float32; the tolerances say by how much it may differ.
#[test]
fn default_arithmetic_stays_close() {
    for name in all_fixtures() {
        let golden = Golden::load(name);
        let mut runner = fixture_runner(name, Setup::new(Numbers::Default));
        let table = Blocks::new(runner.as_ref()).table(golden.ids.len());
        let rows = feed(runner.as_mut(), &table, &golden.ids, 0, 1);
        check_golden(name, "default arithmetic", &golden, &rows, default_tolerance(name));
    }
}

fn default_tolerance(name: &str) -> f32 {
    match name {
        "gguf-q8_0-linear-rope" | "gguf-q4_0" | "gguf-q4_1" | "gguf-q4_k" | "gguf-q6_k" | "gguf-qwen3-q8_0" => {
            INTEGER_TOLERANCE
        }
        _ => HALF_TOLERANCE,
    }
}

/// Checks the rows at positions that have golden logits. There must be at least one.
fn check_golden(name: &str, path: &str, golden: &Golden, rows: &[Row], tolerance: f32) {
    let mut checked = 0;
    for (position, logits) in rows {
        if let Some((_, expected)) = golden.rows.iter().find(|row| row.0 == *position) {
            let error = relative_error(logits, expected);
            assert!(error <= tolerance, "{name}, {path}: off by {error:e} at position {position}");
            checked += 1;
        }
    }
    assert!(checked > 0, "{name}, {path}: no position to check");
}
