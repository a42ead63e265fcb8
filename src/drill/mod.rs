//! `outrigger drill`: game days. Runs streams of all kinds on a cluster, causes the faults that `exercise` lists, and compares
//! every token with a run without faults.
//!
//! The cluster consists of real processes: the drill's own, or those that the operator named. The drill kills only processes
//! that it started or that the operator allowed. The integration tests run the same exercises through this module.

pub mod arena;
pub mod client;
pub mod exercise;
mod flight;
pub mod game_day;
pub mod measure;
mod moves;
pub mod process;
pub mod report;
mod served_model;
pub mod sse;
pub mod transcript;
pub mod workload;

use std::io::{self, Write};
use std::process::ExitCode;

use arena::{Arena, ArenaError, ArenaNode};
use client::DrillClient;
use exercise::Exercise;
use game_day::{GameDay, Load};
use measure::Outcome;
use process::{ClusterPlan, NodeAddresses, ScratchFolder, plan_nodes};

use crate::config::{DrillArguments, temporary_folder, this_program};

/// Words of each prompt in exercises that disturb prefill.
const PREFILL_WORDS: usize = 600;

#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    #[error("there is no exercise `{name}`; there are {known}")]
    UnknownExercise { name: String, known: String },
    #[error("the drill cannot prepare its cluster")]
    Preparation(#[from] io::Error),
    #[error(transparent)]
    Arena(ArenaError),
    #[error("the streams fail even without a fault: {0}")]
    Rehearsal(String),
    #[error("cannot inject the fault (was the node started with --fault-injection?): {0}")]
    Fault(String),
}

/// Runs the exercises and prints the results. The exit code is success if every exercise that ran met its goals.
pub fn run(arguments: &DrillArguments, key: Option<&str>) -> Result<ExitCode, DrillError> {
    let exercises = chosen(&arguments.exercises)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            code = play(arguments, &exercises, key) => code,
            // Returning drops, and so kills, the nodes that were started.
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                Ok(ExitCode::FAILURE)
            }
        }
    })
}

fn chosen(names: &[String]) -> Result<Vec<Exercise>, DrillError> {
    if names.is_empty() {
        return Ok(Exercise::ALL.to_vec());
    }
    let known = || Exercise::ALL.map(Exercise::name).join(", ");
    let find = |name: &String| {
        Exercise::from_name(name).ok_or_else(|| DrillError::UnknownExercise { name: name.clone(), known: known() })
    };
    names.iter().map(find).collect()
}

async fn play(arguments: &DrillArguments, exercises: &[Exercise], key: Option<&str>) -> Result<ExitCode, DrillError> {
    let client = DrillClient::new(key).map_err(ArenaError::from)?;
    let scratch = ScratchFolder::new(&temporary_folder())?;
    let nodes = match arguments.targets.is_empty() {
        true => own_nodes(arguments, &scratch)?,
        false => {
            arguments.targets.iter().map(|target| ArenaNode::foreign(target.clone(), arguments.hook.clone())).collect()
        }
    };
    tell(&format!("{} nodes, {} streams of {} tokens\n", nodes.len(), arguments.streams, arguments.tokens));
    let arena = Arena::start(nodes, client).await?;
    tell("The cluster is complete; recording reference streams\n");
    let load = Load { streams: arguments.streams, tokens: arguments.tokens, prefill_words: PREFILL_WORDS };
    let mut day = GameDay::rehearse(arena, &load).await?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for exercise in exercises {
        let outcome = match day.run(*exercise).await {
            Ok(outcome) => outcome,
            Err(error) => {
                // Report what was measured before the error.
                print(&outcomes, arguments.as_json);
                return Err(error);
            }
        };
        let verdict = if outcome.skipped.is_some() {
            "skipped"
        } else if outcome.is_good() {
            "good"
        } else {
            "BAD"
        };
        tell(&format!("{}: {verdict}\n", exercise.name()));
        outcomes.push(outcome);
    }
    print(&outcomes, arguments.as_json);
    Ok(if report::is_good(&outcomes) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Nodes that run this program, configured so that several fit on one machine.
fn own_nodes(arguments: &DrillArguments, scratch: &ScratchFolder) -> Result<Vec<ArenaNode>, DrillError> {
    let mut flags = arguments.node_flags.clone();
    let defaults = [
        ("--threads", "1"),
        // Cached prompts of earlier exercises would make failover look faster than it is.
        ("--enable-prefix-caching", "false"),
        // Other programs on the machine must not influence the drill.
        ("--memory-shrink-mark", "1"),
        ("--memory-removal-mark", "1"),
        ("--memory-warn-mark", "1"),
    ];
    for (flag, value) in defaults {
        if !flags.iter().any(|given| given.split('=').next() == Some(flag)) {
            flags.push(format!("{flag}={value}"));
        }
    }
    flags.push("--fault-injection".into());
    let plan = ClusterPlan {
        program: this_program()?,
        folder: scratch.path().to_owned(),
        flags,
        hidden_variables: Vec::new(),
        wrapper: Vec::new(),
    };
    let addresses = (0..arguments.nodes).map(|_| NodeAddresses::free()).collect::<io::Result<Vec<_>>>()?;
    Ok(plan_nodes(&plan, &addresses)?.into_iter().map(ArenaNode::own).collect())
}

fn print(outcomes: &[Outcome], as_json: bool) {
    let text = if as_json { report::json(outcomes) } else { report::table(outcomes) };
    // A closed pipe must not change the exit code.
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Writes progress to standard error; standard output is only for the result.
fn tell(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exercises_are_chosen_by_name_and_all_without_one() {
        assert_eq!(chosen(&[]).expect("all"), Exercise::ALL);
        assert_eq!(chosen(&["pause".into()]).expect("known"), [Exercise::Pause]);
        let error = chosen(&["picnic".into()]).expect_err("unknown").to_string();
        assert!(error.contains("picnic") && error.contains("kill-in-decode"), "{error}");
    }
}
