//! Who holds which key.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwap;

use super::file::TenantsFile;
use super::key::{ApiKeyError, KeyDigest, check_keys};
use crate::types::Tenant;

/// Where no key is asked for. All who are in no file are one organization.
static ANYBODY: LazyLock<Caller> =
    LazyLock::new(|| Caller { tenant: Tenant::default(), organization: "default".into(), is_operator: true });

/// Whom a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user; for a key of `api_keys`, the key. Keeps streams, idempotency keys and cached prompts apart.
    pub tenant: Tenant,
    pub organization: Arc<str>,
    /// May see the cluster: holds a key of `api_keys`, or no key is asked for.
    pub is_operator: bool,
}

impl Default for Caller {
    /// Anybody, where no key is asked for.
    fn default() -> Self {
        ANYBODY.clone()
    }
}

/// All keys, and their holders. If there are no keys and no file, everybody may come in.
#[derive(Debug, Default)]
pub struct Directory {
    /// Looked up by hash. The hash function has a secret of this process, so the time of a look-up tells nothing of the digests.
    holders: HashMap<KeyDigest, Caller>,
    asks_for_keys: bool,
    digest: Option<u64>,
}

impl Directory {
    pub fn new(api_keys: &[String], file: Option<&TenantsFile>) -> Result<Self, ApiKeyError> {
        let of_key =
            |digest: KeyDigest| (digest, Caller { tenant: Tenant::new(digest.first_half()), ..Caller::default() });
        let mut holders: HashMap<KeyDigest, Caller> = check_keys(api_keys)?.into_iter().map(of_key).collect();
        let asks_for_keys = file.is_some() || !holders.is_empty();
        for organization in file.iter().flat_map(|file| &file.organizations) {
            let id: Arc<str> = organization.id.as_str().into();
            for user in &organization.users {
                let tenant = Tenant::new(format!("{id}/{}", user.id));
                let caller = Caller { tenant, organization: id.clone(), is_operator: false };
                holders.extend(user.keys.iter().map(|digest| (*digest, caller.clone())));
            }
        }
        Ok(Self { holders, asks_for_keys, digest: file.map(TenantsFile::digest) })
    }

    /// Whether a request needs a key.
    pub fn asks_for_keys(&self) -> bool {
        self.asks_for_keys
    }

    /// Who holds this key.
    pub fn holder(&self, key: &str) -> Option<&Caller> {
        self.holders.get(&KeyDigest::of(key))
    }

    /// Tells nodes with different tenants files apart; none without a file.
    pub fn digest(&self) -> Option<u64> {
        self.digest
    }

    pub fn key_count(&self) -> usize {
        self.holders.len()
    }

    /// The number of keys that are not in `next`.
    pub(super) fn missing_in(&self, next: &Self) -> usize {
        self.holders.keys().filter(|digest| !next.holders.contains_key(digest)).count()
    }
}

/// The directory in use. Cheap to clone; all clones change together.
#[derive(Clone)]
pub struct Tenants(Arc<ArcSwap<Directory>>);

impl Tenants {
    pub fn new(directory: Directory) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(directory)))
    }

    /// Only the keys of `api_keys`.
    pub fn of_keys(api_keys: &[String]) -> Result<Self, ApiKeyError> {
        Directory::new(api_keys, None).map(Self::new)
    }

    pub fn get(&self) -> Arc<Directory> {
        self.0.load_full()
    }

    pub(super) fn replace(&self, next: Directory) {
        self.0.store(Arc::new(next));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(api_keys: &[&str], file: Option<&str>) -> Directory {
        let keys: Vec<String> = api_keys.iter().map(ToString::to_string).collect();
        let file = file.map(|text| TenantsFile::parse(text).expect("a valid file"));
        Directory::new(&keys, file.as_ref()).expect("valid keys")
    }

    #[test]
    fn plain_and_hashed_keys_are_known_and_others_are_not() {
        let hashed = format!("sha256:{}", KeyDigest::of("second"));
        let known = directory(&["first", &hashed], None);
        let tenant = |key: &str| known.holder(key).map(|caller| caller.tenant.clone());
        assert!(tenant("first").is_some() && tenant("second").is_some() && tenant("first") != tenant("second"));
        for key in ["third", "", "firs", "first ", &hashed] {
            assert_eq!(tenant(key), None, "{key}");
        }
    }

    #[test]
    fn without_keys_and_without_a_file_nobody_is_asked() {
        assert!(!directory(&[], None).asks_for_keys());
        assert!(directory(&["k"], None).asks_for_keys());
        assert!(directory(&[], Some("")).asks_for_keys(), "an empty file lets nobody in");
    }

    #[test]
    fn a_user_is_one_tenant_with_all_keys_and_users_are_told_apart() {
        let key = |name: &str| format!("[[organization.user.key]]\nsha256 = \"{}\"\n", KeyDigest::of(name));
        let text = [
            "[[organization]]\nid = \"a\"\n[[organization.user]]\nid = \"u\"\n",
            &key("1"),
            &key("2"),
            "[[organization.user]]\nid = \"v\"\n",
            &key("3"),
            "[[organization]]\nid = \"b\"\n[[organization.user]]\nid = \"u\"\n",
            &key("4"),
        ];
        let known = directory(&["plain"], Some(&text.concat()));
        let caller = |key: &str| known.holder(key).expect("a known key").clone();
        assert_eq!(caller("1"), caller("2"));
        let tenants: std::collections::BTreeSet<_> = ["1", "3", "4", "plain"].map(|key| caller(key).tenant).into();
        assert_eq!(tenants.len(), 4);
        assert_eq!(
            ["1", "3", "4", "plain"].map(|key| caller(key).organization.to_string()),
            ["a", "a", "b", "default"]
        );
        assert_eq!(["1", "3", "4", "plain"].map(|key| caller(key).is_operator), [false, false, false, true]);
        assert_eq!(known.missing_in(&directory(&["plain"], None)), 4);
    }
}
