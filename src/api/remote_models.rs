//! Models that only peers serve. To accept a request for one, this node needs the model's tokenizer, and fetches it from a peer
//! once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::model::ServedModel;
use crate::cluster::{ModelReport, Peer};
use crate::router::Router;
use crate::tokenizer::{TokenizerBundle, bundle};
use crate::types::{Failure, FailureKind};

/// Tokenizers that are cached. When one more is needed, the cache is cleared.
const MAX_KEPT: usize = 8;
/// Model names that are remembered.
const MAX_SEEN: usize = 1024;

#[derive(Default)]
pub struct RemoteModels {
    /// Cached tokenizers, by fingerprint and tokenizer digest.
    kept: Mutex<BTreeMap<(String, String), Arc<ServedModel>>>,
    /// Names that a peer has served. If no peer serves one now, the model is unavailable rather than unknown.
    seen: Mutex<BTreeSet<String>>,
    /// Held while a tokenizer is fetched: one at a time.
    fetching: tokio::sync::Mutex<()>,
}

impl RemoteModels {
    /// The model with this name, if a peer serves it. Ready peers are tried first.
    pub async fn find(&self, router: &Router, name: &str) -> Result<Option<Arc<ServedModel>>, Failure> {
        let mut served = router.peer_models();
        self.remember(&served);
        served.retain(|(_, model)| model.has_name(name));
        served.sort_by_key(|(peer, _)| !peer.report.ready);
        let Some((_, report)) = served.first() else { return Ok(None) };
        if let Some(model) = self.kept(report) {
            return Ok(Some(model));
        }
        let _turn = self.fetching.lock().await;
        let mut last = Failure::new(FailureKind::PeerUnreachable, "No node that serves the model can be reached.");
        for (peer, report) in &served {
            if let Some(model) = self.kept(report) {
                return Ok(Some(model));
            }
            match router.fetch_tokenizer(peer, &report.tokenizer).await {
                Ok(bytes) if bundle::digest(&bytes) == report.tokenizer => {
                    let model = Arc::new(open(report.clone(), bytes.into()).await?);
                    self.keep(report, model.clone());
                    return Ok(Some(model));
                }
                Ok(_) => {
                    tracing::warn!(peer = %peer.id, "a peer sent a tokenizer that differs from the one it reports")
                }
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// Whether a peer has served a model with this name before.
    pub fn knew(&self, name: &str) -> bool {
        self.seen.lock().contains(name)
    }

    fn remember(&self, served: &[(Arc<Peer>, ModelReport)]) {
        let mut seen = self.seen.lock();
        for name in served.iter().flat_map(|(_, model)| &model.names) {
            if seen.len() < MAX_SEEN && !seen.contains(name) {
                seen.insert(name.clone());
            }
        }
    }

    fn kept(&self, report: &ModelReport) -> Option<Arc<ServedModel>> {
        self.kept.lock().get(&key(report)).filter(|model| model.names() == report.names).cloned()
    }

    fn keep(&self, report: &ModelReport, model: Arc<ServedModel>) {
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(key(report), model);
    }
}

fn key(report: &ModelReport) -> (String, String) {
    (report.fingerprint.as_str().to_owned(), report.tokenizer.clone())
}

async fn open(report: ModelReport, bytes: Vec<u8>) -> Result<ServedModel, Failure> {
    let unusable = |message: &str| Failure::new(FailureKind::Internal, message);
    let open = move || {
        let bundle = TokenizerBundle::decode(&bytes).map_err(|error| unusable(DAMAGED).with_source(error))?;
        let tokenizer = bundle.build().map_err(|error| unusable(DAMAGED).with_source(error))?;
        let template = tokenizer.chat_template().map_err(|error| unusable(DAMAGED).with_source(error))?;
        // Analyses the template now, so that the first request does not pay for it.
        let _ = (template.traits(false), template.traits(true));
        let model = ServedModel::new(&report, tokenizer, template, bundle.eos_token_ids().to_vec());
        Ok(model.with_sampling_defaults(bundle.sampling_defaults().clone()))
    };
    tokio::task::spawn_blocking(open).await.map_err(|_| unusable("Cannot open a peer's tokenizer."))?
}

const DAMAGED: &str = "The model's tokenizer cannot be used on this node.";
