//! The cluster: the other nodes, the load reports that they gossip, and connections to them. There is no gateway and no broker:
//! nodes gossip their load, and call one another over HTTP/2 with mutual TLS.
//!
//! Knows nothing of engines, and of requests only what is sent between nodes. The router decides which node serves a request.

pub mod config;
pub mod gossip;
pub mod journal;
mod journal_store;
pub mod key;
pub mod load_report;
pub mod membership;
pub mod peer_client;
pub mod problems;
pub mod protocol;
pub mod reach;
pub mod reload;
pub mod rendezvous;
pub mod seal;
pub mod tls;
pub mod transport;
pub mod view;
pub mod wire;

pub use config::Config;
pub use journal::{ChoiceProgress, JournalEntry, JournalRecord, JournalRefusal};
pub use journal_store::JournalStore;
pub use key::{ClusterKey, KeyRing};
pub use load_report::{LoadReport, ModelReport, NodeDescription, PaceReport};
pub use problems::{Problem, Problems};
pub use protocol::{PROTOCOL, ProtocolRange};
pub use transport::{FollowCall, GenerateCall, JournalBatch, PeerFrame, PeerService, PeerStream, PeerTransport};
pub use view::{ClusterView, Peer};
