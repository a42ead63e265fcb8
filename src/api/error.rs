//! Failures as HTTP responses: the status, and a body in OpenAI's shape `{"error": {message, type, param, code}}`.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tracing::{debug, error};

use super::content_coding;
use crate::types::reaction::Log;
use crate::types::{Failure, FailureKind};

/// An error response.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: FailureKind,
    body: ErrorBody,
    retry_after: Option<Duration>,
}

#[derive(Debug, Serialize)]
struct ErrorEnvelope<'a> {
    error: &'a ErrorBody,
}

#[derive(Debug, Serialize)]
struct ErrorBody {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: &'static str,
}

impl ApiError {
    /// A failure with another status than its kind's.
    pub fn with_status(status: StatusCode, failure: Failure) -> Self {
        Self { status, ..Self::of(&failure) }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::with_status(
            StatusCode::NOT_FOUND,
            Failure::new(FailureKind::InvalidRequest, message).with_code("not_found"),
        )
    }

    pub fn model_not_found(model: &str) -> Self {
        let shown: String = model.chars().take(200).collect();
        let failure = Failure::invalid("model", format!("The model `{shown}` is not served here. See /v1/models."));
        Self::with_status(StatusCode::NOT_FOUND, failure.with_code("model_not_found"))
    }

    fn of(failure: &Failure) -> Self {
        let status = StatusCode::from_u16(failure.kind.reaction().status).expect("the table has HTTP statuses");
        Self { status, kind: failure.kind, body: ErrorBody::of(failure), retry_after: failure.retry_after }
    }

    /// The error as JSON, for a stream that has already started.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&ErrorEnvelope { error: &self.body }).expect("strings serialize")
    }
}

impl ErrorBody {
    fn of(failure: &Failure) -> Self {
        Self {
            message: failure.message.clone(),
            r#type: failure.kind.reaction().error_type,
            param: failure.param.clone(),
            code: failure.shown_code(),
        }
    }
}

impl From<Failure> for ApiError {
    /// Logs the failure, since this is where it is handled.
    fn from(failure: Failure) -> Self {
        log(&failure);
        Self::of(&failure)
    }
}

fn log(failure: &Failure) {
    let kind = failure.kind.label();
    match failure.kind.reaction().log {
        Log::Fault => {
            let source = failure.source.as_deref().map(|source| source as &dyn std::error::Error);
            error!(kind, source, "a request failed: {}", failure.message);
        }
        Log::Refusal => debug!(kind, code = failure.code, "a request was refused or cut short"),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], self.to_json()).into_response();
        if let Some(delay) = self.retry_after {
            // Whole seconds, rounded up: a client that comes back earlier would be refused again.
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(content_coding::SUPPORTED));
        }
        // The `observe` middleware counts failures by kind.
        response.extensions_mut().insert(self.kind);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_an_error_status() {
        for kind in FailureKind::ALL {
            let error = ApiError::from(Failure::new(kind, "m"));
            assert!(error.status.as_u16() >= 400, "{kind:?}");
        }
    }

    #[test]
    fn the_body_is_openai_shaped() {
        let error = ApiError::from(Failure::invalid("top_p", "too \"high\"").with_code("out_of_range"));
        let value: serde_json::Value = serde_json::from_str(&error.to_json()).expect("JSON");
        let expected = serde_json::json!({"error": {
            "message": "too \"high\"", "type": "invalid_request_error", "param": "top_p", "code": "out_of_range"
        }});
        assert_eq!(value, expected);
    }

    #[test]
    fn retry_after_is_rounded_up_to_whole_seconds() {
        for (delay, header) in
            [(Duration::from_millis(1), "1"), (Duration::from_millis(2500), "3"), (Duration::ZERO, "1")]
        {
            let failure = Failure::new(FailureKind::Overloaded, "full").with_retry_after(delay);
            let response = ApiError::from(failure).into_response();
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()[header::RETRY_AFTER], header);
        }
    }
}
