//! The connection loop: a limit on connections, time limits, graceful end.
//!
//! Connections beyond the limit are accepted too: in the kernel's accept queue, health probes would wait behind them. Idle
//! connections are closed to make room; if none is idle, a few more are accepted and get the overflow router (see `places`).

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::connection::{Connection, Place, Routes};
use super::farewell;
use super::listener::AcceptErrors;
use super::places::{Closing, PlaceLimits, Places};
use super::routes::{overflow_router, router};
use super::state::ApiState;

/// Connections beyond `max_connections` that are still answered, with 503 or the health routes.
pub const OVERFLOW_CONNECTIONS: usize = 128;
/// Maximum size of a request's head, and of the read buffer.
const MAX_BUFFER_BYTES: usize = 64 << 10;
/// Idle connections that are closed when file descriptors run out.
const CLOSED_FOR_FILES: usize = 32;
/// HTTP/2 has no idle timeout in the library; pings detect dead clients.
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(30);
/// Connections that may still be closing after they have lost their place, since each still has a file descriptor. The accept loop
/// waits for them a moment, but not for ever: HTTP/2 may send the end of a response.
const CLOSING_CONNECTIONS: usize = 64;
const CLOSING_PATIENCE: Duration = Duration::from_millis(250);
const CLOSING_RETRY: Duration = Duration::from_millis(1);
/// How often to look for a free place when none is available. The accept loop waits meanwhile.
const PLACE_RETRY: Duration = Duration::from_millis(5);

/// Serves until `shutdown`. Then accepts nothing more, and returns when every connection has ended: idle ones soon, others
/// after their current response. The caller limits that time.
///
/// `extra` are additional routes.
pub async fn serve(listener: TcpListener, state: ApiState, extra: Router, shutdown: CancellationToken) {
    let limit = state.config.max_connections;
    let routes = Routes {
        served: router(state.clone()).merge(extra),
        overflow: overflow_router(state.clone(), format!("All {limit} connections are busy (max_connections).")),
    };
    let limits = PlaceLimits { served: limit, overflow: OVERFLOW_CONNECTIONS };
    serve_routes(listener, state, routes, limits, shutdown).await;
}

/// Like `serve`, with the given routes and limits.
pub(super) async fn serve_routes(
    listener: TcpListener,
    state: ApiState,
    routes: Routes,
    limits: PlaceLimits,
    shutdown: CancellationToken,
) {
    let server = Server::new(state, routes, limits, shutdown.clone());
    let mut errors = AcceptErrors::new("clients");
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            // Whoever was accepted is answered, also if the shutdown comes while there is no place.
            Ok((stream, _)) => server.accept(stream).await,
            Err(error) => {
                if errors.note(&error).await {
                    server.places.lock().close_idle(CLOSED_FOR_FILES);
                }
            }
        }
    }
    farewell::close(listener, |stream| server.accept(stream)).await;
    server.connections.close();
    server.connections.wait().await;
}

struct Server {
    state: ApiState,
    routes: Routes,
    places: Arc<Mutex<Places>>,
    builder: Arc<Builder<TokioExecutor>>,
    /// At most so many have a file descriptor, as a rule.
    limit: usize,
    connections: TaskTracker,
    shutdown: CancellationToken,
}

impl Server {
    fn new(state: ApiState, routes: Routes, limits: PlaceLimits, shutdown: CancellationToken) -> Self {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(state.config.header_read_timeout)
            .max_buf_size(MAX_BUFFER_BYTES);
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(HTTP2_PING_INTERVAL);
        let places = Arc::new(Mutex::new(Places::new(limits)));
        let (builder, limit) = (Arc::new(builder), limits.served + limits.overflow + CLOSING_CONNECTIONS);
        Self { state, routes, places, builder, limit, connections: TaskTracker::new(), shutdown }
    }

    /// Waits for a place for the next connection. There is none only while every place is held by a connection younger than the
    /// grace period of a quarter of a second.
    async fn place(&self) -> (Closing, Place) {
        loop {
            let closing = Closing::default();
            match Place::take(&self.places, closing.clone()) {
                Some(place) => return (closing, place),
                None => sleep(PLACE_RETRY).await,
            }
        }
    }

    /// Waits until the connections that have lost their places have closed, but for a few.
    async fn few_are_closing(&self) {
        let deadline = Instant::now() + CLOSING_PATIENCE;
        while self.connections.len() >= self.limit && Instant::now() < deadline {
            sleep(CLOSING_RETRY).await;
        }
    }

    /// Serves the connection as soon as there is a place.
    async fn accept(&self, stream: TcpStream) {
        self.few_are_closing().await;
        let (closing, place) = self.place().await;
        self.state.metrics.http_connections_opened.inc();
        // Tokens are small writes that must not be delayed (Nagle's algorithm).
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "the connection is gone already");
            return;
        }
        let connection = Connection {
            state: self.state.clone(),
            builder: self.builder.clone(),
            routes: self.routes.clone(),
            place,
            closing,
            shutdown: self.shutdown.clone(),
        };
        self.connections.spawn(connection.run(stream));
    }
}
