//! The server on `admin_addr`, for operators: `/cluster` (the cluster as this node sees it), and the probes and metrics that
//! the main port serves as well. Several nodes on one machine need different addresses.
//!
//! Its connection limit is separate from the main port's, so probes are answered here however many clients the main port has.
//!
//! `/cluster` shows node names and addresses, so it requires a key of `api_keys` if the API requires keys. This module knows nothing of routing:
//! a function passed to it supplies the overview.

use std::sync::Arc;

use axum::http::header;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::connection::Routes;
use super::places::PlaceLimits;
use super::routes::{finish, overflow_router, require_operator, unknown_route};
use super::server::serve_routes;
use super::state::ApiState;
use crate::router::ClusterOverview;

/// Returns the current overview of the cluster.
pub type OverviewSource = Arc<dyn Fn() -> ClusterOverview + Send + Sync>;

/// Connection limits of the admin address.
pub const ADMIN_LIMITS: PlaceLimits = PlaceLimits { served: 64, overflow: 16 };

/// Serves until `shutdown`, like the main port.
pub async fn serve(listener: TcpListener, state: ApiState, overview: OverviewSource, shutdown: CancellationToken) {
    let busy = format!("All {} connections of admin_addr are busy.", ADMIN_LIMITS.served);
    let overflow = overflow_router(state.clone(), busy);
    let routes = Routes { served: admin_router(state.clone(), overview), overflow };
    serve_routes(listener, state, routes, ADMIN_LIMITS, shutdown).await;
}

/// All routes of the admin address.
pub fn admin_router(state: ApiState, overview: OverviewSource) -> Router {
    let guarded = Router::new()
        .route("/cluster", get(cluster))
        .route_layer(from_fn_with_state(state.clone(), require_operator))
        .layer(Extension(Overview(overview)));
    finish(guarded.fallback(unknown_route), state)
}

#[derive(Clone)]
struct Overview(OverviewSource);

async fn cluster(Extension(Overview(overview)): Extension<Overview>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(overview())).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::admission::{self, AdmissionController};
    use crate::api::Config;
    use crate::cluster::LoadReport;
    use crate::health::{self, Health};
    use crate::observability::Metrics;
    use crate::router::{self, NodeOverview, StreamCounts};
    use crate::tenancy::{Directory, KeyDigest, Tenants, TenantsFile};
    use crate::types::NodeId;

    fn overview() -> ClusterOverview {
        ClusterOverview {
            cluster_id: "c".into(),
            node: NodeOverview {
                id: NodeId::new("a"),
                incarnation: 1,
                version: "0.1.0".into(),
                zone: String::new(),
                peer_addr: None,
                models: Vec::new(),
                report: LoadReport::default(),
            },
            peers: Vec::new(),
            pace: None,
            dead: Vec::new(),
            streams: StreamCounts::default(),
            keys: Vec::new(),
            problems: Vec::new(),
        }
    }

    fn router(api_keys: &[&str]) -> Router {
        router_with(api_keys, None)
    }

    fn router_with(api_keys: &[&str], file: Option<&TenantsFile>) -> Router {
        let metrics = Arc::new(Metrics::new("tiny"));
        let health = Health::new(health::Config::default(), metrics.clone());
        let admission = AdmissionController::new(admission::Config::default(), 1, metrics.clone());
        let config = Config { api_keys: api_keys.iter().map(ToString::to_string).collect(), ..Config::default() };
        let router =
            router::Router::alone(router::Config::default(), admission.clone(), health.clone(), metrics.clone());
        let tenants = Tenants::new(Directory::new(&config.api_keys, file).expect("valid keys"));
        let state = ApiState::new(config, tenants, metrics, admission, health, router);
        admin_router(state, Arc::new(overview))
    }

    async fn get(router: Router, path: &str, key: Option<&str>) -> (StatusCode, String) {
        let mut request = Request::get(path);
        if let Some(key) = key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let response = router.oneshot(request.body(Body::empty()).expect("a request")).await.expect("infallible");
        let status = response.status();
        let body = response.into_body().collect().await.expect("a whole body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("UTF-8"))
    }

    #[tokio::test]
    async fn the_cluster_is_told_and_probes_answer_as_on_the_main_port() {
        let (status, body) = get(router(&[]), "/cluster", None).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(serde_json::from_str::<ClusterOverview>(&body).expect("an overview"), overview());
        for path in ["/livez", "/metrics", "/version"] {
            assert_eq!(get(router(&[]), path, None).await.0, StatusCode::OK, "{path}");
        }
        for path in ["/readyz", "/startupz"] {
            assert_eq!(
                get(router(&[]), path, None).await.0,
                StatusCode::SERVICE_UNAVAILABLE,
                "{path}: nothing is loaded"
            );
        }
        assert_eq!(get(router(&[]), "/v1/models", None).await.0, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn where_the_api_wants_a_key_the_cluster_does_too_and_probes_do_not() {
        assert_eq!(get(router(&["k"]), "/cluster", None).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(get(router(&["k"]), "/cluster", Some("other")).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(get(router(&["k"]), "/cluster", Some("k")).await.0, StatusCode::OK);
        assert_eq!(get(router(&["k"]), "/livez", None).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn the_cluster_is_not_for_tenants() {
        let file = format!(
            "[[organization]]\nid = \"acme\"\n[[organization.user]]\nid = \"ana\"\n[[organization.user.key]]\nsha256 = \"{}\"",
            KeyDigest::of("hers")
        );
        let file = TenantsFile::parse(&file).expect("valid");
        let cluster = async |key: &str| get(router_with(&["k"], Some(&file)), "/cluster", Some(key)).await;
        let (status, body) = cluster("hers").await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        assert!(body.contains("only keys of `api_keys`"), "{body}");
        assert_eq!(cluster("k").await.0, StatusCode::OK);
    }
}
