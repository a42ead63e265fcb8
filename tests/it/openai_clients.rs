//! Tests the real server with the official OpenAI clients for Python and Node. The checks are in the scripts in
//! `tests/clients`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use crate::real_server::RealServer;

/// The folder of the clients. The first test that needs them installs them.
static CLIENTS: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |target| root.join(target));
    let output = run(Command::new(root.join("tests/clients/install")));
    assert!(output.status.success(), "the clients cannot be installed: {output:?}");
    target.join("clients")
});

/// The golden texts were computed in float32. The first token of the text that is compared is so close to another one that the
/// default arithmetic might choose that.
const GOLDEN_DTYPE: [&str; 2] = ["--dtype", "float32"];

fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Runs the checks and shows the script's output if one fails.
async fn check(mut command: Command, server: &RealServer, checks: &[&str]) {
    command.arg(&server.base_url).args(checks);
    let output = tokio::task::spawn_blocking(move || run(command)).await.expect("no panic");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (told, error) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success(), "{}\n{told}{error}", output.status);
    assert_eq!(told.lines().collect::<Vec<_>>(), checks, "some checks did not run");
}

async fn python(server: &RealServer, checks: &[&str]) {
    let mut command = Command::new(CLIENTS.join("venv/bin/python"));
    command.arg(script("openai_client.py"));
    check(command, server, checks).await;
}

async fn node(server: &RealServer, checks: &[&str]) {
    let mut command = Command::new("node");
    command.arg(script("openai_client.mjs")).arg(CLIENTS.join("node_modules/openai"));
    check(command, server, checks).await;
}

#[tokio::test]
async fn python_generates() {
    let checks = ["models", "chat", "chat_stream", "choices", "stop", "logprobs", "completions"];
    python(&*RealServer::shared(&GOLDEN_DTYPE).await, &checks).await;
}

#[tokio::test]
async fn python_sees_typed_errors() {
    python(&*RealServer::shared(&[]).await, &["errors"]).await;
}

#[tokio::test]
async fn python_leaves_and_the_server_is_free() {
    python(&RealServer::ready(&[]).await, &["leaving"]).await;
}

#[tokio::test]
async fn python_is_told_to_come_back_and_does() {
    python(&RealServer::ready(&["--max-num-seqs", "1", "--max-num-queued-requests", "0"]).await, &["overload"]).await;
}

#[tokio::test]
async fn python_needs_the_key() {
    python(&RealServer::ready(&["--api-key", "open-sesame"]).await, &["keys"]).await;
}

#[tokio::test]
async fn node_generates() {
    let checks = ["models", "chat", "chatStream", "streamHelper", "choices", "stopAndLogprobs", "completions"];
    node(&*RealServer::shared(&GOLDEN_DTYPE).await, &checks).await;
}

#[tokio::test]
async fn node_sees_typed_errors() {
    node(&*RealServer::shared(&[]).await, &["errors"]).await;
}

#[tokio::test]
async fn node_leaves_and_the_server_is_free() {
    node(&RealServer::ready(&[]).await, &["leaving"]).await;
}

#[tokio::test]
async fn node_is_told_to_come_back() {
    node(&RealServer::ready(&["--max-num-seqs", "1", "--max-num-queued-requests", "0"]).await, &["overload"]).await;
}
