//! File descriptors for connections: each connection needs one, and the process has a limit (RLIMIT_NOFILE).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::api;
use crate::config::Config;

/// Descriptors for other purposes: listeners, timers, model files, downloads, the log, connections that are being closed.
const OTHER_FILES: usize = 160;
/// Descriptors for connections between nodes, and gossip.
const PEER_FILES: usize = 128;
/// The smallest useful number of connections. The node tries to serve as many even if the limit is lower.
const LEAST_CONNECTIONS: usize = 16;

/// Raises the limit so that `max_connections` fit. If that is impossible, lowers `max_connections` and logs a warning.
pub fn make_room(config: &mut Config) {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => return tracing::warn!(%error, "cannot read the limit of open files"),
    };
    let others = others(config);
    let wanted = (config.api.max_connections + others) as u64;
    if wanted <= soft {
        return;
    }
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard) {
        Ok(()) => wanted.min(hard),
        Err(_) => soft,
    };
    if limit >= wanted {
        return tracing::info!(from = soft, to = limit, "raised the limit of open files, so that max_connections fit");
    }
    let fitting = fitting(limit, others);
    tracing::warn!(
        limit,
        wanted,
        max_connections = config.api.max_connections,
        "the limit of open files (RLIMIT_NOFILE; `ulimit -n`, LimitNOFILE) is too low for max_connections: {fitting} are served"
    );
    config.api.max_connections = fitting;
}

/// Descriptors for everything else.
fn others(config: &Config) -> usize {
    let admin = config.api.admin_addr.map_or(0, |_| api::ADMIN_LIMITS.served + api::ADMIN_LIMITS.overflow);
    let peers = if config.cluster.is_clustered() { PEER_FILES } else { 0 };
    api::OVERFLOW_CONNECTIONS + OTHER_FILES + admin + peers
}

fn fitting(limit: u64, others: usize) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(others).max(LEAST_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_for_clients() {
        let mut config = Config::default();
        let alone = others(&config);
        assert_eq!(fitting(1024, alone), 1024 - alone);
        assert_eq!(fitting(10, alone), LEAST_CONNECTIONS);
        config.api.admin_addr = Some("127.0.0.1:9000".parse().unwrap());
        assert_eq!(others(&config), alone + api::ADMIN_LIMITS.served + api::ADMIN_LIMITS.overflow);
    }
}
