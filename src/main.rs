//! The process: arguments in, exit code out.

use std::process::ExitCode;

use outrigger::app;
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
    let ended = match invocation.command {
        Command::ShowConfig => {
            print!("{}", invocation.effective());
            Ok(ExitCode::SUCCESS)
        }
        Command::CheckHealth => {
            let address = &invocation.config.api;
            app::healthcheck::run(&address.host, address.port).map(|()| ExitCode::SUCCESS)
        }
        Command::Serve => app::serve(invocation),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("outrigger: {error:#}");
        ExitCode::FAILURE
    })
}
