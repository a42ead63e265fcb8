//! Lines for a stream that may stop taking them: a pipe that nobody reads, a full disk, a stopped terminal. Who writes never
//! waits. A thread writes what is queued; what finds no room in the queue, or fails to be written, is dropped and counted.
//!
//! Knows nothing of what the lines say. (`tracing-appender` does nearly this, but it counts no failed write, bounds lines and
//! not bytes, and prints to standard output at its end, which hangs when that is the same blocked pipe.)

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Bytes that may wait.
const MAX_QUEUED_BYTES: usize = 1 << 20;
/// A stream in non-blocking mode that takes nothing is tried again after this.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// While lines are being dropped and the queue is never empty, this long passes between two reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Is told how many lines were dropped since it was last told. Called on the writing thread, after a line was written.
pub type OnDropped = Box<dyn Fn(u64) + Send>;

/// A handle; cheap to clone. Each `write` is one line, and always succeeds.
#[derive(Clone)]
pub struct Sink(Arc<SinkState>);

struct SinkState {
    queue: Mutex<QueuedLines>,
    /// A line was queued.
    queued: Condvar,
    /// Nothing is queued or being written any more.
    idle: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct QueuedLines {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    is_writing: bool,
}

impl Sink {
    /// Starts the thread that writes to `stream`; it lives as long as the process.
    pub fn start(name: &str, stream: impl Write + Send + 'static, on_dropped: Option<OnDropped>) -> io::Result<Self> {
        let shared = Arc::new(SinkState {
            queue: Mutex::default(),
            queued: Condvar::new(),
            idle: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        let sink = Self(shared.clone());
        thread::Builder::new().name(name.to_owned()).spawn(move || shared.write_forever(stream, on_dropped))?;
        Ok(sink)
    }

    /// Queues a line, or drops it when there is no room.
    pub fn push(&self, line: &[u8]) {
        let mut queue = self.0.queue.lock();
        if queue.bytes + line.len() > MAX_QUEUED_BYTES {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line.to_vec());
        drop(queue);
        self.0.queued.notify_one();
    }

    /// Lines that were not written, so far.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything is written, but not longer than `limit`.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut queue = self.0.queue.lock();
        while queue.is_writing || !queue.lines.is_empty() {
            if self.0.idle.wait_until(&mut queue, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SinkState {
    fn write_forever(&self, mut stream: impl Write, on_dropped: Option<OnDropped>) -> ! {
        let mut reported = 0;
        let mut last_report: Option<Instant> = None;
        loop {
            let (line, is_last) = self.next();
            if write_line(&mut stream, &line).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let dropped = self.dropped.load(Ordering::Relaxed);
            let is_due = is_last || last_report.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL);
            if let Some(on_dropped) = on_dropped.as_ref().filter(|_| dropped > reported && is_due) {
                on_dropped(dropped - reported);
                (reported, last_report) = (dropped, Some(Instant::now()));
            }
        }
    }

    /// The next line, and whether no other waits behind it.
    fn next(&self) -> (Vec<u8>, bool) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.is_writing = true;
                return (line, queue.lines.is_empty());
            }
            queue.is_writing = false;
            self.idle.notify_all();
            self.queued.wait(&mut queue);
        }
    }
}

/// `write_all`, but a stream in non-blocking mode is waited for.
#[expect(clippy::disallowed_methods, reason = "the sink's own thread")]
fn write_line(stream: &mut impl Write, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
            Err(error) => return Err(error),
        }
    }
    stream.flush()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A stream that can be blocked and broken, and keeps what it took.
    #[derive(Clone, Default)]
    struct Stream(Arc<StreamState>);

    #[derive(Default)]
    struct StreamState {
        text: Mutex<String>,
        is_blocked: AtomicBool,
        is_broken: AtomicBool,
    }

    impl Stream {
        fn text(&self) -> String {
            self.0.text.lock().clone()
        }

        fn block(&self, blocked: bool) {
            self.0.is_blocked.store(blocked, Ordering::SeqCst);
        }

        fn break_it(&self, broken: bool) {
            self.0.is_broken.store(broken, Ordering::SeqCst);
        }
    }

    impl Write for Stream {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.is_broken.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if self.0.is_blocked.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // A byte at a time, as a nearly full pipe takes them.
            self.0.text.lock().push(char::from(bytes[0]));
            Ok(1)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A sink, and what was reported as dropped.
    fn sink(stream: &Stream) -> (Sink, Arc<Mutex<Vec<u64>>>) {
        let reports: Arc<Mutex<Vec<u64>>> = Arc::default();
        let told = reports.clone();
        let on_dropped: OnDropped = Box::new(move |lines| told.lock().push(lines));
        (Sink::start("sink", stream.clone(), Some(on_dropped)).expect("a thread"), reports)
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn lines_come_out_in_order_and_whole() {
        let stream = Stream::default();
        let (sink, reports) = sink(&stream);
        for line in 0..100 {
            sink.push(format!("{line}\n").as_bytes());
        }
        sink.flush(PATIENCE);
        assert_eq!(stream.text(), (0..100).map(|line| format!("{line}\n")).collect::<String>());
        assert_eq!((sink.dropped(), reports.lock().len()), (0, 0));
    }

    #[test]
    fn a_blocked_stream_holds_up_nobody_and_what_was_dropped_is_told_once() {
        let stream = Stream::default();
        let (sink, reports) = sink(&stream);
        stream.block(true);
        let line = [b'x'; 1 << 10];
        let start = Instant::now();
        for _ in 0..3000 {
            sink.push(&line);
        }
        // Its end has a bound, too.
        sink.flush(Duration::from_millis(50));
        assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
        let dropped = sink.dropped();
        // One line may be in the writer's hands.
        assert!((1975..=1976).contains(&dropped), "{dropped}");
        assert!(reports.lock().is_empty(), "told before the stream works");
        stream.block(false);
        until("the rest is written", || stream.text().len() as u64 == (3000 - dropped) << 10);
        until("told", || !reports.lock().is_empty());
        sink.push(b"y");
        sink.flush(PATIENCE);
        assert_eq!(reports.lock().iter().sum::<u64>(), dropped);
        assert!(reports.lock().len() <= 2, "{:?}", reports.lock());
    }

    #[test]
    fn a_full_disk_costs_lines_and_is_told_when_there_is_room_again() {
        let stream = Stream::default();
        let (sink, reports) = sink(&stream);
        stream.break_it(true);
        for _ in 0..3 {
            sink.push(b"lost\n");
        }
        sink.flush(PATIENCE);
        assert_eq!((sink.dropped(), stream.text().as_str()), (3, ""));
        stream.break_it(false);
        sink.push(b"kept\n");
        sink.flush(PATIENCE);
        assert_eq!(stream.text(), "kept\n");
        until("told", || *reports.lock() == [3]);
    }
}
