//! Injects every fault into a single node under every load. Checks what each probe answers and when, how the process ends,
//! and what waiting clients get. There is no other node that could take over.
//!
//! Run with `--nocapture` to see the table.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::cluster::{Folder, slow_model};
use crate::real_server::{COMPLETIONS, a_place, within};
use crate::server::{PATIENCE, Server};

const STALL: Duration = Duration::from_secs(1);
const LIVENESS: Duration = Duration::from_secs(3);
/// How much sooner than its timeout a verdict may come, since the last sign of life may be a little older than the fault.
const EARLY: Duration = Duration::from_millis(500);
/// How much later than its timeout a verdict may come on a busy machine.
const SLACK: Duration = Duration::from_secs(20);

const FLAGS: &[&str] = &[
    "--threads=1",
    "--fault-injection",
    "--max-num-seqs=2",
    "--max-num-queued-requests=3",
    "--probe-interval=200ms",
    "--probe-hard-limit=10m",
    "--stall-timeout=1s",
    "--liveness-timeout=3s",
    "--failure-linger=2s",
    "--shutdown-timeout=1s",
    "--memory-warn-mark=1",
    "--memory-shrink-mark=1",
    "--memory-removal-mark=1",
];

/// A fault and its expected effects.
struct Fault {
    name: &'static str,
    /// The error codes that clients may get. Empty for a fault of the front, which then answers nobody.
    codes: &'static [&'static str],
    /// The earliest time at which readiness may fail.
    unready_after: Duration,
    /// The earliest time at which liveness may fail.
    dead_after: Duration,
    silences_the_front: bool,
}

impl Fault {
    const fn at_once(name: &'static str, codes: &'static [&'static str]) -> Self {
        Self { name, codes, unready_after: Duration::ZERO, dead_after: Duration::ZERO, silences_the_front: false }
    }
}

/// Error codes for requests to a node that has failed or is about to exit.
const LATE: &[&str] = &["engine_failed", "shutting_down"];

const FAULTS: &[Fault] = &[
    Fault {
        unready_after: STALL,
        dead_after: LIVENESS,
        ..Fault::at_once("hang", &["engine_failed", "engine_stalled"])
    },
    // Printing a backtrace may take so long that the engine counts as stalled.
    Fault::at_once("panic", &["engine_failed", "engine_stalled"]),
    Fault::at_once("device", &["engine_failed"]),
    Fault::at_once("corrupt_weights", &["numerics_suspect"]),
    Fault::at_once("nan_logits", &["numerics_invalid", "numerics_suspect"]),
    Fault::at_once("panic_task", &["engine_failed"]),
    Fault { silences_the_front: true, ..Fault::at_once("hang_front", &[]) },
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Idle,
    OneStream,
    /// As many streams as can run at once, and more requests in the queue.
    Full,
    /// The queue fills after the fault.
    FillsLater,
}

impl Load {
    /// The number of requests before the fault.
    fn before(self) -> usize {
        match self {
            Load::Idle | Load::FillsLater => 0,
            Load::OneStream => 1,
            Load::Full => 5,
        }
    }

    /// The number of requests after the fault: more than the node accepts.
    fn after(self) -> usize {
        if self == Load::FillsLater { 8 } else { 0 }
    }
}

/// The result of a client's request.
#[derive(Clone, Debug, PartialEq)]
enum Got {
    /// A complete answer.
    Answer,
    /// An error, as the answer or as an event in the stream.
    Error { status: u16, code: String },
    /// The connection could not be established, or broke.
    Broken,
}

impl Got {
    /// Whether the request was refused because the queue was full.
    fn is_refusal(&self) -> bool {
        *self == Got::Error { status: 429, code: "overloaded".to_owned() }
    }
}

/// The observations of one node after the fault.
struct Seen {
    unready: Option<Duration>,
    dead: Option<Duration>,
    ended: Duration,
    exit_code: Option<i32>,
    got: Vec<Got>,
}

#[tokio::test]
async fn every_fault_of_an_idle_node_is_seen_and_ends_it() {
    matrix(Load::Idle).await;
}

#[tokio::test]
async fn every_fault_of_a_node_with_a_stream_is_seen_and_ends_both() {
    matrix(Load::OneStream).await;
}

#[tokio::test]
async fn every_fault_of_a_full_node_is_seen_and_nobody_waits_in_vain() {
    matrix(Load::Full).await;
}

#[tokio::test]
async fn every_fault_of_a_node_whose_queue_fills_later_is_seen_and_nobody_waits_in_vain() {
    matrix(Load::FillsLater).await;
}

async fn matrix(load: Load) {
    let _place = a_place().await;
    let folder = Folder::new();
    let model = slow_model(folder.path());
    let seen = join_all(FAULTS.iter().map(|fault| observe(fault, load, &model))).await;
    for (fault, seen) in FAULTS.iter().zip(&seen) {
        eprintln!("{}", row(fault, load, seen));
    }
    for (fault, seen) in FAULTS.iter().zip(&seen) {
        judge(fault, load, seen);
    }
}

async fn observe(fault: &Fault, load: Load, model: &[String]) -> Seen {
    let flags: Vec<&str> = model.iter().map(String::as_str).chain(FLAGS.iter().copied()).collect();
    let mut server = Server::ready(&flags).await;
    let mut clients: Vec<_> = (0..load.before()).map(|index| client(&server, index)).collect();
    server.wait_until("loaded", async |server: &Server| taken(server).await == load.before()).await;

    let start = Instant::now();
    let injected = Client::new().post(server.url("/debug/fault")).json(&json!({"fault": fault.name})).send().await;
    assert_eq!(injected.expect("an answer").status(), 202, "{}", fault.name);
    clients.extend((0..load.after()).map(|index| client(&server, index)));
    let (mut unready, mut dead) = (None, None);
    // Observe the probes until the node stops listening.
    while let (Some(live), Some(ready)) = (status(&server, "/livez").await, status(&server, "/readyz").await) {
        if ready != 200 && unready.is_none() {
            unready = Some(start.elapsed());
            clients.push(client(&server, 0));
        }
        if live != 200 && dead.is_none() {
            dead = Some(start.elapsed());
            // A node that must be restarted must not be ready either. `ready` was read after `live`.
            assert_ne!(ready, 200, "{}: liveness fails, but readiness passes", fault.name);
            clients.push(client(&server, 1));
        }
        sleep(Duration::from_millis(20)).await;
    }
    let exit_code = server.exit().await.code();
    let ended = start.elapsed();
    let got = within("answered", join_all(clients)).await;
    let got = got.into_iter().map(|got| got.expect("no panic")).collect();
    Seen { unready, dead, ended, exit_code, got }
}

fn judge(fault: &Fault, load: Load, seen: &Seen) {
    let case = row(fault, load, seen);
    assert_eq!(seen.exit_code, Some(1), "{case}");
    if fault.silences_the_front {
        assert!(seen.unready.is_none() && seen.dead.is_none(), "the hung front has answered: {case}");
        assert!(seen.ended + EARLY >= LIVENESS && seen.ended < LIVENESS + SLACK, "{case}");
        assert_eq!(seen.got.len(), load.before() + load.after(), "{case}");
        assert!(seen.got.iter().all(|got| *got == Got::Broken || got.is_refusal()), "{case}");
        return;
    }
    let (unready, dead) = (seen.unready.expect(&case), seen.dead.expect(&case));
    assert!(unready + EARLY >= fault.unready_after && unready < fault.unready_after + SLACK, "{case}");
    assert!(dead + EARLY >= fault.dead_after && dead < fault.dead_after + SLACK, "{case}");
    assert!(unready <= dead && dead < seen.ended && seen.ended < dead + SLACK, "{case}");
    assert_eq!(seen.got.len(), load.before() + load.after() + 2, "{case}");
    for got in &seen.got {
        let Got::Error { status, code } = got else { panic!("{got:?}: {case}") };
        let is_known = fault.codes.contains(&code.as_str()) || LATE.contains(&code.as_str());
        assert!(got.is_refusal() || is_known, "{status} {code}: {case}");
    }
}

/// The row of the table for this case.
fn row(fault: &Fault, load: Load, seen: &Seen) -> String {
    let time = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
    let mut got: Vec<String> = (seen.got.iter())
        .map(|got| match got {
            Got::Error { status, code } => format!("{status} {code}"),
            got => format!("{got:?}"),
        })
        .collect();
    got.sort();
    let counts = got.chunk_by(|a, b| a == b).map(|alike| format!("{} x {}", alike.len(), alike[0])).collect::<Vec<_>>();
    format!(
        "| {} | {load:?} | {} | {} | {:.2} s | {:?} | {} |",
        fault.name,
        time(seen.unready),
        time(seen.dead),
        seen.ended.as_secs_f64(),
        seen.exit_code,
        counts.join(", ")
    )
}

/// Sends a request for more tokens than are ever computed before the fault ends it. Every other client streams.
fn client(server: &Server, index: usize) -> JoinHandle<Got> {
    let body = json!({
        "prompt": [5, 6, 7 + index], "max_tokens": 1900, "ignore_eos": true, "temperature": 0,
        "stream": index.is_multiple_of(2),
    });
    let request = Client::new().post(server.url(COMPLETIONS)).json(&body).timeout(PATIENCE).send();
    tokio::spawn(async move {
        match request.await {
            Ok(response) => read(response).await,
            Err(_) => Got::Broken,
        }
    })
}

async fn read(response: Response) -> Got {
    let status = response.status().as_u16();
    let Ok(text) = response.text().await else { return Got::Broken };
    let events = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
    let mut errors = events.filter_map(|text| serde_json::from_str::<Value>(text).ok()?.get("error").cloned());
    match errors.next_back() {
        Some(error) => Got::Error { status, code: error["code"].as_str().unwrap_or_default().to_owned() },
        None => Got::Answer,
    }
}

/// The number of requests that the node has accepted and not answered.
async fn taken(server: &Server) -> usize {
    let text = reqwest::get(server.url("/metrics")).await.expect("an answer").text().await.expect("text");
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name) && line[name.len()..].starts_with('{'));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse::<usize>().ok()).unwrap_or(0)
    };
    value("vllm:num_requests_running") + value("vllm:num_requests_waiting")
}

/// The status of a GET. `None` if nobody answers.
async fn status(server: &Server, path: &str) -> Option<u16> {
    let answer = Client::new().get(server.url(path)).timeout(PATIENCE).send().await.ok()?;
    Some(answer.status().as_u16())
}
