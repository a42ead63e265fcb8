//! Sends an arbitrary request body through the whole HTTP side, over an engine that answers at once. The response must be a
//! result or a refusal in OpenAI's shape, never a 5xx. The first byte chooses the endpoint.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use axum::body::{Body, Bytes};
use axum::http::{Request, header};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use outrigger::admission::{self, AdmissionController};
use outrigger::api::{self, ApiState, ServedModel};
use outrigger::cluster::ModelReport;
use outrigger::engine::null::NullEngine;
use outrigger::health::{self, Health};
use outrigger::observability::Metrics;
use outrigger::router::{self, LocalReplica, Router};
use outrigger::tenancy::{Directory, Tenants};
use outrigger::tokenizer::Tokenizer;
use outrigger::types::Backend;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;

/// Small, so that every answer is short.
const MAX_MODEL_LEN: u32 = 64;

struct Node {
    runtime: Runtime,
    state: ApiState,
}

static NODE: LazyLock<Node> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let state = runtime.block_on(async { state() });
    Node { runtime, state }
});

fn state() -> ApiState {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/fixtures/llama-gqa-tied-bf16");
    let tokenizer = Tokenizer::from_dir(&fixture).expect("the fixture has a tokenizer");
    let template = tokenizer.chat_template().expect("the fixture has a template");
    let metrics = Arc::new(Metrics::new("null"));
    let admission = AdmissionController::new(admission::Config::default(), 64, metrics.clone());
    let health = Health::new(health::Config::default(), metrics.clone());
    let router = Router::alone(router::Config::default(), admission.clone(), health.clone(), metrics.clone());
    let tenants = Tenants::new(Directory::default());
    let state = ApiState::new(api::Config::default(), tenants, metrics, admission, health.clone(), router.clone());
    let backend = Arc::new(NullEngine::new(tokenizer.vocab_size() as u32));
    let model = ModelReport {
        names: vec!["null".into()],
        fingerprint: backend.fingerprint(),
        tokenizer: "tokenizer".into(),
        max_model_len: MAX_MODEL_LEN,
        created: 1,
    };
    state.set_model(ServedModel::new(&model, tokenizer, template, vec![2]));
    router.attach(LocalReplica { engine: backend, model, seats: 64, tokenizer: Bytes::new() });
    health.lifecycle().warming("loaded").expect("a step of the diagram");
    health.lifecycle().ready("tried").expect("a step of the diagram");
    state
}

fuzz_target!(|input: &[u8]| {
    let Some((endpoint, body)) = input.split_first() else { return };
    let path = match endpoint {
        b'p' => "/v1/completions",
        b't' => "/tokenize",
        b'd' => "/detokenize",
        _ => "/v1/chat/completions",
    };
    let node = &*NODE;
    node.runtime.block_on(async {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.to_vec())).expect("a request");
        let response = api::router(node.state.clone()).oneshot(request).await.expect("infallible");
        let status = response.status();
        let answer = response.into_body().collect().await.expect("a whole body").to_bytes();
        let answer = std::str::from_utf8(&answer).expect("UTF-8");
        assert!(!status.is_server_error(), "{status}: {answer}");
        if status.is_success() {
            assert!(answer.ends_with("data: [DONE]\n\n") || serde_json::from_str::<Value>(answer).is_ok(), "{answer}");
        } else {
            let error: Value = serde_json::from_str(answer).expect("an error is JSON");
            assert!(error["error"]["message"].is_string(), "{status}: {answer}");
        }
    });
});
