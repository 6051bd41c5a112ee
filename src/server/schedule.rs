//! Schedules in requests and answers.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::request::{ChosenAdapter, GivenSchedule, Recipe};

use super::invalid::InvalidBody;

/// Reads `schedule`.
pub(super) fn given_schedule(value: Option<&Value>) -> Result<Option<GivenSchedule>, InvalidBody> {
    let given = value.map_or(Ok(None), GivenSchedule::from_json);
    given.map_err(|error| InvalidBody::value(error.param, &error.message))
}

/// An adapter that the images were generated with.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsedAdapter {
    name: String,
    scale: f64,
}

impl UsedAdapter {
    pub(super) fn all(adapters: &[ChosenAdapter]) -> Vec<Self> {
        let used = adapters.iter().map(|chosen| Self {
            name: chosen.info.name.clone(),
            scale: chosen.scale,
        });
        used.collect()
    }
}

/// What a distilled model was trained for.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelRecipe {
    /// Name of the recipe, such as `lightning`.
    name: String,
    num_inference_steps: Option<usize>,
    true_cfg_scale: Option<f64>,
}

impl From<&Recipe> for ModelRecipe {
    fn from(recipe: &Recipe) -> Self {
        Self {
            name: recipe.name.clone(),
            num_inference_steps: recipe.steps,
            true_cfg_scale: recipe.true_cfg_scale,
        }
    }
}

/// The noise levels of the steps, and why they were used.
#[derive(ToSchema)]
#[schema(as = UsedSchedule)]
#[expect(
    dead_code,
    reason = "only for the document: the request's own type is serialised"
)]
pub(super) struct ScheduleFacts {
    origin: OriginName,
    /// Name of the recipe; null for the model's own schedule, and for levels that the request gave.
    name: Option<String>,
    /// Time shift, if there was a fixed one.
    shift: Option<f64>,
    /// Noise level that the last step of the shift was stretched to.
    terminal: Option<f64>,
    /// True if each step predicted the clean image and added fresh noise. Absent otherwise.
    stochastic: Option<bool>,
    /// The noise level at the start of each step.
    sigmas: Vec<f32>,
}

/// Where the schedule comes from: a field of the request, the JSON file beside the adapter, the header
/// of the adapter's file, the table of known adapters, or the model.
#[derive(ToSchema)]
#[schema(as = ScheduleOrigin)]
#[serde(rename_all = "snake_case")]
#[expect(
    dead_code,
    reason = "only for the document: the request's own type is serialised"
)]
pub(super) enum OriginName {
    Request,
    Sidecar,
    Header,
    KnownName,
    Model,
}

/// A schedule: the name of a recipe, or an object with its values.
#[derive(ToSchema)]
#[schema(as = Schedule)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "only for the document: schedules are read by hand"
)]
pub(super) enum ScheduleField {
    Name(ScheduleName),
    Levels(ScheduleLevels),
}

/// `model` is the schedule of the model's `scheduler_config.json`.
#[derive(ToSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(
    dead_code,
    reason = "only for the document: schedules are read by hand"
)]
pub(super) enum ScheduleName {
    Model,
    Lightning,
    WuliTurbo,
    #[serde(rename = "dmd2-3step")]
    Dmd2,
    Distill,
    Twinflow,
    #[serde(rename = "twinflow-2step")]
    TwinflowOf2Steps,
}

/// Noise levels, as `shift` or as `sigmas`, and the sampler.
#[derive(ToSchema)]
#[expect(
    dead_code,
    reason = "only for the document: schedules are read by hand"
)]
pub(super) struct ScheduleLevels {
    /// As the request's `shift`.
    shift: Option<f64>,
    /// Noise level that the last step of `shift` is stretched to, from 0 to below 1.
    #[schema(minimum = 0, maximum = 1)]
    terminal: Option<f64>,
    /// As the request's `sigmas`.
    sigmas: Option<Vec<f64>>,
    /// Whether each step predicts the clean image and adds fresh noise of the next level.
    stochastic: Option<bool>,
}
