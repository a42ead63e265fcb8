//! What every handler shares.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use tokio::sync::Semaphore;

use super::auth::{ApiKeyError, ApiKeys};
use super::config::Config;
use super::error::ApiError;
use super::model::{DEFAULT_ALIAS, ServedModel};
use super::openai::deadline;
use super::remote_models::RemoteModels;
use crate::admission::AdmissionController;
use crate::health::Health;
use crate::observability::Metrics;
use crate::router::{Hold, Router};
use crate::types::{Failure, FailureKind, NodeState};

/// Long texts that are tokenised at once, beside the engine.
const TOKENIZE_WORKERS: usize = 2;
/// When a client may ask again that came while nobody could serve it.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<Shared>);

pub struct Shared {
    pub config: Config,
    pub keys: ApiKeys,
    pub metrics: Arc<Metrics>,
    pub admission: AdmissionController,
    pub health: Health,
    pub router: Router,
    remote: RemoteModels,
    model: OnceLock<Arc<ServedModel>>,
    /// Of the model that this node will serve.
    expected_name: OnceLock<String>,
    tokenize_workers: Arc<Semaphore>,
}

impl Deref for ApiState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl ApiState {
    /// The API as it is while the model loads: health answers, generation is refused.
    pub fn new(
        config: Config,
        metrics: Arc<Metrics>,
        admission: AdmissionController,
        health: Health,
        router: Router,
    ) -> Result<Self, ApiKeyError> {
        let keys = ApiKeys::new(&config.api_keys)?;
        let tokenize_workers = Arc::new(Semaphore::new(TOKENIZE_WORKERS));
        let model = OnceLock::new();
        let remote = RemoteModels::default();
        let expected_name = OnceLock::new();
        let shared =
            Shared { config, keys, metrics, admission, health, router, remote, model, expected_name, tokenize_workers };
        Ok(Self(Arc::new(shared)))
    }

    /// Says which model will be served, so that requests for it find peers while it loads here.
    pub fn expect_model(&self, name: String) {
        // The first one counts.
        let _ = self.expected_name.set(name);
    }

    /// From now on this model is served. Only the first call counts; a node serves one model for its life.
    pub fn set_model(&self, model: ServedModel) {
        let first = self.model.set(Arc::new(model)).is_ok();
        assert!(first, "a node serves one model");
    }

    /// The model once it is loaded, whatever the node's state.
    pub fn model(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// The model that a request names, if this node or another may serve it now. While this node starts, the request waits
    /// for one.
    pub async fn serving_model(&self, hold: &mut Hold, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        loop {
            match self.find_model(name).await {
                Err(_) if hold.waits().await => {}
                found => {
                    hold.succeeded();
                    return found;
                }
            }
        }
    }

    async fn find_model(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let is_own = |model: &&Arc<ServedModel>| name.is_none_or(|name| name == DEFAULT_ALIAS || model.has_name(name));
        let own = self.model().filter(is_own);
        if let Some(own) = own
            && (self.router.can_serve_here() || self.router.serves_elsewhere(own.name(), &own.tokenizer_digest))
        {
            return Ok(own.clone());
        }
        let name = name.filter(|name| *name != DEFAULT_ALIAS);
        if let Some(name) = name.or_else(|| self.expected_name.get().map(String::as_str))
            && let Some(remote) = self.remote.find(&self.router, name).await?
        {
            return Ok(remote);
        }
        match name {
            Some(name) if self.remote.knew(name) => Err(ApiError::unavailable(
                "No node that serves the model can be reached now.",
                "no_replica",
                Some(RETRY_AFTER),
            )),
            Some(name) if self.model().is_some_and(|model| !model.has_name(name)) => {
                Err(ApiError::model_not_found(name))
            }
            _ => Err(self.unavailable()),
        }
    }

    /// The node will not be here for long.
    pub fn is_ending(&self) -> bool {
        match self.health.lifecycle().state() {
            NodeState::Starting | NodeState::Warming | NodeState::Ready | NodeState::Degraded => false,
            NodeState::Draining | NodeState::Stopped | NodeState::Failed => true,
        }
    }

    /// Refuses before a body is read, when nobody could serve it; at once, unless this node starts. The request may wait no
    /// longer than the given hold allows.
    pub async fn check_serving(&self, headers: &HeaderMap) -> Result<Hold, ApiError> {
        // One that is wrong is told so later.
        let deadline = deadline(headers, Instant::now()).unwrap_or_default();
        let mut hold = self.router.hold(deadline);
        while !self.router.can_serve() {
            if !hold.waits().await {
                hold.check_deadline()?;
                return Err(self.unavailable());
            }
        }
        hold.succeeded();
        Ok(hold)
    }

    fn unavailable(&self) -> ApiError {
        let failure = self.router.unavailable();
        ApiError::unavailable(failure.message, failure.code.unwrap_or("no_replica"), failure.retry_after)
    }

    /// Runs work here, or on a blocking thread when it is long; then only a few at once.
    pub async fn off_thread_if<T, F>(&self, long: bool, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, Failure> + Send + 'static,
    {
        if !long {
            return work();
        }
        let _permit = self.tokenize_workers.acquire().await.map_err(|_| worker_failed())?;
        tokio::task::spawn_blocking(work).await.map_err(|_| worker_failed())?
    }
}

/// The blocking work panicked: the request is answered, the node goes on.
fn worker_failed() -> Failure {
    Failure::new(FailureKind::Internal, "The prompt could not be processed.")
}
