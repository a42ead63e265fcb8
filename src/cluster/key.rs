//! The secrets that all nodes of a cluster share, and the keys derived from them.
//!
//! A key file has one of two formats:
//!
//! * a single secret: the whole file, whatever its bytes, including a newline at its end;
//! * a list: the first line is [`LIST_HEAD`], and every other line is one secret in base64. Blank lines and lines that begin
//!   with `#` are skipped. The first secret encrypts, all of them decrypt. A file of random bytes does not begin with that
//!   line.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hkdf;

/// The first line of a file that lists several secrets.
pub const LIST_HEAD: &str = "outrigger-cluster-keys";
/// Shorter secrets are refused.
const MIN_BYTES: usize = 32;
/// Longer files are refused.
const MAX_BYTES: usize = 64 << 10;
/// Maximum number of secrets. Two are enough to change the key; each further one makes it more expensive to reject datagrams
/// from strangers.
const MAX_KEYS: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum ClusterKeyError {
    #[error("cluster_key_file: {path} cannot be read")]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cluster_key_file: the secret has {bytes} bytes; it must have from {MIN_BYTES} to {MAX_BYTES}")]
    Length { bytes: usize },
    #[error("cluster_key_file: the file is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("cluster_key_file: line {line} is not base64")]
    NotBase64 { line: usize },
    #[error(
        "cluster_key_file: line {line} looks like hexadecimal digits, and lines are base64: write the output of `base64 -w0 \
         FILE`, where FILE is the key file that the nodes have now"
    )]
    Hexadecimal { line: usize },
    #[error("cluster_key_file: the secret in line {line} has {bytes} bytes; it must have {MIN_BYTES} or more")]
    Short { line: usize, bytes: usize },
    #[error("cluster_key_file: line {line} repeats an earlier secret")]
    Repeated { line: usize },
    #[error("cluster_key_file: the list must have from 1 to {MAX_KEYS} secrets; it has {found}")]
    Count { found: usize },
}

/// Identifies a secret without revealing anything about it. The same on every node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 4]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Derives an independent key for each purpose (HKDF-SHA256, RFC 5869).
#[derive(Clone)]
pub struct ClusterKey(hkdf::Prk);

impl ClusterKey {
    pub fn from_secret(secret: &[u8]) -> Result<Self, ClusterKeyError> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&secret.len()) {
            return Err(ClusterKeyError::Length { bytes: secret.len() });
        }
        Ok(Self(hkdf::Salt::new(hkdf::HKDF_SHA256, b"outrigger cluster key v1").extract(secret)))
    }

    pub fn id(&self) -> KeyId {
        let [a, b, c, d, ..] = self.derive("key id");
        KeyId([a, b, c, d])
    }

    /// 32 bytes for one purpose, the same on every node.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        let mut key = [0; 32];
        let info = [purpose.as_bytes()];
        let expanded = self.0.expand(&info, hkdf::HKDF_SHA256).expect("32 bytes are within HKDF's limit");
        expanded.fill(&mut key).expect("the length is the hash's own");
        key
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(<redacted>)")
    }
}

/// The keys of a cluster: the first encrypts, all of them decrypt. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KeyRing(Arc<[ClusterKey]>);

impl From<ClusterKey> for KeyRing {
    fn from(key: ClusterKey) -> Self {
        Self(Arc::new([key]))
    }
}

impl KeyRing {
    pub fn from_file(path: &Path) -> Result<Self, ClusterKeyError> {
        let unreadable = |source| ClusterKeyError::Unreadable { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        // Limits the read, since the file may be a device without an end.
        file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        Self::parse(&bytes)
    }

    /// Parses the contents of a key file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ClusterKeyError> {
        if bytes.len() > MAX_BYTES {
            return Err(ClusterKeyError::TooLong);
        }
        match list_of(bytes) {
            Some(list) => Self::parse_list(list),
            None => Ok(ClusterKey::from_secret(bytes)?.into()),
        }
    }

    fn parse_list(list: &[u8]) -> Result<Self, ClusterKeyError> {
        let mut keys: Vec<ClusterKey> = Vec::new();
        for (index, line) in list.split(|byte| *byte == b'\n').enumerate() {
            let (number, text) = (index + 2, line.trim_ascii());
            if text.is_empty() || text.starts_with(b"#") {
                continue;
            }
            if text.len() >= 2 * MIN_BYTES && text.iter().all(u8::is_ascii_hexdigit) {
                return Err(ClusterKeyError::Hexadecimal { line: number });
            }
            let secret = STANDARD.decode(text).map_err(|_| ClusterKeyError::NotBase64 { line: number })?;
            if secret.len() < MIN_BYTES {
                return Err(ClusterKeyError::Short { line: number, bytes: secret.len() });
            }
            let key = ClusterKey::from_secret(&secret)?;
            if keys.iter().any(|known| known.id() == key.id()) {
                return Err(ClusterKeyError::Repeated { line: number });
            }
            keys.push(key);
        }
        if !(1..=MAX_KEYS).contains(&keys.len()) {
            return Err(ClusterKeyError::Count { found: keys.len() });
        }
        Ok(Self(keys.into()))
    }

    /// The key used for encryption.
    pub fn first(&self) -> &ClusterKey {
        &self.0[0]
    }

    pub fn iter(&self) -> impl Iterator<Item = &ClusterKey> {
        self.0.iter()
    }

    /// The ids of all keys, in order.
    pub fn ids(&self) -> Vec<KeyId> {
        self.0.iter().map(ClusterKey::id).collect()
    }

    /// Whether nodes with these keys and nodes with `other` can communicate in both directions.
    pub fn is_heard_by(&self, other: &KeyRing) -> bool {
        let (ours, theirs) = (self.ids(), other.ids());
        theirs.contains(&ours[0]) && ours.contains(&theirs[0])
    }
}

/// The text after the head of a list, if the file is a list.
fn list_of(bytes: &[u8]) -> Option<&[u8]> {
    let (head, list) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    (head.trim_ascii() == LIST_HEAD.as_bytes()).then_some(list.strip_prefix(b"\n").unwrap_or(list))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(secret: u8) -> ClusterKey {
        ClusterKey::from_secret(&[secret; 32]).expect("long enough")
    }

    fn list(lines: &[&str]) -> Result<KeyRing, ClusterKeyError> {
        KeyRing::parse(format!("{LIST_HEAD}\n{}", lines.join("\n")).as_bytes())
    }

    fn line(secret: u8) -> String {
        STANDARD.encode([secret; 32])
    }

    #[test]
    fn purposes_and_secrets_have_keys_of_their_own() {
        assert_eq!(key(1).derive("gossip"), key(1).derive("gossip"));
        assert_ne!(key(1).derive("gossip"), key(1).derive("peer"));
        assert_ne!(key(1).derive("gossip"), key(2).derive("gossip"));
        assert!(matches!(ClusterKey::from_secret(&[0; 31]), Err(ClusterKeyError::Length { bytes: 31 })));
        assert!(!format!("{:?}", KeyRing::from(key(1))).contains('1'));
        assert_ne!(key(1).id(), key(2).id());
    }

    #[test]
    fn a_list_has_its_keys_in_order_and_the_same_keys_as_single_files() {
        let ring = list(&["# the new one", &line(2), "", &format!("  {}\r", line(1))]).expect("a list");
        assert_eq!(ring.ids(), [key(2).id(), key(1).id()]);
        // As an operator would convert an old file: every byte counts, including its newline.
        let old = b"an old secret that somebody has typed\n";
        let single = KeyRing::parse(old).expect("long enough");
        assert_eq!(list(&[&STANDARD.encode(old)]).expect("a list").ids(), single.ids());
        let windows = format!("{LIST_HEAD}\r\n{}\r\n", line(1));
        assert_eq!(KeyRing::parse(windows.as_bytes()).expect("a list").ids(), [key(1).id()]);
    }

    #[test]
    fn what_is_wrong_with_a_list_is_named_with_its_line() {
        let error = |lines: &[&str]| list(lines).expect_err("refused").to_string();
        assert!(error(&[]).contains("it has 0"), "{}", error(&[]));
        assert!(error(&[&line(1), "not base64!"]).contains("line 3 is not base64"));
        assert!(error(&[&STANDARD.encode([1; 31])]).contains("line 2 has 31 bytes"));
        assert!(error(&[&line(1), "#", &line(1)]).contains("line 4 repeats"));
        assert!(error(&[&"0af1".repeat(16)]).contains("base64 -w0"));
        let five: Vec<String> = (0..5).map(line).collect();
        assert!(error(&five.iter().map(String::as_str).collect::<Vec<_>>()).contains("it has 5"));
        assert!(KeyRing::parse(&[0; MAX_BYTES + 1]).expect_err("long").to_string().contains("longer than"));
        let typo = format!("{LIST_HEAD}s\n{}", line(1));
        assert_eq!(KeyRing::parse(typo.as_bytes()).expect("a single secret").ids().len(), 1);
    }

    #[test]
    fn neighbouring_steps_of_a_change_hear_each_other_and_others_do_not() {
        let ring = |secrets: &[u8]| KeyRing(secrets.iter().map(|&secret| key(secret)).collect());
        let steps = [ring(&[1]), ring(&[1, 2]), ring(&[2, 1]), ring(&[2])];
        for (at, step) in steps.iter().enumerate() {
            for (other_at, other) in steps.iter().enumerate() {
                assert_eq!(step.is_heard_by(other), at.abs_diff(other_at) <= 1, "{at} {other_at}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = KeyRing::from_file(Path::new("/no/such/key")).expect_err("missing").to_string();
        assert!(error.contains("cluster_key_file") && error.contains("/no/such/key"), "{error}");
        let endless = KeyRing::from_file(Path::new("/dev/zero")).expect_err("endless").to_string();
        assert!(endless.contains("longer than"), "{endless}");
    }

    proptest! {
        /// Any other file is read as a single secret, as before lists were supported.
        #[test]
        fn a_file_without_the_head_is_one_secret(bytes in prop::collection::vec(any::<u8>(), 32..200)) {
            let ring = KeyRing::parse(&bytes).expect("long enough");
            prop_assert_eq!(ring.ids(), [ClusterKey::from_secret(&bytes).expect("long enough").id()]);
        }

        #[test]
        fn no_list_makes_it_panic(text in "[A-Za-z0-9+/=#\n\r ]{0,300}") {
            let _ = list(&[&text]);
        }
    }
}
