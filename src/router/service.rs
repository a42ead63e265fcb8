//! What this node does for its peers: generates, lets them follow streams, keeps journals.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{Instrument, debug, info};

use super::Router;
use super::failover::now;
use super::hot_prefixes;
use super::source::{Sign, StreamSource};
use super::stream_log::Cursor;
use super::this_node::{DepartureStage, ThisNode};
use crate::cluster::{
    FollowCall, GenerateCall, JournalBatch, JournalEntry, JournalRecord, JournalRefusal, PeerFrame, PeerService,
    PeerStream,
};
use crate::types::{Failure, FailureKind, GenerateRequest, GenerationEvent, JournalKey, tasks, watch};

/// Heartbeats per stall timeout: several may be lost before the peer reacts.
const HEARTBEATS_PER_TIMEOUT: u32 = 4;
/// Heartbeats without tokens also tell that a stream is preempted, which `pace::progress` needs to know within its window.
const MAX_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

impl PeerService for Router {
    fn generate(&self, call: GenerateCall) -> Result<PeerStream, Failure> {
        let node = &self.node;
        let local = node.local().filter(|_| node.may_serve());
        let local = local.ok_or_else(|| Failure::shutting_down("The replica is not ready, or is leaving."))?;
        if local.model.fingerprint != call.fingerprint {
            return Err(Failure::unavailable("no_replica", "The replica has another fingerprint."));
        }
        let GenerateCall { mut envelope, choices, remaining, is_continuation, fingerprint: _ } = call;
        if let Some(remaining) = remaining {
            // A time that no clock can hold is no deadline.
            Arc::make_mut(&mut envelope).deadline = now().checked_add(remaining);
        }
        let prefixes = hot_prefixes::hashes(&envelope.prompt, envelope.extensions.cache_salt);
        let (unfinished, span) = (choices.len(), envelope.span());
        let request = GenerateRequest::new(envelope, choices);
        let source = node.admit(local, request, &prefixes, Cursor::fresh(0), is_continuation)?;
        span.in_scope(|| match is_continuation {
            true => info!("goes on with a stream for a peer"),
            false => debug!("computes a stream for a peer"),
        });
        let (frames, answer) = PeerStream::channel();
        let departure = node.departure.subscribe();
        if node.leaves() {
            // The hand-over has just begun.
            let _ = frames.send(PeerFrame::HandOver);
        }
        let work = serve(node.clone(), source, frames, unfinished, departure);
        tasks::spawn("serves a peer", work.instrument(span));
        Ok(answer)
    }

    fn follow(&self, call: FollowCall) -> Result<PeerStream, Failure> {
        let gone = || Failure::new(FailureKind::PeerDisconnected, "The stream is not running on this node.");
        let log = self.streams.running.lock().get(&call.key).cloned().ok_or_else(gone)?;
        // A stream resumed from a journal lacks the log-probabilities of earlier tokens.
        if log.envelope.sampling.logprobs.is_some() && !log.has_logprobs_from(&call.have) {
            return Err(Failure::new(
                FailureKind::PeerDisconnected,
                "This node does not have the stream from that position on.",
            ));
        }
        let mut left = log.envelope.sampling.n;
        let mut stream = log.listen(&call.have).ok_or_else(gone)?;
        let (frames, answer) = PeerStream::channel();
        let every = self.node.heartbeat_interval();
        log.envelope.span().in_scope(|| debug!("lets a peer follow a stream"));
        tasks::spawn("lets a peer follow a stream", async move {
            let mut ticks = interval(every);
            while left > 0 {
                let frame = tokio::select! {
                    biased;
                    () = frames.closed() => return,
                    event = stream.next() => match event {
                        // A follower already has these: a stream whose prompt is to be scored is not followed.
                        Some(GenerationEvent::PromptLogprobs { .. }) => continue,
                        Some(event) => PeerFrame::Event(event),
                        None => return,
                    },
                    _ = ticks.tick() => PeerFrame::Heartbeat,
                };
                left -= u32::from(matches!(frame, PeerFrame::Event(GenerationEvent::Finished { .. })));
                let is_over = matches!(frame, PeerFrame::Event(GenerationEvent::Failed(_)));
                if frames.send(frame).is_err() || is_over {
                    return;
                }
            }
        });
        Ok(answer)
    }

    fn journal(&self, batch: JournalBatch) -> Vec<JournalRefusal> {
        let JournalBatch { from, entries } = batch;
        let take = |entry: JournalEntry| {
            if let JournalEntry::Put(record) = &entry
                && !self.streams.yield_to(&record.envelope)
            {
                return Some(JournalRefusal::Fenced { key: record.name().key, epoch: record.epoch.saturating_add(1) });
            }
            self.streams.journals.lock().apply(entry, &from, now()).err()
        };
        entries.into_iter().filter_map(take).collect()
    }

    fn lookup(&self, key: JournalKey) -> Option<JournalRecord> {
        let running = self.streams.running.lock().get(&key).cloned();
        if let Some(log) = running {
            return Some(log.record(&self.node.id));
        }
        self.streams.kept(&key)
    }

    fn tokenizer(&self, digest: &str) -> Option<Bytes> {
        let local = self.node.local()?;
        (local.model.tokenizer == digest).then(|| local.tokenizer.clone())
    }
}

impl ThisNode {
    fn heartbeat_interval(&self) -> Duration {
        (self.config.peer_stall_timeout / HEARTBEATS_PER_TIMEOUT).min(MAX_HEARTBEAT_INTERVAL)
    }
}

/// Forwards the engine's events. While there are none, sends heartbeats as long as its step loop makes progress; if the engine
/// hangs, the stream goes silent.
async fn serve(
    node: Arc<ThisNode>,
    mut source: StreamSource,
    frames: UnboundedSender<PeerFrame>,
    mut unfinished: usize,
    mut departure: watch::Receiver<DepartureStage>,
) {
    node.metrics.streams_served.inc();
    let mut ticks = interval(node.heartbeat_interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_beat = now();
    while unfinished > 0 {
        let frame = tokio::select! {
            biased;
            () = frames.closed() => break,
            sign = source.next() => match sign {
                Sign::Event(event) => PeerFrame::Event(event),
                Sign::Heartbeat | Sign::HandOver => continue,
            },
            Ok(()) = departure.changed() => PeerFrame::HandOver,
            _ = ticks.tick() => {
                let beat = source.last_sign();
                if beat <= last_beat {
                    continue;
                }
                last_beat = beat;
                PeerFrame::Heartbeat
            }
        };
        unfinished -= usize::from(matches!(frame, PeerFrame::Event(GenerationEvent::Finished { .. })));
        let is_over = matches!(frame, PeerFrame::Event(GenerationEvent::Failed(_)));
        if frames.send(frame).is_err() || is_over {
            break;
        }
    }
    node.metrics.streams_served.dec();
}
