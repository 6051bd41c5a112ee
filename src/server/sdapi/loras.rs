//! The adapters that prompts may name.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::adapters::Listed;

use super::super::LoadedApp;
use super::{SdapiError, SdapiErrorBody, json as answer};

/// An adapter.
#[derive(Serialize, ToSchema)]
pub(super) struct Lora {
    /// Its name in tags: `<lora:NAME:WEIGHT>`.
    name: String,
    /// The same name.
    alias: String,
    /// Its file, relative to the server's folder of adapters.
    path: String,
    /// What the header of its file says about it.
    metadata: BTreeMap<String, Value>,
}

impl Lora {
    fn new(listed: &Listed) -> Self {
        let name = &listed.info.name;
        let metadata = listed.metadata.iter();
        Self {
            name: name.clone(),
            alias: name.clone(),
            path: listed.file().to_owned(),
            metadata: metadata
                .map(|(key, text)| (key.clone(), metadata_value(text)))
                .collect(),
        }
    }
}

/// A value of a header, which has texts only. As in the web UI, the text of a JSON object is the object.
fn metadata_value(text: &str) -> Value {
    let object = text
        .starts_with('{')
        .then(|| serde_json::from_str(text).ok());
    object.flatten().unwrap_or_else(|| text.into())
}

/// Returns the adapters that prompts may name.
#[utoipa::path(
    get,
    path = "/v1/loras",
    tag = "loras",
    responses((status = 200, body = Vec<Lora>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn loras(
    Extension(app): Extension<Arc<LoadedApp>>,
) -> Result<Response, SdapiError> {
    let listed = app.adapters.listed();
    let loras: Vec<Lora> = listed.iter().map(|it| Lora::new(it)).collect();
    answer(&loras)
}

/// Lists the files in the server's folder of adapters again: new ones, changed ones, and no longer those
/// that are gone.
#[utoipa::path(
    post,
    path = "/v1/refresh-loras",
    tag = "loras",
    responses(
        (status = 200, body = Option<Object>),
        (status = "4XX", body = SdapiErrorBody),
        (status = "5XX", body = SdapiErrorBody),
    ),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn refresh_loras(
    Extension(app): Extension<Arc<LoadedApp>>,
) -> Result<Response, SdapiError> {
    spawn_blocking(move || app.adapters.rescan()).await??;
    answer(&())
}
