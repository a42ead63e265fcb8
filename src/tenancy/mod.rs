//! Who may use this deployment: organizations, their users, and the API keys of these.
//!
//! The keys of `api_keys` and of the tenants file are together in one [`Directory`]. It is never changed but replaced as a whole
//! when the file changes, so that a request sees one version of it. Knows keys only as digests, and nothing of HTTP.

mod directory;
mod file;
mod key;
pub mod reload;

pub use directory::{Caller, Directory, Tenants};
pub use file::{TenantsError, TenantsFile};
pub use key::{ApiKeyError, KeyDigest, NewKey, check_keys, is_digest};
