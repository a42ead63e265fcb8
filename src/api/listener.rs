//! Listening sockets: opening them, and handling connections that cannot be accepted.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, ToSocketAddrs, lookup_host};
use tokio::time::sleep;
use tracing::warn;

/// Length of the accept queue. With the library's 128, a burst of connections overflows it: the kernel drops them, and each
/// affected client, a probe for example, retries only after a second.
const BACKLOG: u32 = 4096;
/// Pause after running out of file descriptors, so that the accept loop does not spin.
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
    // Without this, a restart fails while the kernel still holds connections of the previous process.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Handles errors of `accept`: the listener continues, and logs at most one line per second.
pub struct AcceptErrors {
    /// Who connects, for the log line: `clients`, for example.
    from: &'static str,
    last_line: Option<Instant>,
    /// Errors since the last log line.
    errors: u64,
}

impl AcceptErrors {
    pub fn new(from: &'static str) -> Self {
        Self { from, last_line: None, errors: 0 }
    }

    /// Records the error. If the node is out of file descriptors or memory, waits a moment and returns true. Errors of a single
    /// connection are ignored.
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

    /// The number of errors since the last log line, if another line is due.
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
