//! The GPU suite's program: runs every check of the device kernels on a real device, and measures what share of the device's
//! limits each kernel reaches. `kernels/tests/gpu/suite` packs it for machines that have a GPU and no build tools.
//!
//! `cargo test` runs it too: without a device it reports that it is skipped; in builds with the feature `emulator` it runs
//! everything with tiny shapes.

#![expect(clippy::print_stdout, reason = "its result")]

mod arguments;
mod checks;
mod kernels;
mod noise;
mod table;

use std::process::ExitCode;

use outrigger_kernels::gpu::Device;

use arguments::{Arguments, DeviceName, Part};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let arguments = match Arguments::parse(words.iter().cloned()) {
        Ok(arguments) => arguments,
        // `cargo test` hands every program its filters, and what is meant for the test harness.
        Err(problem) if !words.iter().any(|word| word == "--device") => {
            println!("gpu: skipped: {problem}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            println!("gpu: {problem}\n{}", arguments::USAGE);
            return ExitCode::FAILURE;
        }
    };
    let (device, is_real) = match open(arguments.device) {
        Ok(found) => found,
        Err(reason) if arguments.device == DeviceName::Any => {
            println!("gpu: no device: skipped. {reason}");
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            println!("gpu: {reason}");
            return ExitCode::FAILURE;
        }
    };
    let properties = device.properties();
    let (name, capability) = (&properties.name, properties.capability);
    println!("gpu: {name}, compute capability {}.{}", capability / 10, capability % 10);
    let passed = match arguments.part {
        Part::Checks => checks::run(&device, &arguments),
        Part::Kernels => kernels::run(&device, is_real, &arguments),
        Part::All => checks::run(&device, &arguments) & kernels::run(&device, is_real, &arguments),
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The device, and whether it is one.
fn open(which: DeviceName) -> Result<(Device, bool), String> {
    let cuda = |index| Device::cuda(index).map(|device| (device, true)).map_err(|error| error.to_string());
    let emulator = || Device::emulator().map(|device| (device, false)).map_err(|error| error.to_string());
    match which {
        DeviceName::Cuda(index) => cuda(index),
        DeviceName::Emulator => emulator(),
        DeviceName::Any => {
            cuda(0).or_else(|no_cuda| emulator().map_err(|no_emulator| format!("{no_cuda}; {no_emulator}")))
        }
    }
}
