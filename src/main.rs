//! The process: arguments in, exit code out.

use std::fmt::Display;
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
            return misused(problems);
        }
    };
    run(invocation).unwrap_or_else(|error| {
        last_words(&format!("outrigger: {}", with_causes(&*error)));
        ExitCode::FAILURE
    })
}

fn misused(problem: impl Display) -> ExitCode {
    last_words(&format!("outrigger: {problem}"));
    ExitCode::from(EXIT_USAGE)
}

#[expect(clippy::print_stdout, reason = "these commands print their result")]
fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    let api = &invocation.config.api;
    match &invocation.command {
        Command::ShowConfig => print!("{}", invocation.effective()),
        Command::CheckHealth => app::healthcheck::run(&api.host, api.port)?,
        Command::ShowStatus { as_json } => {
            let Some(address) = api.admin_addr else {
                return Ok(misused("no node to ask: --admin-addr is missing"));
            };
            print!("{}", app::status::run(address, api.plain_key(), *as_json)?);
        }
        Command::NewKey { organization, user } => {
            print!("{}", app::keys::new(organization, user, api.tenants_file.as_deref())?);
        }
        Command::ListKeys => print!("{}", app::keys::list(api.tenants_file.as_deref())?),
        Command::Drill(arguments) => {
            return match drill::run(arguments, api.plain_key()) {
                Err(unknown @ DrillError::UnknownExercise { .. }) => Ok(misused(unknown)),
                outcome => Ok(outcome?),
            };
        }
        Command::Serve => return app::serve(invocation),
    }
    Ok(ExitCode::SUCCESS)
}
