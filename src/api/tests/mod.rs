//! The API over a scripted backend: what it asks of the backend, and what it makes of its events.

mod chat;
mod completions;
mod peer;
mod refusals;
mod resumption;
mod routes;
mod sockets;
mod streams;
mod tokenize;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;
use tower::ServiceExt;

use super::{ApiState, Config, ServedModel};
use crate::admission::{self, AdmissionController};
use crate::cluster::ModelReport;
use crate::health::{self, Health};
use crate::observability::Metrics;
use crate::router::{self, LocalReplica, Router};
use crate::tenancy::Tenants;
use crate::tokenizer::Tokenizer;
use crate::types::{
    Backend, EngineStatus, Failure, Fingerprint, FinishReason, GenerateRequest, GenerationEvent, GenerationStream,
    SamplingDefaults, StopCause, TokenId, TokenLogprobs,
};

/// The end-of-sequence token of the fixture.
const EOS: TokenId = 2;
const MAX_MODEL_LEN: usize = 256;

type Events = UnboundedSender<GenerationEvent>;
type Script = dyn Fn(&GenerateRequest, Events) -> Result<(), Failure> + Send + Sync;

/// Answers each request by a script, and remembers the requests.
struct ScriptedBackend {
    script: Box<Script>,
    requests: Arc<Mutex<Vec<GenerateRequest>>>,
}

impl Backend for ScriptedBackend {
    fn generate(&self, request: GenerateRequest) -> Result<GenerationStream, Failure> {
        let (events, stream) = GenerationStream::channel();
        (self.script)(&request, events)?;
        self.requests.lock().push(request);
        Ok(stream)
    }

    fn status(&self) -> EngineStatus {
        EngineStatus { running: 1, kv_blocks_used: 1, ..EngineStatus::idle(Instant::now(), 10) }
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("f00d")
    }
}

/// A node whose engine is a script.
struct Node {
    state: ApiState,
    requests: Arc<Mutex<Vec<GenerateRequest>>>,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The data of the events; comments are left out.
    fn events(&self) -> Vec<String> {
        let events = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        events.map(str::to_string).collect()
    }

    /// The events as JSON, without the final `[DONE]`, which has to be there.
    fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.text);
        events.iter().map(|event| serde_json::from_str(event).expect("a chunk is JSON")).collect()
    }

    fn error(&self) -> Value {
        let error = self.json()["error"].take();
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{field} is missing in {error}");
        }
        error
    }
}

fn tokenizer() -> Tokenizer {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fixtures/llama-gqa-tied-bf16");
    Tokenizer::from_dir(&fixture).expect("the fixture has a tokenizer")
}

fn ids(text: &str) -> Vec<TokenId> {
    tokenizer().encode(text, false).expect("any text can be encoded")
}

impl Node {
    fn new(script: impl Fn(&GenerateRequest, Events) -> Result<(), Failure> + Send + Sync + 'static) -> Self {
        Self::with_config(Config::default(), admission::Config::default(), script)
    }

    fn with_config(
        config: Config,
        admission: admission::Config,
        script: impl Fn(&GenerateRequest, Events) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        let node = Self::loading(config, admission);
        let requests = node.requests.clone();
        node.load(ScriptedBackend { script: Box::new(script), requests });
        node
    }

    /// Answers every request with this text and a natural end.
    fn saying(text: &str) -> Self {
        let tokens = ids(text);
        Self::new(move |request, events| {
            play(&events, request, &tokens, FinishReason::Stop(StopCause::EndOfSequence(EOS)));
            Ok(())
        })
    }

    /// Whose model's authors recommend this to requests that leave it out.
    fn recommending(defaults: SamplingDefaults) -> Self {
        let node = Self::loading(Config::default(), admission::Config::default());
        let script = Box::new(|request: &GenerateRequest, events: Events| {
            play(&events, request, &[], FinishReason::Length);
            Ok(())
        });
        let requests = node.requests.clone();
        node.load_with(ScriptedBackend { script, requests }, defaults);
        node
    }

    /// What comes before there is a model is not held for long.
    fn loading(config: Config, admission: admission::Config) -> Self {
        Self::loading_and_holding(config, admission, Duration::from_millis(100))
    }

    fn loading_and_holding(config: Config, admission: admission::Config, failover_timeout: Duration) -> Self {
        let metrics = Arc::new(Metrics::new("tiny"));
        let health = Health::new(health::Config::default(), metrics.clone());
        let admission = AdmissionController::new(admission, 1, metrics.clone());
        let routing = router::Config { failover_timeout, ..router::Config::default() };
        let router = Router::alone(routing, admission.clone(), health.clone(), metrics.clone());
        let tenants = Tenants::of_keys(&config.api_keys).expect("valid keys");
        let state = ApiState::new(config, tenants, metrics, admission, health, router);
        Self { state, requests: Arc::default() }
    }

    fn load(&self, backend: ScriptedBackend) {
        self.load_with(backend, SamplingDefaults::default());
    }

    fn load_with(&self, backend: ScriptedBackend, defaults: SamplingDefaults) {
        let tokenizer = tokenizer();
        let template = tokenizer.chat_template().expect("the fixture has a template");
        let model = ModelReport {
            names: vec!["tiny".into(), "org/tiny".into()],
            fingerprint: backend.fingerprint(),
            tokenizer: "tokenizer".into(),
            max_model_len: MAX_MODEL_LEN as u32,
            created: 1,
        };
        let served = ServedModel::new(&model, tokenizer, template, vec![EOS]);
        self.state.set_model(served.with_sampling_defaults(defaults));
        let engine = Arc::new(backend);
        self.state.router.attach(LocalReplica { engine, model, seats: 1, tokenizer: Bytes::new() });
        let lifecycle = self.state.health.lifecycle();
        lifecycle.warming("loaded").expect("a step of the diagram");
        lifecycle.ready("tried").expect("a step of the diagram");
    }

    fn router(&self) -> axum::Router {
        super::router(self.state.clone())
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router().oneshot(request).await.expect("infallible");
        let (head, body) = response.into_parts();
        let bytes = body.collect().await.expect("a whole body").to_bytes();
        let text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
        Answer { status: head.status, headers: head.headers, text }
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(Request::post(path).body(body.into()).expect("a request")).await
    }

    async fn post_json(&self, path: &str, body: Value) -> Answer {
        self.post(path, body.to_string()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    fn last_request(&self) -> GenerateRequest {
        self.requests.lock().last().cloned().expect("a request reached the backend")
    }
}

/// Plays the same tokens for every choice, interleaved as a batch would.
fn play(events: &Events, request: &GenerateRequest, tokens: &[TokenId], reason: FinishReason) {
    // A client that goes away closes the channel; then nobody listens.
    let send = |event| drop(events.send(event));
    send(GenerationEvent::Scheduled { cached_tokens: 1 });
    if let Some(count) = request.envelope.extensions.prompt_logprobs {
        let scored: Vec<TokenLogprobs> =
            request.envelope.prompt[1..].iter().map(|&token| scored(token, count)).collect();
        // In two pieces, as chunks of a prefill.
        let (first, second) = scored.split_at(scored.len() / 2);
        send(GenerationEvent::PromptLogprobs { start: 0, logprobs: first.to_vec() });
        send(GenerationEvent::PromptLogprobs { start: first.len() as u32, logprobs: second.to_vec() });
    }
    let n = request.envelope.sampling.n;
    let stop_token = match reason {
        FinishReason::Stop(StopCause::EndOfSequence(token) | StopCause::Token(token)) => Some(token),
        _ => None,
    };
    for &token in tokens.iter().chain(&stop_token) {
        for choice in 0..n {
            send(GenerationEvent::Token { choice, token, logprobs: logprobs_of(request, token) });
        }
    }
    for choice in 0..n {
        send(GenerationEvent::Finished { choice, reason: reason.clone() });
    }
}

/// A token of the prompt at -2.5, behind the next ids at -0.25, -0.5, …
fn scored(token: TokenId, count: u32) -> TokenLogprobs {
    let top = (1..=count).map(|rank| (token + rank, -0.25 * rank as f32)).collect();
    TokenLogprobs { logprob: -2.5, rank: 40, top }
}

/// The sampled token at -0.5, followed by the next ids at -1, -2, …
fn logprobs_of(request: &GenerateRequest, token: TokenId) -> Option<Box<TokenLogprobs>> {
    let top = request.envelope.sampling.logprobs?;
    let rest = (1..top).map(|rank| (token + rank, -(rank as f32)));
    let top = [(token, -0.5)].into_iter().take(top as usize).chain(rest).collect();
    Some(Box::new(TokenLogprobs { logprob: -0.5, rank: 1, top }))
}
