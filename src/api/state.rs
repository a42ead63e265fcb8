//! What every handler shares.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::auth::{ApiKeyError, ApiKeys};
use super::config::Config;
use super::error::ApiError;
use super::model::ServedModel;
use crate::admission::AdmissionController;
use crate::health::{Health, QueueView};
use crate::observability::Metrics;
use crate::types::{Failure, FailureKind, NodeState};

/// Long texts that are tokenised at once, beside the engine.
const TOKENIZE_WORKERS: usize = 2;
/// When a client may ask again that came while the model was loading.
const LOADING_RETRY_AFTER: Duration = Duration::from_secs(2);

/// Cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<Shared>);

pub struct Shared {
    pub config: Config,
    pub keys: ApiKeys,
    pub metrics: Arc<Metrics>,
    pub admission: AdmissionController,
    pub health: Health,
    model: OnceLock<Arc<ServedModel>>,
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
    ) -> Result<Self, ApiKeyError> {
        let keys = ApiKeys::new(&config.api_keys)?;
        let tokenize_workers = Arc::new(Semaphore::new(TOKENIZE_WORKERS));
        let model = OnceLock::new();
        Ok(Self(Arc::new(Shared { config, keys, metrics, admission, health, model, tokenize_workers })))
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

    /// The model, if the node may serve a request with it now.
    pub fn serving_model(&self) -> Result<Arc<ServedModel>, ApiError> {
        let loading = || {
            ApiError::unavailable(
                "The model is still loading. See /startupz.",
                "model_loading",
                Some(LOADING_RETRY_AFTER),
            )
        };
        match self.health.lifecycle().state() {
            NodeState::Ready | NodeState::Degraded => self.model().cloned().ok_or_else(loading),
            NodeState::Starting | NodeState::Warming => Err(loading()),
            NodeState::Draining | NodeState::Stopped => {
                Err(ApiError::unavailable("The server is shutting down.", "shutting_down", None))
            }
            NodeState::Failed => {
                Err(ApiError::unavailable("The engine has failed. See /livez.", "engine_failed", None))
            }
        }
    }

    /// The queue as the readiness verdict looks at it. A single node has no peer that could take its traffic.
    pub fn queue(&self) -> QueueView {
        QueueView { saturation: self.admission.status().saturation, other_ready_peer_below_mark: false }
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
