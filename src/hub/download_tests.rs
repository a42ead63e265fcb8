//! Tests of downloading from the hub, against a hub on a loopback port that fails in the ways that hubs do.

use std::time::Instant;

use super::super::fake_hub::{Behaviour, FakeHub};
use super::*;

const REPOSITORY: &str = "owner/name";
const FILE: RemoteFile<'static> = RemoteFile { repository: REPOSITORY, revision: "main", path: "model.gguf" };

struct Setup {
    hub: FakeHub,
    client: HubClient,
    store: Store,
    _home: tempfile::TempDir,
}

fn content() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn expected() -> Checksum {
    Checksum::of(&content()[..]).unwrap()
}

fn with_file() -> Behaviour {
    Behaviour { files: [("model.gguf".to_owned(), content())].into(), ..Behaviour::default() }
}

async fn setup(behaviour: Behaviour) -> Setup {
    let home = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(behaviour).await;
    let config = Config { endpoint: Some(hub.endpoint.clone()), ..Config::new(home.path()) };
    let limits = Limits { answer: Duration::from_millis(400), stall: Duration::from_millis(400) };
    let client = HubClient::new(&config, limits).unwrap();
    Setup { hub, client, store: Store::new(home.path().to_owned()), _home: home }
}

impl Setup {
    async fn fetch(&self, expected: Option<&Checksum>) -> Result<Checksum, SourceError> {
        self.client.fetch(&FILE, expected, &self.store, "model.gguf", &Progress::Log).await
    }

    /// Everything in the directory but records.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.directory()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.ends_with(".verified")).collect()
    }
}

#[tokio::test]
async fn a_file_arrives_whole_and_is_not_downloaded_twice() {
    let setup = setup(with_file()).await;
    assert_eq!(setup.fetch(Some(&expected())).await.unwrap(), expected());
    assert_eq!(std::fs::read(setup.store.path("model.gguf")).unwrap(), content());
    assert_eq!(setup.fetch(None).await.unwrap(), expected(), "the hub's own checksum will do");
    assert_eq!(setup.hub.downloads(), 1);
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let setup = setup(Behaviour { cut_after: Some(80_000), ..with_file() }).await;
    assert_eq!(setup.fetch(Some(&expected())).await.unwrap(), expected());
    assert_eq!(std::fs::read(setup.store.path("model.gguf")).unwrap(), content());
    assert_eq!(setup.hub.downloads(), 4, "80 000 bytes at a time");
}

#[tokio::test]
async fn a_connection_that_keeps_breaking_is_given_up() {
    let setup = setup(Behaviour { cut_after: Some(1000), ..with_file() }).await;
    assert!(setup.fetch(Some(&expected())).await.is_err());
    assert_eq!(setup.hub.downloads(), 1 + MAX_RESUMPTIONS as usize);
    assert!(setup.files().is_empty(), "{:?}", setup.files());
}

#[tokio::test]
async fn another_file_is_refused_before_it_is_downloaded() {
    let setup = setup(Behaviour { announced_sha256: Some("0".repeat(64)), ..with_file() }).await;
    assert!(matches!(setup.fetch(Some(&expected())).await, Err(SourceError::Checksum { .. })));
    let shorter = Checksum { size: 7, ..expected() };
    assert!(setup.fetch(Some(&shorter)).await.is_err());
    assert_eq!(setup.hub.downloads(), 0);
}

#[tokio::test]
async fn what_arrives_is_verified_and_not_only_what_is_announced() {
    let setup = setup(Behaviour { corrupts: true, ..with_file() }).await;
    assert!(matches!(setup.fetch(Some(&expected())).await, Err(SourceError::Checksum { .. })));
    assert!(matches!(setup.fetch(None).await, Err(SourceError::Checksum { .. })));
    assert!(setup.files().is_empty(), "{:?}", setup.files());
}

#[tokio::test]
async fn a_silent_hub_is_given_up_within_the_limit() {
    let setup = setup(Behaviour { is_silent: true, ..with_file() }).await;
    let begin = Instant::now();
    assert!(matches!(setup.fetch(None).await, Err(SourceError::Unreachable(_))));
    assert!(matches!(setup.client.info(REPOSITORY, "main").await, Err(SourceError::Unreachable(_))));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(Limits::default().answer, Duration::from_secs(5), "what the issue asks for");
}

#[tokio::test]
async fn refusals_say_why() {
    let denied = setup(Behaviour { status: Some(401), ..Behaviour::default() }).await;
    assert!(matches!(denied.fetch(None).await, Err(SourceError::AccessDenied)));
    let absent = setup(Behaviour::default()).await;
    assert!(matches!(absent.fetch(None).await, Err(SourceError::Status(404))));
}
