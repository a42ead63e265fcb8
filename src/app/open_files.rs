//! Room for connections: each takes a file descriptor, and the process has a limit of them (RLIMIT_NOFILE).

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::api;
use crate::config::Config;

/// Descriptors for what is not a client: listeners, timers, the model's files, downloads, the log, connections that are just
/// being closed.
const OTHER_FILES: usize = 160;
/// Descriptors for connections between nodes, and gossip.
const PEER_FILES: usize = 128;
/// With fewer connections than this a node is of no use; it tries all the same.
const LEAST_CONNECTIONS: usize = 16;

/// Raises the limit so far that `max_connections` fit, or lowers `max_connections` to what fits, and says so.
pub fn make_room(config: &mut Config) {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => return tracing::warn!(%error, "the limit of open files is not known"),
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

/// Descriptors for everything but the connections that `max_connections` counts.
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
