//! `GET /v1/models` and `GET /version`: the names of the model and of adapters, and the version of kiln.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{OriginalUri, Path};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::adapters::Listed;
use crate::version;

use super::LoadedApp;
use super::error::{ApiError, ErrorEnvelope};
use super::json::json;

/// The names of the model, and the adapters.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// One name of the model, or an adapter.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelCard {
    id: String,
    object: &'static str,
    /// Unix time at which the server started, in seconds.
    created: u64,
    owned_by: &'static str,
    /// Only of adapters: the model that they change.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    /// Only of adapters: the file, relative to the server's folder of adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    root: Option<String>,
}

/// The version of kiln, and what it was built from.
#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the key is vLLM's")]
pub(super) struct Version {
    /// Version of the package.
    version: &'static str,
    /// First digits of the commit's hash; null if it was not built in a git repository.
    commit: Option<&'static str>,
    /// Date of the commit in UTC, `YYYY-MM-DD`.
    date: Option<&'static str>,
    /// Backends that were compiled in.
    features: Vec<&'static str>,
    /// Version of the burn framework.
    burn: &'static str,
}

fn card(app: &LoadedApp, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: app.started,
        owned_by: "kiln",
        parent: None,
        root: None,
    }
}

/// An adapter, which requests may name as the model.
fn adapter_card(app: &LoadedApp, adapter: &Listed) -> ModelCard {
    ModelCard {
        parent: Some(app.model_name(None).to_owned()),
        root: Some(adapter.file().to_owned()),
        ..card(app, &adapter.info.name)
    }
}

/// All names of the model, and the adapters.
fn cards(app: &LoadedApp) -> Vec<ModelCard> {
    let names = &app.settings.served_model_names;
    let adapters = app.adapters.listed();
    let adapters = adapters.iter().filter(|it| !names.contains(&it.info.name));
    let models = names.iter().map(|name| card(app, name));
    models
        .chain(adapters.map(|it| adapter_card(app, it)))
        .collect()
}

/// Lists the names of the model, and the adapters.
#[utoipa::path(
    get,
    path = "/models",
    tag = "models",
    responses((status = 200, body = ModelList), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn list(Extension(app): Extension<Arc<LoadedApp>>) -> Result<Response, ApiError> {
    json(&ModelList {
        object: "list",
        data: cards(&app),
    })
}

/// Reports whether the model or an adapter has a name.
#[utoipa::path(
    get,
    path = "/models/{*name}",
    tag = "models",
    params(("name" = String, Path, description = "The name; it may contain slashes.")),
    responses((status = 200, body = ModelCard), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn retrieve(
    Extension(app): Extension<Arc<LoadedApp>>,
    OriginalUri(uri): OriginalUri,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    // A name that is not UTF-8 when decoded stays as it was sent.
    let sent = || uri.path().trim_start_matches("/v1/models/").to_owned();
    let name = name.map_or_else(|_| sent(), |Path(name)| name);
    let card = cards(&app).into_iter().find(|card| card.id == name);
    json(&card.ok_or_else(|| app.unknown_model(name))?)
}

/// Returns the version of kiln.
#[utoipa::path(
    get,
    path = "/version",
    tag = "models",
    responses((status = 200, body = Version)),
)]
pub(super) async fn version() -> Result<Response, ApiError> {
    json(&Version {
        version: version::PACKAGE,
        commit: version::commit(),
        date: version::date(),
        features: version::features(),
        burn: version::BURN,
    })
}
