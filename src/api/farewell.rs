//! Stops listening without breaking a connection that is established from its client's point of view.
//!
//! When a listener closes, the kernel resets connections that it has established and that we have not accepted. So new
//! connections are refused first, those whose handshake has begun are accepted, and then the listener closes.

use std::io;
use std::num::NonZeroU32;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tracing::debug;

/// Time for handshakes that have begun to finish: several round trips on most networks.
const HANDSHAKES: Duration = Duration::from_millis(200);
/// An interface index that no interface has. The kernel refuses new connections to a listener that is bound to it, as if
/// nobody were listening. Handshakes that began before continue.
const NO_INTERFACE: NonZeroU32 = NonZeroU32::new(i32::MAX as u32).expect("not zero");

/// Closes the listener and passes every connection that was established before to `take`.
pub async fn close(listener: TcpListener, mut take: impl FnMut(TcpStream)) {
    // IPv4 and IPv6 share this option. Kernels before 5.7 do not have it.
    if let Err(error) = SockRef::from(&listener).bind_device_by_index_v4(Some(NO_INTERFACE)) {
        debug!(%error, "cannot refuse new connections before the listener closes");
    }
    let handshakes = async {
        loop {
            if let Ok((stream, _)) = listener.accept().await {
                take(stream);
            }
        }
    };
    let _: Result<(), _> = timeout(HANDSHAKES, handshakes).await;
    if let Err(error) = take_rest(listener, take) {
        debug!(%error, "cannot accept the last connections");
    }
}

/// Accepts the connections that are established by now.
fn take_rest(listener: TcpListener, mut take: impl FnMut(TcpStream)) -> io::Result<()> {
    let listener = listener.into_std()?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                take(TcpStream::from_std(stream)?);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

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
        close(listener, |stream| sender.send(stream).expect("somebody listens")).await;
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
}
