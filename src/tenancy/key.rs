//! API keys: kept as SHA-256 digests.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use sha2::{Digest, Sha256};

const DIGEST_PREFIX: &str = "sha256:";
/// Marks a key as ours, so that scanners for leaked secrets can recognize it.
const KEY_PREFIX: &str = "sk-outrigger-";
const KEY_BYTES: usize = 32;

/// What is kept of a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyDigest([u8; 32]);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeyError {
    #[error("api_keys: key {index} is empty")]
    Empty { index: usize },
    #[error("api_keys: key {index} starts with `sha256:` and is not followed by 64 hexadecimal digits")]
    Digest { index: usize },
}

/// A key that was just made. It is shown once and kept nowhere.
pub struct NewKey {
    pub key: String,
    pub digest: KeyDigest,
}

impl KeyDigest {
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Reads 64 hexadecimal digits.
    pub fn parse(hex: &str) -> Option<Self> {
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16);
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Some(Self(digest))
    }

    /// The first half, which keeps the holders of different keys apart.
    pub fn first_half(&self) -> String {
        self.to_string()[..32].to_owned()
    }
}

impl fmt::Display for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl NewKey {
    /// A random key of 256 bits; `None` if the operating system gives no random numbers.
    pub fn random() -> Option<Self> {
        let mut secret = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut secret).ok()?;
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let key = format!("{KEY_PREFIX}{hex}");
        let digest = KeyDigest::of(&key);
        Some(Self { key, digest })
    }
}

/// Whether a configured key is given as a digest.
pub fn is_digest(key: &str) -> bool {
    key.starts_with(DIGEST_PREFIX)
}

/// Takes plain keys, and digests as `sha256:` with 64 hexadecimal digits.
pub fn check_keys(keys: &[String]) -> Result<Vec<KeyDigest>, ApiKeyError> {
    let digest = |(index, key): (usize, &String)| match key.strip_prefix(DIGEST_PREFIX) {
        Some(hex) => KeyDigest::parse(hex).ok_or(ApiKeyError::Digest { index }),
        None if key.is_empty() => Err(ApiKeyError::Empty { index }),
        None => Ok(KeyDigest::of(key)),
    };
    keys.iter().enumerate().map(digest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_keys_are_refused() {
        assert_eq!(check_keys(&["a".into(), String::new()]), Err(ApiKeyError::Empty { index: 1 }));
        assert_eq!(check_keys(&["sha256:xyz".into()]), Err(ApiKeyError::Digest { index: 0 }));
        assert_eq!(check_keys(&[format!("sha256:{}", "g".repeat(64))]), Err(ApiKeyError::Digest { index: 0 }));
        assert_eq!(KeyDigest::parse(&"é".repeat(32)), None);
    }

    #[test]
    fn digests_are_read_as_they_are_written() {
        let digest = KeyDigest::of("second");
        assert_eq!(digest.to_string(), "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4");
        assert_eq!(KeyDigest::parse(&digest.to_string()), Some(digest));
        assert_eq!(KeyDigest::parse(&digest.to_string().to_uppercase()), Some(digest));
    }

    #[test]
    fn new_keys_differ_and_can_be_sent_in_a_header() {
        let keys: Vec<NewKey> = (0..8).filter_map(|_| NewKey::random()).collect();
        assert_eq!(keys.len(), 8);
        for (index, new) in keys.iter().enumerate() {
            assert_eq!(new.key.len(), KEY_PREFIX.len() + 64);
            assert_eq!(KeyDigest::of(&new.key), new.digest);
            assert!(new.key.bytes().all(|byte| byte.is_ascii_graphic()));
            assert!(keys[..index].iter().all(|other| other.key != new.key));
        }
    }
}
