//! Drills with real processes: each exercise alone with random weights, and all exercises in a row with the real model.

use std::process::Stdio;

use outrigger::drill::exercise::Exercise;
use outrigger::drill::game_day::{GameDay, Load};
use outrigger::drill::measure::Outcome;
use outrigger::drill::report;
use serde_json::Value;

use crate::cluster::{Cluster, slow_model};
use crate::real_model;
use crate::server::outrigger;

const SLOW_LOAD: Load = Load { streams: 32, tokens: 160, prefill_words: 150 };
const REAL_LOAD: Load = Load { streams: 32, tokens: 96, prefill_words: 400 };

/// Runs one exercise and checks that its goals are met, which includes that a stream moved if there was a fault.
async fn exercise(exercise: Exercise) -> Outcome {
    let cluster = Cluster::slow().await;
    let (arena, _kept) = cluster.into_parts();
    let mut day = GameDay::rehearse(arena, &SLOW_LOAD).await.unwrap_or_else(|error| panic!("{error}"));
    let outcome = day.run(exercise).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(outcome.is_good() && outcome.skipped.is_none(), "{outcome:#?}");
    assert!(outcome.streams >= SLOW_LOAD.streams, "{outcome:#?}");
    outcome
}

#[tokio::test]
async fn streams_are_the_same_through_every_node() {
    let outcome = exercise(Exercise::Calm).await;
    assert_eq!((outcome.moved(), outcome.reconnects), (0, 0), "{outcome:#?}");
}

#[tokio::test]
async fn a_generator_may_be_killed_in_decode() {
    exercise(Exercise::KillInDecode).await;
}

#[tokio::test]
async fn a_generator_may_be_killed_in_prefill() {
    exercise(Exercise::KillInPrefill).await;
}

#[tokio::test]
async fn a_generator_may_be_paused_and_come_back() {
    exercise(Exercise::Pause).await;
}

#[tokio::test]
async fn a_generator_may_be_slow() {
    let outcome = exercise(Exercise::SlowNode).await;
    assert!(outcome.rescued > 0, "its streams should move before they time out: {outcome:#?}");
}

#[tokio::test]
async fn an_engine_may_panic() {
    exercise(Exercise::EnginePanic).await;
}

#[tokio::test]
async fn a_device_may_break() {
    exercise(Exercise::DeviceError).await;
}

#[tokio::test]
async fn an_engine_may_hang() {
    exercise(Exercise::EngineHang).await;
}

#[tokio::test]
async fn logits_may_be_nan() {
    exercise(Exercise::NanLogits).await;
}

#[tokio::test]
async fn nodes_may_be_restarted_one_after_the_other() {
    let outcome = exercise(Exercise::RollingRestart).await;
    assert!(outcome.streams > 2 * SLOW_LOAD.streams, "the streams did not repeat throughout the restart: {outcome:#?}");
}

#[tokio::test]
async fn the_entry_may_be_killed() {
    let outcome = exercise(Exercise::KillEntry).await;
    assert!(outcome.reconnects > 0 && outcome.resumed > 0, "{outcome:#?}");
}

#[tokio::test]
async fn the_entrys_engine_may_die_under_its_front() {
    exercise(Exercise::EntryEnginePanic).await;
}

#[tokio::test]
async fn all_nodes_but_one_may_die_at_once() {
    exercise(Exercise::AllButOne).await;
}

/// Runs all exercises in a row. Prints the table of results.
#[tokio::test]
async fn every_game_day_is_survived_by_the_real_model() {
    let home = real_model::home();
    tokio::task::spawn_blocking(real_model::path).await.expect("the model is there");
    let home = format!("--home={}", home.display());
    // With prefix caching, the survivors would have all prompts cached from an earlier exercise.
    let cluster = Cluster::start(3, &[&home, "--enable-prefix-caching=false"]).await;
    let (arena, _kept) = cluster.into_parts();
    let mut day = GameDay::rehearse(arena, &REAL_LOAD).await.unwrap_or_else(|error| panic!("{error}"));
    let mut outcomes = Vec::new();
    for exercise in Exercise::ALL {
        outcomes.push(day.run(exercise).await.unwrap_or_else(|error| panic!("{error}\n{}", report::table(&outcomes))));
    }
    let table = report::table(&outcomes);
    println!("{table}");
    assert!(report::is_good(&outcomes), "{table}");
    assert!(outcomes.iter().all(|outcome| outcome.skipped.is_none()), "{table}");
}

#[tokio::test]
async fn the_command_starts_a_cluster_and_tells_how_it_went() {
    // Keeps other servers off the machine.
    let _kept = crate::real_server::every_place().await;
    let folder = tempfile::tempdir().expect("a folder");
    let flags = slow_model(folder.path());
    let output = tokio::task::spawn_blocking(move || {
        let mut command = outrigger();
        command.args(["drill", "--tokens=160", "--json", "--exercise=calm,kill-in-decode"]).args(flags);
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
        command.args(["drill", "--tokens=160", "--exercise=kill-in-decode"]).args(targets);
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
