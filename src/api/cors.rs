//! CORS: which web pages may call the API from a browser and read its responses.
//!
//! Applies to the API only. Probes, metrics, the admin address and fault injection are not available to web pages.

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use tower::{Layer, ServiceExt};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use super::config::Config;

/// Allows all origins, methods or headers.
const ALL: &str = "*";
/// How long a browser may cache the response to a preflight request.
const MAX_AGE: std::time::Duration = std::time::Duration::from_secs(600);

/// The CORS configuration of the API.
#[derive(Clone)]
pub struct Cors(CorsLayer);

impl Cors {
    /// None if no page may call the API. Expects a valid configuration.
    pub fn new(config: &Config) -> Option<Self> {
        if config.allowed_origins.is_empty() {
            return None;
        }
        let origins = match allows_all(&config.allowed_origins) {
            true => AllowOrigin::any(),
            false => AllowOrigin::list(config.allowed_origins.iter().filter_map(|text| parse_origin(text).ok())),
        };
        // A literal `*` would not cover the header `authorization`, and is invalid together with credentials. So the request's
        // own method and headers are returned.
        let methods = match allows_all(&config.allowed_methods) {
            true => AllowMethods::mirror_request(),
            false => AllowMethods::list(config.allowed_methods.iter().filter_map(|text| parse_method(text).ok())),
        };
        let headers = match allows_all(&config.allowed_headers) {
            true => AllowHeaders::mirror_request(),
            false => AllowHeaders::list(config.allowed_headers.iter().filter_map(|text| parse_header(text).ok())),
        };
        let exposed =
            ["x-request-id", "x-outrigger-node", "retry-after", "idempotency-key"].map(HeaderName::from_static);
        let layer = CorsLayer::new()
            .allow_origin(origins)
            .allow_methods(methods)
            .allow_headers(headers)
            .allow_credentials(config.allow_credentials)
            .expose_headers(exposed)
            .max_age(MAX_AGE);
        Some(Self(layer))
    }
}

/// Middleware around every route of the API.
pub async fn cors(State(Cors(layer)): State<Cors>, request: Request, next: Next) -> Response {
    let is_preflight = request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if request.method() == Method::OPTIONS && !is_preflight {
        return next.run(request).await;
    }
    let Ok(response) = layer.layer(next).oneshot(request).await;
    response
}

fn allows_all(values: &[String]) -> bool {
    values.iter().any(|value| value == ALL)
}

/// Reports every problem, each with the key's name.
pub(super) fn validate(config: &Config, errors: &mut Vec<String>) {
    let lists = [
        ("allowed_origins", &config.allowed_origins, parse_origin as fn(&str) -> Result<HeaderValue, String>),
        ("allowed_methods", &config.allowed_methods, |text| parse_method(text).map(|_| HeaderValue::from_static(ALL))),
        ("allowed_headers", &config.allowed_headers, |text| parse_header(text).map(|_| HeaderValue::from_static(ALL))),
    ];
    for (key, values, parse) in lists {
        let problems = values.iter().filter(|value| *value != ALL).filter_map(|value| parse(value).err());
        errors.extend(problems.map(|problem| format!("{key}: {problem}")));
    }
    if config.allow_credentials && allows_all(&config.allowed_origins) {
        errors.push(
            "allow_credentials needs a list of allowed_origins: `*` would let any web page act for its visitors".into(),
        );
    }
}

/// `https://example.org`, `http://localhost:3000`, or the `null` of local files, exactly as browsers send it.
fn parse_origin(text: &str) -> Result<HeaderValue, String> {
    let is_plain = |rest: &str| !rest.is_empty() && !rest.contains(['/', '?', '#', '@', ' ']);
    let is_origin =
        text == "null" || text.split_once("://").is_some_and(|(scheme, rest)| !scheme.is_empty() && is_plain(rest));
    let value = HeaderValue::from_str(text).ok().filter(|_| is_origin);
    value.ok_or_else(|| {
        format!("`{text}` is not an origin such as https://example.org or http://localhost:3000, without a path")
    })
}

fn parse_method(text: &str) -> Result<Method, String> {
    text.parse().map_err(|_| format!("`{text}` is not an HTTP method"))
}

fn parse_header(text: &str) -> Result<HeaderName, String> {
    text.parse().map_err(|_| format!("`{text}` is not the name of a header"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(config: Config) -> Vec<String> {
        let mut errors = Vec::new();
        validate(&config, &mut errors);
        errors
    }

    fn origins(origins: &[&str]) -> Config {
        Config { allowed_origins: origins.iter().map(ToString::to_string).collect(), ..Config::default() }
    }

    #[test]
    fn origins_are_written_as_browsers_send_them() {
        assert!(problems(origins(&["*"])).is_empty());
        assert!(
            problems(origins(&["https://a.example", "http://localhost:3000", "null", "http://[::1]:80"])).is_empty()
        );
        for wrong in ["https://a.example/", "a.example", "https://", "https://a.example/x", "https://u@a.example", ""] {
            let found = problems(origins(&[wrong]));
            assert!(found.len() == 1 && found[0].starts_with("allowed_origins: "), "{wrong}: {found:?}");
        }
        let config =
            Config { allowed_methods: vec!["PO ST".into()], allowed_headers: vec!["x y".into()], ..Config::default() };
        assert_eq!(problems(config).len(), 2);
    }

    #[test]
    fn credentials_are_for_named_origins() {
        let any = Config { allow_credentials: true, ..Config::default() };
        assert!(problems(any)[0].starts_with("allow_credentials"));
        assert!(problems(Config { allow_credentials: true, ..origins(&["https://a.example"]) }).is_empty());
    }
}
