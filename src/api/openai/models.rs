//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::api::error::ApiError;
use crate::api::model::ServedModel;
use crate::api::state::ApiState;

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

fn card(model: &ServedModel, id: &str) -> ModelCard {
    ModelCard {
        id: id.to_string(),
        object: "model",
        created: model.created,
        owned_by: "outrigger",
        root: model.name().to_string(),
        parent: None,
        max_model_len: model.max_model_len,
    }
}

/// Lists nothing while the model loads.
pub async fn list(State(state): State<ApiState>) -> Json<ModelList> {
    let cards = |model: &ServedModel| model.names().iter().map(|name| card(model, name)).collect();
    Json(ModelList { object: "list", data: state.model().map(|model| cards(model)).unwrap_or_default() })
}

/// The id may hold slashes, as hub ids do.
pub async fn get(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    let model = state.model().ok_or_else(|| ApiError::model_not_found(&id))?;
    model.check_name(Some(&id))?;
    Ok(Json(card(model, model.names().iter().find(|name| **name == id).map_or(model.name(), |name| name))))
}
