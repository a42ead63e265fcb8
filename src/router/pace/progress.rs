//! What this node's streams observe of one replica: counted by the streams, read periodically.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use smallvec::SmallVec;

/// Length of the window that is evaluated.
const WINDOW: Duration = Duration::from_millis(1500);
/// Minimum total time of streams that receive tokens, for a meaningful result.
const MIN_STREAM_SECONDS: f64 = 0.8;
/// A longer pause between two looks is a pause of this process.
const LONGEST_PAUSE: Duration = Duration::from_millis(600);
/// All choices of a batch advance alike. One that gets no token while another gets more than this many is not in the batch.
const AHEAD: u64 = 2;
/// Maximum number of choices whose silence one look takes back.
const MAX_PASSED_OVER: usize = 1024;

/// Plain atomics: a token costs one addition and a few stores.
///
/// A choice that the scheduler has preempted gets no token while the replica works at its usual pace. Such a choice is **passed
/// over**: its time since its last token is taken back, and counts again from its next token on. It differs from a choice of a
/// slow replica in this: heartbeats say that the engine makes progress, and others advance meanwhile, or sequences wait there.
#[derive(Debug)]
pub struct StreamProgress {
    epoch: Instant,
    /// Sources that are open at the replica.
    sources: AtomicU32,
    /// The last sign of life of any of them, in microseconds since `epoch`.
    heard: AtomicU64,
    tokens: AtomicU64,
    /// Choices that have received a token, have not ended, and are not passed over.
    speaking: AtomicU32,
    /// When the replica last reported that sequences wait there, in microseconds since `epoch`; 0 if never.
    queue_seen: AtomicU64,
    /// The last tokens of choices that have been passed over since the last look.
    passed_over: Mutex<Vec<Instant>>,
    first_tokens: AtomicU64,
    first_token_micros: AtomicU64,
}

/// One source's share of the counts. It is taken back however the source ends.
#[derive(Debug)]
pub struct ProgressPart {
    progress: Arc<StreamProgress>,
    /// Choices that have received a token, have not ended, and are not passed over.
    speaking: SmallVec<[Speaker; 1]>,
}

/// A choice, and its last token.
#[derive(Clone, Copy, Debug)]
struct Speaker {
    choice: u32,
    last_token: Instant,
    /// Tokens that the replica had delivered at the first heartbeat since, which may have come right behind the token.
    first_heartbeat: Option<u64>,
}

/// The first tokens since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstTokens {
    pub count: u64,
    /// Total time from the opening of a source to its first token.
    pub time: Duration,
}

impl StreamProgress {
    pub fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            sources: AtomicU32::new(0),
            heard: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            speaking: AtomicU32::new(0),
            queue_seen: AtomicU64::new(0),
            passed_over: Mutex::default(),
            first_tokens: AtomicU64::new(0),
            first_token_micros: AtomicU64::new(0),
        }
    }

    /// A source was opened.
    pub fn part(self: &Arc<Self>, now: Instant) -> ProgressPart {
        self.sources.fetch_add(1, Ordering::Relaxed);
        let part = ProgressPart { progress: self.clone(), speaking: SmallVec::new() };
        part.heard(now);
        part
    }

    /// How long nothing has been heard from the replica. `None` if no source is open there, since then nothing is expected.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.epoch);
        let heard = Duration::from_micros(self.heard.load(Ordering::Relaxed));
        (self.sources.load(Ordering::Relaxed) > 0).then(|| since.saturating_sub(heard))
    }

    /// The replica reports that sequences wait there: in the queue, or preempted.
    pub fn queue_seen(&self, now: Instant) {
        self.queue_seen.store(self.micros(now), Ordering::Relaxed);
    }

    fn micros(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_micros()).unwrap_or(u64::MAX)
    }

    /// Whether the replica works, but not on this choice: it has delivered so many tokens to others since, or has a queue in
    /// which the choice may stand.
    fn passes_over(&self, speaker: &Speaker, delivered: u64) -> bool {
        let others = self.speaking.load(Ordering::Relaxed).saturating_sub(1).max(1);
        let queue_seen = self.queue_seen.load(Ordering::Relaxed);
        delivered > AHEAD * u64::from(others) || (queue_seen > 0 && queue_seen >= self.micros(speaker.last_token))
    }

    /// Takes what has been counted since the last call.
    pub fn take_first_tokens(&self) -> FirstTokens {
        let count = self.first_tokens.swap(0, Ordering::Relaxed);
        FirstTokens { count, time: Duration::from_micros(self.first_token_micros.swap(0, Ordering::Relaxed)) }
    }
}

impl ProgressPart {
    /// A token or another sign of life has arrived.
    pub fn heard(&self, now: Instant) {
        self.progress.heard.store(self.progress.micros(now), Ordering::Relaxed);
    }

    /// The replica's engine has made progress.
    pub fn heartbeat(&mut self) {
        let progress = &self.progress;
        let tokens = progress.tokens.load(Ordering::Relaxed);
        self.speaking.retain(|speaker| {
            let Some(before) = speaker.first_heartbeat else {
                speaker.first_heartbeat = Some(tokens);
                return true;
            };
            let is_passed_over = progress.passes_over(speaker, tokens.wrapping_sub(before));
            if is_passed_over {
                progress.speaking.fetch_sub(1, Ordering::Relaxed);
                let mut passed_over = progress.passed_over.lock();
                if passed_over.len() < MAX_PASSED_OVER {
                    passed_over.push(speaker.last_token);
                }
            }
            !is_passed_over
        });
    }

    /// The source's first token has arrived, this long after its opening.
    pub fn first_token(&self, after: Duration) {
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        self.progress.first_token_micros.fetch_add(micros, Ordering::Relaxed);
        self.progress.first_tokens.fetch_add(1, Ordering::Relaxed);
    }

    pub fn token(&mut self, choice: u32, now: Instant) {
        self.progress.tokens.fetch_add(1, Ordering::Relaxed);
        let speaker = Speaker { choice, last_token: now, first_heartbeat: None };
        match self.speaking.iter_mut().find(|speaking| speaking.choice == choice) {
            Some(speaking) => *speaking = speaker,
            None => {
                self.speaking.push(speaker);
                self.progress.speaking.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// One choice has ended.
    pub fn finished(&mut self, choice: u32) {
        if let Some(at) = self.speaking.iter().position(|speaking| speaking.choice == choice) {
            self.speaking.swap_remove(at);
            self.progress.speaking.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for ProgressPart {
    fn drop(&mut self) {
        let speaking = u32::try_from(self.speaking.len()).unwrap_or(u32::MAX);
        self.progress.speaking.fetch_sub(speaking, Ordering::Relaxed);
        self.progress.sources.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The progress in the current window. Time is passed in.
#[derive(Debug, Default)]
pub struct ProgressWindow {
    last: Option<(Instant, u64)>,
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    /// Since the look before.
    pause: Duration,
    stream_seconds: f64,
    tokens: u64,
}

impl ProgressWindow {
    /// Reads the counts. Call it several times a second.
    pub fn look(&mut self, progress: &StreamProgress, now: Instant) {
        let tokens = progress.tokens.load(Ordering::Relaxed);
        let speaking = progress.speaking.load(Ordering::Relaxed);
        let passed_over = std::mem::take(&mut *progress.passed_over.lock());
        let Some((last, tokens_before)) = self.last.replace((now, tokens)) else { return };
        let pause = now.saturating_duration_since(last);
        if pause > LONGEST_PAUSE {
            // This process was paused, so it cannot tell how fast others are.
            return self.samples.clear();
        }
        passed_over.into_iter().for_each(|since| self.take_back(since));
        let tokens = tokens.wrapping_sub(tokens_before);
        // These tokens are from streams that were receiving, even if they have ended since.
        let stream_seconds = f64::from(speaking) * pause.as_secs_f64();
        self.samples.push_back(Sample { at: now, pause, stream_seconds, tokens });
        while self.samples.front().is_some_and(|sample| now.saturating_duration_since(sample.at) >= WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Takes back the time of one choice since then.
    fn take_back(&mut self, since: Instant) {
        for sample in self.samples.iter_mut().rev().take_while(|sample| sample.at > since) {
            let counted = sample.at.saturating_duration_since(since).min(sample.pause);
            sample.stream_seconds = (sample.stream_seconds - counted.as_secs_f64()).max(0.0);
        }
    }

    /// Seconds per token of a stream, if streams have received tokens for long enough.
    pub fn token_seconds(&self) -> Option<f64> {
        let stream_seconds: f64 = self.samples.iter().map(|sample| sample.stream_seconds).sum();
        let tokens: u64 = self.samples.iter().map(|sample| sample.tokens).sum();
        (stream_seconds >= MIN_STREAM_SECONDS).then(|| stream_seconds / tokens.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// Streams that each get a token per this interval, observed for this long.
    fn watch(window: &mut ProgressWindow, progress: &StreamProgress, now: &mut Instant, per_tick: u64, ticks: u32) {
        for _ in 0..ticks {
            progress.tokens.fetch_add(per_tick, Ordering::Relaxed);
            *now += TICK;
            window.look(progress, *now);
        }
    }

    #[test]
    fn the_time_from_token_to_token_follows_within_the_window() {
        let mut now = Instant::now();
        let progress = Arc::new(StreamProgress::new(now));
        let mut window = ProgressWindow::default();
        let mut parts: Vec<ProgressPart> = (0..4).map(|_| progress.part(now)).collect();
        parts.iter_mut().for_each(|part| part.token(0, now));
        window.look(&progress, now);
        assert_eq!(window.token_seconds(), None);
        watch(&mut window, &progress, &mut now, 40, 20);
        assert!((window.token_seconds().expect("measured") - 0.01).abs() < 1e-9);
        watch(&mut window, &progress, &mut now, 0, 14);
        assert!(window.token_seconds().expect("measured") > 0.1, "silence counts while it lasts");
        drop(parts);
        watch(&mut window, &progress, &mut now, 0, 15);
        assert_eq!(window.token_seconds(), None, "nobody speaks, nothing is known");
    }

    #[test]
    fn a_pause_of_this_process_says_nothing_of_others() {
        let mut now = Instant::now();
        let progress = Arc::new(StreamProgress::new(now));
        let mut window = ProgressWindow::default();
        let mut part = progress.part(now);
        (0..2).for_each(|choice| part.token(choice, now));
        window.look(&progress, now);
        watch(&mut window, &progress, &mut now, 20, 20);
        now += Duration::from_secs(2);
        window.look(&progress, now);
        assert_eq!(window.token_seconds(), None);
        watch(&mut window, &progress, &mut now, 20, 10);
        assert!((window.token_seconds().expect("measured again") - 0.01).abs() < 1e-9);
    }

    #[test]
    fn what_a_source_counted_goes_with_it() {
        let now = Instant::now();
        let progress = Arc::new(StreamProgress::new(now));
        let mut part = progress.part(now);
        let speaking = || progress.speaking.load(Ordering::Relaxed);
        part.finished(0);
        assert_eq!(speaking(), 0, "it had not begun");
        part.first_token(Duration::from_millis(20));
        [4, 2, 2, 7].into_iter().for_each(|choice| part.token(choice, now));
        assert_eq!(speaking(), 3, "choices that wait for a seat do not count");
        part.finished(2);
        assert_eq!(speaking(), 2);
        drop(part);
        assert_eq!(speaking(), 0);
        let first = progress.take_first_tokens();
        assert_eq!(first, FirstTokens { count: 1, time: Duration::from_millis(20) });
        assert_eq!(progress.take_first_tokens(), FirstTokens::default());
    }

    /// Two streams of one replica, which also tell of heartbeats.
    struct Pair {
        progress: Arc<StreamProgress>,
        window: ProgressWindow,
        parts: [ProgressPart; 2],
        now: Instant,
        ticks: u32,
    }

    impl Pair {
        /// Both have got a token every 10 ms so far.
        fn new() -> Self {
            let now = Instant::now();
            let progress = Arc::new(StreamProgress::new(now));
            let parts = [(); 2].map(|()| progress.part(now));
            let mut pair = Self { window: ProgressWindow::default(), parts, progress, now, ticks: 0 };
            pair.pass(20, [10, 10], true);
            assert!((pair.interval() - 10.0).abs() < 1e-6);
            pair
        }

        /// The streams get these tokens in every tick.
        fn pass(&mut self, ticks: u32, per_tick: [u32; 2], has_heartbeats: bool) {
            for _ in 0..ticks {
                for (part, tokens) in self.parts.iter_mut().zip(per_tick) {
                    (0..tokens).for_each(|_| part.token(0, self.now));
                }
                self.now += TICK;
                self.ticks += 1;
                if has_heartbeats && self.ticks.is_multiple_of(5) {
                    self.parts.iter_mut().for_each(ProgressPart::heartbeat);
                }
                self.window.look(&self.progress, self.now);
            }
        }

        /// Milliseconds from token to token.
        fn interval(&self) -> f64 {
            self.window.token_seconds().expect("measured") * 1e3
        }
    }

    #[test]
    fn the_time_of_a_preempted_stream_is_taken_back() {
        let mut pair = Pair::new();
        pair.pass(4, [10, 0], true);
        assert!(pair.interval() > 11.0, "its replica may be slow");
        pair.pass(6, [10, 0], true);
        assert!((pair.interval() - 10.0).abs() < 1.0, "it is preempted: {}", pair.interval());
        pair.pass(30, [10, 0], true);
        assert!((pair.interval() - 10.0).abs() < 1e-6);
        pair.pass(15, [10, 5], true);
        assert!((pair.interval() - 20.0 / 1.5).abs() < 1e-6, "it counts again from its next token on");
    }

    #[test]
    fn a_silent_stream_is_preempted_if_the_engine_works_and_another_advances_or_waits() {
        let mut pair = Pair::new();
        pair.pass(15, [10, 0], false);
        assert!(pair.interval() > 19.0, "without heartbeats its connection may be bad");
        let mut pair = Pair::new();
        pair.progress.queue_seen(pair.now - TICK * 2);
        pair.pass(15, [0, 0], true);
        assert!(pair.interval() > 1e3, "no other advances, and nobody waits since");
        let mut pair = Pair::new();
        pair.progress.queue_seen(pair.now);
        pair.pass(8, [0, 0], true);
        assert!((pair.interval() - 10.0).abs() < 2.0, "they may stand in the queue: {}", pair.interval());
        pair.pass(15, [0, 0], true);
        assert_eq!(pair.window.token_seconds(), None, "nobody speaks");
    }

    #[test]
    fn silence_is_that_of_all_sources_and_of_none_without_any() {
        let start = Instant::now();
        let progress = Arc::new(StreamProgress::new(start));
        let after = |ticks| start + TICK * ticks;
        assert_eq!(progress.silence(after(100)), None, "nothing should be heard");
        let first = progress.part(after(100));
        let second = progress.part(after(110));
        assert_eq!(progress.silence(after(115)), Some(TICK * 5));
        first.heard(after(120));
        assert_eq!(progress.silence(after(121)), Some(TICK), "one source speaks for the replica");
        drop((first, second));
        assert_eq!(progress.silence(after(200)), None);
    }
}
