//! The first step of admission: a request that no replica would admit, however short its prompt, is refused before work goes into
//! rendering and tokenizing it. The second step, with the token count, is `dispatch`.
//!
//! This step may be too lenient, never too strict: whatever is refused here, `dispatch` would refuse at this moment. It knows less,
//! so that the reason may be another one: a full queue here or everywhere, a queue of requests or of tokens, or a deadline.

use super::dispatch::Want;
use super::handle::Router;
use crate::admission::Demand;
use crate::types::Failure;

impl Router {
    /// Refuses a new request that no replica would admit now. `least` is what it demands at least. Not for a request that may
    /// resume a stream, which is not refused because of load.
    pub fn check_room(&self, model: &str, tokenizer: &str, least: Demand) -> Result<(), Failure> {
        let node = &self.node;
        if node.is_cut() {
            return Err(node.unavailable());
        }
        let hold = self.hold(least.deadline);
        let here = node.local().filter(|local| node.may_serve() && local.model.serves(model, tokenizer));
        // While this node has room, the peers need not be considered, which takes much longer.
        if here.is_some_and(|local| node.admission.check(least, local.drain_rate()).is_ok()) {
            return Ok(());
        }
        let want = Want::least(model, tokenizer, least, &node.config);
        if hold.is_on() {
            // It will be held.
            if !self.is_placeable(&want) {
                return Ok(());
            }
            hold.check_deadline()?;
        }
        let mut rejection = None;
        let admit = || {
            let rate = node.local().expect("it was chosen").drain_rate();
            node.admission.check(least, rate).map_err(|refused| {
                rejection = Some(refused);
                refused.into()
            })
        };
        // For some strategies the choice is a draw, and the next one may be a peer, whatever this node says.
        let placed = self.place(&want, admit, |_, _| (), |_| true);
        if let (Err(_), Some(rejection)) = (&placed, rejection) {
            node.admission.count_refusal_at_entry(rejection);
        }
        placed
    }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
