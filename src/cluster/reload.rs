//! Reloads the key file and the certificate files when they change, so that no restart is needed. Invalid files change nothing
//! and are reported.
//!
//! A new key list is accepted only if nodes with it and with the previous list can still communicate. Nodes never change at the
//! same moment, so any other list would cut this node off.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::key::{ClusterKeyError, KeyId, KeyRing};
use super::membership::Membership;
use super::problems::ProblemReason;
use super::tls::{PeerTls, PeerTlsError};
use super::{Config, Problems};
use crate::types::with_causes;

/// Interval at which the files are read. Contents are compared, because mounted secrets can change without a change of the file
/// times.
const INTERVAL: Duration = Duration::from_secs(2);

/// How much of each file is compared. Longer files are invalid anyway.
const MAX_FILE_BYTES: u64 = 2 << 20;

/// The keys in use. Cheap to clone; all clones change together.
#[derive(Clone)]
pub struct CurrentKeys(Arc<ArcSwap<KeyRing>>);

impl CurrentKeys {
    pub fn new(keys: KeyRing) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(keys)))
    }

    pub fn get(&self) -> KeyRing {
        KeyRing::clone(&self.0.load())
    }
}

#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Key(#[from] ClusterKeyError),
    #[error(transparent)]
    Tls(#[from] PeerTlsError),
    #[error(
        "cluster_key_file: other nodes would not hear this one with the keys {next:?} after {current:?}. Add the new key as the \
         second on every node, then make it the first on every node, then remove the old one; or restart all nodes together"
    )]
    TooFar { current: Vec<KeyId>, next: Vec<KeyId> },
}

/// The files to read, and the users of their contents.
pub struct Reload {
    pub config: Config,
    pub key_file: PathBuf,
    pub keys: CurrentKeys,
    pub tls: PeerTls,
    pub membership: Arc<Membership>,
    pub problems: Problems,
}

/// A digest of all files. An unreadable file counts as empty.
type Contents = [u8; 32];

impl Reload {
    /// Runs until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        // A pipe, such as a shell's process substitution, can be read only once.
        if !std::fs::metadata(&self.key_file).is_ok_and(|found| found.is_file()) {
            tracing::info!("cluster_key_file is not a regular file, so it is not read again");
            return shutdown.cancelled().await;
        }
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The files may have changed since they were first read. Applying the same ones again changes nothing.
        let mut used: Option<Contents> = None;
        let mut seen: Option<Contents> = None;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let files = self.files();
            let Ok(contents) = tokio::task::spawn_blocking(move || digest(&files)).await else { continue };
            if used == Some(contents) {
                self.problems.state(ProblemReason::RefusedFile, Vec::new());
                continue;
            }
            // Contents must be the same twice in a row, in case a file is just being written.
            let is_settled = seen.replace(contents) == Some(contents);
            match self.take().await {
                Ok(()) => used = Some(contents),
                Err(error) if is_settled => {
                    self.problems
                        .state(ProblemReason::RefusedFile, vec![(String::new(), with_causes(&error).to_string())]);
                }
                Err(_) => {}
            }
        }
    }

    fn files(&self) -> Vec<PathBuf> {
        let Config { peer_tls_cert_file, peer_tls_key_file, peer_tls_ca_file, .. } = &self.config;
        let certificates = [peer_tls_cert_file, peer_tls_key_file, peer_tls_ca_file];
        std::iter::once(&self.key_file).chain(certificates.into_iter().flatten()).cloned().collect()
    }

    async fn take(&self) -> Result<(), ReloadError> {
        let (config, key_file, tls) = (self.config.clone(), self.key_file.clone(), self.tls.clone());
        let current = self.keys.get();
        let read = move || {
            let next = KeyRing::from_file(&key_file)?;
            if !next.is_heard_by(&current) {
                return Err(ReloadError::TooFar { current: current.ids(), next: next.ids() });
            }
            tls.replace(&config, &next)?;
            Ok((current, next))
        };
        let Ok(read) = tokio::task::spawn_blocking(read).await else { return Ok(()) };
        let (before, next) = read?;
        if before.ids() != next.ids() {
            tracing::info!(before = ?before.ids(), keys = ?next.ids(), "the cluster keys have changed");
            self.membership.set_keys(&next);
            self.keys.0.store(Arc::new(next));
        }
        Ok(())
    }
}

fn digest(files: &[PathBuf]) -> Contents {
    let read = |file: &PathBuf| {
        let mut contents = Vec::new();
        std::fs::File::open(file)?.take(MAX_FILE_BYTES).read_to_end(&mut contents)?;
        std::io::Result::Ok(contents)
    };
    let mut digest = Sha256::new();
    for file in files {
        let contents = read(file).ok();
        digest.update([u8::from(contents.is_some())]);
        digest.update(Sha256::digest(contents.unwrap_or_default()));
    }
    digest.finalize().into()
}

/// Warns if other users of the machine can read or change the secret.
pub fn check_permissions(key_file: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let Ok(found) = std::fs::metadata(key_file) else { return };
    let mode = found.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        let (path, mode) = (key_file.display(), format!("{mode:03o}"));
        tracing::warn!(%path, mode, "every user of this machine can read cluster_key_file: remove these permissions");
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use tokio::time::timeout;

    use super::*;
    use crate::cluster::ClusterKey;
    use crate::cluster::key::LIST_HEAD;

    fn reload(key_file: &Path) -> Reload {
        let keys = KeyRing::from(ClusterKey::from_secret(&[1; 32]).expect("long enough"));
        Reload {
            config: Config::default(),
            key_file: key_file.to_owned(),
            tls: PeerTls::from_keys(&keys).expect("a certificate"),
            keys: CurrentKeys::new(keys),
            membership: Arc::new(Membership::alone(&Config::default())),
            problems: Problems::default(),
        }
    }

    fn list(secrets: &[u8]) -> String {
        let line = |secret: &u8| base64::engine::general_purpose::STANDARD.encode([*secret; 32]) + "\n";
        format!("{LIST_HEAD}\n{}", secrets.iter().map(line).collect::<String>())
    }

    /// Checks the files several times.
    async fn look(reload: Reload) -> (usize, Vec<String>) {
        let (keys, problems) = (reload.keys.clone(), reload.problems.clone());
        let ended = timeout(INTERVAL * 5, reload.run(CancellationToken::new())).await;
        assert!(ended.is_err(), "it goes on");
        (keys.get().ids().len(), problems.list().into_iter().map(|problem| problem.detail).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn what_fits_is_taken_and_what_does_not_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("key");
        let case = async |contents: &str| {
            std::fs::write(&file, contents).expect("written");
            look(reload(&file)).await
        };
        assert_eq!(case(&list(&[1, 2])).await, (2, vec![]));
        assert_eq!(case(&"\u{1}".repeat(32)).await, (1, vec![]), "the same as before");
        for (contents, part) in
            [(list(&[2, 1]), "would not hear"), (list(&[2]), "would not hear"), ("short".into(), "has 5 bytes")]
        {
            let (keys, problems) = case(&contents).await;
            assert!(keys == 1 && problems.len() == 1 && problems[0].contains(part), "{contents}: {problems:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_regular_file_is_not_read_again() {
        assert_eq!(look(reload(Path::new("/dev/zero"))).await, (1, vec![]));
    }
}
