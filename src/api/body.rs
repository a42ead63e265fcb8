//! Reads a request body within its limits of size and time.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::config::Config;
use super::content_coding::ContentCoding;
use super::error::ApiError;
use super::json;
use crate::types::{Failure, FailureKind};

/// Reads the body as JSON; the content type is not checked.
pub async fn read_json<T: DeserializeOwned>(config: &Config, headers: &HeaderMap, body: Body) -> Result<T, ApiError> {
    Ok(json::parse(&read(config, headers, body).await?)?)
}

/// Reads the whole body and decodes it if it is compressed. The size limit applies before and after decoding.
pub async fn read(config: &Config, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let coding = ContentCoding::of(headers)?;
    let (bytes, limit) = (read_as_sent(config, headers, body).await?, config.max_body_bytes);
    if coding == ContentCoding::Identity {
        return Ok(bytes);
    }
    // A few compressed bytes may decode to `max_body_bytes`, so this is blocking work.
    let decoding = spawn_blocking(move || coding.decode(bytes, limit));
    let failed = |_| Failure::new(FailureKind::Internal, "The body could not be decoded.");
    match decoding.await.map_err(failed)?? {
        decoded if decoded.len() > limit => Err(too_large(limit)),
        decoded => Ok(decoded),
    }
}

async fn read_as_sent(config: &Config, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let limit = config.max_body_bytes;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    match timeout(config.body_read_timeout, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(limit)),
        Ok(Err(_)) => {
            let message = "The connection broke while the body was read.";
            Err(Failure::new(FailureKind::InvalidRequest, message).with_code("incomplete_body").into())
        }
        Err(_) => {
            let message = format!("The body did not arrive within {} s.", config.body_read_timeout.as_secs_f64());
            let failure = Failure::new(FailureKind::InvalidRequest, message).with_code("body_timeout");
            Err(ApiError::with_status(StatusCode::REQUEST_TIMEOUT, failure))
        }
    }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("The body is larger than {limit} bytes (max_body_bytes).");
    let failure = Failure::new(FailureKind::InvalidRequest, message).with_code("body_too_large");
    ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, failure)
}
