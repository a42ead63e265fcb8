//! A client: sends a request to a node, compares every token with the reference, and resumes the stream at another node when
//! its node dies or falls silent.

use std::sync::Arc;
use std::time::Duration;

use outrigger::cluster::JournalKey;
use outrigger::router::{Dispatch, Dispatched, StreamName};
use outrigger::types::{
    Extensions, Failure, FailureKind, FinishReason, GenerationEvent, RequestId, TokenId, TokenLogprobs,
};
use tokio::time::{Instant, sleep, timeout};

use crate::net::Process;
use crate::node::{MODEL, Node, TOKENIZER};
use crate::oracle::{Reference, Violation};
use crate::plan::ClientPlan;
use crate::random::Random;
use crate::world::World;

const FORGOTTEN: &str = "stream_not_found";

/// What a client has of one choice.
#[derive(Default)]
struct Received {
    tokens: Vec<TokenId>,
    end: Option<FinishReason>,
}

/// Why a connection ended.
enum Ending {
    /// Every choice has ended.
    Complete,
    /// The connection is gone, and the server with it as far as the client can tell.
    Broken,
    /// The client itself hung up, for so long.
    HungUp(Duration),
    /// The server said so.
    Refused(Failure),
}

pub struct Client {
    name: String,
    plan: ClientPlan,
    reference: Arc<Reference>,
    world: Arc<World>,
    random: Random,
    received: Vec<Received>,
    /// Connections made, and hang-ups done.
    attempts: u32,
    hang_ups: usize,
    deadline: Option<Instant>,
    /// What the stream is called: the client's own key, or the name that a server gave it.
    key: String,
    /// The process that it was last connected to.
    connected: Option<Process>,
    /// Since when a server has answered: the stream can be asked for by its name.
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

    /// Returns when the client has what it wanted, or has seen what it must not see.
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
                    if failure.code == Some(FORGOTTEN) {
                        self.known_since = None;
                    }
                    avoided = Some(node.process.node);
                    sleep(self.random.millis(100, 600)).await;
                }
            }
        }
        Ok(())
    }

    /// A request that nobody has answered is made anew.
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
            node.router.dispatch(dispatch).await
        };
        let answer = tokio::select! {
            biased;
            () = node.death.cancelled() => return Ok(Ending::Broken),
            answer = timeout(self.plan.patience, answer) => answer,
        };
        let mut dispatched = match answer {
            Err(_) => return Ok(Ending::Broken),
            Ok(Err(failure)) => return Ok(Ending::Refused(failure)),
            Ok(Ok(dispatched)) => dispatched,
        };
        self.known_since.get_or_insert_with(Instant::now);
        let ending = self.listen(node, &mut dispatched).await;
        // A process that stands still does not see that its client has gone.
        let (world, process) = (self.world.clone(), node.process.clone());
        tokio::spawn(async move {
            world.net.resumed(process.node).await;
            drop(dispatched);
        });
        ending
    }

    async fn listen(&mut self, node: &Node, dispatched: &mut Dispatched) -> Result<Ending, Violation> {
        // Tokens come again from the first one on; what the client has is passed over.
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
                // Silence, or an end without an end.
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
                    // The end alone of a choice whose tokens the client has is told at once.
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
            return Err(self.violation(format!(
                "token {position} of choice {choice} is {token} where the undisturbed run has {expected:?}"
            )));
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
        // At its deadline a stream ends where the node that answers is, which may be before where the client was.
        let is_cut_short = is_late && reason == FinishReason::Deadline;
        let expected = &self.reference.choices[choice];
        let is_whole = position == expected.tokens.len() && reason == expected.end;
        if !is_whole && !is_cut_short {
            return Err(self.violation(format!(
                "choice {choice} ends after {position} tokens with {reason:?}, where the undisturbed run ends after {} with \
                 {:?}",
                expected.tokens.len(),
                expected.end
            )));
        }
        self.received[choice].end = Some(reason);
        Ok(())
    }

    /// What a client does about an error. True when it is content with it.
    fn accepts(&self, node: &Node, failure: &Failure) -> Result<bool, Violation> {
        let has_begun = self.received.iter().any(|received| !received.tokens.is_empty());
        let is_late = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let was_troubled = self.known_since.is_some_and(|since| self.world.had_trouble_since(since));
        let is_allowed = match failure.kind {
            // A wait that is longer than the deadline may be foreseen.
            FailureKind::DeadlineExceeded if self.deadline.is_some() && (is_late || !has_begun) => return Ok(true),
            // A stream whose tokens nobody knows any more stands in the queue like a fresh one.
            FailureKind::Overloaded
                if self.world.has_tight_queues() && (!has_begun || was_troubled || !self.is_known()) =>
            {
                true
            }
            // Its entry node and the holders of its journal were lost together.
            _ if failure.code == Some(FORGOTTEN) => was_troubled,
            _ if failure.code == Some("shutting_down") && node.has_stopped() => true,
            _ => !self.world.could_serve(node),
        };
        match is_allowed {
            true => Ok(false),
            false => Err(self.violation(format!("is told {failure} though a replica was there"))),
        }
    }

    fn dispatch(&self) -> Dispatch {
        let plan = &self.plan;
        let have = self.received.iter().map(|received| received.tokens.len() as u32).collect();
        let name = StreamName {
            key: journal_key(&self.key),
            body: [plan.request as u8; 16],
            may_exist: plan.is_keyed || self.is_known(),
            // Only the server knows the seed of a stream that it has named; here the client knows it as well, to compare.
            must_exist: self.is_known() && !plan.is_keyed,
            have: self.is_known().then_some(have),
        };
        Dispatch {
            id: RequestId::new(format!("{}-{}", self.name, self.attempts)),
            created: 1,
            model: MODEL.into(),
            tokenizer: TOKENIZER.into(),
            prompt: plan.prompt.clone(),
            sampling: plan.sampling.clone(),
            priority: 0,
            deadline: self.deadline.map(Instant::into_std),
            strategy: plan.strategy,
            extensions: Extensions {
                prompt_logprobs: plan.extensions.prompt_logprobs.filter(|_| self.lacks_scores()),
                ..plan.extensions
            },
            allows_other_fingerprint: false,
            name: Some(name),
        }
    }

    /// As the API sees it: what the prompt scored was told with the beginning of each choice.
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

fn journal_key(key: &str) -> JournalKey {
    JournalKey::new("tenant", key, 0)
}
