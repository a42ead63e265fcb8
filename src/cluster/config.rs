//! Configuration of the cluster: this node's name and addresses, and how it finds other nodes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this node. Default: none, which generates a random one.
    pub node_id: Option<String>,
    /// Name of the cluster. Gossip from other clusters is ignored. Default: `outrigger`.
    pub cluster_id: String,
    /// UDP address for gossip. Default: none, for a single node without a cluster.
    pub gossip_addr: Option<SocketAddr>,
    /// Address at which other nodes reach `gossip_addr`. Default: none, which means `gossip_addr`.
    pub gossip_advertise_addr: Option<SocketAddr>,
    /// TCP address for requests from other nodes. Default: none, which means the host and port of `gossip_addr`.
    pub peer_addr: Option<SocketAddr>,
    /// Address at which other nodes reach `peer_addr`. Default: none, which means `peer_addr`.
    pub peer_advertise_addr: Option<SocketAddr>,
    /// Gossip addresses of other nodes, `host:port`. Names are resolved periodically.
    pub peers: Vec<String>,
    /// File with the secret that all nodes of a cluster share: 32 bytes or more.
    pub cluster_key_file: Option<PathBuf>,
    /// Zone of this node; requests prefer nodes in the same zone. Default: empty, which is a zone of its own.
    pub zone: String,
    /// Interval of gossip rounds. Default: 250 ms.
    pub gossip_interval: Duration,
    /// Time limit for connecting to a peer. Default: 1 s.
    pub peer_connect_timeout: Duration,
    /// Certificates for traffic between nodes, instead of those derived from the cluster key. Set all three, or none.
    pub peer_tls_cert_file: Option<PathBuf>,
    pub peer_tls_key_file: Option<PathBuf>,
    pub peer_tls_ca_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_id: None,
            cluster_id: "outrigger".into(),
            gossip_addr: None,
            gossip_advertise_addr: None,
            peer_addr: None,
            peer_advertise_addr: None,
            peers: Vec::new(),
            cluster_key_file: None,
            zone: String::new(),
            gossip_interval: Duration::from_millis(250),
            peer_connect_timeout: Duration::from_secs(1),
            peer_tls_cert_file: None,
            peer_tls_key_file: None,
            peer_tls_ca_file: None,
        }
    }
}

impl Config {
    /// Whether this node is part of a cluster.
    pub fn is_clustered(&self) -> bool {
        self.gossip_addr.is_some()
    }

    /// The gossip address that other nodes use, given the address to which the socket is bound.
    pub fn gossip_advertised(&self, bound: SocketAddr) -> SocketAddr {
        self.gossip_advertise_addr.unwrap_or(bound)
    }

    /// The address to listen on for peers; `None` for a single node.
    pub fn peer_listen_addr(&self) -> Option<SocketAddr> {
        self.gossip_addr.map(|gossip_addr| self.peer_addr.unwrap_or(gossip_addr))
    }

    /// The address that peers use to call this node, given the address to which the listener is bound.
    pub fn peer_advertised(&self, bound: SocketAddr) -> SocketAddr {
        let same_host = |gossip: SocketAddr| SocketAddr::new(gossip.ip(), bound.port());
        self.peer_advertise_addr.or(self.gossip_advertise_addr.map(same_host)).unwrap_or(bound)
    }

    /// Reports every problem, with the key's name.
    pub fn validate(&self, problems: &mut Vec<String>) {
        if self.is_clustered() && self.cluster_key_file.is_none() {
            problems.push(
                "cluster_key_file is required with gossip_addr: traffic between nodes is always encrypted".into(),
            );
        }
        if !self.is_clustered() {
            let orphans = [
                ("peers", !self.peers.is_empty()),
                ("peer_addr", self.peer_addr.is_some()),
                ("gossip_advertise_addr", self.gossip_advertise_addr.is_some()),
                ("peer_advertise_addr", self.peer_advertise_addr.is_some()),
            ];
            for (key, _) in orphans.iter().filter(|(_, is_set)| *is_set) {
                problems.push(format!("{key} has no effect without gossip_addr"));
            }
        }
        let unspecified = |addr: Option<SocketAddr>| addr.is_some_and(|addr| addr.ip().is_unspecified());
        if unspecified(self.gossip_addr) && self.gossip_advertise_addr.is_none() {
            problems.push(
                "gossip_advertise_addr is required: other nodes cannot use gossip_addr, which names no single address"
                    .into(),
            );
        }
        for (key, addr) in
            [("gossip_advertise_addr", self.gossip_advertise_addr), ("peer_advertise_addr", self.peer_advertise_addr)]
        {
            if addr.is_some_and(|addr| addr.ip().is_unspecified() || addr.port() == 0) {
                problems.push(format!("{key} must be an address that others can reach"));
            }
        }
        for peer in &self.peers {
            let is_named =
                |(host, port): (&str, &str)| !host.is_empty() && port.parse().is_ok_and(|port: u16| port > 0);
            if !peer.rsplit_once(':').is_some_and(is_named) {
                problems.push(format!("peers: `{peer}` is not `host:port`"));
            }
        }
        if unspecified(self.peer_addr) && self.peer_advertise_addr.or(self.gossip_advertise_addr).is_none() {
            problems.push(
                "peer_advertise_addr is required: other nodes cannot use peer_addr, which names no single address"
                    .into(),
            );
        }
        let files = [&self.peer_tls_cert_file, &self.peer_tls_key_file, &self.peer_tls_ca_file];
        if !matches!(files.iter().filter(|file| file.is_some()).count(), 0 | 3) {
            problems.push("set all of peer_tls_cert_file, peer_tls_key_file and peer_tls_ca_file, or none".into());
        }
        for (key, time) in
            [("gossip_interval", self.gossip_interval), ("peer_connect_timeout", self.peer_connect_timeout)]
        {
            if time < Duration::from_millis(10) || time > Duration::from_secs(60) {
                problems.push(format!("{key} must be from 10ms to 1m"));
            }
        }
        for (key, name) in
            [("cluster_id", Some(&self.cluster_id)), ("node_id", self.node_id.as_ref()), ("zone", Some(&self.zone))]
        {
            if name.is_some_and(|name| name.len() > 64) {
                problems.push(format!("{key} must have at most 64 bytes"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn clustered(gossip_addr: &str) -> Config {
        let cluster_key_file = Some("key".into());
        Config { gossip_addr: Some(addr(gossip_addr)), cluster_key_file, ..Config::default() }
    }

    fn problems(config: &Config) -> Vec<String> {
        let mut problems = Vec::new();
        config.validate(&mut problems);
        problems
    }

    #[test]
    fn peers_call_beside_the_gossip_unless_said_otherwise() {
        let config = clustered("10.0.0.1:7946");
        assert_eq!(config.peer_listen_addr(), Some(addr("10.0.0.1:7946")));
        assert_eq!(config.gossip_advertised(addr("10.0.0.1:7946")), addr("10.0.0.1:7946"));
        assert_eq!(config.peer_advertised(addr("10.0.0.1:7946")), addr("10.0.0.1:7946"));
        let apart = Config { peer_addr: Some(addr("10.0.0.1:7947")), ..config };
        assert_eq!(apart.peer_listen_addr(), Some(addr("10.0.0.1:7947")));
        assert_eq!(Config::default().peer_listen_addr(), None);
    }

    #[test]
    fn the_host_that_gossip_advertises_holds_for_peers_as_well() {
        let config = Config { gossip_advertise_addr: Some(addr("192.0.2.1:5")), ..clustered("0.0.0.0:7946") };
        assert_eq!(config.gossip_advertised(addr("0.0.0.0:7946")), addr("192.0.2.1:5"));
        assert_eq!(config.peer_advertised(addr("0.0.0.0:7000")), addr("192.0.2.1:7000"));
        let own = Config { peer_advertise_addr: Some(addr("192.0.2.2:9")), ..config };
        assert_eq!(own.peer_advertised(addr("0.0.0.0:7000")), addr("192.0.2.2:9"));
    }

    #[test]
    fn addresses_that_nobody_could_reach_are_reported() {
        let found = |config: Config| problems(&config).join("\n");
        assert_eq!(found(clustered("10.0.0.1:7946")), "");
        assert!(found(clustered("0.0.0.0:7946")).contains("gossip_advertise_addr is required"));
        for advertised in ["0.0.0.0:1", "10.0.0.1:0"] {
            let config = Config { gossip_advertise_addr: Some(addr(advertised)), ..clustered("0.0.0.0:7946") };
            assert!(found(config).contains("gossip_advertise_addr must be"), "{advertised}");
        }
    }

    #[test]
    fn peers_have_a_host_and_a_port() {
        for (peer, is_sound) in [
            ("10.0.0.1:7946", true),
            ("[::1]:7946", true),
            ("outrigger.default.svc:7946", true),
            ("outrigger", false),
            (":7946", false),
            ("outrigger:", false),
            ("outrigger:http", false),
            ("outrigger:0", false),
        ] {
            let config = Config { peers: vec![peer.into()], ..clustered("10.0.0.1:7946") };
            assert_eq!(problems(&config).is_empty(), is_sound, "{peer}");
        }
    }
}
