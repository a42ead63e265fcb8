//! Simulates the real router, engine core and protocols over a simulated network and clock, from a seed.
//!
//! Each seed gives a cluster of two to five nodes, clients of all kinds, and faults: processes and machines die, pause and
//! drain; links are cut in one or both directions, connections break; engines slow down, hang, crash, run out of memory or
//! return NaN; reports arrive late and out of order. Every stream must equal the undisturbed run of its request. No client may
//! see an error while a replica could have helped. At the end nothing may be left over.
//!
//! `SIM_SEED=7` runs one seed and prints what happens; `SIM_SEEDS=1000000` sets the number of seeds; `SIM_FIRST` sets the first
//! one.
//!
//! Limits of the simulation: a paused process sends and receives nothing, and its engine does not step, but its timers
//! continue. Membership is a model of gossip, not chitchat. HTTP/2 and TLS are not simulated.

#![expect(clippy::disallowed_methods, reason = "the simulator waits for its own tasks")]
#![expect(clippy::print_stdout, reason = "a failed seed's events are printed on standard output")]

mod client;
mod conflict;
mod dialect;
mod engine;
mod gossip;
mod net;
mod node;
mod oracle;
mod plan;
mod random;
mod run;
mod slow;
mod trace;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use run::Outcome;

/// The number of seeds in an ordinary test run.
const SEEDS: u64 = 5_000;
/// A seed that takes longer than this is in an endless loop.
const SEED_LIMIT: Duration = Duration::from_secs(300);

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text}")))
}

fn replay_line(seed: u64) -> String {
    format!("SIM_SEED={seed} cargo test --test sim every_stream -- --nocapture")
}

#[derive(Default)]
struct Progress {
    /// The seed that each thread is running, and since when.
    running: Mutex<BTreeMap<usize, (u64, Instant)>>,
    failed: Mutex<BTreeMap<u64, String>>,
    done: AtomicU64,
    sum: Mutex<Outcome>,
}

#[test]
fn every_stream_equals_its_undisturbed_run() {
    if let Some(seed) = setting("SIM_SEED") {
        match run::run(seed, true) {
            Ok(_) => return,
            Err(violation) => panic!("{}\n    {}", violation.0, replay_line(seed)),
        }
    }
    let first = setting("SIM_FIRST").unwrap_or(0);
    let end = first + setting("SIM_SEEDS").unwrap_or(SEEDS);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let (progress, next) = (Arc::<Progress>::default(), Arc::new(AtomicU64::new(first)));
    let workers: Vec<_> = (0..threads)
        .map(|thread| {
            let (progress, next) = (progress.clone(), next.clone());
            std::thread::spawn(move || work(thread, end, &next, &progress))
        })
        .collect();
    while workers.iter().any(|worker| !worker.is_finished()) {
        std::thread::sleep(Duration::from_millis(50));
        let running = progress.running.lock();
        if let Some((seed, _)) = running.values().find(|(_, since)| since.elapsed() > SEED_LIMIT) {
            panic!("seed {seed} does not end\n    {}", replay_line(*seed));
        }
    }
    let failed = progress.failed.lock();
    if let Some((seed, violation)) = failed.first_key_value() {
        let done = progress.done.load(Ordering::Relaxed);
        panic!("{violation}\n    found after {done} seeds\n    {}", replay_line(*seed));
    }
    let Outcome { failovers, hand_overs, rescued, resumed, fenced, .. } = *progress.sum.lock();
    println!(
        "{} seeds: {failovers} failovers, {hand_overs} hand-overs, {rescued} rescued, {resumed} resumed, {fenced} fenced",
        end - first
    );
    if end - first >= SEEDS {
        for count in [failovers, hand_overs, resumed, fenced] {
            assert!(count > (end - first) / 200, "too few faults had an effect for a meaningful test");
        }
    }
}

/// Runs one seed after another until none is left or one has failed.
fn work(thread: usize, end: u64, next: &AtomicU64, progress: &Progress) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end || !progress.failed.lock().is_empty() {
            break;
        }
        progress.running.lock().insert(thread, (seed, Instant::now()));
        match run::run(seed, false) {
            Ok(outcome) => progress.sum.lock().add(outcome),
            Err(violation) => {
                progress.failed.lock().insert(seed, violation.0);
            }
        }
        progress.done.fetch_add(1, Ordering::Relaxed);
    }
    progress.running.lock().remove(&thread);
}

#[test]
fn a_seed_happens_the_same_way_every_time() {
    let digest = |seed| run::run(seed, false).map_err(|violation| violation.0);
    let digests: Vec<_> = (0..40).map(digest).collect();
    for (seed, first) in digests.iter().enumerate() {
        assert_eq!(digest(seed as u64), *first, "{}", replay_line(seed as u64));
    }
    let mut different: Vec<_> = digests.iter().collect();
    different.dedup();
    assert_eq!(different.len(), digests.len(), "different seeds must give different runs");
}
