//! Runs every check of the device kernels, with fresh inputs.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outrigger_kernels::gpu::checks::{self, Check, CheckFailure};
use outrigger_kernels::gpu::{Device, DeviceError};

use crate::arguments::Arguments;

/// Longer ones are named, so that the suite stays within its time.
const LONG: Duration = Duration::from_secs(5);

pub fn run(device: &Device, arguments: &Arguments) -> bool {
    let base = fresh_seed();
    let seeds = (0..arguments.seeds).map(|number| base.wrapping_add(number));
    let wanted: Vec<Check> = checks::all().filter(|check| check.name.contains(&arguments.only)).collect();
    // Each seed goes through all checks before the next, from another one on each time: where time is short, every check has
    // its turn in some run.
    let first = base as usize % wanted.len().max(1);
    let order = || wanted[first..].iter().chain(&wanted[..first]);
    let (mut passed, mut failed, mut left, started) = (0, 0, 0, Instant::now());
    for (check, seed) in seeds.flat_map(|seed| order().map(move |check| (check, seed))) {
        if started.elapsed().as_secs() >= arguments.seconds {
            left += 1;
            continue;
        }
        let check_started = Instant::now();
        match run_one(device, *check, seed) {
            Ok(()) => passed += 1,
            Err(failure) => {
                failed += 1;
                println!("FAILED {} (seed {seed}): {failure}", check.name);
                // Nothing runs after this: what follows would fail for no reason of its own.
                if let CheckFailure::Device(DeviceError::Failed { .. }) = failure {
                    println!("checks: stopped, since the device failed; {passed} had passed");
                    return false;
                }
            }
        }
        if check_started.elapsed() > LONG {
            println!("slow: {} took {:.1} s", check.name, check_started.elapsed().as_secs_f64());
        }
    }
    let took = started.elapsed().as_secs_f64();
    println!("checks: {passed} passed, {failed} failed, {left} not begun in time, seeds from {base}, {took:.1} s");
    failed == 0 && passed > 0
}

/// A fault in a kernel shows when the device is waited for.
fn run_one(device: &Device, check: Check, seed: u64) -> Result<(), CheckFailure> {
    (check.run)(device, seed)?;
    Ok(device.synchronize()?)
}

#[expect(clippy::disallowed_methods, reason = "seeds that differ from one run to the next")]
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 & 0xffff_ffff
}
