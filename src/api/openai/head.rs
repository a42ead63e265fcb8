//! What is the same in every chunk of a response, or in its one body.

use std::sync::Arc;

use serde::Serialize;

use crate::api::model::ServedModel;
use crate::router::StreamFingerprint;
use crate::types::{Fingerprint, RequestId};

/// Of one response.
pub struct Head {
    pub id: RequestId,
    /// Seconds since the epoch.
    pub created: u64,
    pub model: Arc<ServedModel>,
    /// Whose numbers the first prompt's choices have.
    pub fingerprint: StreamFingerprint,
}

/// As the client reads it; each format flattens it into its objects.
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
