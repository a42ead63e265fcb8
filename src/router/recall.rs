//! Finds out what this node and others know about a stream that a client names by its key. If both sides of a partition have
//! used the key for different streams, the older one keeps it, on every node.
//!
//! The node that finds both streams tells those that hold the younger one. Clients reading the younger one get the rest of it;
//! later requests with its body are refused, as for any use of a key with a second body.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::timeout;

use super::dispatch::StreamName;
use super::failover::now;
use super::shared::RouterState;
use super::stream_log::StreamLog;
use crate::cluster::{JournalBatch, JournalEntry, JournalHead, JournalKey, JournalRecord, rendezvous};
use crate::types::{NodeId, tasks};

/// Number of peers asked for a journal, in the rendezvous order of the key.
const LOOKUPS: usize = 8;
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(250);

/// What is known about a stream.
pub(super) enum Recalled {
    Running(Arc<StreamLog>),
    Record(JournalRecord),
    Nothing,
}

impl RouterState {
    /// Asks this node and then others, in the rendezvous order of the key.
    pub(super) async fn recall(self: &Arc<Self>, name: &StreamName) -> Recalled {
        let running = self.streams.lock().get(&name.key).cloned();
        let own = self.kept(&name.key);
        if name.must_exist {
            // A node generated the key, so no other stream has it.
            if let Some(log) = running {
                return Recalled::Running(log);
            }
            if let Some(record) = own.clone().filter(JournalRecord::is_finished) {
                return Recalled::Record(record);
            }
        }
        let told = self.lookup(&name.key).await;
        let here = running.iter().map(|log| log.record(&self.own)).chain(own);
        let all: Vec<JournalRecord> = told.iter().map(|(_, record)| record.clone()).chain(here).collect();
        let Some((record, has_rivals)) = oldest(&all) else { return Recalled::Nothing };
        if has_rivals {
            self.settle(&record, &told);
        }
        match running.filter(|log| log.head.body == record.head.body) {
            Some(log) => Recalled::Running(log),
            None => Recalled::Record(record),
        }
    }

    /// What other nodes know about a stream.
    async fn lookup(&self, key: &JournalKey) -> Vec<(NodeId, JournalRecord)> {
        let view = self.view.borrow().clone();
        let ranked = rendezvous::rank(key, view.peers.keys());
        let lookups = ranked.into_iter().take(LOOKUPS).map(|node| {
            let call = timeout(LOOKUP_TIMEOUT, self.transport.lookup(&view.peers[node], *key));
            async move { Some((node.clone(), call.await.ok()?.ok()??)) }
        });
        let mut answers: FuturesUnordered<_> = lookups.collect();
        let mut records = Vec::new();
        while let Some(answer) = answers.next().await {
            records.extend(answer);
        }
        records
    }

    /// The record's stream keeps the key: tells nodes that hold another stream under it.
    fn settle(self: &Arc<Self>, record: &JournalRecord, told: &[(NodeId, JournalRecord)]) {
        self.yield_to(&record.head);
        let _ = self.journals.lock().put(record.clone(), now());
        let view = self.view.borrow().clone();
        let holders = told.iter().filter(|(_, known)| known.head.body != record.head.body);
        for peer in holders.filter_map(|(node, _)| view.peers.get(node)) {
            let entries = vec![JournalEntry::Put(record.clone())];
            let batch = JournalBatch { from: self.own.clone(), entries };
            let call = self.transport.journal(peer, batch);
            // A node that does not receive this will find both at the next request for the key.
            tasks::spawn("tells a peer of an older stream", timeout(self.config.journal_ack_timeout, call));
        }
    }

    /// Gives up the name of a running stream that is younger than `head` and has another body. Returns false if the running
    /// stream is older and keeps the name.
    pub(super) fn yield_to(&self, head: &JournalHead) -> bool {
        let mut streams = self.streams.lock();
        let Some(log) = streams.get(&head.key).filter(|log| log.head.body != head.body) else { return true };
        if log.head.seniority() < head.seniority() {
            return false;
        }
        let log = log.clone();
        streams.remove(&head.key);
        drop(streams);
        log.supersede();
        self.replicator.abandon(&log);
        self.metrics.journal_conflicts.inc();
        tracing::debug!(request = %log.head.id, key = ?head.key, "an older stream has the same idempotency key and another body");
        true
    }
}

/// The stream that owns the key, as far as known, and whether others claim it. The same records give the same answer on every
/// node.
fn oldest(records: &[JournalRecord]) -> Option<(JournalRecord, bool)> {
    // Copies of one stream count from the oldest one.
    let mut claims: BTreeMap<[u8; 16], u64> = BTreeMap::new();
    for record in records {
        let created = claims.entry(record.head.body).or_insert(record.head.created);
        *created = record.head.created.min(*created);
    }
    let (body, created) =
        claims.iter().map(|(body, created)| (*body, *created)).min_by_key(|&(body, at)| (at, body))?;
    let of_it = records.iter().filter(|record| record.head.body == body);
    let best = of_it.max_by_key(|record| {
        let tokens: usize = record.choices.iter().map(|choice| choice.tokens.len()).sum();
        let settled = (Reverse(record.head.created), Reverse(record.head.fingerprint.as_str()));
        (record.is_finished(), record.epoch, tokens, settled)
    })?;
    let mut best = best.clone();
    if claims.len() > 1 && best.head.created != created {
        best.head = Arc::new(JournalHead { created, ..(*best.head).clone() });
    }
    Some((best, claims.len() > 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::ChoiceProgress;
    use crate::types::{Fingerprint, FinishReason, RequestId, SamplingParams};

    fn record(body: u8, created: u64, epoch: u64, tokens: u32, is_finished: bool) -> JournalRecord {
        let head = JournalHead {
            key: JournalKey::new("tenant", "key", 0),
            body: [body; 16],
            id: RequestId::new("r"),
            created,
            model: "m".into(),
            fingerprint: Fingerprint::new("f"),
            prompt: Arc::from([1]),
            sampling: Arc::new(SamplingParams::default()),
        };
        let finished = is_finished.then_some(FinishReason::Length);
        let choices = vec![ChoiceProgress { tokens: (0..tokens).collect(), finished }];
        JournalRecord { head: Arc::new(head), epoch, entry: NodeId::new("n"), choices }
    }

    #[test]
    fn the_older_stream_has_the_key_however_far_the_younger_one_is() {
        let (older, younger) = (record(9, 1, 1, 3, false), record(1, 2, 5, 30, true));
        assert_eq!(oldest(&[younger.clone(), older.clone()]), Some((older.clone(), true)));
        assert_eq!(oldest(std::slice::from_ref(&younger)), Some((younger, false)));
        assert_eq!(oldest(&[]), None);
        // With the same second, the digests of the bodies decide, which are the same everywhere.
        assert_eq!(oldest(&[record(2, 1, 1, 1, true), older]).expect("one").0.head.body, [2; 16]);
    }

    #[test]
    fn of_one_stream_the_best_known_record_counts_with_the_oldest_ones_age() {
        let records = [record(1, 3, 1, 9, true), record(1, 1, 1, 2, false), record(2, 2, 1, 1, true)];
        let (best, has_rivals) = oldest(&records).expect("one");
        assert!(has_rivals);
        assert_eq!((best.head.created, best.choices[0].tokens.len()), (1, 9));
        assert_eq!(oldest(&records[..2]).expect("one").0.head.created, 3, "without a rival nothing is rewritten");
    }

    proptest! {
        #[test]
        fn the_order_in_which_records_are_found_does_not_matter(
            parts in prop::collection::vec((0u8..3, 0u64..3, 1u64..3, 0u32..3, any::<bool>()), 1..7), turn in 0usize..7
        ) {
            let records: Vec<JournalRecord> =
                parts.iter().map(|&(body, created, epoch, tokens, end)| record(body, created, epoch, tokens, end)).collect();
            let mut turned = records.clone();
            turned.rotate_left(turn % records.len());
            prop_assert_eq!(oldest(&records), oldest(&turned));
        }
    }
}
