//! The other nodes: who they are, what they say of themselves, and how they are reached. No gateway, no broker: nodes gossip
//! their load, and call one another over HTTP/2 with mutual TLS.
//!
//! Knows nothing of engines and of requests beyond what crosses the wire; which node serves a request, the router decides.

pub mod config;
pub mod gossip;
pub mod journal;
mod journal_store;
pub mod key;
pub mod load_report;
pub mod membership;
pub mod peer_client;
pub mod problems;
pub mod reach;
pub mod reload;
pub mod rendezvous;
pub mod seal;
pub mod tls;
pub mod transport;
pub mod view;
pub mod wire;

pub use config::Config;
pub use journal::{ChoiceProgress, JournalEntry, JournalHead, JournalKey, JournalRecord, JournalRefusal};
pub use journal_store::JournalStore;
pub use key::{ClusterKey, KeyRing};
pub use load_report::{LoadReport, ModelReport, NodeDescription, PROTOCOL_VERSION};
pub use problems::{Problem, Problems};
pub use transport::{FollowCall, GenerateCall, JournalBatch, PeerFrame, PeerService, PeerStream, PeerTransport};
pub use view::{ClusterView, Peer};
