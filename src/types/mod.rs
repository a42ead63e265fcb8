//! Types that all modules share. Uses no other module of the crate.

pub mod backend;
pub mod causes;
pub mod failure;
pub mod ids;
mod panic;
pub mod reaction;
pub mod request;
pub mod status;
pub mod tasks;
pub mod watch;

pub use backend::{Backend, FinishReason, GenerationEvent, GenerationStream, StopCause, TokenLogprobs};
pub use causes::with_causes;
pub use failure::{Failure, FailureKind};
pub use ids::{Fingerprint, NodeId, RequestId, TokenId};
pub use panic::panic_message;
pub use reaction::Reaction;
pub use request::{CacheSalt, ChoiceStart, Extensions, GenerateRequest, SamplingDefaults, SamplingParams};
pub use status::{EngineStatus, NodeState, Pace};
