//! Listening sockets: how they are opened, and what happens when a connection cannot be accepted.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, ToSocketAddrs, lookup_host};
use tokio::time::sleep;
use tracing::warn;

/// Connections that may wait to be accepted. The library's 128 are few: when more come at once, the kernel drops what they
/// send, and each client that comes then, a probe among them, tries again only a second later.
const BACKLOG: u32 = 4096;
/// Out of file descriptors: the next accept waits, so that the loop does not spin.
const PAUSE: Duration = Duration::from_millis(50);
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Listens on the first of the addresses that can be bound.
pub async fn listen(addresses: impl ToSocketAddrs) -> io::Result<TcpListener> {
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for address in lookup_host(addresses).await? {
        result = listen_on(address);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A restart must not wait until the connections of the process before have left the kernel.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What a listener does about connections that cannot be accepted: it goes on, and says so at most once a second.
pub struct AcceptErrors {
    /// `clients`, or who else connects.
    from: &'static str,
    last_line: Option<Instant>,
    /// Since the last line.
    errors: u64,
}

impl AcceptErrors {
    pub fn new(from: &'static str) -> Self {
        Self { from, last_line: None, errors: 0 }
    }

    /// Notes the error. Returns, after a pause, whether it is the node that has run out of something; what only concerns the
    /// connection is passed over.
    pub async fn note(&mut self, error: &io::Error) -> bool {
        let of_the_connection =
            [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionRefused];
        if of_the_connection.contains(&error.kind()) {
            return false;
        }
        if let Some(errors) = self.count(Instant::now()) {
            warn!(%error, errors, "cannot accept connections from {}", self.from);
        }
        sleep(PAUSE).await;
        true
    }

    /// The errors since the last line, when it is time for one.
    fn count(&mut self, now: Instant) -> Option<u64> {
        self.errors += 1;
        if self.last_line.is_some_and(|last| now.saturating_duration_since(last) < LOG_INTERVAL) {
            return None;
        }
        self.last_line = Some(now);
        Some(std::mem::take(&mut self.errors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_a_second_tells_how_many_there_were() {
        let (mut errors, start) = (AcceptErrors::new("clients"), Instant::now());
        assert_eq!(errors.count(start), Some(1));
        for millis in [50, 100, 999] {
            assert_eq!(errors.count(start + Duration::from_millis(millis)), None);
        }
        assert_eq!(errors.count(start + Duration::from_millis(1000)), Some(4));
        assert_eq!(errors.count(start + Duration::from_millis(1050)), None);
    }

    #[tokio::test]
    async fn a_connection_that_its_client_gave_up_is_no_error_of_ours() {
        let mut errors = AcceptErrors::new("clients");
        assert!(!errors.note(&io::ErrorKind::ConnectionAborted.into()).await);
        assert_eq!(errors.errors, 0);
        assert!(errors.note(&io::Error::from_raw_os_error(24)).await);
    }
}
