//! Types that all modules share. Uses no other module of the crate.

pub mod backend;
pub mod causes;
pub mod envelope;
pub mod failure;
pub mod ids;
pub mod node_reason;
mod panic;
pub mod reaction;
pub mod request;
pub mod status;
pub mod tasks;
pub mod trace;
pub mod watch;

pub use backend::{Backend, FinishReason, GenerationEvent, GenerationStream, StopCause, TokenLogprobs};
pub use causes::with_causes;
pub use envelope::{CacheSalt, Envelope, Extensions, StreamName};
pub use failure::{Failure, FailureKind};
pub use ids::{Fingerprint, JournalKey, NodeId, RequestId, Tenant, TokenId};
pub use node_reason::{DegradedBy, NodeReason, ReportedReason};
pub use panic::panic_message;
pub use reaction::Reaction;
pub use request::{ChoiceStart, GenerateRequest, SamplingDefaults, SamplingParams};
pub use status::{EngineStatus, NodeState, Pace};
pub use trace::{TraceContext, request_span};
