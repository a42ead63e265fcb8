//! State that all handlers share.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::auth::check_operator;
use super::config::Config;
use super::error::ApiError;
use super::model::{DEFAULT_ALIAS, ServedModel};
use super::openai::deadline;
use super::remote_models::RemoteModels;
use crate::admission::AdmissionController;
use crate::health::Health;
use crate::observability::Metrics;
use crate::router::{Hold, Router};
use crate::tenancy::Tenants;
use crate::types::{Failure, FailureKind, NodeState};

/// Long texts that are tokenized at the same time, on threads other than the engine's.
const TOKENIZE_WORKERS: usize = 2;
/// When a client that nobody could serve should try again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<ApiParts>);

pub struct ApiParts {
    pub config: Config,
    pub tenants: Tenants,
    pub metrics: Arc<Metrics>,
    pub admission: AdmissionController,
    pub health: Health,
    pub router: Router,
    remote: RemoteModels,
    model: OnceLock<Arc<ServedModel>>,
    /// Name of the model that this node will serve.
    expected_name: OnceLock<String>,
    tokenize_workers: Arc<Semaphore>,
}

impl Deref for ApiState {
    type Target = ApiParts;

    fn deref(&self) -> &ApiParts {
        &self.0
    }
}

impl ApiState {
    /// The state while the model loads: health is answered, generation is refused.
    pub fn new(
        config: Config,
        tenants: Tenants,
        metrics: Arc<Metrics>,
        admission: AdmissionController,
        health: Health,
        router: Router,
    ) -> Self {
        let tokenize_workers = Arc::new(Semaphore::new(TOKENIZE_WORKERS));
        let model = OnceLock::new();
        let remote = RemoteModels::default();
        let expected_name = OnceLock::new();
        let shared = ApiParts {
            config,
            tenants,
            metrics,
            admission,
            health,
            router,
            remote,
            model,
            expected_name,
            tokenize_workers,
        };
        Self(Arc::new(shared))
    }

    /// Sets the name of the model that is loading, so that requests for it are forwarded to peers that serve it.
    pub fn expect_model(&self, name: String) {
        // Later calls have no effect.
        let _ = self.expected_name.set(name);
    }

    /// Starts serving this model. Only the first call has an effect; a node serves one model for its whole life.
    pub fn set_model(&self, model: ServedModel) {
        let first = self.model.set(Arc::new(model)).is_ok();
        assert!(first, "a node serves one model");
    }

    /// The model once it is loaded, whatever state the node is in.
    pub fn model(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// The model that a request names, if this node or a peer can serve it now. While this node starts, waits for one.
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
            Some(name) if self.remote.knew(name) => {
                let message = "No node that serves the model can be reached now.";
                let failure = Failure::unavailable("no_replica", message);
                Err(failure.with_retry_after(RETRY_AFTER).into())
            }
            Some(name) if self.model().is_some_and(|model| !model.has_name(name)) => {
                Err(ApiError::model_not_found(name))
            }
            _ => Err(self.router.unavailable().into()),
        }
    }

    /// Whether the node is draining or shutting down.
    pub fn is_ending(&self) -> bool {
        match self.health.lifecycle().state() {
            NodeState::Starting | NodeState::Warming | NodeState::Ready | NodeState::Degraded => false,
            NodeState::Draining | NodeState::Stopped | NodeState::Failed => true,
        }
    }

    /// Refuses a request that is not an operator's.
    pub fn check_operator(&self, headers: &HeaderMap) -> Result<(), Failure> {
        check_operator(&self.tenants.get(), headers)
    }

    /// Refuses a request before its body is read, if no node can serve it. While this node starts, the request waits for a
    /// node, up to the limit of the returned hold.
    pub async fn check_serving(&self, headers: &HeaderMap) -> Result<Hold, ApiError> {
        // An invalid deadline header is reported later, with the other fields.
        let deadline = deadline(headers, Instant::now()).unwrap_or_default();
        let mut hold = self.router.hold(deadline);
        while !self.router.can_serve() {
            if !hold.waits().await {
                hold.check_deadline()?;
                return Err(self.router.unavailable().into());
            }
        }
        hold.succeeded();
        Ok(hold)
    }

    /// Waits for its turn if the work will be long: only a few long ones run at once.
    pub async fn worker(&self, is_long: bool) -> Result<Worker<'_>, Failure> {
        if !is_long {
            return Ok(Worker(None));
        }
        Ok(Worker(Some(self.tokenize_workers.acquire().await.map_err(|_| worker_failed())?)))
    }
}

/// A turn to render or tokenize a prompt.
pub struct Worker<'a>(Option<SemaphorePermit<'a>>);

impl Worker<'_> {
    /// Does the work here, or on a blocking thread if it is long.
    pub async fn run<T, F>(self, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, Failure> + Send + 'static,
    {
        if self.0.is_none() {
            return work();
        }
        tokio::task::spawn_blocking(work).await.map_err(|_| worker_failed())?
    }
}

/// The blocking work panicked. The request fails; the node continues.
fn worker_failed() -> Failure {
    Failure::new(FailureKind::Internal, "The prompt could not be processed.")
}
