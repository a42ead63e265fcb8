//! Drills with real processes: exercises in a row, with random weights and with the real model.

use std::process::Stdio;

use outrigger::drill::exercise::Exercise;
use outrigger::drill::game_day::{GameDay, Load};
use outrigger::drill::measure::Outcome;
use outrigger::drill::report;
use serde_json::Value;

use crate::cluster::{Cluster, slow_model};
use crate::server::outrigger;

const SLOW_LOAD: Load = Load { streams: 32, tokens: 160, prefill_words: 150 };
const REAL_LOAD: Load = Load { streams: 16, tokens: 96, prefill_words: 400 };

/// Runs exercises in a row and checks that the goals of all are met. The cluster has no prefix cache: with one, the survivors
/// would have all prompts cached from an earlier exercise.
async fn survive(cluster: Cluster, load: &Load, exercises: &[Exercise]) -> Vec<Outcome> {
    let (arena, _kept) = cluster.into_parts();
    let mut day = GameDay::rehearse(arena, load).await.unwrap_or_else(|error| panic!("{error}"));
    let mut outcomes = Vec::new();
    for exercise in exercises {
        outcomes.push(day.run(*exercise).await.unwrap_or_else(|error| panic!("{error}\n{}", report::table(&outcomes))));
    }
    let table = report::table(&outcomes);
    println!("{table}");
    assert!(report::is_good(&outcomes), "{table}");
    for outcome in &outcomes {
        assert!(outcome.skipped.is_none() && outcome.streams >= load.streams, "{outcome:#?}\n{table}");
    }
    outcomes
}

#[tokio::test]
async fn every_exercise_keeps_every_stream() {
    let cluster = Cluster::slow_with(3, &["--enable-prefix-caching=false"]).await;
    let outcomes = survive(cluster, &SLOW_LOAD, &Exercise::ALL).await;
    let of = |exercise: Exercise| outcomes.iter().find(|outcome| outcome.exercise == exercise.name()).expect("it ran");
    let calm = of(Exercise::Calm);
    assert_eq!((calm.moved(), calm.reconnects), (0, 0), "{calm:#?}");
    let slow = of(Exercise::SlowNode);
    assert!(slow.rescued > 0, "its streams should move before they time out: {slow:#?}");
    let rolling = of(Exercise::RollingRestart);
    assert!(rolling.streams > 2 * SLOW_LOAD.streams, "the streams did not repeat throughout the restart: {rolling:#?}");
    let entry = of(Exercise::KillEntry);
    assert!(entry.reconnects > 0 && entry.resumed > 0, "{entry:#?}");
}

#[tokio::test]
async fn the_real_model_survives_what_ends_or_stops_a_process() {
    let cluster = Cluster::real(3, &["--enable-prefix-caching=false"]).await;
    // How an engine fails does not depend on its weights.
    let exercises = [
        Exercise::Calm,
        Exercise::KillInDecode,
        Exercise::KillInPrefill,
        Exercise::Pause,
        Exercise::RollingRestart,
        Exercise::KillEntry,
    ];
    survive(cluster, &REAL_LOAD, &exercises).await;
}

#[tokio::test]
async fn the_command_starts_a_cluster_and_tells_how_it_went() {
    // Keeps other servers off the machine.
    let _kept = crate::real_server::every_place().await;
    let folder = tempfile::tempdir().expect("a folder");
    let flags = slow_model(folder.path());
    let output = tokio::task::spawn_blocking(move || {
        let mut command = outrigger();
        command.args(["drill", "--streams=16", "--tokens=160", "--json", "--exercise=calm,kill-in-decode"]).args(flags);
        command.stderr(Stdio::piped()).output().expect("it runs")
    });
    let output = output.await.expect("no panic");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&told).expect("JSON alone");
    assert_eq!(report["good"], true, "{told}");
    assert_eq!(report["exercises"].as_array().map(Vec::len), Some(2), "{told}");
    let killed = &report["exercises"][1];
    assert!(killed["detect_seconds"].is_f64() && killed["failovers"]["peer_disconnected"].as_u64() > Some(0), "{told}");
}

#[tokio::test]
async fn the_command_takes_a_live_cluster_and_kills_only_what_it_may() {
    let mut cluster = Cluster::slow().await;
    let mut target = |node: usize, may_kill: bool| {
        let (url, admin) = (cluster.url(node).to_owned(), cluster.admin(node).to_owned());
        let id = cluster.nodes[node].process().and_then(|process| process.id()).expect("it runs");
        let permission = if may_kill { format!(",may-kill={id}") } else { String::new() };
        format!("--target={url},admin={admin}{permission}")
    };
    let drill = async |targets: [String; 3]| {
        let mut command = outrigger();
        command.args(["drill", "--streams=16", "--tokens=160", "--exercise=kill-in-decode"]).args(targets);
        tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic")
    };
    let (forbidden, allowed) = {
        let forbidden = [target(0, false), target(1, true), target(2, false)];
        (forbidden, [target(0, false), target(1, true), target(2, true)])
    };
    let output = drill(forbidden).await;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "no exercise may run: {told}");
    assert!(told.contains("kill is not allowed on"), "{told}");
    for node in 0..3 {
        assert!(cluster.is_up(node).await, "node {node} was killed");
    }
    let output = drill(allowed).await;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let mut running = 0;
    for node in 0..3 {
        running += u32::from(cluster.is_up(node).await);
    }
    assert_eq!(running, 2, "exactly one node is killed");
    assert!(cluster.is_up(0).await);
}
