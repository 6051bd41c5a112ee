//! The routes that change the list of adapters: vLLM's `POST /v1/load_lora_adapter` and
//! `POST /v1/unload_lora_adapter`, and `POST /v1/refresh_lora_adapters`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::OriginalUri;
use serde::Deserialize;
use serde_json::Value;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::adapters::AdapterError;

use super::super::LoadedApp;
use super::super::body::{self, JsonObject};
use super::super::error::{ApiError, ErrorEnvelope};
use super::super::invalid::InvalidBody;

/// An adapter to list.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LoadLora {
    /// Its name in requests.
    #[schema(required = true, value_type = String)]
    lora_name: Option<String>,
    /// Its file in the server's folder of adapters, relative to the folder or absolute. Default: the
    /// file that has the name.
    lora_path: Option<String>,
    /// Replace an adapter that is listed under this name. Requests that are using it keep it.
    load_inplace: Option<bool>,
    /// Ignored.
    #[schema(value_type = Option<Value>)]
    #[serde(rename = "base_model_name")]
    _base_model_name: Option<Value>,
    /// Ignored.
    #[schema(value_type = Option<Value>)]
    #[serde(rename = "is_3d_lora_weight")]
    _is_3d_lora_weight: Option<Value>,
}

/// An adapter to take from the list.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UnloadLora {
    /// Its name.
    #[schema(required = true, value_type = String)]
    lora_name: Option<String>,
    /// Ignored.
    #[schema(value_type = Option<Value>)]
    #[serde(rename = "lora_int_id")]
    _lora_int_id: Option<Value>,
}

/// Lists an adapter, or with `load_inplace` a new version of one. Needs `--enable-lora-updates`.
#[utoipa::path(
    post,
    path = "/load_lora_adapter",
    tag = "adapters",
    request_body = LoadLora,
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(in super::super) async fn load(
    Extension(app): Extension<Arc<LoadedApp>>,
    OriginalUri(uri): OriginalUri,
    JsonObject(object): JsonObject,
) -> Result<String, ApiError> {
    require_updates(&app, uri.path())?;
    let LoadLora {
        lora_name,
        lora_path,
        load_inplace,
        ..
    } = body::read(without_nulls(object))?;
    let name = named(lora_name)?;
    let merged = app.limits.merged.as_ref();
    if merged.is_some_and(|merged| merged.info.name == name) {
        return Err(AdapterError::Merged { name }.into());
    }
    let file = lora_path.filter(|path| !path.is_empty());
    let message = format!("Success: LoRA adapter '{name}' added successfully.");
    spawn_blocking(move || {
        let file = file.as_deref().unwrap_or(&name);
        app.adapters
            .add(&name, file, load_inplace.unwrap_or_default())
    })
    .await??;
    Ok(message)
}

/// Takes an adapter from the list. Requests that are using it keep it. Needs `--enable-lora-updates`.
#[utoipa::path(
    post,
    path = "/unload_lora_adapter",
    tag = "adapters",
    request_body = UnloadLora,
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(in super::super) async fn unload(
    Extension(app): Extension<Arc<LoadedApp>>,
    OriginalUri(uri): OriginalUri,
    JsonObject(object): JsonObject,
) -> Result<String, ApiError> {
    require_updates(&app, uri.path())?;
    let UnloadLora { lora_name, .. } = body::read(without_nulls(object))?;
    let name = named(lora_name)?;
    let message = format!("Success: LoRA adapter '{name}' removed successfully.");
    spawn_blocking(move || app.adapters.remove(&name)).await??;
    Ok(message)
}

/// Lists the files of the server's folder of adapters again: new ones, changed ones, and no longer those
/// that are gone. Needs `--enable-lora-updates`.
#[utoipa::path(
    post,
    path = "/refresh_lora_adapters",
    tag = "adapters",
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(in super::super) async fn refresh(
    Extension(app): Extension<Arc<LoadedApp>>,
    OriginalUri(uri): OriginalUri,
) -> Result<String, ApiError> {
    require_updates(&app, uri.path())?;
    let count = spawn_blocking(move || {
        app.adapters.rescan()?;
        Ok::<_, AdapterError>(app.adapters.listed().len())
    });
    let count = count.await??;
    Ok(format!("Success: {count} LoRA adapters can be used."))
}

fn without_nulls(mut object: serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    object.retain(|_, value| !value.is_null());
    object
}

fn named(name: Option<String>) -> Result<String, InvalidBody> {
    let name = name.filter(|name| !name.is_empty());
    name.ok_or_else(|| InvalidBody::missing("lora_name"))
}

fn require_updates(app: &LoadedApp, path: &str) -> Result<(), ApiError> {
    if app.settings.lora_updates {
        return Ok(());
    }
    let path = path.to_owned();
    Err(ApiError::LoraUpdatesOff { path })
}
