//! The facts about the served model that the drill needs.

use serde_json::json;

use super::DrillError;
use super::arena::Arena;
use super::workload::{CHAT, Shape, plan};

/// Tokens to keep free: prompts with the same number of words differ in tokens, and a chat template adds some.
const CONTEXT_MARGIN: u64 = 64;

pub(super) struct ServedModel {
    pub(super) name: String,
    pub(super) has_chat: bool,
    /// The maximum length of prompt and output together, in tokens.
    context: u64,
}

impl ServedModel {
    /// Asks the node for its first model and tests whether the model accepts chat requests.
    pub(super) async fn look(arena: &Arena, node: usize) -> Result<Self, DrillError> {
        let url = &arena.nodes[node].url;
        let models = arena.client.get(url, "/v1/models").await.map_err(DrillError::Rehearsal)?;
        let card = &models["data"][0];
        let (Some(name), Some(context)) = (card["id"].as_str(), card["max_model_len"].as_u64()) else {
            return Err(DrillError::Rehearsal("the node serves no model".into()));
        };
        let question = json!({"model": name, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1});
        let has_chat = arena.client.post(url, CHAT, &question).await.is_ok();
        Ok(Self { name: name.to_owned(), has_chat, context })
    }

    /// Shortens the prompts until prompts and outputs fit into the model's context.
    pub(super) async fn fit(&self, arena: &Arena, node: usize, mut shape: Shape) -> Result<Shape, DrillError> {
        loop {
            // The last prompt contains the longest number.
            let last = plan(&shape).pop().map(|stream| stream.body).unwrap_or_default();
            let body = json!({"model": self.name, "prompt": last["prompt"], "messages": last["messages"]});
            let answer = arena.client.post(&arena.nodes[node].url, "/tokenize", &body).await;
            let count = answer.map_err(DrillError::Rehearsal)?["count"].as_u64().unwrap_or(u64::MAX);
            if count.saturating_add(shape.tokens.into()).saturating_add(CONTEXT_MARGIN) <= self.context {
                return Ok(shape);
            }
            if shape.prompt_words == 0 {
                let why = format!("streams of {} tokens do not fit into a context of {}", shape.tokens, self.context);
                return Err(DrillError::Rehearsal(why));
            }
            shape.prompt_words = shape.prompt_words * 3 / 4;
        }
    }
}
