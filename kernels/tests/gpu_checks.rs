//! Every check of the device kernels on the emulated device, with threads in different orders.

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
    let mut failures = Vec::new();
    for (seed, (order, options)) in devices().into_iter().enumerate() {
        for check in checks::all() {
            // A device of its own, since a failed one stays failed.
            let device = Device::emulator_with(options.clone()).expect("the feature is on");
            if let Err(failure) = (check.run)(&device, seed as u64).and_then(|()| Ok(device.synchronize()?)) {
                failures.push(format!("{} ({order}, seed {seed}): {failure}", check.name));
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}
