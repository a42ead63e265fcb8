//! Tests of the download directory: what counts as a file, and what is left behind.

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::new(directory.path().to_owned());
    (directory, store)
}

fn names(store: &Store) -> Vec<String> {
    let entries = std::fs::read_dir(store.directory()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn checksum(content: &[u8]) -> Checksum {
    Checksum::of(content).unwrap()
}

#[tokio::test]
async fn a_committed_file_is_there_and_verified() {
    let (_directory, store) = store();
    let expected = checksum(b"weights");
    assert_eq!(store.check("model.gguf", &expected).await.unwrap(), Presence::Absent);
    let mut partial = store.partial().unwrap();
    partial.write(b"wei").unwrap();
    partial.write(b"ghts").unwrap();
    assert_eq!(store.check("model.gguf", &expected).await.unwrap(), Presence::Absent, "not before it is committed");
    assert_eq!(partial.commit("model.gguf", Some(&expected)).unwrap(), expected);
    assert_eq!(store.check("model.gguf", &expected).await.unwrap(), Presence::Verified);
    assert_eq!(names(&store), [".model.gguf.verified", "model.gguf"]);
}

#[tokio::test]
async fn a_file_of_another_content_does_not_count_and_leaves_nothing() {
    let (_directory, store) = store();
    let mut partial = store.partial().unwrap();
    partial.write(b"waits").unwrap();
    let result = partial.commit("model.gguf", Some(&checksum(b"weights")));
    assert!(matches!(result, Err(SourceError::Checksum { .. })));
    assert!(names(&store).is_empty());
    let mut partial = store.partial().unwrap();
    partial.write(b"abandoned").unwrap();
    drop(partial);
    drop(store.partial_directory().unwrap());
    assert!(names(&store).is_empty());
}

#[tokio::test]
async fn a_file_is_read_again_only_when_it_was_touched() {
    let (_directory, store) = store();
    let expected = checksum(b"weights");
    let mut partial = store.partial().unwrap();
    partial.write(b"weights").unwrap();
    partial.commit("f", Some(&expected)).unwrap();
    let path = store.path("f");
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();

    // Another content under the same size and time is not noticed: it shows that the file was not read.
    std::fs::write(&path, b"WEIGHTS").unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(store.check("f", &expected).await.unwrap(), Presence::Verified);

    let touched = modified + Duration::from_secs(1);
    File::options().write(true).open(&path).unwrap().set_modified(touched).unwrap();
    assert_eq!(store.check("f", &expected).await.unwrap(), Presence::Different(checksum(b"WEIGHTS")));

    std::fs::write(&path, b"weights, longer").unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(touched).unwrap();
    assert_eq!(store.check("f", &expected).await.unwrap(), Presence::Different(checksum(b"weights, longer")));
}

#[tokio::test]
async fn a_file_from_elsewhere_is_verified_and_remembered() {
    let (_directory, store) = store();
    std::fs::write(store.path("f"), b"weights").unwrap();
    std::fs::write(store.record_path("f"), b"no record").unwrap();
    assert_eq!(store.check("f", &checksum(b"weights")).await.unwrap(), Presence::Verified);
    assert_eq!(store.record("f").unwrap().checksum, checksum(b"weights"));
}

#[tokio::test]
async fn the_lock_is_exclusive_and_its_holder_clears_leftovers() {
    let (_directory, store) = store();
    std::fs::write(store.path(".partial-of-a-killed-process"), b"half").unwrap();
    std::fs::create_dir_all(store.path(".partial-directory/inner")).unwrap();
    let held = store.lock().await.unwrap();
    assert_eq!(names(&store), [".lock"]);
    // Another handle stands for another process: locks belong to the open file.
    let other = Store::new(store.directory().to_owned());
    let second = tokio::spawn(async move { other.lock().await.map(drop) });
    tokio::time::sleep(LOCK_POLL * 3).await;
    assert!(!second.is_finished(), "two hold the lock");
    drop(held);
    second.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_named() {
    let (directory, _) = store();
    std::fs::write(directory.path().join("file"), b"").unwrap();
    let error = Store::new(directory.path().join("file/below")).lock().await.map(drop).unwrap_err();
    assert!(matches!(&error, HubError::Directory { .. }) && error.to_string().contains("file/below"), "{error}");
}

#[test]
fn a_full_disk_is_told_from_other_errors() {
    let error = |kind: io::ErrorKind| SourceError::disk(kind.into(), 7);
    assert!(matches!(error(io::ErrorKind::StorageFull), SourceError::DiskFull { needed: 7 }));
    assert!(matches!(error(io::ErrorKind::QuotaExceeded), SourceError::DiskFull { needed: 7 }));
    assert!(matches!(error(io::ErrorKind::PermissionDenied), SourceError::Io(_)));
}
