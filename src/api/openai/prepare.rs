//! From a request to a running generation: its body, tokenization, limits, admission, dispatch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::HeaderMap;
use tracing::Span;
use tracing::field::display;

use super::body::{PromptInput, RequestBody};
use super::conversation::Conversation;
use super::generation::{ClientGeneration, Part};
use super::head::Head;
use super::resumption::Resumption;
use super::sampling::{self, Endpoint, MAX_CHOICES};
use crate::admission::Demand;
use crate::api::body::read;
use crate::api::config::Config;
use crate::api::error::ApiError;
use crate::api::json;
use crate::api::model::{ServedModel, unix_seconds};
use crate::api::state::{ApiState, Worker};
use crate::router::{Dispatch, Dispatched, EarlierAttempt, Strategy};
use crate::tenancy::Caller;
use crate::types::{Envelope, Extensions, Failure, RequestId, SamplingParams, TokenId, TraceContext};

/// The request's deadline, in milliseconds from its arrival.
pub const TIMEOUT_HEADER: &str = "x-request-timeout-ms";
/// The placement strategy for this request.
pub const PLACEMENT_HEADER: &str = "x-outrigger-placement";
/// If `true` and no replica with the stream's fingerprint is left, continue on a replica with another one.
pub const OTHER_FINGERPRINT_HEADER: &str = "x-outrigger-allow-other-fingerprint";
/// One day.
const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Prompts per completion request. The queue limit may allow fewer.
pub const MAX_PROMPTS: usize = 2048;
/// Longer texts are tokenized on a blocking thread. For shorter ones, switching threads takes longer than tokenizing.
const INLINE_TEXT_BYTES: usize = 16 << 10;
/// Default `max_tokens` of a completion, as OpenAI documents it.
const DEFAULT_COMPLETION_TOKENS: u32 = 16;

/// A prompt's token ids, and its text if the client sent text.
pub struct Prompt {
    pub tokens: Arc<[TokenId]>,
    pub text: Option<String>,
}

/// All that a handler needs to build the response.
pub struct Prepared {
    pub head: Head,
    pub prompts: Vec<Prompt>,
    /// Choices per prompt.
    pub n: u32,
    pub generation: ClientGeneration,
    pub resumption: Resumption,
}

/// The deadline that the client set, if any.
pub fn deadline(headers: &HeaderMap, arrived: Instant) -> Result<Option<Instant>, Failure> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
    match millis {
        Some(millis @ 1..=MAX_TIMEOUT_MS) => Ok(Some(arrived + Duration::from_millis(millis))),
        _ => {
            let message = format!("The header `{TIMEOUT_HEADER}` must be a whole number from 1 to {MAX_TIMEOUT_MS}.");
            Err(Failure::invalid(TIMEOUT_HEADER, message).with_code("out_of_range"))
        }
    }
}

/// The prompts of a request as the client sent them.
enum PromptSource {
    Chat(Conversation),
    Completion { input: PromptInput, add_special_tokens: bool },
}

/// Reads the request and checks everything, then admits and starts all its prompts, or none. What can be refused without the
/// prompts' tokens is refused before they are tokenized.
pub async fn prepare(
    state: &ApiState,
    request: Request,
    endpoint: Endpoint,
) -> Result<(RequestBody, Prepared), ApiError> {
    let (request, body) = request.into_parts();
    let headers = &request.headers;
    let mut hold = state.check_serving(headers).await?;
    let bytes = read(&state.config, headers, body).await?;
    let mut body: RequestBody = json::parse(&bytes)?;
    let model = state.serving_model(&mut hold, body.model.as_deref()).await?;
    if endpoint == Endpoint::Chat && body.echo == Some(true) {
        let refusal = Failure::invalid("echo", "`echo` is not supported in chat.");
        return Err(refusal.with_code("unsupported_parameter").into());
    }
    let arrived = Instant::now();
    body.refuse_unsupported()?;
    let deadline = deadline(headers, arrived)?;
    let caller: &Caller = request.extensions.get().expect("the route asks for a key");
    let mut resumption = Resumption::read(state, caller.tenant.clone(), headers, &bytes, endpoint)?;
    Span::current().record("id", display(&resumption.id));
    let (defaults, vocab) = (&model.sampling_defaults, model.tokenizer.vocab_size());
    let sampling = sampling::params(&body, endpoint, defaults, vocab, resumption.seed)?;
    let source = PromptSource::take(&mut body, endpoint)?;
    check_choices(state, source.count(), sampling.n)?;
    let isolated = Some(&caller.tenant).filter(|tenant| state.config.isolate_prefix_cache && tenant.is_known());
    let extensions = sampling::extensions(&body, endpoint, isolated)?;
    let requested = sampling::requested_max_tokens(&body, endpoint)?;
    check_requested(&state.config, &sampling, requested)?;
    resumption.fit(body.is_stream(), source.count() * sampling.n as usize)?;
    let is_derivable = body.seed.is_some() || sampling.temperature == 0.0;
    let strategy = strategy(headers)?;
    let allows_other_fingerprint = allows_other_fingerprint(headers)?;
    let name = body.model.as_deref().filter(|name| model.has_name(name)).unwrap_or(model.name());
    let priority = body.priority.unwrap_or(0);
    let worker = state.worker(source.text_bytes() > INLINE_TEXT_BYTES).await?;
    // With a key, the stream may exist already, and is then not refused because of load. Prompts are admitted one by one, and
    // places may become free between them, so the first prompt's choices are what is certain.
    if !resumption.is_keyed() {
        let least = Demand::least(sampling.n, priority, deadline);
        state.router.check_room(name, &model.tokenizer_digest, least)?;
    }
    let prompts = source.tokenize(worker, &model).await?;
    let is_named = resumption.is_keyed() || (body.is_stream() && state.router.is_clustered());
    let start = Start {
        state,
        model: &model,
        name,
        priority,
        deadline,
        arrived,
        strategy,
        extensions,
        allows_other_fingerprint,
        resumption: &resumption,
        is_named,
        must_exist: resumption.is_given_name() && !is_derivable,
        trace: request.extensions.get().cloned(),
    };
    let mut first = None;
    let mut parts = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let max_tokens = max_tokens(&state.config, &model, endpoint, prompt.tokens.len(), requested)?;
        check_min_tokens(&sampling, max_tokens)?;
        let sampling = Arc::new(SamplingParams { max_tokens, ..sampling.clone() });
        let (part, head) = start.part(index, prompt, sampling).await?;
        parts.push(part);
        first.get_or_insert(head);
    }
    let head = first.expect("a request has a prompt");
    state.metrics.organization_requests.with(&caller.organization, []).inc();
    let mut generation = ClientGeneration::new(parts, deadline, caller.organization.clone(), state.metrics.clone());
    if let Some(marks) = &resumption.has {
        generation.skip(marks);
    }
    resumption.is_offered = is_named;
    let n = sampling.n;
    Ok((body, Prepared { head, prompts, n, generation, resumption }))
}

struct Start<'a> {
    state: &'a ApiState,
    model: &'a Arc<ServedModel>,
    /// The name by which the client called the model.
    name: &'a str,
    priority: i32,
    deadline: Option<Instant>,
    arrived: Instant,
    strategy: Option<Strategy>,
    extensions: Extensions,
    allows_other_fingerprint: bool,
    resumption: &'a Resumption,
    /// The client can resume this stream.
    is_named: bool,
    /// The stream must still exist somewhere, because its seed is not known and it cannot be computed again.
    must_exist: bool,
    trace: Option<TraceContext>,
}

impl Start<'_> {
    /// Dispatches one prompt. If a later prompt is refused, those already started are cancelled.
    async fn part(
        &self,
        index: usize,
        prompt: &Prompt,
        sampling: Arc<SamplingParams>,
    ) -> Result<(Part, Head), Failure> {
        let id = &self.resumption.id;
        let first_choice = index as u32 * sampling.n;
        let mut extensions = self.extensions;
        if !self.resumption.lacks_beginning(first_choice as usize, sampling.n as usize) {
            // The client already has the prompt's log-probabilities: they came with the beginning of the stream.
            extensions.prompt_logprobs = None;
        }
        let envelope = Envelope {
            id: if index == 0 { id.clone() } else { RequestId::new(format!("{id}-{index}")) },
            created: unix_seconds(),
            name: self.is_named.then(|| self.resumption.stream_name(index)),
            tenant: self.resumption.tenant.clone(),
            model: self.name.into(),
            tokenizer: self.model.tokenizer_digest.as_str().into(),
            prompt: prompt.tokens.clone(),
            sampling: sampling.clone(),
            priority: self.priority,
            deadline: self.deadline,
            extensions,
            trace: self.trace.clone(),
        };
        let dispatched = self.state.router.dispatch(Dispatch {
            envelope: Arc::new(envelope),
            strategy: self.strategy,
            allows_other_fingerprint: self.allows_other_fingerprint,
            earlier: EarlierAttempt {
                may_exist: self.resumption.is_keyed(),
                must_exist: self.must_exist,
                have: self.resumption.tokens_of(first_choice as usize, sampling.n as usize),
            },
        });
        let dispatched = dispatched.await?;
        let prompt_tokens = prompt.tokens.len();
        let model = self.model.clone();
        // A resumed stream keeps its id and creation time.
        let Dispatched { stream, id, created, fingerprint } = dispatched;
        let scores_prompt = extensions.prompt_logprobs.is_some();
        let part = Part::new(stream, model.clone(), sampling, first_choice, prompt_tokens, scores_prompt, self.arrived);
        Ok((part, Head { id, created, model, fingerprint }))
    }
}

/// Refuses a request whose choices could never be queued together.
fn check_choices(state: &ApiState, num_prompts: usize, n: u32) -> Result<(), Failure> {
    let (choices, limit) = (num_prompts as u64 * u64::from(n), state.admission.max_choices().max(MAX_CHOICES.into()));
    if choices <= limit {
        return Ok(());
    }
    let message = format!(
        "The request asks for {choices} choices, `n` for each prompt; this server holds at most {limit} (max_num_seqs and \
         max_num_queued_requests together)."
    );
    Err(Failure::invalid("n", message).with_code("out_of_range"))
}

fn strategy(headers: &HeaderMap) -> Result<Option<Strategy>, Failure> {
    let Some(value) = headers.get(PLACEMENT_HEADER) else { return Ok(None) };
    let strategy = value.to_str().ok().and_then(|name| Strategy::from_name(name.trim()));
    strategy.map(Some).ok_or_else(|| {
        let names = Strategy::ALL.map(Strategy::name).join(", ");
        let message = format!("The header `{PLACEMENT_HEADER}` must be one of {names}.");
        Failure::invalid(PLACEMENT_HEADER, message).with_code("out_of_range")
    })
}

fn allows_other_fingerprint(headers: &HeaderMap) -> Result<bool, Failure> {
    match headers.get(OTHER_FINGERPRINT_HEADER).map(|value| value.as_bytes().trim_ascii()) {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => {
            let message = format!("The header `{OTHER_FINGERPRINT_HEADER}` must be true or false.");
            Err(Failure::invalid(OTHER_FINGERPRINT_HEADER, message).with_code("out_of_range"))
        }
    }
}

impl PromptSource {
    /// Takes the fields out of the body, and checks what can be checked without the model.
    fn take(body: &mut RequestBody, endpoint: Endpoint) -> Result<Self, Failure> {
        if endpoint == Endpoint::Chat {
            return Conversation::take(body).map(Self::Chat);
        }
        let input = body.prompt.take().ok_or_else(|| Failure::invalid("prompt", "`prompt` is required."))?;
        let source = Self::Completion { input, add_special_tokens: body.add_special_tokens.unwrap_or(true) };
        check_prompt_count(source.count())?;
        Ok(source)
    }

    /// The number of prompts.
    fn count(&self) -> usize {
        match self {
            Self::Chat(_) => 1,
            Self::Completion { input: PromptInput::Text(_) | PromptInput::Tokens(_), .. } => 1,
            Self::Completion { input: PromptInput::Texts(texts), .. } => texts.len(),
            Self::Completion { input: PromptInput::TokenLists(lists), .. } => lists.len(),
        }
    }

    fn text_bytes(&self) -> usize {
        match self {
            Self::Chat(conversation) => conversation.text_bytes(),
            Self::Completion { input: PromptInput::Text(text), .. } => text.len(),
            Self::Completion { input: PromptInput::Texts(texts), .. } => texts.iter().map(String::len).sum(),
            Self::Completion { input: PromptInput::Tokens(_) | PromptInput::TokenLists(_), .. } => 0,
        }
    }

    async fn tokenize(self, worker: Worker<'_>, model: &Arc<ServedModel>) -> Result<Vec<Prompt>, Failure> {
        let served = model.clone();
        match self {
            Self::Chat(conversation) => {
                let tokens = worker.run(move || conversation.encode(&served)).await?;
                Ok(vec![Prompt { tokens: check_prompt(tokens, "messages")?, text: None }])
            }
            Self::Completion { input, add_special_tokens } => {
                let texts = match input {
                    PromptInput::Text(text) => vec![text],
                    PromptInput::Texts(texts) => texts,
                    PromptInput::Tokens(tokens) => return id_prompts(model, vec![tokens]),
                    PromptInput::TokenLists(lists) => return id_prompts(model, lists),
                };
                worker.run(move || text_prompts(&served, texts, add_special_tokens)).await
            }
        }
    }
}

fn text_prompts(model: &ServedModel, texts: Vec<String>, add_special_tokens: bool) -> Result<Vec<Prompt>, Failure> {
    let prompt = |text: String| {
        let tokens = check_prompt(encode(model, &text, add_special_tokens, "prompt")?, "prompt")?;
        Ok(Prompt { tokens, text: Some(text) })
    };
    texts.into_iter().map(prompt).collect()
}

fn id_prompts(model: &ServedModel, lists: Vec<Vec<TokenId>>) -> Result<Vec<Prompt>, Failure> {
    let vocab = model.tokenizer.vocab_size();
    let prompt = |tokens: Vec<TokenId>| {
        for &token in &tokens {
            sampling::check_token("prompt", token, vocab)?;
        }
        Ok(Prompt { tokens: check_prompt(tokens, "prompt")?, text: None })
    };
    lists.into_iter().map(prompt).collect()
}

fn check_prompt_count(count: usize) -> Result<(), Failure> {
    if (1..=MAX_PROMPTS).contains(&count) {
        return Ok(());
    }
    let message = format!("`prompt` must hold from 1 to {MAX_PROMPTS} prompts, not {count}.");
    Err(Failure::invalid("prompt", message).with_code("out_of_range"))
}

fn check_prompt(tokens: Vec<TokenId>, field: &'static str) -> Result<Arc<[TokenId]>, Failure> {
    if tokens.is_empty() {
        return Err(Failure::invalid(field, format!("`{field}` must give at least one token.")));
    }
    Ok(tokens.into())
}

pub fn encode(
    model: &ServedModel,
    text: &str,
    add_special_tokens: bool,
    field: &'static str,
) -> Result<Vec<TokenId>, Failure> {
    model.tokenizer.encode(text, add_special_tokens).map_err(|error| {
        Failure::invalid(field, format!("`{field}` holds text that the tokenizer cannot encode.")).with_source(error)
    })
}

/// The limit on generated tokens: what the client asked for if it fits, else the model's recommended limit or the rest of the
/// context.
fn max_tokens(
    config: &Config,
    model: &ServedModel,
    endpoint: Endpoint,
    prompt_tokens: usize,
    requested: Option<(&'static str, u32)>,
) -> Result<u32, Failure> {
    let field = match endpoint {
        Endpoint::Chat => "messages",
        Endpoint::Completions => "prompt",
    };
    // Clients look for these words of OpenAI's and vLLM's, to shorten the prompt and try again.
    let too_long = |field, message: String| Failure::invalid(field, message).with_code("context_length_exceeded");
    let context = model.max_model_len;
    let least = requested.map_or(1, |(_, value)| value.min(1));
    if prompt_tokens + least as usize > context {
        let message = format!(
            "This model's maximum context length is {context} tokens (max_model_len). However, your {field} resulted in \
             {prompt_tokens} tokens, and the answer needs at least {least}. Please reduce the length of the {field}."
        );
        return Err(too_long(field, message));
    }
    if let Some(limit) = config.max_input_tokens.filter(|&limit| prompt_tokens > limit as usize) {
        let message = format!(
            "The input tokens exceed the configured limit of {limit} tokens (max_input_tokens). Your {field} resulted in \
             {prompt_tokens} tokens. Please reduce the length of the {field}."
        );
        return Err(too_long(field, message));
    }
    let left = u32::try_from(context - prompt_tokens).unwrap_or(u32::MAX);
    let cap = output_cap(config);
    let recommended = model.sampling_defaults.max_new_tokens.unwrap_or(u32::MAX);
    match requested {
        Some((name, value)) if value > left => {
            let total = prompt_tokens as u64 + u64::from(value);
            let message = format!(
                "This model's maximum context length is {context} tokens (max_model_len). However, you requested {total} \
                 tokens ({prompt_tokens} in the {field}, {value} in the completion, `{name}`). Please reduce the length of \
                 the {field} or completion."
            );
            Err(too_long(name, message))
        }
        Some((_, value)) => Ok(value),
        None if endpoint == Endpoint::Completions => Ok(DEFAULT_COMPLETION_TOKENS.min(recommended).min(left).min(cap)),
        None => Ok(recommended.min(left).min(cap)),
    }
}

fn output_cap(config: &Config) -> u32 {
    config.max_output_tokens.unwrap_or(u32::MAX)
}

/// What the client asked for must be allowed, however short the prompt is.
fn check_requested(
    config: &Config,
    sampling: &SamplingParams,
    requested: Option<(&'static str, u32)>,
) -> Result<(), Failure> {
    let Some((name, value)) = requested else { return Ok(()) };
    let cap = output_cap(config);
    if value > cap {
        let message = format!("`{name}` is {value}; at most {cap} are allowed (max_output_tokens).");
        return Err(Failure::invalid(name, message).with_code("out_of_range"));
    }
    check_min_tokens(sampling, value)
}

fn check_min_tokens(sampling: &SamplingParams, max_tokens: u32) -> Result<(), Failure> {
    if sampling.min_tokens <= max_tokens {
        return Ok(());
    }
    let message = format!("`min_tokens` is {}, more than the {max_tokens} tokens allowed.", sampling.min_tokens);
    Err(Failure::invalid("min_tokens", message).with_code("out_of_range"))
}
