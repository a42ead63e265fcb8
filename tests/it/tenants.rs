//! Several tenants on one real server: whose key opens what, and what happens when their file changes.

use std::path::{Path, PathBuf};

use reqwest::{Method, StatusCode};
use serde_json::json;
use tempfile::TempDir;

use crate::cluster::model_flag;
use crate::real_server::{COMPLETIONS, a_place};
use crate::server::{Server, outrigger};

const FIXTURE: &str = "llama-gqa-tied-bf16";
const ORGANIZATION: &str = "[[organization]]\nid = \"acme\"\n";
const OPERATORS_KEY: &str = "operators-key";
const REFUSED: &str = "outrigger_tenants_file_refused";

fn run(arguments: &[&str]) -> (bool, String) {
    let output = outrigger().args(arguments).output().expect("the program runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("text"))
}

/// A new key, and the lines that make it a key of this user.
fn new_key(user: &str) -> (String, String) {
    let (made, text) = run(&["keys", "new", "--org", "acme", "--user", user]);
    assert!(made, "{text}");
    let key = text.lines().next().expect("the key").to_owned();
    let lines = text.split_once(ORGANIZATION).expect("lines for the file").1.to_owned();
    (key, lines)
}

struct Shared {
    server: Server,
    file: PathBuf,
    _folder: TempDir,
}

impl Shared {
    async fn with(lines: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("tenants.toml");
        write(&file, lines);
        let (path, model) = (file.to_str().expect("a UTF-8 path"), model_flag(FIXTURE));
        let flags =
            ["--tenants-file", path, "--api-key", OPERATORS_KEY, "--fault-injection", "--log-level", "debug", &model];
        Self { server: Server::ready(&flags).await, file, _folder: folder }
    }

    async fn send(&self, method: Method, path: &str, header: (&str, &str)) -> StatusCode {
        let request = reqwest::Client::new().request(method, self.server.url(path)).header(header.0, header.1);
        request
            .json(&json!({"prompt": [5], "max_tokens": 3, "ignore_eos": true}))
            .send()
            .await
            .expect("an answer")
            .status()
    }

    async fn completes(&self, key: &str) -> bool {
        let status = self.send(Method::POST, COMPLETIONS, ("x-api-key", key)).await;
        assert!([StatusCode::OK, StatusCode::UNAUTHORIZED].contains(&status), "{status}");
        status == StatusCode::OK
    }

    async fn until_refused(&self, is_refused: bool) {
        let expected = f64::from(u8::from(is_refused));
        self.server.wait_until("told", async |server: &Server| server.metric(REFUSED).await == expected).await;
    }
}

fn write(file: &Path, lines: &str) {
    std::fs::write(file, format!("{ORGANIZATION}{lines}")).expect("written");
}

#[tokio::test]
async fn keys_come_and_go_with_the_file_and_a_broken_file_changes_nothing() {
    let _place = a_place().await;
    let ((anas, ana), (bobs, bob)) = (new_key("ana"), new_key("bob"));
    let node = Shared::with(&ana).await;
    assert!(node.completes(&anas).await && node.completes(OPERATORS_KEY).await && !node.completes(&bobs).await);
    let bearer = format!("Bearer {anas}");
    assert_eq!(node.send(Method::POST, COMPLETIONS, ("authorization", &bearer)).await, StatusCode::OK);
    assert_eq!(node.send(Method::POST, "/debug/fault", ("x-api-key", &anas)).await, StatusCode::UNAUTHORIZED);
    assert_eq!(node.server.metric("outrigger_organization_requests_total").await, 3.0);
    let metrics = reqwest::get(node.server.url("/metrics")).await.expect("an answer").text().await.expect("text");
    for series in
        ["requests_total{organization=\"acme\"} 2", "tokens_total{organization=\"default\",kind=\"generation\"} 3"]
    {
        assert!(metrics.contains(&format!("outrigger_organization_{series}\n")), "{series}: {metrics}");
    }
    assert!(node.server.log().contains("tenant=acme/ana") && !node.server.log().contains(&anas));

    write(&node.file, &[&*ana, &bob].concat());
    node.server.wait_until("bob's", async |_| node.completes(&bobs).await).await;

    write(&node.file, &[&*ana, &ana, "[[organization]]\nname = \"other\"\n"].concat());
    node.until_refused(true).await;
    assert!(node.completes(&anas).await && node.completes(&bobs).await, "the tenants of before");
    for problem in [
        "the id `ana` is used more than once",
        "is already that of acme/ana",
        "organization 2: `id` must",
        "`name` is not",
    ] {
        assert!(node.server.log().contains(problem), "{problem}");
    }

    write(&node.file, &bob);
    node.server.signal(libc::SIGHUP);
    node.server.wait_until("ana's gone", async |_| !node.completes(&anas).await).await;
    node.until_refused(false).await;
    assert!(node.completes(&bobs).await && node.completes(OPERATORS_KEY).await);
}

#[tokio::test]
async fn a_key_of_one_tenant_does_not_find_the_streams_of_another() {
    let _place = a_place().await;
    let ((anas, ana), (bobs, bob)) = (new_key("ana"), new_key("bob"));
    let (second, second_lines) = new_key("ana");
    let second_key = second_lines.split_once("    [[organization.user.key]]").expect("a key").1;
    let node = Shared::with(&format!("{ana}    [[organization.user.key]]{second_key}{bob}")).await;
    let ask = async |key: &str| {
        let request = reqwest::Client::new().post(node.server.url(COMPLETIONS)).header("x-api-key", key);
        let request = request
            .header("idempotency-key", "mine")
            .json(&json!({"prompt": [5], "max_tokens": 20, "ignore_eos": true}));
        let answer: serde_json::Value = request.send().await.expect("an answer").json().await.expect("JSON");
        answer["id"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    };
    let id = ask(&anas).await;
    assert_eq!(ask(&second).await, id, "another key of the same user");
    assert_ne!(ask(&bobs).await, id);
}

#[test]
fn a_broken_file_is_refused_at_start_and_by_the_list() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tenants.toml");
    write(&file, "nam = 1\n[[organization.user]]\n");
    let path = file.to_str().expect("a UTF-8 path");
    let model = model_flag(FIXTURE);
    for arguments in
        [&["serve", "--port", "0", "--tenants-file", path, &model][..], &["keys", "list", "--tenants-file", path]]
    {
        let (worked, text) = run(arguments);
        assert!(!worked && text.contains("organization `acme`: `nam` is not a known field"), "{text}");
        assert!(text.contains("organization `acme`, user 1: `id` must have"), "{text}");
    }
    let (key, lines) = new_key("ana");
    write(&file, &lines);
    let (worked, text) = run(&["keys", "list", "--tenants-file", path]);
    assert!(worked && text.starts_with("acme/ana  ") && !text.contains(&key), "{text}");
}
