//! `outrigger healthcheck`: asks the node of this configuration whether it is alive. For container engines that run a command
//! as a health check, in images without curl. Knows only the server's address and `/livez`.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail};

const TIMEOUT: Duration = Duration::from_secs(3);

/// Succeeds when `GET /livez` at the configured address answers 200.
pub fn run(host: &str, port: u16) -> anyhow::Result<()> {
    let host = reachable(host);
    let status = ask(host, port).with_context(|| format!("no answer from {host}:{port}"))?;
    match status.split_ascii_whitespace().nth(1) {
        Some("200") => Ok(()),
        _ => bail!("/livez answers `{}`", status.trim_end()),
    }
}

/// An address at which a listener on all addresses can be reached from this machine.
fn reachable(host: &str) -> &str {
    match host {
        "0.0.0.0" => "127.0.0.1",
        "::" | "[::]" => "::1",
        host => host.trim_start_matches('[').trim_end_matches(']'),
    }
}

/// The status line of the response.
fn ask(host: &str, port: u16) -> io::Result<String> {
    let address = (host, port).to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // Sent in one write: a server may answer and close after it has read the first line.
    stream.write_all(format!("GET /livez HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut head = [0; 256];
    let mut length = 0;
    while length < head.len() && !head[..length].contains(&b'\n') {
        match stream.read(&mut head[length..])? {
            0 => break,
            read => length += read,
        }
    }
    let text = String::from_utf8_lossy(&head[..length]);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Answers one connection with `answer`; returns the port.
    fn answering(answer: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 256];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /livez "));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        port
    }

    #[test]
    fn only_200_is_alive() {
        run("127.0.0.1", answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).unwrap();
        run("0.0.0.0", answering("HTTP/1.1 200 OK\r\n\r\n")).unwrap();
        let error = run("127.0.0.1", answering("HTTP/1.1 503 Service Unavailable\r\n\r\n")).unwrap_err();
        assert!(error.to_string().contains("503"), "{error}");
        assert!(run("127.0.0.1", answering("")).is_err());
    }

    #[test]
    fn nobody_there_is_not_alive() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(run("127.0.0.1", free).unwrap_err().to_string().contains("no answer"));
    }
}
