//! The arguments of `outrigger drill`, beside the keys of the configuration, which apply to the nodes that it starts.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, value_parser};

use super::{Assignment, Origin};

/// Its nodes have these each for itself.
const PER_NODE: &[&str] = &[
    "host",
    "port",
    "node_id",
    "gossip_addr",
    "gossip_advertise_addr",
    "peer_addr",
    "peer_advertise_addr",
    "peers",
    "cluster_key_file",
    "admin_addr",
    "fault_injection",
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrillArguments {
    /// By name; all that can be run when empty.
    pub exercises: Vec<String>,
    /// Nodes to start, unless there are targets.
    pub nodes: usize,
    /// A live cluster. Empty: a cluster is started.
    pub targets: Vec<DrillTarget>,
    /// Does to targets what the drill must not do itself: called as `HOOK ACTION URL`.
    pub hook: Option<PathBuf>,
    /// Streams in flight at one time.
    pub streams: usize,
    /// Tokens of each stream.
    pub tokens: u32,
    pub as_json: bool,
    /// For the nodes that it starts, as flags.
    pub node_flags: Vec<String>,
}

/// A node of a live cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrillTarget {
    /// Base URL of its API.
    pub url: String,
    /// `host:port` of its admin address.
    pub admin: Option<String>,
    /// Its process on this machine, which the drill may kill.
    pub may_kill: Option<u32>,
}

pub(super) fn flags() -> Vec<Arg> {
    let heading = "Drill";
    let count = |name: &'static str, most: u64| {
        Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u64).range(1..=most)).help_heading(heading)
    };
    let list = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Append).help_heading(heading);
    vec![
        list("exercise")
            .value_name("NAME")
            .value_delimiter(',')
            .value_parser(NonEmptyStringValueParser::new())
            .help("Exercises to run, in this order [default: all]; an unknown name lists them"),
        count("nodes", 16).default_value("3").help("Nodes to start"),
        count("streams", 1024).default_value("32").help("Streams in flight at one time"),
        count("tokens", 100_000).default_value("128").help("Tokens of each stream"),
        list("target").value_name("URL[,admin=HOST:PORT][,may-kill=PID]").value_parser(parse_target).help(
            "A node of a live cluster, instead of starting one; only a process that is named with may-kill is ever killed",
        ),
        Arg::new("hook")
            .long("hook")
            .value_name("PROGRAM")
            .value_parser(value_parser!(PathBuf))
            .requires("target")
            .help_heading(heading)
            .help("Called as `PROGRAM kill|pause|resume|terminate|restart URL` for targets without may-kill"),
        super::arguments::json_flag().help_heading(heading),
    ]
}

/// What the matches and the flags among the assignments ask for.
pub(super) fn read(
    matches: &ArgMatches,
    file: Option<&PathBuf>,
    assignments: &[Assignment],
) -> Result<DrillArguments, clap::Error> {
    let count = |name: &str| matches.get_one::<u64>(name).copied().unwrap_or_default();
    let list = |name: &str| matches.get_many::<String>(name).into_iter().flatten().cloned().collect();
    Ok(DrillArguments {
        exercises: list("exercise"),
        nodes: count("nodes") as usize,
        targets: matches.get_many("target").into_iter().flatten().cloned().collect(),
        hook: matches.get_one("hook").cloned(),
        streams: count("streams") as usize,
        tokens: u32::try_from(count("tokens")).unwrap_or(u32::MAX),
        as_json: matches.get_flag("json"),
        node_flags: node_flags(file, assignments)?,
    })
}

/// The configuration that was given to the drill, as its nodes get it.
fn node_flags(file: Option<&PathBuf>, assignments: &[Assignment]) -> Result<Vec<String>, clap::Error> {
    let mut flags: Vec<String> = file.iter().map(|file| format!("--config={}", file.display())).collect();
    for Assignment { key, text, origin } in assignments {
        if PER_NODE.contains(&key.name) {
            let message = format!("{origin} means nothing here: a drill gives every node its own\n");
            return Err(clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message));
        }
        if let Origin::Flag(_) = origin {
            flags.push(format!("--{}={text}", super::arguments::kebab(key.name)));
        }
    }
    Ok(flags)
}

fn parse_target(text: &str) -> Result<DrillTarget, String> {
    let mut parts = text.split(',');
    let url = parts.next().unwrap_or_default().trim_end_matches('/').to_owned();
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(format!("`{url}` is no URL such as http://10.0.0.7:8000"));
    }
    let mut target = DrillTarget { url, admin: None, may_kill: None };
    for part in parts {
        match part.split_once('=') {
            Some(("admin", address)) if address.contains(':') => target.admin = Some(address.to_owned()),
            Some(("may-kill", pid)) => {
                let pid = pid.parse().ok().filter(|pid| (2..=i32::MAX as u32).contains(pid));
                target.may_kill = Some(pid.ok_or("may-kill wants the id of a process")?);
            }
            _ => return Err(format!("`{part}` is neither admin=HOST:PORT nor may-kill=PID")),
        }
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_how_it_is_reached_and_whether_it_may_die() {
        let target = parse_target("http://h:8000/,admin=h:9000,may-kill=77").expect("a target");
        let expected = DrillTarget { url: "http://h:8000".into(), admin: Some("h:9000".into()), may_kill: Some(77) };
        assert_eq!(target, expected);
        assert_eq!(parse_target("https://h").expect("a target").may_kill, None);
        // 0 and -1 name whole groups of processes, 1 is init.
        for wrong in ["h:8000", "http://h,may-kill=0", "http://h,may-kill=1", "http://h,may-kill=-1", "http://h,pid=7"]
        {
            assert!(parse_target(wrong).is_err(), "{wrong}");
        }
    }
}
