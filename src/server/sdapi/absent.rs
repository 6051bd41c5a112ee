//! Lists of what kiln does not have, and commands that have nothing to do. Clients call them and stop
//! at an error.

use axum::response::Response;
use serde_json::json;

use super::{SdapiError, SdapiErrorBody, json as answer};

/// Returns an empty object: the server's options are not those of the web UI.
#[utoipa::path(
    get,
    path = "/v1/cmd-flags",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn cmd_flags() -> Result<Response, SdapiError> {
    answer(&json!({}))
}

/// Returns two empty objects: embeddings cannot be loaded.
#[utoipa::path(
    get,
    path = "/v1/embeddings",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn embeddings() -> Result<Response, SdapiError> {
    answer(&json!({"loaded": {}, "skipped": {}}))
}

/// Returns an empty list: images are not post-processed.
#[utoipa::path(
    get,
    path = "/v1/face-restorers",
    tag = "absent",
    responses((status = 200, body = Vec<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn face_restorers() -> Result<Response, SdapiError> {
    answer(&json!([]))
}

/// Returns an empty list: hypernetworks cannot be loaded.
#[utoipa::path(
    get,
    path = "/v1/hypernetworks",
    tag = "absent",
    responses((status = 200, body = Vec<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn hypernetworks() -> Result<Response, SdapiError> {
    answer(&json!([]))
}

/// Returns two empty objects: the server's memory is in `/metrics`.
#[utoipa::path(
    get,
    path = "/v1/memory",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn memory() -> Result<Response, SdapiError> {
    answer(&json!({"ram": {}, "cuda": {}}))
}

/// Returns an empty list: styles are written into the prompt.
#[utoipa::path(
    get,
    path = "/v1/prompt-styles",
    tag = "absent",
    responses((status = 200, body = Vec<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn prompt_styles() -> Result<Response, SdapiError> {
    answer(&json!([]))
}

/// Returns an empty list: images are not enlarged.
#[utoipa::path(
    get,
    path = "/v1/realesrgan-models",
    tag = "absent",
    responses((status = 200, body = Vec<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn realesrgan_models() -> Result<Response, SdapiError> {
    answer(&json!([]))
}

/// Returns an empty list: there are no scripts.
#[utoipa::path(
    get,
    path = "/v1/script-info",
    tag = "absent",
    responses((status = 200, body = Vec<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn script_info() -> Result<Response, SdapiError> {
    answer(&json!([]))
}

/// Returns two empty lists: there are no scripts.
#[utoipa::path(
    get,
    path = "/v1/scripts",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn scripts() -> Result<Response, SdapiError> {
    answer(&json!({"txt2img": [], "img2img": []}))
}

/// Does nothing: the server has one model.
#[utoipa::path(
    post,
    path = "/v1/refresh-checkpoints",
    tag = "absent",
    responses((status = 200, body = Option<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn refresh_checkpoints() -> Result<Response, SdapiError> {
    answer(&json!(null))
}

/// Does nothing: embeddings cannot be loaded.
#[utoipa::path(
    post,
    path = "/v1/refresh-embeddings",
    tag = "absent",
    responses((status = 200, body = Option<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn refresh_embeddings() -> Result<Response, SdapiError> {
    answer(&json!(null))
}

/// Does nothing: the model has one VAE.
#[utoipa::path(
    post,
    path = "/v1/refresh-vae",
    tag = "absent",
    responses((status = 200, body = Option<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn refresh_vae() -> Result<Response, SdapiError> {
    answer(&json!(null))
}

/// Does nothing: the model is always loaded.
#[utoipa::path(
    post,
    path = "/v1/reload-checkpoint",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn reload_checkpoint() -> Result<Response, SdapiError> {
    answer(&json!({}))
}

/// Does nothing: the model stays loaded.
#[utoipa::path(
    post,
    path = "/v1/unload-checkpoint",
    tag = "absent",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn unload_checkpoint() -> Result<Response, SdapiError> {
    answer(&json!({}))
}
