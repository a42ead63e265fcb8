//! Configuration of the HTTP server: addresses, limits, API keys, CORS.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::cors;
use crate::tenancy::{check_keys, is_digest};

#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address to listen on. Default: `127.0.0.1`.
    pub host: String,
    /// Port to listen on; 0 picks a free one. Default: 8000.
    pub port: u16,
    /// Connections served at once. Beyond this, the longest idle connection is closed to make room. If none is idle, new
    /// connections get 503, except for health and metrics. Default: 900.
    pub max_connections: usize,
    /// Maximum size of a request body, in bytes. Default: 4 MiB.
    pub max_body_bytes: usize,
    /// Time limit for receiving a request's head, and for idle connections. Default: 30 s.
    pub header_read_timeout: Duration,
    /// Time limit for receiving a request's body. Default: 60 s.
    pub body_read_timeout: Duration,
    /// Disconnect a client that reads nothing for this long. Default: 60 s.
    pub write_timeout: Duration,
    /// Send a comment line on a stream that has been silent for this long. Default: 5 s.
    pub stream_keep_alive: Duration,
    /// Maximum prompt length, in tokens. Default: the model's context.
    pub max_input_tokens: Option<u32>,
    /// Maximum tokens generated per choice. Default: the model's context.
    pub max_output_tokens: Option<u32>,
    /// Address of the admin server. Default: none.
    pub admin_addr: Option<SocketAddr>,
    /// API keys, sent by clients as `Authorization: Bearer …`. Each is plain, or `sha256:` and 64 hexadecimal digits. Default:
    /// none, which admits everybody.
    pub api_keys: Vec<String>,
    /// Organizations, users and their keys. Default: none.
    pub tenants_file: Option<PathBuf>,
    /// Whether prompts of different tenants never share cached blocks. Default: false.
    pub isolate_prefix_cache: bool,
    /// Origins of web pages that may call the API. `*` allows all; an empty list disables CORS. Default: `*`, as in vLLM.
    pub allowed_origins: Vec<String>,
    /// HTTP methods that web pages may use. Default: `*`.
    pub allowed_methods: Vec<String>,
    /// Request headers that web pages may send. Default: `*`.
    pub allowed_headers: Vec<String>,
    /// Whether browsers may send cookies and other credentials. Default: false.
    pub allow_credentials: bool,
}

impl fmt::Debug for Config {
    /// Leaves the keys out, so that they do not reach logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            host,
            port,
            max_connections,
            max_body_bytes,
            header_read_timeout,
            body_read_timeout,
            write_timeout,
            stream_keep_alive,
            max_input_tokens,
            max_output_tokens,
            admin_addr,
            api_keys,
            tenants_file,
            isolate_prefix_cache,
            allowed_origins,
            allowed_methods,
            allowed_headers,
            allow_credentials,
        } = self;
        f.debug_struct("Config")
            .field("host", host)
            .field("port", port)
            .field("max_connections", max_connections)
            .field("max_body_bytes", max_body_bytes)
            .field("header_read_timeout", header_read_timeout)
            .field("body_read_timeout", body_read_timeout)
            .field("write_timeout", write_timeout)
            .field("stream_keep_alive", stream_keep_alive)
            .field("max_input_tokens", max_input_tokens)
            .field("max_output_tokens", max_output_tokens)
            .field("admin_addr", admin_addr)
            .field("api_keys", &format_args!("{} redacted", api_keys.len()))
            .field("tenants_file", tenants_file)
            .field("isolate_prefix_cache", isolate_prefix_cache)
            .field("allowed_origins", allowed_origins)
            .field("allowed_methods", allowed_methods)
            .field("allowed_headers", allowed_headers)
            .field("allow_credentials", allow_credentials)
            .finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            max_connections: 900,
            max_body_bytes: 4 << 20,
            header_read_timeout: Duration::from_secs(30),
            body_read_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            stream_keep_alive: Duration::from_secs(5),
            max_input_tokens: None,
            max_output_tokens: None,
            admin_addr: None,
            api_keys: Vec::new(),
            tenants_file: None,
            isolate_prefix_cache: false,
            allowed_origins: vec!["*".into()],
            allowed_methods: vec!["*".into()],
            allowed_headers: vec!["*".into()],
            allow_credentials: false,
        }
    }
}

impl Config {
    /// A key that this process can send to a node with the same configuration. Keys given as digests cannot be sent.
    pub fn plain_key(&self) -> Option<&str> {
        self.api_keys.iter().map(String::as_str).find(|key| !is_digest(key))
    }

    /// Whether a request needs a key.
    pub fn asks_for_keys(&self) -> bool {
        !self.api_keys.is_empty() || self.tenants_file.is_some()
    }

    /// Reports every problem, each with the key's name.
    pub fn validate(&self, errors: &mut Vec<String>) {
        let positive = [
            ("max_connections", self.max_connections > 0),
            ("max_body_bytes", self.max_body_bytes > 0),
            ("header_read_timeout", !self.header_read_timeout.is_zero()),
            ("body_read_timeout", !self.body_read_timeout.is_zero()),
            ("write_timeout", !self.write_timeout.is_zero()),
            ("stream_keep_alive", !self.stream_keep_alive.is_zero()),
            ("max_input_tokens", self.max_input_tokens != Some(0)),
            ("max_output_tokens", self.max_output_tokens != Some(0)),
        ];
        errors.extend(positive.iter().filter(|(_, ok)| !ok).map(|(key, _)| format!("{key} must be greater than 0")));
        if self.host.is_empty() {
            errors.push("host must be an address or a name".into());
        }
        if let Err(error) = check_keys(&self.api_keys) {
            errors.push(error.to_string());
        }
        cors::validate(self, errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_not_show_in_logs() {
        let config = Config { api_keys: vec!["hunter2".into()], ..Config::default() };
        let shown = format!("{config:?}");
        assert!(!shown.contains("hunter2") && shown.contains("1 redacted"), "{shown}");
    }

    #[test]
    fn every_problem_is_reported_with_its_key() {
        let config = Config {
            max_connections: 0,
            max_output_tokens: Some(0),
            api_keys: vec!["sha256:12".into()],
            ..Config::default()
        };
        let mut errors = Vec::new();
        config.validate(&mut errors);
        assert_eq!(errors.len(), 3, "{errors:?}");
        for key in ["max_connections", "max_output_tokens", "api_keys"] {
            assert!(errors.iter().any(|error| error.contains(key)), "{key}: {errors:?}");
        }
        errors.clear();
        Config::default().validate(&mut errors);
        assert!(errors.is_empty());
    }
}
