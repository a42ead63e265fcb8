//! The journals that this node holds: for other nodes' streams, and for its own finished streams. Limited in time and memory;
//! time is passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::journal::{ChoiceProgress, JournalEntry, JournalRecord, JournalRefusal};
use crate::types::{JournalKey, NodeId};

/// Approximate memory of a record without its tokens.
const RECORD_BYTES: u64 = 1024;

pub struct JournalStore {
    ttl: Duration,
    max_bytes: u64,
    bytes: u64,
    records: BTreeMap<JournalKey, Kept>,
    /// Records by the time of their last change.
    ages: BTreeSet<(Instant, JournalKey)>,
}

struct Kept {
    record: JournalRecord,
    bytes: u64,
    changed: Instant,
}

impl JournalStore {
    pub fn new(ttl: Duration, max_bytes: u64) -> Self {
        Self { ttl, max_bytes, bytes: 0, records: BTreeMap::new(), ages: BTreeSet::new() }
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Approximate memory of all records.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn get(&self, key: &JournalKey) -> Option<&JournalRecord> {
        self.records.get(key).map(|kept| &kept.record)
    }

    /// Applies a change from the node `from`, the stream's entry node, or says why it is rejected.
    pub fn apply(&mut self, entry: JournalEntry, from: &NodeId, now: Instant) -> Result<(), JournalRefusal> {
        self.expire(now);
        match entry {
            JournalEntry::Put(record) => self.put(record, now),
            JournalEntry::Append { key, epoch, choice, start, tokens, finished } => {
                let kept = self.records.get_mut(&key).ok_or(JournalRefusal::Unknown { key })?;
                if epoch < kept.record.epoch {
                    return Err(JournalRefusal::Fenced { key, epoch: kept.record.epoch });
                }
                // Another stream may have got the key in the meantime. With the whole record, `put` can decide which one keeps
                // it.
                if kept.record.entry != *from {
                    return Err(JournalRefusal::Unknown { key });
                }
                let start = start as usize;
                let choice = kept.record.choices.get_mut(choice as usize);
                let Some(choice) = choice.filter(|choice| epoch == kept.record.epoch && start <= choice.tokens.len())
                else {
                    return Err(JournalRefusal::Unknown { key });
                };
                let known = choice.tokens.len() - start;
                choice.tokens.extend(tokens.into_iter().skip(known));
                choice.finished = choice.finished.take().or(finished);
                self.settle(key, now);
                Ok(())
            }
            JournalEntry::Unreadable(refusal) => Err(refusal),
            JournalEntry::Drop { key, epoch } => {
                if self.get(&key).is_some_and(|record| record.epoch <= epoch && record.entry == *from) {
                    self.remove(key);
                }
                Ok(())
            }
        }
    }

    /// Stores the record, unless a later epoch of the stream or an older stream with the same key is stored.
    pub fn put(&mut self, mut record: JournalRecord, now: Instant) -> Result<(), JournalRefusal> {
        let key = record.name().key;
        if size(&record) > self.max_bytes {
            return Err(JournalRefusal::Full { key });
        }
        if let Some(kept) = self.records.get(&key) {
            let held = &kept.record;
            let is_rival = held.name() != record.name();
            if is_rival && held.envelope.seniority() < record.envelope.seniority() {
                return Err(JournalRefusal::Fenced { key, epoch: held.epoch.max(record.epoch.saturating_add(1)) });
            }
            let is_behind = held.epoch > record.epoch || (held.epoch == record.epoch && held.entry != record.entry);
            if is_behind && !is_rival {
                return Err(JournalRefusal::Fenced { key, epoch: held.epoch });
            }
            // Both are the same generation, so the longer one contains the other.
            if held.fingerprint == record.fingerprint && !is_rival {
                record.choices.iter_mut().zip(&held.choices).for_each(|(new, old)| extend(new, old));
            }
            let changed = kept.changed;
            self.ages.remove(&(changed, key));
            self.bytes -= kept.bytes;
        }
        self.records.insert(key, Kept { record, bytes: 0, changed: now });
        self.ages.insert((now, key));
        self.settle(key, now);
        Ok(())
    }

    /// Removes records that are older than their time to live.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(changed, key)) = self.ages.first()
            && now.saturating_duration_since(changed) >= self.ttl
        {
            self.remove(key);
        }
    }

    /// Updates the record's age and size. If memory is exceeded, removes the oldest finished streams first.
    fn settle(&mut self, key: JournalKey, now: Instant) {
        let kept = self.records.get_mut(&key).expect("the record is kept");
        self.ages.remove(&(kept.changed, key));
        self.ages.insert((now, key));
        kept.changed = now;
        self.bytes -= kept.bytes;
        kept.bytes = size(&kept.record);
        self.bytes += kept.bytes;
        while self.bytes > self.max_bytes {
            let oldest = |ended: bool| {
                let mut keys = self.ages.iter().map(|(_, key)| *key);
                keys.find(|key| !ended || self.records[key].record.is_finished())
            };
            let Some(victim) = oldest(true).or_else(|| oldest(false)) else { return };
            self.remove(victim);
        }
    }

    pub fn remove(&mut self, key: JournalKey) {
        if let Some(kept) = self.records.remove(&key) {
            self.ages.remove(&(kept.changed, key));
            self.bytes -= kept.bytes;
        }
    }
}

/// Adds what `other` has beyond `choice`.
fn extend(choice: &mut ChoiceProgress, other: &ChoiceProgress) {
    if other.tokens.len() > choice.tokens.len() {
        choice.tokens.extend_from_slice(&other.tokens[choice.tokens.len()..]);
    }
    if choice.finished.is_none() && other.tokens.len() == choice.tokens.len() {
        choice.finished.clone_from(&other.finished);
    }
}

fn size(record: &JournalRecord) -> u64 {
    let tokens: usize = record.choices.iter().map(|choice| choice.tokens.len()).sum();
    let sampling = &record.envelope.sampling;
    let texts: usize = sampling.stop.iter().map(String::len).sum();
    let biases = sampling.logit_bias.len() * 8;
    RECORD_BYTES + (4 * (record.envelope.prompt.len() + tokens) + texts + biases) as u64
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::types::{Envelope, Fingerprint, FinishReason, RequestId, SamplingParams, StreamName, Tenant};

    const SECOND: Duration = Duration::from_secs(1);

    fn key(name: &str) -> JournalKey {
        JournalKey::new(&Tenant::new("tenant"), name, 0)
    }

    fn record(name: &str, epoch: u64, entry: &str, tokens: &[u32]) -> JournalRecord {
        let envelope = Envelope {
            created: 1,
            name: Some(StreamName { key: key(name), body: [0; 16] }),
            ..Envelope::new(RequestId::new("r"), Arc::from([1, 2, 3]), SamplingParams::default())
        };
        JournalRecord {
            envelope: Arc::new(envelope),
            fingerprint: Fingerprint::new("f"),
            epoch,
            entry: NodeId::new(entry),
            choices: vec![ChoiceProgress { tokens: tokens.to_vec(), finished: None }],
        }
    }

    /// Applies an entry from the node that owns most records in these tests.
    fn apply(store: &mut JournalStore, entry: JournalEntry, now: Instant) -> Result<(), JournalRefusal> {
        store.apply(entry, &NodeId::new("x"), now)
    }

    /// Another request with the same key, created at that time.
    fn rival(body: u8, created: u64, entry: &str, tokens: &[u32]) -> JournalRecord {
        let record = record("a", 1, entry, tokens);
        let envelope = record.envelope.with(|envelope| {
            envelope.created = created;
            envelope.name = Some(StreamName { body: [body; 16], ..record.name() });
        });
        JournalRecord { envelope, ..record }
    }

    fn append(name: &str, epoch: u64, start: u32, tokens: &[u32], finished: bool) -> JournalEntry {
        JournalEntry::Append {
            key: key(name),
            epoch,
            choice: 0,
            start,
            tokens: tokens.to_vec(),
            finished: finished.then_some(FinishReason::Length),
        }
    }

    fn tokens(store: &JournalStore, name: &str) -> Option<Vec<u32>> {
        store.get(&key(name)).map(|record| record.choices[0].tokens.clone())
    }

    #[test]
    fn a_spoiled_stream_is_forgotten_but_not_a_later_epoch_of_it() {
        let (mut store, now) = (JournalStore::new(SECOND, 1 << 20), Instant::now());
        let drop = |epoch| JournalEntry::Drop { key: key("a"), epoch };
        apply(&mut store, drop(1), now).expect("nothing to forget");
        apply(&mut store, JournalEntry::Put(record("a", 2, "x", &[7, 8])), now).expect("kept");
        apply(&mut store, drop(1), now).expect("late");
        assert_eq!(tokens(&store, "a"), Some(vec![7, 8]));
        apply(&mut store, drop(2), now).expect("forgotten");
        assert_eq!((tokens(&store, "a"), store.bytes()), (None, 0));
        apply(&mut store, JournalEntry::Put(record("a", 1, "x", &[9])), now).expect("a new stream");
        assert_eq!(tokens(&store, "a"), Some(vec![9]));
    }

    #[test]
    fn appends_overlap_but_leave_no_gap() {
        let (mut store, now) = (JournalStore::new(SECOND, 1 << 20), Instant::now());
        let key = self::key("a");
        assert_eq!(apply(&mut store, append("a", 1, 0, &[7], false), now), Err(JournalRefusal::Unknown { key }));
        apply(&mut store, JournalEntry::Put(record("a", 1, "x", &[7, 8])), now).expect("kept");
        apply(&mut store, append("a", 1, 1, &[8, 9], false), now).expect("overlaps");
        apply(&mut store, append("a", 1, 0, &[7], false), now).expect("known");
        assert_eq!(tokens(&store, "a"), Some(vec![7, 8, 9]));
        assert_eq!(apply(&mut store, append("a", 1, 4, &[1], false), now), Err(JournalRefusal::Unknown { key }));
        apply(&mut store, append("a", 1, 3, &[], true), now).expect("ends");
        assert!(store.get(&key).expect("kept").is_finished());
    }

    #[test]
    fn a_later_epoch_fences_the_earlier_one() {
        let (mut store, now) = (JournalStore::new(SECOND, 1 << 20), Instant::now());
        let key = self::key("a");
        apply(&mut store, JournalEntry::Put(record("a", 1, "x", &[7, 8])), now).expect("kept");
        apply(&mut store, JournalEntry::Put(record("a", 2, "y", &[7])), now).expect("later");
        assert_eq!(tokens(&store, "a"), Some(vec![7, 8]), "what is known stays known");
        let fenced = Err(JournalRefusal::Fenced { key, epoch: 2 });
        assert_eq!(apply(&mut store, append("a", 1, 2, &[9], false), now), fenced);
        assert_eq!(apply(&mut store, JournalEntry::Put(record("a", 1, "x", &[7, 8, 9])), now), fenced);
        assert_eq!(
            apply(&mut store, JournalEntry::Put(record("a", 2, "z", &[7, 8, 9])), now),
            fenced,
            "the first one counts"
        );
        assert_eq!(tokens(&store, "a"), Some(vec![7, 8]));
    }

    #[test]
    fn of_two_streams_with_one_key_the_older_one_is_kept_in_whatever_order_they_come() {
        let now = Instant::now();
        let (older, younger) = (rival(2, 5, "x", &[1, 2]), rival(1, 6, "y", &[7, 8, 9]));
        let later_epoch = JournalRecord { epoch: 9, ..younger.clone() };
        for rival in [&younger, &later_epoch] {
            for order in [[&older, rival], [rival, &older]] {
                let mut store = JournalStore::new(SECOND, 1 << 20);
                let results = order.map(|record| store.put(record.clone(), now));
                assert_eq!(tokens(&store, "a"), Some(vec![1, 2]), "nothing of the other one is taken over");
                assert_eq!(results[0], Ok(()));
                match order[0] == &older {
                    true => assert!(
                        matches!(results[1], Err(JournalRefusal::Fenced { epoch, .. }) if epoch > rival.epoch),
                        "its node has to learn that it lost"
                    ),
                    false => assert_eq!(results[1], Ok(())),
                }
            }
        }
    }

    #[test]
    fn the_node_of_another_stream_adds_nothing_and_drops_nothing() {
        let (mut store, now) = (JournalStore::new(SECOND, 1 << 20), Instant::now());
        let (key, other) = (self::key("a"), NodeId::new("y"));
        store.put(record("a", 1, "x", &[1, 2]), now).expect("kept");
        assert_eq!(store.apply(append("a", 1, 2, &[9], false), &other, now), Err(JournalRefusal::Unknown { key }));
        store.apply(JournalEntry::Drop { key, epoch: 1 }, &other, now).expect("nothing to do");
        assert_eq!(tokens(&store, "a"), Some(vec![1, 2]));
        apply(&mut store, append("a", 1, 2, &[3], false), now).expect("its own node");
        assert_eq!(tokens(&store, "a"), Some(vec![1, 2, 3]));
    }

    #[test]
    fn records_live_for_their_time_after_the_last_change() {
        let (mut store, now) = (JournalStore::new(SECOND, 1 << 20), Instant::now());
        apply(&mut store, JournalEntry::Put(record("a", 1, "x", &[])), now).expect("kept");
        apply(&mut store, append("a", 1, 0, &[1], false), now + SECOND / 2).expect("kept");
        store.expire(now + SECOND);
        assert_eq!(store.len(), 1);
        store.expire(now + SECOND * 3 / 2);
        assert_eq!((store.len(), store.bytes()), (0, 0));
    }

    #[test]
    fn memory_is_bounded_and_ended_streams_go_first() {
        let (mut store, now) = (JournalStore::new(SECOND, 3 * (RECORD_BYTES + 100)), Instant::now());
        for (age, name) in ["a", "b", "c"].iter().enumerate() {
            store.put(record(name, 1, "x", &[1]), now + SECOND / 100 * age as u32).expect("kept");
        }
        apply(&mut store, append("b", 1, 1, &[], true), now + SECOND / 10).expect("ends");
        store.put(record("d", 1, "x", &[1]), now + SECOND / 5).expect("kept");
        assert_eq!((tokens(&store, "b"), store.len()), (None, 3));
        store.put(record("e", 1, "x", &[1]), now + SECOND / 4).expect("kept");
        assert_eq!((tokens(&store, "a"), store.len()), (None, 3), "then the oldest");
        let key = self::key("f");
        let huge = record("f", 1, "x", &vec![1; 10_000]);
        assert_eq!(store.put(huge, now), Err(JournalRefusal::Full { key }));
    }
}
