//! Opens more connections than the server has places for, without complete requests: probes are still answered on both ports,
//! streams continue, and new requests are served.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::cluster::model_flag;
use crate::server::{PATIENCE, Server, outrigger};

/// Clients in a crowd: far more than `max_connections` and the reserve.
const CROWD: usize = 1500;
/// Time limit for a probe. Kubernetes gives up after a few seconds; the test's machine may be busy.
const PROMPT: Duration = Duration::from_secs(5);
const FIXTURE: &str = "llama-gqa-tied-bf16";
const PROBES: [&str; 3] = ["/livez", "/readyz", "/startupz"];

const SILENCE: &[u8] = b"";
const HALF_A_HEAD: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n";
const HALF_A_BODY: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"prompt\":";
const A_REQUEST: &[u8] = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n";
/// HTTP/2's preface and an empty SETTINGS frame.
const HTTP2_WITHOUT_STREAMS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Each connection needs an open file in the server, and another one in this process.
fn raise_the_limit_of_open_files() {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read and write the struct, which outlives them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limits), 0);
        limits.rlim_cur = limits.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limits), 0);
    }
}

struct Crowded {
    server: Server,
    admin: String,
}

impl Crowded {
    async fn ready() -> Self {
        raise_the_limit_of_open_files();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
        let admin = format!("--admin-addr={free}");
        let server = Server::ready(&[&model_flag(FIXTURE), &admin]).await;
        Self { server, admin: format!("http://{free}") }
    }

    /// Connects `size` clients, each of which sends `bytes` and waits. The server may close the connections at any time.
    async fn crowd(address: &str, size: usize, bytes: &[u8]) -> Vec<TcpStream> {
        let address = address.strip_prefix("http://").expect("a URL");
        let join = async || {
            let mut client = TcpStream::connect(address).await.expect("a connection");
            let _ = client.write_all(bytes).await;
            client
        };
        join_all((0..size).map(|_| join())).await
    }

    async fn assert_probes_answer(&self) {
        for base in [&self.server.base_url, &self.admin] {
            for path in PROBES {
                let start = Instant::now();
                let answer = timeout(PROMPT, reqwest::get(format!("{base}{path}"))).await;
                let answer = answer.unwrap_or_else(|_| panic!("{base}{path} does not answer")).expect("an answer");
                assert_eq!(answer.status(), 200, "{base}{path} after {:?}", start.elapsed());
            }
        }
        let port = self.server.base_url.rsplit(':').next().expect("a port");
        let check = outrigger().args(["healthcheck", "--port", port]).status().expect("it runs");
        assert!(check.success());
    }

    /// A new client is served. If the answer is 503, the client retries.
    async fn assert_a_newcomer_is_served(&self) {
        let start = Instant::now();
        loop {
            let body = json!({"prompt": [5], "max_tokens": 2, "ignore_eos": true});
            let request = reqwest::Client::new().post(self.server.url("/v1/completions")).json(&body);
            let answer = request.send().await.expect("an answer");
            match answer.status().as_u16() {
                200 => return,
                503 if start.elapsed() < PROMPT => sleep(Duration::from_millis(100)).await,
                status => panic!("{status} after {:?}: {:?}", start.elapsed(), answer.text().await),
            }
        }
    }
}

/// Runs one stream after another until `stop`. Each must end normally. Returns their number.
async fn stream_on(url: String, stop: Arc<AtomicBool>, begun: Arc<AtomicUsize>) -> usize {
    let body = json!({"prompt": [5, 6], "max_tokens": 200, "ignore_eos": true, "stream": true});
    // Each stream has its own connection: a kept one would be idle between two streams and could be closed to make room.
    let client = reqwest::Client::builder().pool_max_idle_per_host(0).build().expect("a client");
    let mut ended = 0;
    while !stop.load(Ordering::SeqCst) {
        let answer = client.post(&url).json(&body).send().await.expect("a stream");
        begun.fetch_add(1, Ordering::SeqCst);
        if answer.status() == 503 {
            // A new connection may be refused like any other; try again.
            sleep(Duration::from_millis(100)).await;
            continue;
        }
        let text = answer.text().await.expect("the stream is not cut");
        assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
        ended += 1;
    }
    ended
}

async fn survives(bytes: &'static [u8]) {
    let crowded = Crowded::ready().await;
    let (stop, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let url = crowded.server.url("/v1/completions");
    let streams: Vec<_> = (0..4).map(|_| tokio::spawn(stream_on(url.clone(), stop.clone(), begun.clone()))).collect();
    crowded.server.wait_until("streaming", async |_: &Server| begun.load(Ordering::SeqCst) >= 4).await;

    let mut clients = Crowded::crowd(&crowded.server.base_url, CROWD, bytes).await;
    clients.extend(Crowded::crowd(&crowded.admin, CROWD / 3, bytes).await);
    crowded.assert_probes_answer().await;
    crowded.assert_a_newcomer_is_served().await;
    // The crowd keeps coming back.
    for _ in 0..3 {
        clients.drain(..CROWD / 3);
        clients.extend(Crowded::crowd(&crowded.server.base_url, CROWD / 3, bytes).await);
        crowded.assert_probes_answer().await;
    }
    crowded.assert_a_newcomer_is_served().await;
    stop.store(true, Ordering::SeqCst);
    for stream in streams {
        assert!(stream.await.expect("no panic") > 0, "no stream ran to its end");
    }
    let mut made_room = crowded.server.metric("outrigger_http_connections_recycled_total").await;
    if bytes == HALF_A_BODY {
        // A request that is refused before its body has arrived ends its connection, so fewer others must make room.
        made_room += crowded.server.metric("outrigger_http_connections_refused_total").await;
    }
    assert!(made_room > 100.0, "{made_room}");
    assert!(crowded.server.metric("process_open_fds").await < 1300.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_send_nothing_starve_nobody() {
    survives(SILENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_with_half_a_head_starve_nobody() {
    survives(HALF_A_HEAD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_with_half_a_body_starve_nobody() {
    survives(HALF_A_BODY).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_keep_their_connection_starve_nobody() {
    survives(A_REQUEST).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_clients_without_streams_starve_nobody() {
    survives(HTTP2_WITHOUT_STREAMS).await;
}

/// The program under a limit of open files. `ulimit` holds the arguments of the shell's `ulimit`.
fn limited(ulimit: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {ulimit} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_outrigger")]);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("OUTRIGGER_")) {
        shell.env_remove(name);
    }
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    shell
}

#[tokio::test]
async fn a_low_limit_of_open_files_lowers_max_connections_and_is_told_with_the_numbers() {
    raise_the_limit_of_open_files();
    let server = Server::start_as(limited("-n 400"), &[&model_flag(FIXTURE)]);
    server.wait_until("ready", async |server: &Server| server.status("/readyz").await == Some(200)).await;
    let log = server.log();
    let line = log.lines().find(|line| line.contains("RLIMIT_NOFILE")).unwrap_or_else(|| panic!("{log}"));
    for part in ["WARN", "limit=400", "wanted=1188", "max_connections=900", "112 are served"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let _crowd = Crowded::crowd(&server.base_url, 600, SILENCE).await;
    for path in PROBES {
        assert_eq!(timeout(PROMPT, server.status(path)).await.expect("prompt"), Some(200), "{path}");
    }
    let open = server.metric("process_open_fds").await;
    assert!(open < 400.0, "{open}");
    assert!(!server.log().contains("cannot accept"), "{}", server.log());
}

#[tokio::test]
async fn a_low_soft_limit_of_open_files_is_raised() {
    raise_the_limit_of_open_files();
    let server = Server::start_as(limited("-Sn 256"), &[&model_flag(FIXTURE)]);
    server.wait_until("ready", async |server: &Server| server.status("/readyz").await == Some(200)).await;
    let mut crowd = Crowded::crowd(&server.base_url, 600, SILENCE).await;
    server
        .wait_until("full of clients", async |server: &Server| {
            server.metric("outrigger_http_connections").await >= 600.0
        })
        .await;
    assert_eq!(server.metric("outrigger_http_connections_recycled_total").await, 0.0);
    assert!(server.log().contains("raised the limit of open files"), "{}", server.log());
    // The server has closed no connection.
    let first = timeout(Duration::from_millis(50), crowd[0].read_u8()).await;
    assert!(first.is_err(), "{first:?}");
    drop(server);
    timeout(PATIENCE, crowd[0].read_u8()).await.expect("it ends with the server").expect_err("no answer");
}
