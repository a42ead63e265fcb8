//! The secret that all nodes of a cluster share, and the keys derived from it.

use std::fmt;
use std::path::{Path, PathBuf};

use ring::hkdf;

/// Shorter secrets are refused.
const MIN_BYTES: usize = 32;
/// Longer files are refused.
const MAX_BYTES: usize = 64 << 10;

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
}

/// Derives an independent key for each purpose (HKDF-SHA256, RFC 5869).
#[derive(Clone)]
pub struct ClusterKey(hkdf::Prk);

impl ClusterKey {
    pub fn from_file(path: &Path) -> Result<Self, ClusterKeyError> {
        let secret =
            std::fs::read(path).map_err(|source| ClusterKeyError::Unreadable { path: path.to_owned(), source })?;
        Self::from_secret(&secret)
    }

    pub fn from_secret(secret: &[u8]) -> Result<Self, ClusterKeyError> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&secret.len()) {
            return Err(ClusterKeyError::Length { bytes: secret.len() });
        }
        Ok(Self(hkdf::Salt::new(hkdf::HKDF_SHA256, b"outrigger cluster key v1").extract(secret)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn purposes_and_secrets_have_keys_of_their_own() {
        let key = |secret: u8| ClusterKey::from_secret(&[secret; 32]).expect("long enough");
        assert_eq!(key(1).derive("gossip"), key(1).derive("gossip"));
        assert_ne!(key(1).derive("gossip"), key(1).derive("peer"));
        assert_ne!(key(1).derive("gossip"), key(2).derive("gossip"));
        assert!(matches!(ClusterKey::from_secret(&[0; 31]), Err(ClusterKeyError::Length { bytes: 31 })));
        assert!(!format!("{:?}", key(1)).contains('1'));
    }
}
