//! Downloads files from the model hub. `hf-hub` knows its addresses, credentials and metadata. The bytes are streamed here,
//! because its own download buffers whole chunks, has no time limits and does not verify the data.

use std::time::Duration;

use bytes::Bytes;
use hf_hub::api::RepoInfo;
use hf_hub::api::tokio::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Config;
use super::checksum::Checksum;
use super::error::SourceError;
use super::progress::{Progress, ProgressTask};
use super::store::{PartialFile, Presence, Store, unblock};
use crate::types::tasks;

/// How often the download of a file is resumed after its connection broke.
const MAX_RESUMPTIONS: u32 = 5;
/// Chunks that may wait between the network and the disk.
const QUEUED_PIECES: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For the hub to answer a query about a file.
    pub answer: Duration,
    /// Between two chunks of a file.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { answer: Duration::from_secs(5), stall: Duration::from_secs(30) }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct RemoteFile<'a> {
    pub repository: &'a str,
    pub revision: &'a str,
    pub path: &'a str,
}

pub(super) struct HubClient {
    api: Api,
    limits: Limits,
}

impl HubClient {
    pub fn new(config: &Config, limits: Limits) -> Result<Self, SourceError> {
        let cache = Cache::new(config.home.join("hub"));
        let mut builder = ApiBuilder::from_cache(cache).with_token(config.token.clone()).with_progress(false);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        Ok(Self { api: builder.build()?, limits })
    }

    fn repo(&self, repository: &str, revision: &str) -> ApiRepo {
        self.api.repo(Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned()))
    }

    /// The commit of a revision, and its files.
    pub async fn info(&self, repository: &str, revision: &str) -> Result<RepoInfo, SourceError> {
        let repo = self.repo(repository, revision);
        self.answered(repo.info()).await
    }

    async fn answered<T>(&self, question: impl Future<Output = Result<T, ApiError>>) -> Result<T, SourceError> {
        let answer = timeout(self.limits.answer, question).await;
        answer.map_err(|_| SourceError::Unreachable(self.limits.answer))?.map_err(refused)
    }

    /// Downloads a remote file into the store under this name, unless a file with the right checksum is already there. The
    /// file must match `expected`, or what the hub announces if there is none.
    pub async fn fetch(
        &self,
        remote: &RemoteFile<'_>,
        expected: Option<&Checksum>,
        store: &Store,
        file: &str,
        progress: &Progress,
    ) -> Result<Checksum, SourceError> {
        let url = self.repo(remote.repository, remote.revision).url(remote.path);
        let metadata = self.answered(self.api.metadata(&url)).await?;
        let size = metadata.size() as u64;
        let announced = announced_checksum(metadata.etag(), size);
        if let (Some(expected), Some(found)) = (expected, &announced)
            && expected != found
        {
            return Err(SourceError::Checksum { expected: expected.clone(), found: found.clone() });
        }
        if let Some(expected) = expected.filter(|expected| expected.size != size) {
            return Err(SourceError::Size { expected: expected.size, found: size });
        }
        let expected = expected.cloned().or(announced);
        if let Some(expected) = &expected
            && store.check(file, expected).await.map_err(SourceError::Io)? == Presence::Verified
        {
            return Ok(expected.clone());
        }
        let partial = store.partial().map_err(|error| SourceError::disk(error, size))?;
        let task = progress.start(format!("downloading {file}"), size);
        let partial = self.stream(&url, size, partial, task).await?;
        let file = file.to_owned();
        unblock(move || partial.commit(&file, expected.as_ref())).await
    }

    /// Downloads `size` bytes from a URL into the partial file.
    async fn stream(
        &self,
        url: &str,
        size: u64,
        partial: PartialFile,
        mut task: ProgressTask,
    ) -> Result<PartialFile, SourceError> {
        let (pieces, queue) = mpsc::channel(QUEUED_PIECES);
        let writer = tasks::spawn("writes a download", unblock(move || write_all(partial, queue, size)));
        let mut received = 0;
        let mut resumptions = 0;
        let result = loop {
            match self.receive(url, size, &mut received, &pieces, &mut task).await {
                Err(Broken::Retry(reason)) if resumptions < MAX_RESUMPTIONS => {
                    resumptions += 1;
                    tracing::info!(%reason, received, size, "resuming the download");
                    tokio::time::sleep(self.limits.stall / 30 * resumptions).await;
                }
                Err(Broken::Retry(reason) | Broken::Final(reason)) => break Err(reason),
                Ok(()) => break Ok(()),
            }
        };
        drop(pieces);
        // An error on the disk also ends the transfer, and is the better reason to report.
        let partial = writer.await.map_err(|error| SourceError::Connection(error.into()))??;
        result.map(|()| partial)
    }

    /// Receives from byte `received` on, and advances it.
    async fn receive(
        &self,
        url: &str,
        size: u64,
        received: &mut u64,
        pieces: &mpsc::Sender<Bytes>,
        task: &mut ProgressTask,
    ) -> Result<(), Broken> {
        let stalled = |_| Broken::Retry(SourceError::Stalled(self.limits.stall));
        let mut request = self.api.client().get(url);
        if *received > 0 {
            request = request.header("range", format!("bytes={received}-"));
        }
        let answer = timeout(self.limits.stall, request.send()).await.map_err(stalled)?;
        let mut response = answer.map_err(|error| Broken::Retry(SourceError::Connection(error.into())))?;
        match response.status().as_u16() {
            206 if *received > 0 => {}
            200 if *received == 0 => {}
            status @ (408 | 429 | 500..) => return Err(Broken::Retry(SourceError::Status(status))),
            status => return Err(Broken::Final(SourceError::Status(status))),
        }
        while *received < size {
            let piece = timeout(self.limits.stall, response.chunk()).await.map_err(stalled)?;
            let piece = piece.map_err(|error| Broken::Retry(SourceError::Connection(error.into())))?;
            let piece = piece.ok_or(Broken::Retry(SourceError::Size { expected: size, found: *received }))?;
            *received += piece.len() as u64;
            task.set(*received);
            if pieces.send(piece).await.is_err() {
                // The writer has failed and reports the reason.
                return Err(Broken::Final(SourceError::Size { expected: size, found: *received }));
            }
        }
        Ok(())
    }
}

enum Broken {
    Retry(SourceError),
    Final(SourceError),
}

/// Writes the received bytes until the sender is done. Refuses more than `size` bytes.
fn write_all(
    mut partial: PartialFile,
    mut queue: mpsc::Receiver<Bytes>,
    size: u64,
) -> Result<PartialFile, SourceError> {
    while let Some(piece) = queue.blocking_recv() {
        let found = partial.size() + piece.len() as u64;
        if found > size {
            return Err(SourceError::Size { expected: size, found });
        }
        partial.write(&piece).map_err(|error| SourceError::disk(error, size))?;
    }
    Ok(partial)
}

/// Turns the error of a query into words for the operator.
fn refused(error: ApiError) -> SourceError {
    match error {
        ApiError::RequestError(request) => match request.status().map(|status| status.as_u16()) {
            Some(401 | 403) => SourceError::AccessDenied,
            Some(status) => SourceError::Status(status),
            None => SourceError::Connection(request.into()),
        },
        other => other.into(),
    }
}

/// The SHA-256 of a large file is its entity tag. The entity tag of other files is a git hash, which is not used.
fn announced_checksum(etag: &str, size: u64) -> Option<Checksum> {
    let is_sha256 = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_sha256.then(|| Checksum { sha256: etag.to_ascii_lowercase(), size })
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
