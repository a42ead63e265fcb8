//! Which replica serves a request, and what happens when it dies.

pub mod breaker;
pub mod config;
pub mod hot_prefixes;
pub mod overview;
pub mod placement;
pub mod retry_budget;

pub use config::{Config, Strategy};
pub use overview::{ClusterOverview, NodeOverview, PeerOverview, StreamCounts};
