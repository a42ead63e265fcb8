//! OpenAI's endpoints, with the extensions that vLLM's clients use.

mod body;
pub mod chat;
mod choice;
mod collect;
pub mod completions;
mod conversation;
mod generation;
mod head;
mod logprobs;
mod messages;
pub mod models;
mod numbers;
mod prepare;
mod resumption;
mod sampling;
mod stream;
pub mod tokenize;
pub mod unsupported;
mod usage;

pub use body::RequestBody;
pub(super) use prepare::deadline;
