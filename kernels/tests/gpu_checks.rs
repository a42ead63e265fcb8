//! Runs every check of the device kernels on the emulated device, with threads in different orders.
//!
//! `CHECK=name` runs the checks whose name contains it; `SEED=number` changes the inputs.

use std::time::Instant;

use outrigger_kernels::gpu::checks;
use outrigger_kernels::gpu::{Device, EmulatorOptions, ThreadOrder};

/// One order for each way in which a missing barrier can show.
fn devices() -> Vec<(&'static str, EmulatorOptions)> {
    let like = |order, host_threads| EmulatorOptions { order, host_threads, ..EmulatorOptions::default() };
    vec![
        ("forward", like(ThreadOrder::Forward, 1)),
        ("backward", like(ThreadOrder::Backward, 1)),
        ("shuffled, on two threads", like(ThreadOrder::Shuffled(0x5eed), 2)),
    ]
}

#[test]
fn every_check_passes_in_every_order() {
    let wanted = std::env::var("CHECK").unwrap_or_default();
    let first_seed: u64 = std::env::var("SEED").map_or(0, |seed| seed.parse().expect("SEED is a number"));
    let mut failures = Vec::new();
    for (seed, (order, options)) in (first_seed..).zip(devices()) {
        for check in checks::all().filter(|check| check.name.contains(&wanted)) {
            let start = Instant::now();
            // A device of its own, since a failed one stays failed.
            let device = Device::emulator_with(options.clone()).expect("the feature is on");
            let result = (check.run)(&device, seed).and_then(|()| Ok(device.synchronize()?));
            println!("{} ({order}, seed {seed}): {:.2?}", check.name, start.elapsed());
            if let Err(failure) = result {
                failures.push(format!("{} ({order}, seed {seed}): {failure}", check.name));
            }
        }
    }
    assert!(checks::all().any(|check| check.name.contains(&wanted)), "no check is named like {wanted:?}");
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}
