//! The process: arguments in, exit code out.

use std::process::ExitCode;

use outrigger::config::{Command, ConfigError, Invocation};

/// Wrong usage or configuration, as `sysexits.h` and clap have it: restarting does not help.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match Invocation::from_process() {
        Ok(invocation) => invocation,
        Err(ConfigError::Usage(usage)) => usage.exit(),
        Err(problems) => {
            eprintln!("outrigger: {problems}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match invocation.command {
        Command::ShowConfig => {
            print!("{}", invocation.effective());
            ExitCode::SUCCESS
        }
        Command::Serve => ExitCode::SUCCESS,
    }
}
