//! The fields that all chunks of a response share.

use std::sync::Arc;

use serde::Serialize;

use crate::api::model::ServedModel;
use crate::router::StreamFingerprint;
use crate::types::{Fingerprint, RequestId};

/// These fields for one response.
pub struct Head {
    pub id: RequestId,
    /// Seconds since the epoch.
    pub created: u64,
    pub model: Arc<ServedModel>,
    /// The fingerprint of the replica that computes the first prompt.
    pub fingerprint: StreamFingerprint,
}

/// The serialized form, flattened into each response object.
#[derive(Serialize)]
pub struct HeadFields<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: Fingerprint,
}

impl Head {
    pub fn of(&self, object: &'static str) -> HeadFields<'_> {
        HeadFields {
            id: self.id.as_str(),
            object,
            created: self.created,
            model: self.model.name(),
            system_fingerprint: self.fingerprint.get(),
        }
    }
}
