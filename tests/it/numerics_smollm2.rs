//! Compares our numbers on the real model with the float32 continuations of a dozen prompts by transformers.
//!
//! Every case is teacher-forced: the golden tokens are fed, and the most likely next token is compared at each of them. If all
//! agree, greedy decoding gives exactly the golden text.

use std::path::Path;

use serde_json::Value;

use crate::paths::{Blocks, Fed, Row, assert_same_bits, feed, feed_together};
use crate::runners::{Numbers, Setup, smollm2_runner};

/// The minimum share of positions at which the default arithmetic chooses the same token as float32.
const DEFAULT_AGREEMENT: f64 = 0.97;

/// A prompt and its greedy continuation in float32.
struct Case {
    prompt: Vec<u32>,
    output: Vec<u32>,
}

impl Case {
    fn load_all() -> Vec<Self> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
        let cases = golden["cases"].as_array().unwrap();
        let read =
            |case: &Value| Self { prompt: ids(&case["prompt_ids"]), output: ids(&case["gguf_f32"]["output_ids"]) };
        cases.iter().map(read).collect()
    }
}

#[test]
fn float32_reproduces_every_continuation() {
    let (agreeing, compared, report) = top1_agreement(Numbers::Float32);
    assert_eq!(agreeing, compared, "{report}");
}

#[test]
fn default_arithmetic_agrees_in_top1() {
    let (agreeing, compared, report) = top1_agreement(Numbers::Default);
    let share = agreeing as f64 / compared as f64;
    println!("default arithmetic: top-1 agreement {agreeing}/{compared} = {:.2} %\n{report}", share * 100.0);
    assert!(share >= DEFAULT_AGREEMENT, "{agreeing} of {compared} agree\n{report}");
}

/// Compares all cases in one batch, in chunks and decode steps, with each case alone and whole.
#[test]
fn batch_mates_do_not_change_a_bit() {
    for numbers in [Numbers::Float32, Numbers::Default] {
        let mut runner = smollm2_runner(Setup::new(numbers));
        let runner = runner.as_mut();
        // In float32 the long prompt would take most of the time and test nothing that the others do not.
        let longest = if numbers == Numbers::Float32 { 100 } else { usize::MAX };
        let cases = Case::load_all().into_iter().filter(|case| case.prompt.len() <= longest);
        let ids: Vec<Vec<u32>> = cases.map(|case| [&case.prompt[..], &case.output[..8]].concat()).collect();
        let mut blocks = Blocks::new(runner);
        let tables: Vec<Vec<u32>> = ids.iter().map(|ids| blocks.table(ids.len())).collect();
        let chunks: [&[usize]; 3] = [&[1, 30, 1], &[17, 64, 5], &[200, 1]];
        let members = ids.iter().zip(&tables).zip(chunks.iter().cycle());
        let members: Vec<Fed<'_>> = members.map(|((ids, table), chunks)| Fed { ids, table, chunks }).collect();
        let rows = feed_together(runner, &members);
        for (ids, rows) in ids.iter().zip(&rows) {
            let table = blocks.table(ids.len());
            let last: Vec<Row> = rows.last().cloned().into_iter().collect();
            let alone = feed(runner, &table, ids, 0, ids.len());
            assert_same_bits(&format!("{numbers:?}"), &last, &alone);
            blocks.give_back(table);
        }
    }
}

/// Returns the agreeing positions, the compared positions, and a line for each position that differs.
fn top1_agreement(numbers: Numbers) -> (usize, usize, String) {
    let cases = Case::load_all();
    let mut runner = smollm2_runner(Setup::new(numbers));
    let mut blocks = Blocks::new(runner.as_ref());
    let ids: Vec<Vec<u32>> = cases.iter().map(|case| [&case.prompt[..], &case.output].concat()).collect();
    let tables: Vec<Vec<u32>> = ids.iter().map(|ids| blocks.table(ids.len())).collect();
    let chunks: Vec<[usize; 2]> = cases.iter().map(|case| [case.prompt.len(), 1]).collect();
    let members = ids.iter().zip(&tables).zip(&chunks);
    let members: Vec<Fed<'_>> = members.map(|((ids, table), chunks)| Fed { ids, table, chunks }).collect();
    let rows = feed_together(runner.as_mut(), &members);
    let (mut agreeing, mut compared, mut report) = (0, 0, String::new());
    for (case, (ids, rows)) in ids.iter().zip(&rows).enumerate() {
        // The last row predicts a token beyond the golden ones.
        for (position, logits) in rows.iter().filter(|row| row.0 + 1 < ids.len()) {
            let (ours, golden) = (argmax(logits), ids[position + 1] as usize);
            compared += 1;
            agreeing += usize::from(ours == golden);
            if ours != golden {
                let gap = logits[ours] - logits[golden];
                report += &format!("case {case}, position {position}: {ours} over {golden} by {gap}\n");
            }
        }
    }
    assert_eq!(compared, cases.iter().map(|case| case.output.len()).sum::<usize>());
    (agreeing, compared, report)
}

/// The lowest id among the largest logits.
fn argmax(logits: &[f32]) -> usize {
    assert!(logits.iter().all(|logit| logit.is_finite()), "a logit is not finite");
    (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best }).unwrap()
}
