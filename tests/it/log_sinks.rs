//! Standard error and standard output that cannot be written: the collector stops reading, the collector has exited, the disk
//! is full. The server must answer, drain and exit normally, and count the lost lines.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use serde_json::json;

use crate::cluster::model_flag;
use crate::server::{PATIENCE, Server, outrigger};

const FIXTURE: &str = "llama-gqa-tied-bf16";
/// The size of the smallest pipe that the kernel provides.
const PIPE_BYTES: i32 = 4096;
/// Time limit for the process to exit: all timeouts of the shutdown, and a margin for a busy machine.
const PROMPT: Duration = Duration::from_secs(20);
const DROPPED: &str = "outrigger_log_lines_dropped_total";

/// The read end and the write end of a small pipe.
fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both descriptors, which are then owned once each.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let (reader, writer) = (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]));
        assert!(libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) >= PIPE_BYTES);
        (reader, writer)
    }
}

/// Starts a server that logs a lot to `stderr`.
async fn logging_to(stderr: impl Into<Stdio>, more: &[&str]) -> Server {
    let mut program = outrigger();
    program.stderr(stderr);
    let model = model_flag(FIXTURE);
    let arguments: Vec<&str> = [model.as_str(), "--log-level=trace"].into_iter().chain(more.iter().copied()).collect();
    let server = Server::start_as(program, &arguments);
    server.wait_until("ready", async |server: &Server| server.status("/readyz").await == Some(200)).await;
    server
}

async fn complete(server: &Server, tokens: u32, stream: bool) -> reqwest::Response {
    let body = json!({"prompt": [5, 6], "max_tokens": tokens, "ignore_eos": true, "stream": stream});
    let request = reqwest::Client::new().post(server.url("/v1/completions")).json(&body).timeout(PATIENCE);
    request.send().await.expect("an answer")
}

/// Checks that requests, probes and scrapes work while log lines are dropped.
async fn assert_it_works_and_counts(server: &Server) {
    let start = Instant::now();
    while server.metric(DROPPED).await == 0.0 {
        assert!(start.elapsed() < PATIENCE, "no line was dropped, so the test tests nothing");
        for answer in join_all((0..20).map(|_| complete(server, 8, false))).await {
            assert_eq!(answer.status(), 200);
        }
    }
    for path in ["/livez", "/readyz", "/startupz", "/health"] {
        assert_eq!(server.status(path).await, Some(200), "{path}");
    }
}

/// Checks that a stream that runs when the signal arrives ends normally, and that the process exits with 0.
async fn assert_it_drains(mut server: Server) {
    let answer = complete(&server, 500, true).await;
    let mut chunks = answer.bytes_stream();
    let mut text = chunks.next().await.expect("a chunk").expect("not cut").to_vec();
    let start = Instant::now();
    server.signal(libc::SIGTERM);
    while let Some(chunk) = chunks.next().await {
        text.extend(chunk.expect("the stream is not cut"));
    }
    assert!(String::from_utf8_lossy(&text).trim_end().ends_with("data: [DONE]"));
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_collector_that_stops_reading_stops_nothing() {
    let (_unread, stderr) = pipe();
    let server = logging_to(stderr, &[]).await;
    assert_it_works_and_counts(&server).await;
    assert_it_drains(server).await;
}

#[tokio::test]
async fn a_collector_that_has_gone_stops_nothing() {
    let (reader, stderr) = pipe();
    drop(reader);
    let server = logging_to(stderr, &[]).await;
    assert_it_works_and_counts(&server).await;
    assert_it_drains(server).await;
}

#[tokio::test]
async fn a_full_disk_behind_the_log_stops_nothing() {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("the kernel has one");
    let server = logging_to(full, &[]).await;
    assert_it_works_and_counts(&server).await;
    assert_it_drains(server).await;
}

#[tokio::test]
async fn what_was_lost_is_told_when_the_collector_reads_again() {
    let (mut reader, stderr) = pipe();
    let server = logging_to(stderr, &["--log-format=json"]).await;
    assert_it_works_and_counts(&server).await;
    let collector = thread::spawn(move || {
        let mut log = String::new();
        reader.read_to_string(&mut log).expect("the log is text");
        log
    });
    assert_it_drains(server).await;
    let log = collector.join().expect("no panic");
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("whole lines"));
    let reports: Vec<_> = lines
        .filter(|line| line["fields"]["message"].as_str().is_some_and(|text| text.contains("log lines were dropped")))
        .collect();
    assert!(!reports.is_empty(), "the log does not report dropped lines");
    assert!(reports.iter().all(|report| report["level"] == "WARN"), "{reports:?}");
    let told: u64 = reports.iter().map(|report| report["fields"]["lines"].as_u64().expect("a number")).sum();
    assert!(told > 0, "{reports:?}");
}

#[tokio::test]
async fn a_panic_is_no_reason_to_wait_for_the_log() {
    let (_unread, stderr) = pipe();
    let mut server = logging_to(stderr, &["--fault-injection", "--failure-linger=1s"]).await;
    assert_it_works_and_counts(&server).await;
    let start = Instant::now();
    let fault = reqwest::Client::new().post(server.url("/debug/fault")).json(&json!({"fault": "panic"}));
    assert_eq!(fault.send().await.expect("an answer").status(), 202);
    server.wait_until("dead", async |server: &Server| server.status("/livez").await != Some(200)).await;
    assert_eq!(server.exit().await.code(), Some(1));
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
}

/// Waits until a process that is not a `Server` exits.
fn exit(mut child: Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("waits") {
            return status;
        }
        if start.elapsed() > PROMPT {
            let _ = child.kill();
            panic!("still running after {PROMPT:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A pipe that is already full.
fn full_pipe() -> (File, File) {
    let (reader, mut writer) = pipe();
    writer.write_all(&[b'\n'; PIPE_BYTES as usize]).expect("it fits");
    (reader, writer)
}

#[test]
fn last_words_that_nobody_reads_do_not_hold_up_the_end() {
    for (arguments, code) in [(&["--port", "0", "--model", "/nonexistent.gguf"][..], 1), (&["--port", "high"], 2)] {
        let (_unread, stderr) = full_pipe();
        let child = outrigger().args(arguments).stderr(stderr).spawn().expect("it starts");
        assert_eq!(exit(child).code(), Some(code), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_terminal_that_takes_nothing_stops_nothing() {
    let (_unread, stdout) = full_pipe();
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let arguments = [model_flag(FIXTURE), format!("--port={}", free.port())];
    let child = outrigger().args(&arguments).stdout(stdout).stderr(Stdio::null()).spawn().expect("it starts");
    let pid = libc::pid_t::try_from(child.id()).expect("a process id");
    let start = Instant::now();
    while reqwest::get(format!("http://{free}/readyz")).await.map_or(0, |answer| answer.status().as_u16()) != 200 {
        assert!(start.elapsed() < PATIENCE, "not ready");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // SAFETY: kill has no memory effects here; the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    assert_eq!(exit(child).code(), Some(0));
}
