//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::api::error::ApiError;
use crate::api::model::DEFAULT_ALIAS;
use crate::api::state::ApiState;
use crate::cluster::ModelReport;

#[derive(Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

#[derive(Serialize)]
pub struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
}

fn card(model: &ModelReport, id: &str) -> ModelCard {
    ModelCard {
        id: id.to_string(),
        object: "model",
        created: model.created,
        owned_by: "outrigger",
        root: model.names[0].clone(),
        parent: None,
        max_model_len: model.max_model_len as usize,
    }
}

/// The models of this node and its peers, each name once.
fn cards(state: &ApiState) -> Vec<ModelCard> {
    let own = state.router.local().map(|local| local.model.clone());
    let of_peers = state.router.peer_models().into_iter().map(|(_, model)| model);
    let mut cards: Vec<ModelCard> = Vec::new();
    for model in own.into_iter().chain(of_peers) {
        for name in &model.names {
            if !cards.iter().any(|known| known.id == *name) {
                cards.push(card(&model, name));
            }
        }
    }
    cards
}

/// Lists the models that can be served. The list is empty while the only node that serves a model is still loading.
pub async fn list(State(state): State<ApiState>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: cards(&state) })
}

/// The id may contain slashes, as Hugging Face ids do.
pub async fn get(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    let Path(id) =
        id.map_err(|_| ApiError::not_found("The model id in the path is not valid UTF-8. See /v1/models."))?;
    let own =
        state.router.local().filter(|_| id == DEFAULT_ALIAS).map(|local| card(&local.model, &local.model.names[0]));
    let known = own.or_else(|| cards(&state).into_iter().find(|card| card.id == id));
    known.map(Json).ok_or_else(|| ApiError::model_not_found(&id))
}
