//! A client: sends a request to a node, compares every token with the reference, and resumes the stream at another node when
//! its node dies or falls silent.

use std::sync::Arc;
use std::time::Duration;

use outrigger::admission::Demand;
use outrigger::router::{Dispatch, Dispatched, EarlierAttempt};
use outrigger::types::{
    Envelope, Extensions, Failure, FailureKind, FinishReason, GenerationEvent, JournalKey, RequestId, StreamName,
    Tenant, TokenId, TokenLogprobs,
};
use tokio::time::{Instant, sleep, timeout};

use crate::net::Process;
use crate::node::{MODEL, Node, TOKENIZER};
use crate::oracle::{Reference, Violation};
use crate::plan::ClientPlan;
use crate::random::Random;
use crate::world::World;

/// What a client has received of one choice.
#[derive(Default)]
struct Received {
    tokens: Vec<TokenId>,
    end: Option<FinishReason>,
}

/// Why a connection ended.
enum Ending {
    /// Every choice has ended.
    Complete,
    /// The connection is lost. The client cannot tell whether the server is.
    Broken,
    /// The client hung up and reconnects after this time.
    HungUp(Duration),
    /// The server sent an error.
    Refused(Failure),
}

pub struct Client {
    name: String,
    plan: ClientPlan,
    reference: Arc<Reference>,
    world: Arc<World>,
    random: Random,
    received: Vec<Received>,
    /// The numbers of connections and of hang-ups so far.
    attempts: u32,
    hang_ups: usize,
    deadline: Option<Instant>,
    /// The stream's name: the client's own key, or the key that a server gave it.
    key: String,
    /// The process that the client was last connected to.
    connected: Option<Process>,
    /// When a server first answered. From then on the client can resume the stream by its name.
    known_since: Option<Instant>,
}

impl Client {
    pub fn new(index: usize, plan: ClientPlan, reference: Arc<Reference>, world: Arc<World>, random: Random) -> Self {
        let received = (0..plan.sampling.n).map(|_| Received::default()).collect();
        Self {
            name: format!("c{index}"),
            plan,
            reference,
            world,
            random,
            received,
            attempts: 0,
            hang_ups: 0,
            deadline: None,
            key: String::new(),
            connected: None,
            known_since: None,
        }
    }

    /// Returns when the client has received its stream, or an error when it has seen something that must not happen.
    pub async fn run(mut self) -> Result<(), Violation> {
        sleep(self.plan.starts_at).await;
        self.deadline = self.plan.deadline.map(|deadline| Instant::now() + deadline);
        let mut avoided = None;
        while !self.is_complete() {
            let Some(node) = self.world.some_node(avoided, &mut self.random) else {
                sleep(Duration::from_millis(200)).await;
                continue;
            };
            self.attempts += 1;
            if !self.is_known() {
                self.choose_key();
            }
            self.world.trace.note(format_args!("{} asks n{}", self.name, node.process.node));
            avoided = None;
            match self.connect(&node).await? {
                Ending::Complete => self.world.trace.note(format_args!("{} is content", self.name)),
                Ending::Broken => {
                    avoided = Some(node.process.node);
                    sleep(self.random.millis(5, 200)).await;
                }
                Ending::HungUp(time) => sleep(time).await,
                Ending::Refused(failure) => {
                    self.world.trace.note(format_args!("{} is refused: {failure}", self.name));
                    if self.accepts(&node, &failure)? {
                        return Ok(());
                    }
                    if failure.kind == FailureKind::StreamNotFound {
                        self.known_since = None;
                    }
                    avoided = Some(node.process.node);
                    sleep(self.random.millis(100, 600)).await;
                }
            }
        }
        Ok(())
    }

    /// Chooses the key of a request that no server has answered yet.
    fn choose_key(&mut self) {
        self.key = match self.plan.is_keyed {
            true => format!("key-{}", self.plan.request),
            false => format!("{}-{}", self.name, self.attempts),
        };
        self.world.remember(journal_key(&self.key), self.reference.clone());
    }

    async fn connect(&mut self, node: &Node) -> Result<Ending, Violation> {
        let is_connected = self.connected.as_ref() == Some(&node.process);
        let Some(_connection) = node.connect(is_connected) else {
            self.world.trace.note(format_args!("{} finds n{} closed", self.name, node.process.node));
            return Ok(Ending::Broken);
        };
        self.connected = Some(node.process.clone());
        sleep(self.random.micros(100, 2000)).await;
        let dispatch = self.dispatch();
        let answer = async {
            self.world.net.resumed(node.process.node).await;
            let refusal = entry_refusal(node, &dispatch);
            let answer = node.router.dispatch(dispatch).await;
            (refusal, answer)
        };
        let answer = tokio::select! {
            biased;
            () = node.death.cancelled() => return Ok(Ending::Broken),
            answer = timeout(self.plan.patience, answer) => answer,
        };
        let mut dispatched = match answer {
            Err(_) => return Ok(Ending::Broken),
            Ok((None, Err(failure))) => return Ok(Ending::Refused(failure)),
            Ok((Some(refusal), Err(failure))) if refusal.kind == failure.kind => return Ok(Ending::Refused(failure)),
            Ok((Some(refusal), answer)) => {
                let answer = answer.map(|_| "was accepted");
                return Err(self.violation(format!("{refusal} at the entry, but a dispatch there gave {answer:?}")));
            }
            Ok((None, Ok(dispatched))) => dispatched,
        };
        self.known_since.get_or_insert_with(Instant::now);
        let ending = self.listen(node, &mut dispatched).await;
        // A paused process does not notice that its client is gone.
        let (world, process) = (self.world.clone(), node.process.clone());
        tokio::spawn(async move {
            world.net.resumed(process.node).await;
            drop(dispatched);
        });
        ending
    }

    async fn listen(&mut self, node: &Node, dispatched: &mut Dispatched) -> Result<Ending, Violation> {
        // The server sends all tokens again from the first; the client skips those that it has.
        let mut positions = vec![0; self.received.len()];
        let mut ended = vec![false; self.received.len()];
        let num_scores = if self.lacks_scores() { self.reference.scores.len() } else { 0 };
        let mut scores = Vec::new();
        loop {
            if let Some(&(tokens, time)) = self.plan.hang_ups.get(self.hang_ups)
                && self.tokens() >= tokens
            {
                self.hang_ups += 1;
                self.world.trace.note(format_args!("{} hangs up", self.name));
                return Ok(Ending::HungUp(time));
            }
            let event = async {
                let event = dispatched.stream.next().await;
                self.world.net.resumed(node.process.node).await;
                event
            };
            let event = tokio::select! {
                biased;
                () = node.death.cancelled() => return Ok(Ending::Broken),
                event = timeout(self.plan.patience, event) => event,
            };
            match event {
                // The server is silent, or the stream stops without a final event.
                Err(_) | Ok(None) => {
                    let how = if event.is_ok() { "is cut off" } else { "has waited long enough" };
                    self.world.trace.note(format_args!("{} {how}", self.name));
                    return Ok(Ending::Broken);
                }
                Ok(Some(GenerationEvent::Scheduled { .. })) => {}
                Ok(Some(GenerationEvent::PromptLogprobs { start, logprobs })) => {
                    let is_next = start as usize == scores.len();
                    scores.extend(logprobs);
                    if !is_next || self.reference.scores.get(..scores.len()) != Some(&scores[..]) {
                        return Err(self.violation(format!("the prompt scores otherwise from token {start} on")));
                    }
                }
                Ok(Some(GenerationEvent::Token { choice, token, logprobs })) => {
                    if ended[choice as usize] {
                        return Err(self.violation(format!("choice {choice} goes on after its end")));
                    }
                    let position = positions[choice as usize];
                    positions[choice as usize] += 1;
                    if scores.len() < num_scores && position >= self.received[choice as usize].tokens.len() {
                        return Err(self.violation(format!("token {position} comes before the prompt is scored")));
                    }
                    self.token(choice as usize, position, token, logprobs)?;
                }
                Ok(Some(GenerationEvent::Finished { choice, reason })) => {
                    if std::mem::replace(&mut ended[choice as usize], true) {
                        return Err(self.violation(format!("choice {choice} ends twice")));
                    }
                    // If the client already has all tokens of a choice, the end may come before the prompt's scores.
                    let Received { tokens, end } = &self.received[choice as usize];
                    let is_beginning = tokens.is_empty() && end.is_none() && reason.is_of_the_generation();
                    if scores.len() < num_scores && is_beginning {
                        return Err(self.violation(format!("choice {choice} ends before the prompt is scored")));
                    }
                    self.finish(choice as usize, positions[choice as usize], reason)?;
                    if ended.iter().all(|ended| *ended) {
                        return Ok(Ending::Complete);
                    }
                }
                Ok(Some(GenerationEvent::Failed(failure))) => return Ok(Ending::Refused(failure)),
            }
        }
    }

    fn token(
        &mut self,
        choice: usize,
        position: usize,
        token: TokenId,
        logprobs: Option<Box<TokenLogprobs>>,
    ) -> Result<(), Violation> {
        let expected = self.reference.choices[choice].tokens.get(position);
        if expected.map(|(expected, _)| *expected) != Some(token) {
            let expected = expected.map(|(expected, _)| expected);
            return Err(
                self.violation(format!("token {position} of choice {choice} is {token} instead of {expected:?}"))
            );
        }
        let received = &mut self.received[choice];
        if position < received.tokens.len() {
            return Ok(());
        }
        if logprobs != expected.and_then(|(_, logprobs)| logprobs.clone()) {
            return Err(self.violation(format!("the logprobs of token {position} of choice {choice} differ")));
        }
        received.tokens.push(token);
        self.world.trace.note(format_args!("{} gets {token} as {choice}:{position}", self.name));
        Ok(())
    }

    fn finish(&mut self, choice: usize, position: usize, reason: FinishReason) -> Result<(), Violation> {
        self.world.trace.note(format_args!("{} sees the end of {choice}: {reason:?}", self.name));
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        // At the deadline a stream ends at the position of the node that answers, which may be behind the client's position.
        let is_cut_short = is_late && reason == FinishReason::Deadline;
        let expected = &self.reference.choices[choice];
        let is_whole = position == expected.tokens.len() && reason == expected.end;
        if !is_whole && !is_cut_short {
            return Err(self.violation(format!(
                "choice {choice} ends after {position} tokens with {reason:?}; the undisturbed run ends after {} with \
                 {:?}",
                expected.tokens.len(),
                expected.end
            )));
        }
        self.received[choice].end = Some(reason);
        Ok(())
    }

    /// Decides about an error: true if the client gives up the request, false if it tries again. An error that must not happen
    /// is a violation.
    fn accepts(&self, node: &Node, failure: &Failure) -> Result<bool, Violation> {
        let has_begun = self.received.iter().any(|received| !received.tokens.is_empty());
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let was_troubled = self.known_since.is_some_and(|since| self.world.had_trouble_since(since));
        let is_allowed = match failure.kind {
            // The server may refuse early a request whose wait would exceed its deadline.
            FailureKind::DeadlineExceeded if self.deadline.is_some() && (is_late || !has_begun) => return Ok(true),
            // A stream whose tokens no node knows any more is queued like a new one.
            FailureKind::Overloaded
                if self.world.has_tight_queues() && (!has_begun || was_troubled || !self.is_known()) =>
            {
                true
            }
            // The entry node and all holders of the journal were lost.
            _ if failure.kind == FailureKind::StreamNotFound => was_troubled,
            _ if failure.code == Some("shutting_down") && node.has_stopped() => true,
            _ => !self.world.could_serve(node),
        };
        match is_allowed {
            true => Ok(false),
            false => Err(self.violation(format!("got {failure} although a replica was available"))),
        }
    }

    fn dispatch(&self) -> Dispatch {
        let plan = &self.plan;
        let have = self.received.iter().map(|received| received.tokens.len() as u32).collect();
        let earlier = EarlierAttempt {
            may_exist: plan.is_keyed || self.is_known(),
            // In reality, only the server knows the seed of a stream that it has named. Here the client knows it too, so
            // that it can compare.
            must_exist: self.is_known() && !plan.is_keyed,
            have: self.is_known().then_some(have),
        };
        let envelope = Envelope {
            created: 1,
            name: Some(StreamName { key: journal_key(&self.key), body: [plan.request as u8; 16] }),
            deadline: self.deadline.map(Instant::into_std),
            extensions: Extensions {
                prompt_logprobs: plan.extensions.prompt_logprobs.filter(|_| self.lacks_scores()),
                ..plan.extensions
            },
            ..plan.envelope(RequestId::new(format!("{}-{}", self.name, self.attempts)))
        };
        Dispatch { envelope: Arc::new(envelope), strategy: plan.strategy, allows_other_fingerprint: false, earlier }
    }

    /// Whether the prompt's scores are still missing. As in the API, they come before the first token of each choice.
    fn lacks_scores(&self) -> bool {
        let has_begun = |received: &Received| !received.tokens.is_empty() || received.end.is_some();
        self.plan.extensions.prompt_logprobs.is_some() && !self.received.iter().all(has_begun)
    }

    fn is_known(&self) -> bool {
        self.known_since.is_some()
    }

    fn is_complete(&self) -> bool {
        self.received.iter().all(|received| received.end.is_some())
    }

    fn tokens(&self) -> usize {
        self.received.iter().map(|received| received.tokens.len()).sum()
    }

    fn violation(&self, what: String) -> Violation {
        Violation(format!("{} ({:?}): {what}", self.name, self.plan.sampling))
    }
}

/// What the API would say before it tokenizes the prompt. With a key, it says nothing.
fn entry_refusal(node: &Node, dispatch: &Dispatch) -> Option<Failure> {
    let Envelope { sampling, priority, deadline, .. } = &*dispatch.envelope;
    let least = Demand::least(sampling.n, *priority, *deadline);
    let is_new = !dispatch.earlier.may_exist;
    is_new.then(|| node.router.check_room(MODEL, TOKENIZER, least).err()).flatten()
}

fn journal_key(key: &str) -> JournalKey {
    JournalKey::new(&Tenant::new("tenant"), key, 0)
}
