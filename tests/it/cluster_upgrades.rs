//! Clusters of two versions: nodes of this build and of an earlier commit (`tests/upgrades/earlier` builds it) survive each
//! other's deaths, and every stream survives the upgrade and the way back.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use outrigger::drill::exercise::Exercise;
use outrigger::drill::game_day::{GameDay, Load};
use outrigger::drill::measure::Outcome;
use outrigger::drill::report;

use crate::cluster::{Cluster, Folder, slow_model};

const LOAD: Load = Load { streams: 32, tokens: 160, prefill_words: 60 };
const NODES: usize = 3;
const OURS: &str = env!("CARGO_BIN_EXE_outrigger");
/// The variable that names the earlier binary.
const EARLIER: &str = "EARLIER_OUTRIGGER";

/// The program of each node: a link that is read whenever the node starts, so that a restart may change its version.
struct Programs(PathBuf);

impl Programs {
    fn link(&self, node: usize) -> PathBuf {
        self.0.join(format!("n{node}.program"))
    }

    fn set(&self, programs: [&Path; NODES]) {
        for (node, program) in programs.into_iter().enumerate() {
            let link = self.link(node);
            fs::remove_file(&link).ok();
            symlink(program, link).expect("a link");
        }
    }

    /// A wrapper of command lines that replaces the program by the node's own.
    fn wrapper(&self) -> Vec<String> {
        let own = self.0.join("{node}.program").display().to_string();
        ["/bin/sh", "-c", "shift; exec \"$0\" \"$@\"", &own].map(Into::into).into()
    }
}

/// Checks that the nodes run these programs.
fn check_programs(day: &mut GameDay, programs: [&Path; NODES]) {
    for (node, program) in programs.into_iter().enumerate() {
        let process = day.arena.nodes[node].process().expect("ours");
        let runs = fs::read_link(format!("/proc/{}/exe", process.id().expect("it runs"))).expect("a process");
        assert_eq!(runs, fs::canonicalize(program).expect("it exists"), "node {node}");
    }
}

/// Runs an exercise. Every request must be answered, with the tokens of a cluster that nobody disturbs.
async fn survive(day: &mut GameDay, exercise: Exercise) -> Outcome {
    let outcome = day.run(exercise).await.unwrap_or_else(|error| panic!("{error}"));
    let outcomes = [outcome];
    println!("{}", report::table(&outcomes));
    let [outcome] = outcomes;
    let lost = (outcome.failed_requests, outcome.wrong_tokens, outcome.skipped.as_ref());
    assert_eq!(lost, (0, 0, None), "{outcome:#?}");
    outcome
}

/// Restarts all nodes, one after the other, with these programs.
async fn restart_as(day: &mut GameDay, programs: &Programs, then: [&Path; NODES]) {
    programs.set(then);
    let outcome = survive(day, Exercise::RollingRestart).await;
    assert!(outcome.streams > 2 * LOAD.streams, "too few streams ran during the restarts: {outcome:#?}");
    check_programs(day, then);
}

#[tokio::test]
#[ignore = "needs the binary of an earlier commit: .ci/run upgrade"]
async fn streams_survive_nodes_of_both_versions_the_upgrade_and_the_way_back() {
    let earlier = PathBuf::from(std::env::var_os(EARLIER).unwrap_or_else(|| panic!("{EARLIER} names the binary")));
    let (old, new) = (earlier.as_path(), Path::new(OURS));
    let folder = Folder::new();
    let programs = Programs(folder.path().to_owned());
    let mut flags = slow_model(folder.path());
    flags.push("--enable-prefix-caching=false".into());
    flags.push("--drain-linger=300ms".into());

    let newer_entry = [new, old, old];
    programs.set(newer_entry);
    let cluster = Cluster::start_wrapped(folder, NODES, &flags, programs.wrapper()).await;
    let (arena, _kept) = cluster.into_parts();
    let mut day = GameDay::rehearse(arena, &LOAD).await.unwrap_or_else(|error| panic!("{error}"));
    check_programs(&mut day, newer_entry);
    for mixed in [newer_entry, [old, new, new]] {
        if mixed != newer_entry {
            restart_as(&mut day, &programs, mixed).await;
        }
        let killed = survive(&mut day, Exercise::KillInDecode).await;
        assert!(killed.moved() > 0, "no stream lost its replica: {killed:#?}");
        let entry = survive(&mut day, Exercise::KillEntry).await;
        assert!(entry.reconnects > 0 && entry.resumed > 0, "{entry:#?}");
    }
    for all in [old, new, old] {
        restart_as(&mut day, &programs, [all; NODES]).await;
    }
}
