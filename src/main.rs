//! The process: arguments in, exit code out.

use std::process::ExitCode;

use outrigger::config::{Command, ConfigError, Invocation};
use outrigger::drill::DrillError;
use outrigger::observability::trace::last_words;
use outrigger::types::with_causes;
use outrigger::{app, drill};

/// Wrong usage or configuration, as `sysexits.h` and clap have it: restarting does not help.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let invocation = match Invocation::from_process() {
        Ok(invocation) => invocation,
        Err(ConfigError::Usage(usage)) => usage.exit(),
        Err(problems) => {
            last_words(&format!("outrigger: {problems}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    run(invocation).unwrap_or_else(|error| {
        last_words(&format!("outrigger: {}", with_causes(&*error)));
        ExitCode::FAILURE
    })
}

#[expect(clippy::print_stdout, reason = "these commands print their result")]
fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    let api = &invocation.config.api;
    match &invocation.command {
        Command::ShowConfig => print!("{}", invocation.effective()),
        Command::CheckHealth => app::healthcheck::run(&api.host, api.port)?,
        Command::ShowStatus { as_json } => {
            let Some(address) = api.admin_addr else {
                last_words("outrigger: no node to ask: --admin-addr is missing");
                return Ok(ExitCode::from(EXIT_USAGE));
            };
            print!("{}", app::status::run(address, api.plain_key(), *as_json)?);
        }
        Command::Drill(arguments) => {
            return match drill::run(arguments, api.plain_key()) {
                Err(unknown @ DrillError::UnknownExercise { .. }) => {
                    last_words(&format!("outrigger: {unknown}"));
                    Ok(ExitCode::from(EXIT_USAGE))
                }
                outcome => Ok(outcome?),
            };
        }
        Command::Serve => return app::serve(invocation),
    }
    Ok(ExitCode::SUCCESS)
}
