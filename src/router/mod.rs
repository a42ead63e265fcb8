//! Decides which replica serves a request, and what happens when it dies.
//!
//! The `Router` receives every request of the API. It refuses a request for which no replica has room before it is tokenized
//! (`entry`), places it on this node or a peer (`placement`), runs its stream independently of single replicas (`failover`),
//! replicates the stream's journal to two other nodes (`replicator`), and answers peers' calls (`service`). Knows the engine as
//! a `Backend` and other nodes through `cluster`; knows no HTTP and no text.

pub mod breaker;
mod choosing;
pub mod config;
pub mod dispatch;
mod entry;
mod failover;
mod handle;
mod hold;
pub mod hot_prefixes;
mod ledger;
mod load;
mod meter;
mod no_peers;
pub mod overview;
mod pace;
mod peers;
pub mod placement;
mod recall;
mod replicator;
pub mod retry_budget;
mod service;
mod source;
mod stream_log;
mod streams;
mod this_node;

pub use config::{Config, Strategy};
pub use dispatch::{Dispatch, Dispatched, EarlierAttempt};
pub use handle::{Router, RouterParts};
pub use hold::Hold;
pub use overview::{ClusterOverview, NodeOverview, PeerOverview, StreamCounts};
pub use stream_log::StreamFingerprint;
pub use this_node::{LocalReplica, NodeIdentity};
