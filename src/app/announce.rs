//! Messages for the person at the terminal: where the server listens, and a command to try.
//!
//! They go to standard output, which carries nothing else. The log goes to standard error.

use std::net::SocketAddr;

/// The base URL for clients on this machine.
pub fn base_url(address: SocketAddr) -> String {
    match (address.ip().is_unspecified(), address.is_ipv4()) {
        (true, true) => format!("http://127.0.0.1:{}", address.port()),
        (true, false) => format!("http://[::1]:{}", address.port()),
        (false, _) => format!("http://{address}"),
    }
}

/// A `curl` command to paste into a shell. For models without a chat template it uses the completions endpoint.
pub fn curl_line(base_url: &str, has_chat_template: bool, wants_key: bool) -> String {
    let key = if wants_key { " -H \"authorization: Bearer $OPENAI_API_KEY\"" } else { "" };
    let (route, body) = match has_chat_template {
        true => (
            "chat/completions",
            r#"{"model": "default", "messages": [{"role": "user", "content": "What is an outrigger canoe?"}], "temperature": 0}"#,
        ),
        false => ("completions", r#"{"model": "default", "prompt": "The capital of France is", "max_tokens": 32}"#),
    };
    format!("curl {base_url}/v1/{route} -H 'content-type: application/json'{key} -d '{body}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_on_the_loopback() {
        for (address, url) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("0.0.0.0:80", "http://127.0.0.1:80"),
            ("[::]:8000", "http://[::1]:8000"),
            ("10.0.0.7:8000", "http://10.0.0.7:8000"),
        ] {
            assert_eq!(base_url(address.parse().unwrap()), url);
        }
    }

    #[test]
    fn the_line_fits_the_server() {
        let line = curl_line("http://h:1", true, false);
        assert!(line.starts_with("curl http://h:1/v1/chat/completions ") && line.contains("messages"), "{line}");
        assert!(!line.contains("authorization"));
        assert!(curl_line("http://h:1", true, true).contains("$OPENAI_API_KEY"));
        assert!(curl_line("http://h:1", false, false).contains("/v1/completions "));
    }
}
