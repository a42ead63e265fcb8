//! Identifiers.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// An index into the vocabulary of the served model. An alias rather than a newtype: slices of it cross into the
/// kernels, which know nothing of this crate.
pub type TokenId = u32;

/// The public id of a request (`chatcmpl-…`, `cmpl-…`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(Arc<str>);

impl RequestId {
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Identifies everything that decides the numbers: weights, configuration, compute and KV types, kernel version. Streams
/// move only between replicas with equal fingerprints. Lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fingerprint(Arc<str>);

impl Fingerprint {
    pub fn new(hex: impl Into<Arc<str>>) -> Self {
        Self(hex.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a node of the cluster, for as long as its process lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(Arc<str>);

impl NodeId {
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a request comes from, to keep clients apart: `organization/user`, or a digest from which the API key cannot be derived.
/// Empty where the server asks for no keys, and everybody is one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(Arc<str>);

impl Tenant {
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it stands for somebody in particular.
    pub fn is_known(&self) -> bool {
        !self.0.is_empty()
    }
}

impl fmt::Display for Tenant {
    /// For logs: a digest is cut, so that nobody can try keys on it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        match (self.0.contains('/'), self.0.get(..SHOWN)) {
            (false, Some(beginning)) => write!(f, "key-{beginning}"),
            _ => f.write_str(&self.0),
        }
    }
}

/// Identifies a stream in the whole cluster: a digest of tenant, key and prompt index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JournalKey([u8; 16]);

impl JournalKey {
    /// `part` is the index of the prompt in its request.
    pub fn new(tenant: &Tenant, key: &str, part: usize) -> Self {
        let mut digest = Sha256::new();
        for piece in [tenant.as_str().as_bytes(), key.as_bytes(), &(part as u64).to_le_bytes()] {
            digest.update((piece.len() as u64).to_le_bytes());
            digest.update(piece);
        }
        let digest = digest.finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for JournalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
