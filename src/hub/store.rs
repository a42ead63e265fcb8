//! A folder of downloaded files. A file gets its name only when it is complete and verified.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::checksum::{Checksum, RunningChecksum};
use super::error::{HubError, SourceError};

/// Suffix of unfinished files. The next process that holds the lock removes those of a killed process.
const PARTIAL_PREFIX: &str = ".partial-";
const LOCK_FILE: &str = ".lock";
const LOCK_POLL: Duration = Duration::from_millis(100);
/// After this long another process counts as stuck. Continuing without the lock only costs a second download.
const MAX_LOCK_WAIT: Duration = Duration::from_secs(60 * 60);

#[derive(Clone, Debug)]
pub(super) struct Store {
    directory: PathBuf,
}

#[derive(Debug, PartialEq)]
pub(super) enum Presence {
    Absent,
    /// The expected file.
    Verified,
    /// A file with the right name and different content.
    Different(Checksum),
}

/// Held while downloading, so that two processes do not download the same file. Released when dropped, and by the system
/// when the process dies. `None` if the file system has no locks.
pub(super) struct Lock {
    _file: Option<File>,
}

/// Stored beside a verified file, so that the next start need not read all of it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    checksum: Checksum,
    modified_nanoseconds: u64,
}

impl Store {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Checks whether a file is the expected one. Reads all of it the first time and after each change.
    pub async fn check(&self, file: &str, expected: &Checksum) -> io::Result<Presence> {
        let (store, file, expected) = (self.clone(), file.to_owned(), expected.clone());
        unblock(move || store.check_now(&file, &expected)).await
    }

    fn check_now(&self, name: &str, expected: &Checksum) -> io::Result<Presence> {
        let file = match File::open(self.path(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Presence::Absent),
            Err(error) => return Err(error),
        };
        let modified_nanoseconds = modified_nanoseconds(&file)?;
        let found = match self.record(name) {
            Some(record)
                if record.modified_nanoseconds == modified_nanoseconds
                    && record.checksum.size == file.metadata()?.len() =>
            {
                record.checksum
            }
            _ => {
                let checksum = Checksum::of(&file)?;
                self.remember(name, &Record { checksum: checksum.clone(), modified_nanoseconds });
                checksum
            }
        };
        Ok(if found == *expected { Presence::Verified } else { Presence::Different(found) })
    }

    fn record_path(&self, name: &str) -> PathBuf {
        // Beside the file, which may lie in a folder.
        let (folder, name) = name.rsplit_once('/').unwrap_or(("", name));
        self.path(folder).join(format!(".{name}.verified"))
    }

    fn record(&self, name: &str) -> Option<Record> {
        serde_json::from_slice(&std::fs::read(self.record_path(name)).ok()?).ok()
    }

    /// If the record cannot be written (a read-only cache), the file is read again at the next start.
    fn remember(&self, name: &str, record: &Record) {
        let json = serde_json::to_vec(record).expect("a record of strings and numbers serializes");
        if let Err(error) = std::fs::write(self.record_path(name), json) {
            tracing::debug!(file = name, %error, "cannot store a checksum; the file will be read again at the next start");
        }
    }

    /// Creates the folder, and waits until no other process downloads into it.
    pub async fn lock(&self) -> Result<Lock, HubError> {
        let failed = |source| HubError::Directory { path: self.directory.clone(), source };
        std::fs::create_dir_all(&self.directory).map_err(failed)?;
        let path = self.path(LOCK_FILE);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(failed)?;
        let begin = Instant::now();
        let mut is_waiting = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if begin.elapsed() > MAX_LOCK_WAIT => return Ok(Lock { _file: None }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    tracing::debug!(%error, "cannot lock the download folder");
                    return Ok(Lock { _file: None });
                }
            }
            if !is_waiting {
                tracing::info!(directory = %self.directory.display(), "waiting for another process to finish its download");
                is_waiting = true;
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
        self.remove_partials();
        Ok(Lock { _file: Some(file) })
    }

    /// Only the holder of the lock writes partial files, so existing ones are left over.
    fn remove_partials(&self) {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PARTIAL_PREFIX)) {
            let is_directory = entry.file_type().is_ok_and(|ty| ty.is_dir());
            let path = entry.path();
            let removed = if is_directory { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            if let Err(error) = removed {
                tracing::debug!(path = %path.display(), %error, "cannot remove a leftover file");
            }
        }
    }

    pub fn partial(&self) -> io::Result<PartialFile> {
        let path = self.path(&format!("{PARTIAL_PREFIX}{}", Uuid::new_v4()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(PartialFile { store: self.clone(), path, file, checksum: RunningChecksum::default() })
    }

    /// A folder for another program's temporary files, on the same disk.
    pub fn partial_directory(&self) -> io::Result<PartialDirectory> {
        let path = self.path(&format!("{PARTIAL_PREFIX}{}", Uuid::new_v4()));
        std::fs::create_dir(&path)?;
        Ok(PartialDirectory { path })
    }
}

/// A file being written. Removed if dropped without `commit`.
pub(super) struct PartialFile {
    store: Store,
    path: PathBuf,
    file: File,
    checksum: RunningChecksum,
}

impl PartialFile {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.checksum.update(bytes);
        Ok(())
    }

    pub fn size(&self) -> u64 {
        self.checksum.size()
    }

    /// Verifies the file and gives it its name, in a folder if the name says so. Blocks until it is on the disk.
    pub fn commit(self, name: &str, expected: Option<&Checksum>) -> Result<Checksum, SourceError> {
        let found = self.checksum.clone().finish();
        if let Some(expected) = expected.filter(|expected| **expected != found) {
            return Err(SourceError::Checksum { expected: expected.clone(), found });
        }
        let target = self.store.path(name);
        let folder = target.parent().unwrap_or(&self.store.directory);
        let written = || -> io::Result<u64> {
            self.file.sync_all()?;
            std::fs::create_dir_all(folder)?;
            std::fs::rename(&self.path, &target)?;
            // Syncing the folder makes the rename durable.
            File::open(folder)?.sync_all()?;
            modified_nanoseconds(&self.file)
        };
        let modified_nanoseconds = written().map_err(|error| SourceError::disk(error, found.size))?;
        self.store.remember(name, &Record { checksum: found.clone(), modified_nanoseconds });
        Ok(found)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        // After `commit` the path no longer exists; names are unique, so this removes nothing else.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removed with all its content when dropped.
pub(super) struct PartialDirectory {
    path: PathBuf,
}

impl PartialDirectory {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PartialDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove a temporary folder");
        }
    }
}

fn modified_nanoseconds(file: &File) -> io::Result<u64> {
    let modified = file.metadata()?.modified()?;
    Ok(modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64)
}

/// Runs blocking work off the runtime, and propagates its panics.
pub(super) async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
