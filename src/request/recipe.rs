//! Recipes: the noise levels, steps and guidance that an adapter or a distilled model was trained for,
//! and the texts of files that declare them.

use std::collections::BTreeMap;
use std::fmt;

use kiln_models::job::NoiseLevels;
use serde::{Deserialize, Serialize, Serializer};

use super::Integer;
use super::levels::noise_levels;
use super::limits::{DEFAULT_MAX_STEPS, MAX_TRUE_CFG_SCALE};

/// Longest name of a recipe in bytes.
const MAX_NAME: usize = 64;
/// Name of a recipe whose file gives none.
const UNNAMED: &str = "custom";
/// Key of a safetensors header whose value is the JSON of a recipe.
const HEADER_KEY: &str = "kiln.schedule";
/// Key of a safetensors header whose value is a JSON list of noise levels, as vLLM-Omni reads it.
const BASE_SCHEDULE: &str = "base_schedule";

/// What a request gets where it names no value of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Name of the recipe in answers, such as `lightning`.
    pub name: String,
    pub steps: Option<usize>,
    /// `None` keeps the model's noise levels.
    pub levels: Option<NoiseLevels>,
    /// See [`Sampling::stochastic`](kiln_models::job::Sampling::stochastic).
    pub stochastic: bool,
    pub true_cfg_scale: Option<f64>,
}

impl Recipe {
    /// A recipe that changes nothing.
    pub(super) fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            steps: None,
            levels: None,
            stochastic: false,
            true_cfg_scale: None,
        }
    }

    /// Whether requests get the same with either recipe, whatever their names.
    pub(super) fn does_the_same_as(&self, other: &Self) -> bool {
        let name = self.name.clone();
        *self
            == Self {
                name,
                ..other.clone()
            }
    }

    /// Whether it says anything about the noise levels, their number or the sampler.
    pub(super) fn sets_schedule(&self) -> bool {
        self.steps.is_some() || self.levels.is_some() || self.stochastic
    }
}

/// A recipe in a JSON file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRecipe {
    name: Option<String>,
    steps: Option<Integer>,
    shift: Option<f64>,
    terminal: Option<f64>,
    sigmas: Option<Vec<f64>>,
    true_cfg_scale: Option<f64>,
    stochastic: Option<bool>,
}

/// Reads the recipe of an adapter from the JSON file beside it: an object with any of `name`, `steps`,
/// `shift`, `terminal`, `sigmas`, `true_cfg_scale` and `stochastic`. `None` if it has no value.
///
/// ```
/// let recipe = kiln::request::sidecar_recipe(r#"{"steps": 4, "shift": 3, "true_cfg_scale": 1}"#)?;
/// assert_eq!(recipe.unwrap().steps, Some(4));
/// let error = kiln::request::sidecar_recipe(r#"{"step": 4}"#).unwrap_err();
/// assert!(error.starts_with("unknown field `step`"));
/// # Ok::<(), String>(())
/// ```
///
/// # Errors
///
/// Names the field that is unknown, out of its bounds, or does not fit another.
pub fn sidecar_recipe(json: &str) -> Result<Option<Recipe>, String> {
    let written: Option<WrittenRecipe> =
        serde_json::from_str(json).map_err(|error| error.to_string())?;
    written.map_or(Ok(None), WrittenRecipe::check)
}

/// Reads the recipe of an adapter from the metadata of its safetensors header: the JSON of
/// [`sidecar_recipe`] under `kiln.schedule`, or a list of noise levels under vLLM-Omni's `base_schedule`.
/// `None` if it has neither.
///
/// # Errors
///
/// Names the key, and what is wrong with its value.
pub fn header_recipe(metadata: &BTreeMap<String, String>) -> Result<Option<Recipe>, String> {
    if let Some(json) = metadata.get(HEADER_KEY) {
        let recipe = sidecar_recipe(json);
        return recipe.map_err(|error| format!("`{HEADER_KEY}` of the header: {error}"));
    }
    let Some(json) = metadata.get(BASE_SCHEDULE) else {
        return Ok(None);
    };
    let written = serde_json::from_str(json).map_err(|error| error.to_string());
    let recipe = written.and_then(|sigmas| {
        WrittenRecipe {
            name: Some(BASE_SCHEDULE.to_owned()),
            steps: None,
            shift: None,
            terminal: None,
            sigmas: Some(sigmas),
            true_cfg_scale: None,
            stochastic: None,
        }
        .check()
    });
    recipe.map_err(|error| format!("`{BASE_SCHEDULE}` of the header: {error}"))
}

impl WrittenRecipe {
    fn check(self) -> Result<Option<Recipe>, String> {
        let name = self.name.as_deref().map_or(UNNAMED, str::trim);
        if name.is_empty() || name.len() > MAX_NAME || name.contains(char::is_control) {
            return Err(format!(
                "name must have from 1 to {MAX_NAME} bytes and no control characters"
            ));
        }
        let levels = noise_levels(
            self.shift,
            self.terminal,
            self.sigmas.as_deref(),
            DEFAULT_MAX_STEPS,
        );
        let levels = levels.map_err(|error| error.to_string())?;
        let written = self.steps.map(|Integer(steps)| {
            let known = usize::try_from(steps).ok();
            let known = known.filter(|steps| (1..=DEFAULT_MAX_STEPS).contains(steps));
            known.ok_or_else(|| format!("steps must be from 1 to {DEFAULT_MAX_STEPS}, got {steps}"))
        });
        let mut steps = written.transpose()?;
        if let Some(NoiseLevels::Sigmas(sigmas)) = &levels {
            let count = sigmas.len();
            match steps {
                Some(steps) if steps != count => {
                    return Err(format!(
                        "steps is {steps}, but sigmas has {count} noise levels"
                    ));
                }
                _ => steps = Some(count),
            }
        }
        if let Some(got) = self.true_cfg_scale
            && !(0.0..=MAX_TRUE_CFG_SCALE).contains(&got)
        {
            return Err(format!(
                "true_cfg_scale must be from 0 to {MAX_TRUE_CFG_SCALE}, got {got}"
            ));
        }
        let recipe = Recipe {
            name: name.to_owned(),
            steps,
            levels,
            stochastic: self.stochastic == Some(true),
            true_cfg_scale: self.true_cfg_scale,
        };
        Ok((recipe != Recipe::named(name)).then_some(recipe))
    }
}

/// Where the schedule of a request comes from, the first that gives one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleOrigin {
    /// A field of the request.
    Request,
    /// A JSON file beside the adapter's file.
    Sidecar,
    /// The header of the adapter's file.
    Header,
    /// The table of known adapters.
    KnownName,
    /// The model's `scheduler_config.json`.
    Model,
}

impl ScheduleOrigin {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Sidecar => "sidecar",
            Self::Header => "header",
            Self::KnownName => "known_name",
            Self::Model => "model",
        }
    }
}

impl fmt::Display for ScheduleOrigin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Serialize for ScheduleOrigin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests;
