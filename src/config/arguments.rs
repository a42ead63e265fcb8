//! The command line: subcommands, and one flag for every key.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, value_parser};

use super::syntax::{Switch, Syntax};
use super::{Assignment, Command, KEYS, Key, Origin, drill};

pub(super) struct Arguments {
    pub command: Command,
    /// `--config`.
    pub file: Option<PathBuf>,
    pub assignments: Vec<Assignment>,
}

pub(super) fn read(arguments: impl IntoIterator<Item = String>) -> Result<Arguments, clap::Error> {
    let arguments = join_switches(arguments)?;
    let matches = command().try_get_matches_from(std::iter::once("outrigger".to_owned()).chain(arguments))?;
    let (name, matches) = matches.subcommand().unwrap_or(("serve", &matches));
    let (name, matches) = matches.subcommand().unwrap_or((name, matches));
    let file = matches.get_one("config").cloned();
    let mut assignments: Vec<Assignment> = KEYS.iter().filter_map(|key| assignment(key, matches)).collect();
    if let Some(model) = matches.try_get_one::<String>("MODEL").ok().flatten() {
        assignments.push(positional_model(model.clone(), &assignments)?);
    }
    let command = match name {
        "config" => Command::ShowConfig,
        "healthcheck" => Command::CheckHealth,
        "status" => Command::ShowStatus { as_json: matches.get_flag("json") },
        "new" => {
            let id = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
            Command::NewKey { organization: id("org"), user: id("user") }
        }
        "list" => Command::ListKeys,
        "drill" => Command::Drill(drill::read(matches, file.as_ref(), &assignments)?),
        _ => Command::Serve,
    };
    Ok(Arguments { command, file, assignments })
}

/// Joins `--fault-injection true` to `--fault-injection=true`. A switch may stand alone, so the word behind it would otherwise be
/// taken for the model. A flag that takes no value refuses one for the same reason.
fn join_switches(arguments: impl IntoIterator<Item = String>) -> Result<Vec<String>, clap::Error> {
    let is_switch = |name: &str| KEYS.iter().any(|key| key.is_switch && key.names().any(|known| kebab(known) == name));
    let mut joined: Vec<String> = Vec::new();
    let mut are_flags = true;
    for argument in arguments {
        let flag = joined.last().filter(|_| are_flags).and_then(|last| last.strip_prefix("--"));
        match flag {
            Some("") => are_flags = false,
            Some(name) if Switch::read(&argument).is_ok() => {
                if is_switch(name) {
                    let last = joined.pop().unwrap_or_default();
                    joined.push(format!("{last}={argument}"));
                    continue;
                }
                if name == "json" || name.strip_prefix("no-").is_some_and(is_switch) {
                    let message = format!("--{name} takes no value, and got `{argument}`\n");
                    return Err(clap::Error::raw(clap::error::ErrorKind::TooManyValues, message));
                }
            }
            _ => {}
        }
        joined.push(argument);
    }
    Ok(joined)
}

fn command() -> clap::Command {
    let model = Arg::new("MODEL").help("The same as --model").value_parser(NonEmptyStringValueParser::new());
    clap::Command::new("outrigger")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Serves a language model behind the OpenAI API.")
        .after_help(
            "Every flag is a configuration key: `--max-num-seqs 32`, OUTRIGGER_MAX_NUM_SEQS=32 and `max_num_seqs = 32` in \
             the file of --config mean the same. Flags win over variables, variables over the file.\n\
             Switches: `--fault-injection`, `--fault-injection true` or `=false`, `--no-fault-injection`.\n\
             Sizes: 512MiB, 4GiB, 4GB, or bytes. Durations: 250ms, 30s, 5m, or seconds. Counts: 64, 8k (8000), 8K (8192).",
        )
        .args_conflicts_with_subcommands(true)
        .disable_help_subcommand(true)
        .args(flags())
        .subcommand(
            clap::Command::new("serve")
                .about("Serves the model (the default: `outrigger --port 8001` serves)")
                .arg(model.clone())
                .args(flags()),
        )
        .subcommand(
            clap::Command::new("config")
                .about("Prints the effective configuration as a TOML file and exits")
                .arg(model)
                .args(flags()),
        )
        .subcommand(
            clap::Command::new("healthcheck")
                .about("Asks /livez of the node with this configuration; exit code 0 if it is alive")
                .args(flags()),
        )
        .subcommand(
            clap::Command::new("status")
                .about("Prints the cluster as the node at --admin-addr sees it")
                .arg(json_flag())
                .args(flags()),
        )
        .subcommand(keys_command())
        .subcommand(
            clap::Command::new("drill")
                .about("Runs game days: starts a cluster, or takes a live one, kills nodes under load and compares every token")
                .long_about(
                    "Runs game days: starts a cluster (or takes a live one: --target), keeps streams of all kinds in flight, \
                     kills, pauses, breaks and restarts nodes, and compares every token with an undisturbed run. Prints, for \
                     each exercise, the time to detect and to route around, the longest gap a client saw, requests failed and \
                     tokens wrong; ends with 1 when these two are not 0. Configuration keys apply to the nodes that it starts.",
                )
                .args(drill::flags())
                .arg(Arg::new("MODEL").help("The same as --model").value_parser(NonEmptyStringValueParser::new()))
                .args(flags()),
        )
}

fn keys_command() -> clap::Command {
    let id = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("ID")
            .help(help)
            .required(true)
            .value_parser(NonEmptyStringValueParser::new())
    };
    clap::Command::new("keys")
        .about("Makes API keys for users, and lists those of --tenants-file")
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .subcommand(
            clap::Command::new("new")
                .about("Prints a new key, and its digest for the tenants file")
                .arg(id("org", "The organization"))
                .arg(id("user", "The user"))
                .args(flags()),
        )
        .subcommand(
            clap::Command::new("list")
                .about("Prints the users of the tenants file and the beginnings of their keys' digests")
                .args(flags()),
        )
}

fn flags() -> Vec<Arg> {
    let file = Arg::new("config")
        .long("config")
        .value_name("PATH")
        .value_parser(value_parser!(PathBuf))
        .help_heading("Configuration")
        .help("TOML file with keys as below, in snake case [variable: OUTRIGGER_CONFIG]");
    std::iter::once(file).chain(KEYS.iter().flat_map(key_flags)).collect()
}

/// The flag of a key and, for a switch, its negation `--no-…`, as vLLM has.
fn key_flags(key: &'static Key) -> Vec<Arg> {
    let mut flag = Arg::new(key.name)
        .long(kebab(key.name))
        .aliases(key.aliases.iter().map(|alias| kebab(alias)))
        .value_name(key.hint)
        .help_heading(key.group)
        .help(format!("{} [default: {}]", key.help, default_text(key)))
        .allow_hyphen_values(true)
        .action(if key.is_list { ArgAction::Append } else { ArgAction::Set });
    if !key.is_switch {
        return vec![flag];
    }
    flag = flag.num_args(0..=1).require_equals(true).default_missing_value("true");
    let negation = Arg::new(negated(key))
        .long(format!("no-{}", kebab(key.name)))
        .aliases(key.aliases.iter().map(|alias| format!("no-{}", kebab(alias))))
        .action(ArgAction::SetTrue)
        .hide(true)
        .overrides_with(key.name);
    vec![flag.overrides_with(negated(key)), negation]
}

fn default_text(key: &Key) -> String {
    match key.text(&super::Config::default()) {
        text if text.is_empty() => "none".into(),
        text => text,
    }
}

fn negated(key: &Key) -> String {
    format!("no_{}", key.name)
}

/// `--json`, of the subcommands that print for people.
pub(super) fn json_flag() -> Arg {
    Arg::new("json").long("json").action(ArgAction::SetTrue).help("Prints JSON instead of a table")
}

pub(super) fn kebab(name: &str) -> String {
    name.replace('_', "-")
}

fn assignment(key: &'static Key, matches: &ArgMatches) -> Option<Assignment> {
    let origin = Origin::Flag(kebab(key.name));
    if key.is_switch && matches.get_flag(&negated(key)) {
        return Some(Assignment { key, text: "false".into(), origin });
    }
    let texts: Vec<&str> = matches.get_many::<String>(key.name)?.map(String::as_str).collect();
    Some(Assignment { key, text: texts.join(","), origin })
}

/// vLLM takes the model as an argument of `serve`.
fn positional_model(text: String, assignments: &[Assignment]) -> Result<Assignment, clap::Error> {
    let key = super::keys::find("model").expect("the table has a key `model`");
    if assignments.iter().any(|assignment| assignment.key.name == key.name) {
        let message = "the model is given twice, as an argument and as --model\n";
        return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message));
    }
    Ok(Assignment { key, text, origin: Origin::Flag("model".into()) })
}
