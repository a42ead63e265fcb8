//! Stops listening without breaking a connection that is established from its client's point of view.
//!
//! When a listener closes, the kernel resets connections that it has established and that we have not accepted. So new
//! connections are refused first, those whose handshake has begun are accepted, and then the listener closes.

use std::io;
use std::num::NonZeroU32;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::listener::AcceptErrors;

/// Time for handshakes that have begun to finish: several round trips on most networks.
const HANDSHAKES: Duration = Duration::from_millis(200);
/// An interface index that no interface has. The kernel refuses new connections to a listener that is bound to it, as if
/// nobody were listening. Handshakes that began before continue.
const NO_INTERFACE: NonZeroU32 = NonZeroU32::new(i32::MAX as u32).expect("not zero");

/// Closes the listener and passes every connection that was established before to `take`, one after the other.
pub async fn close<T: Future<Output = ()>>(listener: TcpListener, take: impl Fn(TcpStream) -> T) {
    // IPv4 and IPv6 share this option. Kernels before 5.7 do not have it.
    if let Err(error) = SockRef::from(&listener).bind_device_by_index_v4(Some(NO_INTERFACE)) {
        debug!(%error, "cannot refuse new connections before the listener closes");
    }
    let (end, mut errors) = (Instant::now() + HANDSHAKES, AcceptErrors::new("clients"));
    // Only the wait for connections is limited: `take` may wait longer for a place, and must not be cut off.
    while Instant::now() < end {
        match timeout_at(end, listener.accept()).await {
            Ok(Ok((stream, _))) => take(stream).await,
            Ok(Err(error)) => _ = errors.note(&error).await,
            Err(_) => break,
        }
    }
    let mut rest = Vec::new();
    if let Err(error) = accept_rest(listener, &mut rest) {
        debug!(%error, "cannot accept the last connections");
    }
    for stream in rest {
        take(stream).await;
    }
}

/// Accepts the connections that are established by now, at most as many as fit into the accept queue, and closes the listener.
fn accept_rest(listener: TcpListener, rest: &mut Vec<TcpStream>) -> io::Result<()> {
    let listener = listener.into_std()?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                rest.push(TcpStream::from_std(stream)?);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn who_is_connected_is_taken_in_and_newcomers_are_refused_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        // Nobody has accepted these connections, but the kernel has established them.
        let clients = [TcpStream::connect(address).await, TcpStream::connect(address).await];
        let clients = clients.map(|client| client.expect("established"));
        let (sender, mut taken) = tokio::sync::mpsc::unbounded_channel();
        let newcomer = tokio::spawn(async move {
            sleep(HANDSHAKES / 5).await;
            let begin = Instant::now();
            (TcpStream::connect(address).await.map(drop), begin.elapsed())
        });
        let begin = Instant::now();
        close(listener, async |stream| sender.send(stream).expect("somebody listens")).await;
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        drop(sender);
        let mut count = 0;
        while let Some(stream) = taken.recv().await {
            let peer = stream.peer_addr().expect("an address");
            assert!(
                clients.iter().any(|client| client.local_addr().expect("an address") == peer),
                "a new connection was accepted"
            );
            count += 1;
        }
        assert_eq!(count, clients.len());
        let (refused, after) = newcomer.await.expect("no panic");
        refused.expect_err("nobody listens any more");
        // If the packet had been dropped, the client's kernel would retry after one second.
        assert!(after < Duration::from_millis(900), "dropped, not refused: {after:?}");
        TcpStream::connect(address).await.expect_err("nobody listens any more");
    }

    #[tokio::test]
    async fn who_has_to_wait_to_be_taken_in_is_not_lost() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.expect("established"));
        }
        let taken = AtomicUsize::new(0);
        let take = async |_stream| {
            sleep(HANDSHAKES).await;
            taken.fetch_add(1, Ordering::Relaxed);
        };
        close(listener, take).await;
        assert_eq!(taken.into_inner(), clients.len());
    }
}
