//! `GET /v1/models` and `GET /version`: what is served, and by what.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::version;

use super::App;
use super::error::{ApiError, ErrorEnvelope};
use super::json::json;

/// Names of the model; each is as good as the others.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct ModelCard {
    id: String,
    object: &'static str,
    /// Unix time of the server's start, in seconds.
    created: u64,
    owned_by: &'static str,
}

/// The program's version, and what it was built from.
#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the key is vLLM's")]
pub(super) struct Version {
    /// Version of the package.
    version: &'static str,
    /// First digits of the commit's hash; `null` in a build from outside of a git repository.
    commit: Option<&'static str>,
    /// Date of the commit in UTC, as year-month-day.
    date: Option<&'static str>,
    /// Backends that were compiled in.
    features: Vec<&'static str>,
    /// Version of the burn framework.
    burn: &'static str,
}

fn card(app: &App, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: app.started,
        owned_by: "kiln",
    }
}

/// Lists the names of the model.
#[utoipa::path(
    get,
    path = "/v1/models",
    responses((status = 200, body = ModelList), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let names = &app.settings.served_model_names;
    json(&ModelList {
        object: "list",
        data: names.iter().map(|name| card(&app, name)).collect(),
    })
}

/// Tells whether the model goes by a name.
#[utoipa::path(
    get,
    path = "/v1/models/{name}",
    params(("name" = String, Path, description = "May contain slashes.")),
    responses((status = 200, body = ModelCard), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let names = &app.settings.served_model_names;
    if names.contains(&name) {
        json(&card(&app, &name))
    } else {
        let served = names.join(", ");
        Err(ApiError::UnknownModel { name, served })
    }
}

/// Returns kiln's version.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
pub(super) async fn version() -> Result<Response, ApiError> {
    json(&Version {
        version: version::PACKAGE,
        commit: version::commit(),
        date: version::date(),
        features: version::features(),
        burn: version::BURN,
    })
}
