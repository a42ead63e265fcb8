//! Disconnects clients that read nothing for `write_timeout`. Without it, a client that stops reading, or vanishes without
//! closing the connection, would hold its connection, its admission permit and its buffered events until the kernel gives up.
//! Knows nothing of HTTP.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A stream that fails when a write makes no progress for `limit`.
pub struct WriteTimeout<S, F, G> {
    stream: S,
    limit: Duration,
    /// Creates a guard that is held while a write waits.
    on_wait: F,
    waiting: Option<(Pin<Box<Sleep>>, G)>,
}

impl<S: Unpin, F: Fn() -> G + Unpin, G: Unpin> WriteTimeout<S, F, G> {
    pub fn new(stream: S, limit: Duration, on_wait: F) -> Self {
        Self { stream, limit, on_wait, waiting: None }
    }

    fn bounded<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let done @ Poll::Ready(_) = write(Pin::new(&mut self.stream), context) {
            self.waiting = None;
            return done;
        }
        let (limit, on_wait) = (self.limit, &self.on_wait);
        let (time, _) = self.waiting.get_or_insert_with(|| (Box::pin(sleep(limit)), on_wait()));
        ready!(time.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin, F: Unpin, G: Unpin> AsyncRead for WriteTimeout<S, F, G> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin, F: Fn() -> G + Unpin, G: Unpin> AsyncWrite for WriteTimeout<S, F, G> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.bounded(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.bounded(context, |stream, context| stream.poll_write_vectored(context, pieces))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bounded(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bounded(context, |stream, context| stream.poll_shutdown(context))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::{Instant, timeout};

    use super::*;

    /// Long compared with the pauses of a loaded machine.
    const LIMIT: Duration = Duration::from_secs(2);

    #[tokio::test]
    async fn a_reader_that_stops_is_given_up_and_a_slow_one_is_not() {
        let (ours, mut theirs) = duplex(1);
        let held = Arc::new(());
        let mut writer = WriteTimeout::new(ours, LIMIT, || held.clone());
        let slow_reader = tokio::spawn(async move {
            for _ in 0..5 {
                sleep(LIMIT / 4).await;
                theirs.read_u8().await.expect("a byte");
            }
            theirs
        });
        writer.write_all(b"123456").await.expect("slow is allowed");
        assert_eq!(Arc::strong_count(&held), 1, "nothing waits any more");
        let _silent = slow_reader.await.expect("no panic");
        let start = Instant::now();
        assert!(timeout(LIMIT / 4, writer.write_all(b"7")).await.is_err());
        assert_eq!(Arc::strong_count(&held), 2, "a write waits");
        let error = timeout(10 * LIMIT, writer.write_all(b"7")).await.expect("it ends").expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= LIMIT, "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn our_own_silence_counts_for_nothing() {
        let (ours, mut theirs) = duplex(4);
        let mut writer = WriteTimeout::new(ours, Duration::from_millis(1), || ());
        assert!(timeout(Duration::from_millis(50), writer.read_u8()).await.is_err(), "reading has no bound here");
        writer.write_all(b"ok").await.expect("there is room");
        assert_eq!(theirs.read_u16().await.expect("two bytes"), u16::from_be_bytes(*b"ok"));
    }
}
