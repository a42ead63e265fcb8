//! Reads the tenants file again when it changes, and when asked to. An invalid file changes nothing and is reported.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::directory::{Directory, Tenants};
use super::file::{TenantsError, TenantsFile, contents};

/// Interval at which the file is read. Contents are compared, because mounted secrets can change without a change of the file
/// times.
const INTERVAL: Duration = Duration::from_secs(2);

pub struct TenantsReload {
    pub file: PathBuf,
    /// They stay as they are.
    pub api_keys: Vec<String>,
    pub tenants: Tenants,
}

type Contents = Result<String, TenantsError>;

impl TenantsReload {
    /// Runs until `shutdown`. Reads at once when `asked`. Tells `report` what is wrong with the file, and `None` once it is used.
    pub async fn run(self, asked: Arc<Notify>, report: impl Fn(Option<&TenantsError>), shutdown: CancellationToken) {
        // A pipe, such as a shell's process substitution, can be read only once.
        if !std::fs::metadata(&self.file).is_ok_and(|found| found.is_file()) {
            tracing::info!("tenants_file is not a regular file, so it is not read again");
            return shutdown.cancelled().await;
        }
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The file may have changed since it was first read. Using the same one again changes nothing.
        let mut used: Option<Contents> = None;
        let mut seen: Option<Contents> = None;
        let mut told: Option<TenantsError> = None;
        loop {
            let is_asked = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = asked.notified() => true,
                _ = ticks.tick() => false,
            };
            let file = self.file.clone();
            let Ok(found) = tokio::task::spawn_blocking(move || contents(&file)).await else { continue };
            // A file that is just being written may be valid and lack half of its keys, so it must be the same twice in a row.
            let is_settled = seen.replace(found.clone()).as_ref() == Some(&found) || is_asked;
            if !is_settled {
                continue;
            }
            if used.as_ref() == Some(&found) {
                if told.take().is_some() {
                    tracing::info!("the tenants file is again as it was");
                    report(None);
                }
                continue;
            }
            match found.as_deref().map_err(Clone::clone).and_then(TenantsFile::parse) {
                Ok(file) => {
                    self.take(&file);
                    (used, told) = (Some(found), None);
                    report(None);
                }
                Err(error) if told.as_ref() == Some(&error) && !is_asked => {}
                Err(error) => {
                    tracing::error!("{error}\nThe tenants stay as they were.");
                    report(Some(&error));
                    told = Some(error);
                }
            }
        }
    }

    fn take(&self, file: &TenantsFile) {
        let before = self.tenants.get();
        let next = Directory::new(&self.api_keys, Some(file)).expect("the keys of api_keys were read before");
        let (keys, revoked, added) = (next.key_count(), before.missing_in(&next), next.missing_in(&before));
        let (organizations, users) = (file.organizations.len(), file.users().count());
        tracing::info!(organizations, users, keys, added, revoked, "the tenants file is used");
        self.tenants.replace(next);
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use tokio::time::sleep;

    use super::*;
    use crate::tenancy::KeyDigest;

    fn with_keys(keys: &[&str]) -> String {
        let key = |key: &&str| format!("[[organization.user.key]]\nsha256 = \"{}\"\n", KeyDigest::of(key));
        let keys: String = keys.iter().map(key).collect();
        format!("[[organization]]\nid = \"acme\"\n[[organization.user]]\nid = \"ana\"\n{keys}")
    }

    struct Watched {
        _folder: tempfile::TempDir,
        file: PathBuf,
        tenants: Tenants,
        asked: Arc<Notify>,
        reports: Arc<Mutex<Vec<Option<String>>>>,
        shutdown: CancellationToken,
    }

    impl Watched {
        fn start(text: &str) -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let file = folder.path().join("tenants.toml");
            std::fs::write(&file, text).expect("written");
            let (asked, reports, shutdown) =
                (Arc::<Notify>::default(), Arc::<Mutex<Vec<_>>>::default(), CancellationToken::new());
            let api_keys = vec!["plain".to_owned()];
            let tenants = Tenants::of_keys(&api_keys).expect("valid");
            let reload = TenantsReload { file: file.clone(), api_keys, tenants: tenants.clone() };
            let told = reports.clone();
            let report = move |error: Option<&TenantsError>| told.lock().push(error.map(ToString::to_string));
            tokio::spawn(reload.run(asked.clone(), report, shutdown.clone()));
            Self { _folder: folder, file, tenants, asked, reports, shutdown }
        }

        fn write(&self, text: &str) {
            std::fs::write(&self.file, text).expect("written");
        }

        fn known(&self) -> Vec<&'static str> {
            let directory = self.tenants.get();
            ["plain", "1", "2"].into_iter().filter(|key| directory.holder(key).is_some()).collect()
        }

        async fn becomes(&self, known: &[&str]) {
            while self.known() != known {
                sleep(INTERVAL).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_used_and_a_broken_one_is_told_once() {
        let watched = Watched::start(&with_keys(&["1"]));
        watched.becomes(&["plain", "1"]).await;
        watched.write(&with_keys(&["2"]));
        watched.becomes(&["plain", "2"]).await;
        watched.write("organization = 1");
        while watched.reports.lock().last().is_none_or(Option::is_none) {
            sleep(INTERVAL).await;
        }
        sleep(INTERVAL * 5).await;
        assert_eq!(watched.known(), ["plain", "2"], "the old one stays");
        std::fs::remove_file(&watched.file).expect("removed");
        sleep(INTERVAL * 5).await;
        assert_eq!(watched.known(), ["plain", "2"]);
        watched.write(&with_keys(&["1", "2"]));
        watched.becomes(&["plain", "1", "2"]).await;
        let reports = watched.reports.lock().clone();
        let errors: Vec<&String> = reports.iter().flatten().collect();
        assert_eq!(errors.len(), 2, "{reports:?}");
        assert!(errors[0].contains("must be a list") && errors[1].contains("tenants.toml: "), "{errors:?}");
        assert_eq!(reports.last(), Some(&None), "it is over");
        watched.shutdown.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_in_use_that_comes_back_ends_the_complaint() {
        let watched = Watched::start(&with_keys(&["1"]));
        watched.becomes(&["plain", "1"]).await;
        watched.write("x = 1");
        sleep(INTERVAL * 5).await;
        watched.write(&with_keys(&["1"]));
        sleep(INTERVAL * 5).await;
        let is_error: Vec<bool> = watched.reports.lock().iter().map(Option::is_some).collect();
        assert_eq!(is_error, [false, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_is_used_when_it_rests_or_at_once_when_asked() {
        let watched = Watched::start(&with_keys(&["1"]));
        watched.becomes(&["plain", "1"]).await;
        // Looked at once within this time.
        watched.write(&with_keys(&["2"]));
        sleep(INTERVAL).await;
        watched.write(&with_keys(&[]));
        sleep(INTERVAL / 2).await;
        assert_eq!(watched.known(), ["plain", "1"], "it did not rest");
        watched.asked.notify_one();
        sleep(INTERVAL / 8).await;
        assert_eq!(watched.known(), ["plain"]);
    }
}
