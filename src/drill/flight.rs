//! Starts, repeats and collects the streams of an exercise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinSet;

use super::client::{DrillClient, SharedRecord, StreamRecord};
use super::workload::PlannedStream;

/// The running streams of an exercise.
pub(super) struct Flight {
    records: Vec<SharedRecord>,
    players: JoinSet<Vec<(usize, StreamRecord)>>,
    /// Whether a stream that has ended starts again.
    goes_on: Arc<AtomicBool>,
}

impl Flight {
    /// Starts the streams. `urls_of` returns the nodes for a stream's index, in the order in which they are tried. With
    /// `repeats`, a stream that has ended starts again until `descend` is called.
    pub(super) fn take_off(
        client: &DrillClient,
        streams: &[PlannedStream],
        urls_of: impl Fn(usize) -> Vec<String>,
        may_reconnect: bool,
        repeats: bool,
    ) -> Self {
        let records: Vec<SharedRecord> = streams.iter().map(|_| SharedRecord::default()).collect();
        let goes_on = Arc::new(AtomicBool::new(repeats));
        let mut players = JoinSet::new();
        for (index, (stream, shown)) in streams.iter().zip(&records).enumerate() {
            let (client, stream, urls) = (client.clone(), stream.clone(), urls_of(index));
            let (shown, goes_on) = (shown.clone(), goes_on.clone());
            players.spawn(async move {
                let mut ended = Vec::new();
                loop {
                    *shown.lock() = StreamRecord::new();
                    client.play(&stream, &urls, may_reconnect, &shown).await;
                    ended.push((index, shown.lock().clone()));
                    if !goes_on.load(Ordering::Relaxed) {
                        return ended;
                    }
                }
            });
        }
        Self { records, players, goes_on }
    }

    pub(super) fn streams(&self) -> usize {
        self.records.len()
    }

    /// Streams that end from now on do not start again.
    pub(super) fn descend(&self) {
        self.goes_on.store(false, Ordering::Relaxed);
    }

    /// Waits for all streams. Returns each record with the index of its stream.
    pub(super) async fn land(&mut self) -> Vec<(usize, StreamRecord)> {
        let mut records = Vec::new();
        while let Some(ended) = self.players.join_next().await {
            // If a player panics, its stream is missing from the count, and the drill fails.
            records.extend(ended.unwrap_or_default());
        }
        records.sort_by_key(|(index, _)| *index);
        records
    }

    pub(super) fn half_have_tokens(&self) -> bool {
        const SOME: usize = 4;
        let begun = self.records.iter().filter(|record| record.lock().token_times.len() >= SOME).count();
        2 * begun >= self.records.len()
    }

    pub(super) fn is_over(&self) -> bool {
        self.records.iter().all(|record| record.lock().end.is_some())
    }
}
