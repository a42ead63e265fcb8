//! Connections: accepted up to a limit, bounded in time, ended gracefully.
//!
//! Connections beyond `max_connections` are not left in the kernel's backlog, where health probes would wait with them.
//! A few more are accepted and get the overflow router; what comes beyond these is closed at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::routes::{overflow_router, router};
use super::state::ApiState;
use super::write_timeout::WriteTimeout;

/// Connections beyond `max_connections` that are still answered, with 503 or the health routes.
const OVERFLOW_CONNECTIONS: usize = 64;
/// Bytes of a request's head, and of the read buffer.
const MAX_BUFFER_BYTES: usize = 64 << 10;
/// Out of file descriptors: the next accept waits, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// HTTP/2 has no idle timeout of its own; pings find dead peers.
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(30);

/// Serves until `shutdown`, then accepts nothing more and returns when every connection has ended: idle ones at once, the
/// others after the response that they are in. The caller bounds that time.
///
/// `extra` are routes of the caller's own.
pub async fn serve(listener: TcpListener, state: ApiState, extra: Router, shutdown: CancellationToken) {
    let router = router(state.clone()).merge(extra);
    serve_router(listener, state, router, shutdown).await;
}

/// As `serve`, but these routes.
pub(super) async fn serve_router(listener: TcpListener, state: ApiState, router: Router, shutdown: CancellationToken) {
    let server = Server::new(state, router);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            Ok((stream, _)) => server.accept(stream, &graceful),
            Err(error) => pause_after(error).await,
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn pause_after(error: io::Error) {
    let of_the_peer =
        [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionRefused];
    if !of_the_peer.contains(&error.kind()) {
        warn!(%error, "cannot accept connections");
        sleep(ACCEPT_PAUSE).await;
    }
}

struct Server {
    state: ApiState,
    router: Router,
    overflow_router: Router,
    places: Arc<Semaphore>,
    overflow_places: Arc<Semaphore>,
    builder: Arc<Builder<TokioExecutor>>,
}

impl Server {
    fn new(state: ApiState, router: Router) -> Self {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(state.config.header_read_timeout)
            .max_buf_size(MAX_BUFFER_BYTES);
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(HTTP2_PING_INTERVAL);
        Self {
            router,
            overflow_router: overflow_router(state.clone()),
            places: Arc::new(Semaphore::new(state.config.max_connections)),
            overflow_places: Arc::new(Semaphore::new(OVERFLOW_CONNECTIONS)),
            builder: Arc::new(builder),
            state,
        }
    }

    /// Takes a connection in, or closes it when even the overflow is full.
    fn accept(&self, stream: TcpStream, graceful: &GracefulShutdown) {
        let metrics = &self.state.metrics;
        let (place, router) = match self.places.clone().try_acquire_owned() {
            Ok(place) => (place, self.router.clone()),
            Err(_) => {
                metrics.http_connections_refused.inc();
                let Ok(place) = self.overflow_places.clone().try_acquire_owned() else { return };
                (place, self.overflow_router.clone())
            }
        };
        metrics.http_connections_opened.inc();
        // Tokens are small writes that must not wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "the connection is gone already");
            return;
        }
        let connection = Connection {
            state: self.state.clone(),
            builder: self.builder.clone(),
            router,
            watcher: graceful.watcher(),
            _place: place,
        };
        tokio::spawn(connection.run(stream));
    }
}

struct Connection {
    state: ApiState,
    builder: Arc<Builder<TokioExecutor>>,
    router: Router,
    watcher: Watcher,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let _open = OpenConnection::count(&self.state);
        let has_request = Arc::new(AtomicBool::new(false));
        let service = service_fn({
            let (router, has_request) = (self.router, has_request.clone());
            move |request: hyper::Request<Incoming>| {
                has_request.store(true, Ordering::Relaxed);
                let request: Request = request.map(Body::new);
                router.clone().oneshot(request)
            }
        });
        let stream = WriteTimeout::new(stream, self.state.config.write_timeout);
        let connection = self.builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = self.watcher.watch(connection);
        tokio::pin!(connection);
        // Telling HTTP/1 from HTTP/2 has no time limit in the library, so the first request gets one here.
        let first_request = sleep(self.state.config.header_read_timeout);
        let result = tokio::select! {
            result = &mut connection => result,
            () = first_request => {
                if !has_request.load(Ordering::Relaxed) {
                    return;
                }
                connection.await
            }
        };
        if let Err(error) = result {
            debug!(error, "a connection broke");
        }
    }
}

/// Counts a connection for as long as it is open.
struct OpenConnection(ApiState);

impl OpenConnection {
    fn count(state: &ApiState) -> Self {
        state.metrics.http_connections.inc();
        Self(state.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.metrics.http_connections.dec();
    }
}
