//! One client connection: its requests, its place among all connections (see `places`), and how it ends.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Response, Version};
use bytes::Bytes;
use futures::poll;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::debug;

use super::places::{Closing, ConnectionId, Places, Tier};
use super::state::ApiState;
use super::write_timeout::WriteTimeout;

/// How long an idle HTTP/2 connection that has lost its place may take to close. HTTP/2 may still be sending the end of an
/// answer.
const HTTP2_FAREWELL: Duration = Duration::from_secs(1);

/// While the server shuts down, an HTTP/1.1 connection closes after it has been idle for this long. A busy client sends its
/// next request sooner, and a client that has been idle for longer is unlikely to send one at that moment. Longer than the
/// second after which a kernel retries to connect, so that a client that was delayed at another address can still come back.
const IDLE_GRACE: Duration = Duration::from_secs(2);
/// Polling interval for idle connections during shutdown.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// The routes for connections with a place, and for those in the overflow.
#[derive(Clone)]
pub struct Routes {
    pub served: Router,
    pub overflow: Router,
}

pub struct Connection {
    pub state: ApiState,
    pub builder: Arc<Builder<TokioExecutor>>,
    pub routes: Routes,
    pub place: Place,
    pub closing: Closing,
    /// Cancelled when the whole server shuts down.
    pub shutdown: CancellationToken,
}

impl Connection {
    pub async fn run(self, stream: TcpStream) {
        let _open = OpenConnection::count(&self.state);
        let had_request = Arc::new(AtomicBool::new(false));
        let had_http2 = Arc::new(AtomicBool::new(false));
        let service = service_fn({
            let (place, routes) = (self.place.handle(), self.routes);
            let (had_request, had_http2) = (had_request.clone(), had_http2.clone());
            move |request: hyper::Request<Incoming>| {
                had_request.store(true, Ordering::Relaxed);
                had_http2.fetch_or(request.version() == Version::HTTP_2, Ordering::Relaxed);
                answer(&place, &routes, request)
            }
        });
        let place = self.place.handle();
        let stream = WriteTimeout::new(stream, self.state.config.write_timeout, move || place.occupy());
        let connection = self.builder.serve_connection(TokioIo::new(stream), service).into_owned();
        tokio::pin!(connection);
        // The library has no time limit for detecting HTTP/1 or HTTP/2, so the first request gets one here.
        let first_request = sleep(self.state.config.header_read_timeout);
        tokio::pin!(first_request);
        let (mut is_shutting_down, mut is_ending) = (false, false);
        let result = loop {
            tokio::select! {
                biased;
                () = self.closing.end.cancelled() => {
                    self.state.metrics.http_connections_recycled.inc();
                    if self.closing.cut.is_cancelled() {
                        return;
                    }
                    connection.as_mut().graceful_shutdown();
                    // Sends what is already written, and answers a request that has just arrived.
                    if poll!(connection.as_mut()).is_ready() {
                        return;
                    }
                    if !self.place.is_idle() {
                        break connection.await;
                    }
                    if had_http2.load(Ordering::Relaxed) {
                        let _ = timeout(HTTP2_FAREWELL, connection).await;
                    }
                    return;
                }
                result = &mut connection => break result,
                () = self.shutdown.cancelled(), if !is_shutting_down => is_shutting_down = true,
                () = self.place.may_end(&had_http2), if is_shutting_down && !is_ending => {
                    is_ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut first_request, if !had_request.load(Ordering::Relaxed) => {
                    // The first request may have arrived since the branch was enabled.
                    if !had_request.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        };
        if let Err(error) = result {
            debug!(error, "a connection broke");
        }
    }
}

/// Answers a request, and keeps the place busy until the answer is sent.
fn answer(
    place: &PlaceHandle,
    routes: &Routes,
    request: hyper::Request<Incoming>,
) -> impl Future<Output = Result<Response<Held>, Infallible>> + use<> {
    let has_body = !request.body().is_end_stream();
    let (tier, occupation, receiving) = place.begin(has_body);
    let router = match tier {
        Tier::Served => routes.served.clone(),
        Tier::Overflow => routes.overflow.clone(),
    };
    let request: Request = request.map(|body| Body::new(Arriving { body, receiving }));
    async move {
        let response = router.oneshot(request).await?;
        Ok(response.map(|body| Held { body, _occupation: occupation }))
    }
}

/// A connection's place. Dropping it frees the place.
pub struct Place(PlaceHandle);

impl Place {
    /// Takes a place if one can be had; see `Places::enter`.
    pub fn take(places: &Arc<Mutex<Places>>, closing: Closing) -> Option<Self> {
        let id = places.lock().enter(Instant::now(), closing)?;
        Some(Self(PlaceHandle { places: places.clone(), id }))
    }

    fn handle(&self) -> PlaceHandle {
        self.0.clone()
    }

    fn is_idle(&self) -> bool {
        self.0.places.lock().is_idle(self.0.id)
    }

    /// During shutdown, returns when the connection may close. A request that is on its way must not be lost.
    ///
    /// HTTP/2 tells the client which of its requests were not processed, so such a connection may close at any time. An
    /// HTTP/1.1 client only learns of the shutdown from `connection: close` in its next answer, so an idle connection stays
    /// open for `IDLE_GRACE` in case its client sends another request.
    async fn may_end(&self, had_http2: &AtomicBool) {
        loop {
            let idle_since = self.0.places.lock().idle_since(self.0.id);
            let is_over = idle_since.is_some_and(|since| since.elapsed() >= IDLE_GRACE);
            if is_over || had_http2.load(Ordering::Relaxed) {
                return;
            }
            sleep(IDLE_POLL).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.lock().leave(self.0.id);
    }
}

#[derive(Clone)]
struct PlaceHandle {
    places: Arc<Mutex<Places>>,
    id: ConnectionId,
}

impl PlaceHandle {
    /// Marks the start of a request and, if it has one, of its body.
    fn begin(&self, has_body: bool) -> (Tier, Occupation, Option<Receiving>) {
        let tier = self.places.lock().request_begins(self.id, has_body, Instant::now());
        (tier, Occupation(self.clone()), has_body.then(|| Receiving(self.clone())))
    }

    fn occupy(&self) -> Occupation {
        self.places.lock().occupy(self.id, Instant::now());
        Occupation(self.clone())
    }
}

/// While this value exists, the connection is not idle.
struct Occupation(PlaceHandle);

impl Drop for Occupation {
    fn drop(&mut self) {
        self.0.places.lock().vacate(self.0.id, Instant::now());
    }
}

/// While this value exists, the body of a request is incomplete.
struct Receiving(PlaceHandle);

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.places.lock().body_ends(self.0.id);
    }
}

/// The body of a request.
struct Arriving {
    body: Incoming,
    receiving: Option<Receiving>,
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if self.body.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.receiving = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer.
struct Held {
    body: Body,
    _occupation: Occupation,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
