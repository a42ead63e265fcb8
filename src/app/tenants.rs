//! Who may use this node: reads the tenants file, and watches it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::health::Health;
use crate::observability::Metrics;
use crate::tenancy::reload::TenantsReload;
use crate::tenancy::{Directory, Tenants, TenantsError, TenantsFile};
use crate::types::NodeId;
use crate::types::tasks::spawn_background;

/// How long a change of the file may take to reach all nodes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Finds the peers that know other tenants than this node.
#[derive(Default)]
pub struct Comparison {
    /// Since when each of them differs.
    since: BTreeMap<NodeId, Instant>,
}

impl Comparison {
    /// The peers that have differed for long, and how, given the digests of the tenants files.
    pub fn found(
        &mut self,
        own: Option<u64>,
        peers: &BTreeMap<NodeId, Option<u64>>,
        now: Instant,
    ) -> Vec<(String, String)> {
        self.since.retain(|id, _| peers.get(id).is_some_and(|tenants| *tenants != own));
        let others = peers.iter().filter(|(_, tenants)| **tenants != own);
        let late = others.filter(|(id, _)| now - *self.since.entry((*id).clone()).or_insert(now) >= PATIENCE);
        let detail = |tenants: Option<u64>| match (tenants, own) {
            (None, _) => "it has no tenants file",
            (Some(_), None) => "it has a tenants file, and this node has none",
            (Some(_), Some(_)) => "its tenants file is another one",
        };
        late.map(|(id, tenants)| (id.to_string(), detail(*tenants).to_owned())).collect()
    }
}

pub fn read(config: &api::Config) -> anyhow::Result<Tenants> {
    let file = config.tenants_file.as_deref().map(TenantsFile::read).transpose()?;
    Ok(Tenants::new(Directory::new(&config.api_keys, file.as_ref())?))
}

/// Reads the file again when it changes, and on SIGHUP, which without a file ends the process as usual.
pub fn watch(config: &api::Config, tenants: &Tenants, health: &Health, metrics: &Arc<Metrics>) -> anyhow::Result<()> {
    let Some(file) = config.tenants_file.clone() else { return Ok(()) };
    let mut hangups = signal(SignalKind::hangup()).context("SIGHUP cannot be caught")?;
    let asked = Arc::<Notify>::default();
    let asks = asked.clone();
    spawn_background(async move {
        while hangups.recv().await.is_some() {
            tracing::info!("SIGHUP: reading the tenants file");
            asks.notify_one();
        }
    });
    let metrics = metrics.clone();
    let report = move |error: Option<&TenantsError>| _ = metrics.tenants_file_refused.set(error.is_some().into());
    let reload = TenantsReload { file, api_keys: config.api_keys.clone(), tenants: tenants.clone() };
    health.supervise("reads the tenants file again", reload.run(asked, report, CancellationToken::new()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_that_differ_for_long_are_found() {
        let (mut comparison, start) = (Comparison::default(), Instant::now());
        let mut found = |own: Option<u64>, peers: &[(&str, Option<u64>)], seconds: u64| {
            let peers = peers.iter().map(|(id, tenants)| (NodeId::new(*id), *tenants)).collect();
            comparison.found(own, &peers, start + Duration::from_secs(seconds))
        };
        let mixed = [("a", Some(1)), ("b", Some(2)), ("c", None)];
        assert_eq!(found(Some(1), &mixed, 0), []);
        assert_eq!(found(Some(1), &mixed, 9), []);
        let told = |id: &str, detail: &str| (id.to_owned(), detail.to_owned());
        let (other, none) = ("its tenants file is another one", "it has no tenants file");
        assert_eq!(found(Some(1), &mixed, 10), [told("b", other), told("c", none)]);
        assert_eq!(found(Some(1), &[("b", Some(1)), ("c", None)], 11), [told("c", none)], "a and b follow");
        assert_eq!(found(Some(1), &mixed, 12), [told("c", none)], "b has just changed");
        let has_one = "it has a tenants file, and this node has none";
        assert_eq!(found(None, &mixed, 13), [], "this node has just changed");
        assert_eq!(found(None, &mixed, 23), [told("a", has_one), told("b", has_one)]);
    }
}
