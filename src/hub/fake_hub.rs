//! A model hub on a loopback port for tests: the few answers that are asked of one, and the ways in which it can fail.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::checksum::Checksum;

pub(super) const COMMIT: &str = "0123456789abcdef";

/// How the hub behaves.
#[derive(Clone, Default)]
pub(super) struct Behaviour {
    /// Files by path, in the one repository there is.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Says another SHA-256 of its files than they have.
    pub announced_sha256: Option<String>,
    /// Closes the connection after this many bytes of a file.
    pub cut_after: Option<usize>,
    /// Accepts connections and never answers.
    pub is_silent: bool,
    /// Answers everything with this status.
    pub status: Option<u16>,
    /// Flips a bit of what it sends.
    pub corrupts: bool,
}

pub(super) struct FakeHub {
    pub endpoint: String,
    /// Answers that carried a whole file or the rest of one.
    pub downloads: Arc<AtomicUsize>,
}

impl FakeHub {
    pub async fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let downloads = Arc::new(AtomicUsize::new(0));
        let counter = downloads.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, behaviour.clone(), counter.clone()));
            }
        });
        Self { endpoint, downloads }
    }

    pub fn downloads(&self) -> usize {
        self.downloads.load(Ordering::SeqCst)
    }
}

/// One request a connection.
async fn serve(stream: TcpStream, behaviour: Behaviour, downloads: Arc<AtomicUsize>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    if behaviour.is_silent {
        return std::future::pending().await;
    }
    let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
    let range =
        lines.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    let answer = answer(&behaviour, &path, range.as_deref(), &downloads);
    stream.get_mut().write_all(&answer).await?;
    stream.get_mut().shutdown().await
}

fn answer(behaviour: &Behaviour, path: &str, range: Option<&str>, downloads: &AtomicUsize) -> Vec<u8> {
    if let Some(status) = behaviour.status {
        return response(status, &[], b"");
    }
    if path.starts_with("/api/models/") {
        let siblings: Vec<_> = behaviour.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return response(200, &[], body.as_bytes());
    }
    let file = path.split("/resolve/").nth(1).and_then(|rest| rest.split_once('/')).map(|(_, file)| file);
    let Some(content) = file.and_then(|file| behaviour.files.get(file)) else { return response(404, &[], b"") };
    let sha256 = Checksum::of(&content[..]).unwrap().sha256;
    let etag = format!("\"{}\"", behaviour.announced_sha256.as_ref().unwrap_or(&sha256));
    if range == Some("0-0") {
        let content_range = format!("bytes 0-0/{}", content.len());
        let headers = [("x-repo-commit", COMMIT), ("etag", &etag), ("content-range", &content_range)];
        return response(206, &headers, &content[..content.len().min(1)]);
    }
    downloads.fetch_add(1, Ordering::SeqCst);
    let start: usize = range.and_then(|range| range.trim_end_matches('-').parse().ok()).unwrap_or(0);
    let mut body = content[start..].to_vec();
    if behaviour.corrupts {
        body[0] ^= 1;
    }
    let mut answer = response(if start > 0 { 206 } else { 200 }, &[], &body);
    if let Some(limit) = behaviour.cut_after {
        let head = answer.len() - body.len();
        answer.truncate(head + limit.min(body.len()));
    }
    answer
}

fn response(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status} Status\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    [head.as_bytes(), b"\r\n", body].concat()
}
