//! Stops listening without breaking a connection that its client holds for established.
//!
//! What the kernel has accepted and we have not is reset when a listener closes. So newcomers are turned away first, those
//! whose handshake has begun are taken in, and then the listener closes.

use std::io;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tracing::debug;

/// For handshakes that have begun. A newcomer that is turned away in this time tries again after a second, and is refused.
const HANDSHAKES: Duration = Duration::from_millis(50);

/// Drops what opens a connection: the byte of TCP's flags (13) has SYN (2) and not ACK (16).
const NO_NEWCOMERS: [(u16, u8, u8, u32); 5] = [
    (0x30, 0, 0, 13),       // load the byte
    (0x54, 0, 0, 0x12),     // of it, SYN and ACK
    (0x15, 0, 1, 0x02),     // SYN alone?
    (0x06, 0, 0, 0),        // then drop,
    (0x06, 0, 0, u32::MAX), // else keep
];

/// Closes the listener; gives every connection that was established before to `take`.
pub async fn close(listener: TcpListener, mut take: impl FnMut(TcpStream)) {
    let filter =
        NO_NEWCOMERS.map(|(code, jump_true, jump_false, value)| SockFilter::new(code, jump_true, jump_false, value));
    if let Err(error) = SockRef::from(&listener).attach_filter(&filter) {
        debug!(%error, "newcomers cannot be turned away one by one");
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
        debug!(%error, "the last connections could not be taken in");
    }
}

/// Whoever has come by this moment.
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
    async fn who_is_connected_is_taken_in_and_newcomers_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        // Nobody accepts these; the kernel has established them all the same.
        let clients = [TcpStream::connect(address).await, TcpStream::connect(address).await];
        let clients = clients.map(|client| client.expect("established"));
        let (sender, mut taken) = tokio::sync::mpsc::unbounded_channel();
        let newcomer = tokio::spawn(async move {
            sleep(HANDSHAKES / 5).await;
            TcpStream::connect(address).await.map(drop)
        });
        let begin = Instant::now();
        close(listener, |stream| sender.send(stream).expect("somebody listens")).await;
        assert!(begin.elapsed() < HANDSHAKES * 40, "{:?}", begin.elapsed());
        drop(sender);
        let mut count = 0;
        while let Some(stream) = taken.recv().await {
            let peer = stream.peer_addr().expect("an address");
            assert!(
                clients.iter().any(|client| client.local_addr().expect("an address") == peer),
                "a newcomer came in"
            );
            count += 1;
        }
        assert_eq!(count, clients.len());
        newcomer.await.expect("no panic").expect_err("nobody listens any more");
        TcpStream::connect(address).await.expect_err("nobody listens any more");
    }
}
