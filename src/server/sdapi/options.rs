//! Settings and lists of choices: one model with one sampler.

use std::sync::Arc;

use axum::Extension;
use axum::response::Response;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::super::LoadedApp;
use super::super::error::ApiError;
use super::super::invalid::InvalidBody;
use super::super::keys::is_empty;
use super::{
    PREVIEW_STEPS, SAMPLER, SCHEDULER, SdapiError, SdapiErrorBody, SdapiObject, json as answer,
};

/// Settings of the server, which are read-only.
#[derive(Serialize, ToSchema)]
pub(super) struct Options<'a> {
    /// Name of the model.
    sd_model_checkpoint: &'a str,
    sd_vae: &'static str,
    samples_format: &'static str,
    /// Number of steps from one `current_image` of the progress to the next.
    show_progress_every_n_steps: usize,
}

impl<'a> Options<'a> {
    fn new(app: &'a LoadedApp) -> Self {
        Self {
            sd_model_checkpoint: app.model_name(None),
            sd_vae: "Automatic",
            samples_format: "png",
            show_progress_every_n_steps: PREVIEW_STEPS.get(),
        }
    }
}

/// One name of the model.
#[derive(Serialize, ToSchema)]
pub(super) struct SdModel<'a> {
    title: &'a str,
    model_name: &'a str,
    #[schema(value_type = Option<String>)]
    hash: Option<()>,
    #[schema(value_type = Option<String>)]
    sha256: Option<()>,
    filename: &'a str,
    #[schema(value_type = Option<String>)]
    config: Option<()>,
}

/// A sampler.
#[derive(Serialize, ToSchema)]
pub(super) struct Sampler {
    name: &'static str,
    aliases: Vec<&'static str>,
    #[schema(value_type = Object)]
    options: Value,
}

/// A schedule of noise levels.
#[derive(Serialize, ToSchema)]
pub(super) struct Scheduler {
    name: &'static str,
    label: &'static str,
}

/// A way to enlarge images.
#[derive(Serialize, ToSchema)]
pub(super) struct Upscaler {
    name: &'static str,
    scale: f64,
}

/// Returns the settings.
#[utoipa::path(
    get,
    path = "/v1/options",
    tag = "options",
    responses((status = 200, body = Options), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn options(
    Extension(app): Extension<Arc<LoadedApp>>,
) -> Result<Response, SdapiError> {
    answer(&Options::new(&app))
}

/// Accepts the current settings, empty values, and any name of the model, as the server has one
/// model. Other changes are refused.
#[utoipa::path(
    post,
    path = "/v1/options",
    tag = "options",
    request_body = Object,
    responses((status = 200, body = Option<Object>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn set_options(
    Extension(app): Extension<Arc<LoadedApp>>,
    SdapiObject(requested): SdapiObject,
) -> Result<Response, SdapiError> {
    let current = serde_json::to_value(Options::new(&app)).map_err(ApiError::Response)?;
    for (key, value) in &requested {
        let is_name = key == "sd_model_checkpoint" && value.is_string();
        if !is_name && !is_empty(value) && current.get(key) != Some(value) {
            let param = key.clone();
            let instead = "settings are given to kiln serve when it is started";
            return Err(InvalidBody::Unavailable { param, instead }.into());
        }
    }
    answer(&Value::Null)
}

/// Lists the names of the model.
#[utoipa::path(
    get,
    path = "/v1/sd-models",
    tag = "options",
    responses((status = 200, body = Vec<SdModel>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn sd_models(
    Extension(app): Extension<Arc<LoadedApp>>,
) -> Result<Response, SdapiError> {
    let names = app.settings.served_model_names.iter();
    let model = |name| SdModel {
        title: name,
        model_name: name,
        hash: None,
        sha256: None,
        filename: name,
        config: None,
    };
    let models: Vec<_> = names.map(String::as_str).map(model).collect();
    answer(&models)
}

/// Lists the only sampler. Requests may name any sampler.
#[utoipa::path(
    get,
    path = "/v1/samplers",
    tag = "options",
    responses((status = 200, body = Vec<Sampler>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn samplers() -> Result<Response, SdapiError> {
    answer(&[Sampler {
        name: SAMPLER,
        aliases: vec!["euler"],
        options: json!({}),
    }])
}

/// Lists the only schedule. Requests may name any schedule.
#[utoipa::path(
    get,
    path = "/v1/schedulers",
    tag = "options",
    responses((status = 200, body = Vec<Scheduler>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn schedulers() -> Result<Response, SdapiError> {
    answer(&[Scheduler {
        name: "automatic",
        label: SCHEDULER,
    }])
}

/// Lists one entry, `None`: images are not enlarged.
#[utoipa::path(
    get,
    path = "/v1/upscalers",
    tag = "options",
    responses((status = 200, body = Vec<Upscaler>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn upscalers() -> Result<Response, SdapiError> {
    answer(&[Upscaler {
        name: "None",
        scale: 1.0,
    }])
}

/// Returns an empty list: images are not enlarged.
#[utoipa::path(
    get,
    path = "/v1/latent-upscale-modes",
    tag = "options",
    responses((status = 200, body = Vec<String>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn latent_upscale_modes() -> Result<Response, SdapiError> {
    answer(&Vec::<Value>::new())
}

/// Returns an empty list: the model has one VAE.
#[utoipa::path(
    get,
    path = "/v1/sd-vae",
    tag = "options",
    responses((status = 200, body = Vec<String>), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn sd_vae() -> Result<Response, SdapiError> {
    answer(&Vec::<Value>::new())
}
