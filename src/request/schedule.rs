//! The schedule of a request: number and noise levels of its steps, the sampler and the guidance scale,
//! from the request's own fields, the recipes of its adapters, the model's recipe, and the defaults.

use kiln_models::job::{Guidance, NoiseLevels, Sampling, Size};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::levels::{InvalidLevels, noise_levels};
use super::limits::{
    DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE, Limits, MAX_TRUE_CFG_SCALE,
};
use super::recipes::{named_recipe, names};
use super::{ChosenAdapter, GenerationParams, InvalidRequest, Recipe, ScheduleOrigin};

/// How many characters of a word a message repeats.
const MAX_QUOTE: usize = 40;
/// Difference up to which two noise levels are the same.
const SAME_LEVEL: f32 = 1e-6;

/// The `schedule` of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum GivenSchedule {
    /// A recipe that kiln knows, by its name.
    Named(Recipe),
    Levels {
        levels: Option<NoiseLevels>,
        stochastic: Option<bool>,
    },
}

/// A `schedule` that is no valid one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidSchedule {
    /// `schedule`, or the path of its key, such as `schedule.shift`.
    pub param: String,
    pub message: String,
}

/// The schedule of a checked request, as answers have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestSchedule {
    pub origin: ScheduleOrigin,
    /// Name of the recipe; `None` for the model's own schedule and for levels of the request's own.
    pub name: Option<String>,
    pub shift: Option<f64>,
    pub terminal: Option<f64>,
    /// See [`Sampling::stochastic`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub stochastic: bool,
    /// The noise level at the start of each step. Empty in limits without
    /// [`Limits::scheduler`].
    pub sigmas: Vec<f32>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// The keys of a `schedule` that is an object.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSchedule {
    shift: Option<f64>,
    terminal: Option<f64>,
    sigmas: Option<Vec<f64>>,
    stochastic: Option<bool>,
}

impl GivenSchedule {
    /// Reads a request's `schedule`: the name of a recipe, or an object with any of `shift`, `terminal`,
    /// `sigmas` and `stochastic`. `null` and blank texts count as absent.
    ///
    /// ```
    /// use kiln::request::GivenSchedule;
    /// use serde_json::json;
    ///
    /// assert_eq!(GivenSchedule::from_json(&json!(null))?, None);
    /// assert!(GivenSchedule::from_json(&json!("lightning"))?.is_some());
    /// assert!(GivenSchedule::from_json(&json!({"shift": 3, "terminal": 0.02}))?.is_some());
    /// let error = GivenSchedule::from_json(&json!({"terminal": 0.02})).unwrap_err();
    /// assert_eq!(error.param, "schedule.terminal");
    /// # Ok::<(), kiln::request::InvalidSchedule>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If there is no such recipe, or a key or a value is invalid.
    pub fn from_json(value: &Value) -> Result<Option<Self>, InvalidSchedule> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if text.trim().is_empty() => Ok(None),
            Value::String(text) => {
                let recipe = named_recipe(&text.trim().to_lowercase());
                let recipe = recipe.ok_or_else(|| unknown(&quoted(text)))?;
                Ok(Some(Self::Named(recipe)))
            }
            Value::Object(_) => Self::of_object(value).map(Some),
            _ => Err(unknown("another value")),
        }
    }

    fn of_object(value: &Value) -> Result<Self, InvalidSchedule> {
        let invalid = |key: &str, message: String| InvalidSchedule {
            param: format!("schedule.{key}"),
            message,
        };
        let written: WrittenSchedule =
            serde_path_to_error::deserialize(value).map_err(|error| {
                let key = error.path().to_string();
                invalid(&key, error.into_inner().to_string())
            })?;
        let sigmas = written.sigmas.as_deref();
        let levels = noise_levels(written.shift, written.terminal, sigmas, usize::MAX)
            .map_err(|InvalidLevels { key, message }| invalid(key, message))?;
        if levels.is_none() && written.stochastic.is_none() {
            return Err(InvalidSchedule {
                param: "schedule".to_owned(),
                message: "needs shift, sigmas or stochastic in an object".to_owned(),
            });
        }
        Ok(Self::Levels {
            levels,
            stochastic: written.stochastic,
        })
    }
}

fn unknown(got: &str) -> InvalidSchedule {
    let names: Vec<&str> = names().collect();
    InvalidSchedule {
        param: "schedule".to_owned(),
        message: format!(
            "must be one of {}, or an object with shift and terminal, sigmas, stochastic, got {got}",
            names.join(", ")
        ),
    }
}

fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_QUOTE).collect();
    format!("{short:?}")
}

/// What [`resolve`] finds.
pub(super) struct Resolved {
    pub(super) sampling: Sampling,
    pub(super) true_cfg_scale: f64,
    pub(super) schedule: RequestSchedule,
    pub(super) warnings: Vec<String>,
}

/// The recipe that fills in what a request leaves out.
struct InEffect<'a> {
    recipe: &'a Recipe,
    origin: ScheduleOrigin,
    /// `recipe lightning of adapter "x"`.
    described: String,
}

/// Chooses the schedule and the guidance scale of a request. The first source that has a value gives
/// it: the request, the recipe of its adapters, the recipe of the model, the defaults.
pub(super) fn resolve(
    params: &GenerationParams,
    adapters: &[ChosenAdapter],
    size: Size,
    limits: &Limits,
) -> Result<Resolved, InvalidRequest> {
    let given_steps = params.num_inference_steps;
    let given_steps = given_steps.map(|steps| checked_steps(steps, limits.max_steps));
    let given_steps = given_steps.transpose()?;
    let given = given_schedule(params, limits.max_steps)?;
    let given_scale = params.true_cfg_scale;
    if let Some(got) = given_scale
        && !(0.0..=MAX_TRUE_CFG_SCALE).contains(&got)
    {
        return Err(InvalidRequest::TrueCfgScale { got });
    }

    let mut warnings = Vec::new();
    let of_adapter = recipe_of(adapters, given.is_some(), &mut warnings)?;
    let of_model = limits.model_recipe.as_ref().map(|recipe| InEffect {
        recipe,
        origin: ScheduleOrigin::Model,
        described: format!("recipe {} of the model", recipe.name),
    });
    let param = given.as_ref().map_or("", |(_, param)| param);
    let given = given.map(|(given, _)| given);
    let named = match &given {
        Some(GivenSchedule::Named(recipe)) => Some(recipe),
        _ => None,
    };
    let given_levels = given.as_ref().and_then(GivenSchedule::levels);
    let adapter_recipe = of_adapter.as_ref().map(|it| it.recipe);
    let model_recipe = of_model.as_ref().map(|it| it.recipe);

    let levels = given_levels
        .clone()
        .or_else(|| adapter_recipe?.levels.clone())
        .unwrap_or_default();
    let stochastic = match &given {
        Some(given) => given.stochastic(adapter_recipe),
        None => adapter_recipe.and_then(sampler_of),
    };
    // An adapter of the named recipe knows its own number of steps.
    let same = adapter_recipe
        .zip(named)
        .is_some_and(|(recipe, named)| recipe.levels == named.levels);
    let recipes = if same {
        [adapter_recipe, named, model_recipe]
    } else {
        [named, adapter_recipe, model_recipe]
    };
    let first = |value: fn(&Recipe) -> Option<f64>| recipes.into_iter().flatten().find_map(value);

    let steps = match (given_steps, &levels) {
        (Some(steps), NoiseLevels::Sigmas(sigmas)) if steps != sigmas.len() => {
            let of = match (&given_levels, &of_adapter) {
                (None, Some(adapter)) => adapter.described.clone(),
                _ => param.to_owned(),
            };
            let levels = sigmas.len();
            return Err(InvalidRequest::StepsOfLevels { steps, levels, of });
        }
        (Some(steps), _) => steps,
        (None, NoiseLevels::Sigmas(sigmas)) => {
            checked_steps(sigmas.len() as i128, limits.max_steps)?
        }
        (None, _) => {
            let of_recipe = recipes.into_iter().flatten().find_map(|it| it.steps);
            let steps = of_recipe.map(|steps| steps as i128);
            let steps = steps.or(params.fallback_steps);
            let steps = steps.unwrap_or(DEFAULT_NUM_INFERENCE_STEPS.into());
            checked_steps(steps, limits.max_steps)?
        }
    };
    let true_cfg_scale = given_scale
        .or_else(|| first(|recipe| recipe.true_cfg_scale))
        .unwrap_or(DEFAULT_TRUE_CFG_SCALE);
    let sampling = Sampling {
        steps,
        levels,
        stochastic,
    };

    let sets_schedule = |it: &&InEffect<'_>| it.recipe.sets_schedule();
    let of_schedule = of_adapter.as_ref().filter(sets_schedule);
    let of_schedule = of_schedule.or(of_model.as_ref());
    let (origin, name) = match (&given, of_schedule) {
        (Some(_), _) => (ScheduleOrigin::Request, named.map(|it| it.name.clone())),
        (None, Some(it)) => (it.origin, Some(it.recipe.name.clone())),
        (None, None) => (ScheduleOrigin::Model, None),
    };
    if given.is_some()
        && let Some(replaced) = of_schedule.filter(|it| it.differs(&sampling, size, limits))
    {
        let described = &replaced.described;
        warnings.push(format!("{param} replaces the noise levels of {described}"));
    }
    if let Some(in_effect) = of_adapter.as_ref().or(of_model.as_ref()) {
        let guidance = (params.negative_prompt.as_deref(), given_scale);
        in_effect.warn(given_steps, guidance, &mut warnings);
    }
    Ok(Resolved {
        schedule: RequestSchedule::new(origin, name, &sampling, size, limits),
        sampling,
        true_cfg_scale,
        warnings,
    })
}

impl GivenSchedule {
    /// The noise levels, if it sets them. A recipe without any stands for the model's own.
    fn levels(&self) -> Option<NoiseLevels> {
        match self {
            Self::Named(recipe) => Some(recipe.levels.clone().unwrap_or_default()),
            Self::Levels { levels, .. } => levels.clone(),
        }
    }

    /// The sampler, which levels alone leave to the recipe of the adapters.
    fn stochastic(&self, adapter: Option<&Recipe>) -> Option<bool> {
        match self {
            Self::Named(recipe) => sampler_of(recipe),
            Self::Levels { stochastic, .. } => stochastic.or_else(|| adapter.and_then(sampler_of)),
        }
    }
}

/// Whether the steps of a recipe are stochastic; `None` for as the model's.
fn sampler_of(recipe: &Recipe) -> Option<bool> {
    (recipe.stochastic || recipe.levels.is_some()).then_some(recipe.stochastic)
}

fn checked_steps(got: i128, max: usize) -> Result<usize, InvalidRequest> {
    let steps = usize::try_from(got).ok();
    let steps = steps.filter(|steps| (1..=max).contains(steps));
    steps.ok_or(InvalidRequest::Steps { got, max })
}

/// The schedule that a request's own fields give, and the name of the field.
fn given_schedule(
    params: &GenerationParams,
    max_steps: usize,
) -> Result<Option<(GivenSchedule, &'static str)>, InvalidRequest> {
    let fields = [
        ("shift", params.shift.is_some()),
        ("sigmas", params.sigmas.is_some()),
        ("schedule", params.schedule.is_some()),
    ];
    let mut named = fields
        .iter()
        .filter(|(_, given)| *given)
        .map(|(name, _)| *name);
    let (Some(param), other) = (named.next(), named.next()) else {
        return Ok(None);
    };
    if let Some(other) = other {
        return Err(InvalidRequest::TwoSchedules {
            param: other,
            other: param,
        });
    }
    let given = if let Some(schedule) = &params.schedule {
        schedule.clone()
    } else {
        let sigmas = params.sigmas.as_deref();
        let levels = noise_levels(params.shift, None, sigmas, max_steps);
        let levels = levels.map_err(|InvalidLevels { key, message }| InvalidRequest::Levels {
            param: key,
            message,
        })?;
        GivenSchedule::Levels {
            levels,
            stochastic: None,
        }
    };
    if let Some(NoiseLevels::Sigmas(sigmas)) = given.levels()
        && sigmas.len() > max_steps
    {
        let got = sigmas.len();
        let message = format!("may have {max_steps} noise levels at most, got {got}");
        return Err(InvalidRequest::Levels { param, message });
    }
    Ok(Some((given, param)))
}

/// The one recipe of a request's adapters. Several that differ are accepted only if the schedule `is_given`.
fn recipe_of<'a>(
    adapters: &'a [ChosenAdapter],
    is_given: bool,
    warnings: &mut Vec<String>,
) -> Result<Option<InEffect<'a>>, InvalidRequest> {
    let with_recipe = |chosen: &'a ChosenAdapter| {
        let (recipe, origin) = chosen.info.recipe.as_ref()?;
        Some((chosen.info.name.as_str(), recipe, *origin))
    };
    let mut recipes = adapters.iter().filter_map(with_recipe);
    let Some((adapter, recipe, origin)) = recipes.next() else {
        return Ok(None);
    };
    if let Some((other, different, _)) = recipes.find(|(_, it, _)| !it.does_the_same_as(recipe)) {
        if !is_given {
            return Err(InvalidRequest::TwoRecipes {
                adapters: [adapter.to_owned(), other.to_owned()].into(),
                recipes: [recipe.name.clone(), different.name.clone()].into(),
            });
        }
        warnings.push(format!(
            "adapters {adapter:?} and {other:?} have different recipes: what the request leaves out is \
             that of {adapter:?}"
        ));
    }
    Ok(Some(InEffect {
        recipe,
        origin,
        described: format!("recipe {} of adapter {adapter:?}", recipe.name),
    }))
}

impl InEffect<'_> {
    /// Whether the recipe alone gives other noise levels than `sampling`, or another sampler.
    fn differs(&self, sampling: &Sampling, size: Size, limits: &Limits) -> bool {
        let levels = self.recipe.levels.clone().unwrap_or_default();
        let stochastic = sampler_of(self.recipe);
        if let NoiseLevels::Sigmas(sigmas) = &levels
            && sigmas.len() != sampling.steps
        {
            return true;
        }
        let own = Sampling {
            levels,
            stochastic,
            ..sampling.clone()
        };
        let (Some(own), Some(used)) = (
            levels_of(&own, size, limits),
            levels_of(sampling, size, limits),
        ) else {
            return own != *sampling;
        };
        let mut pairs = own.sigmas.iter().zip(&used.sigmas);
        own.stochastic != used.stochastic || pairs.any(|(a, b)| (a - b).abs() > SAME_LEVEL)
    }

    /// Says which steps and which guidance of the request, its negative prompt and scale, are not those of
    /// the recipe.
    fn warn(
        &self,
        steps: Option<usize>,
        (negative, scale): (Option<&str>, Option<f64>),
        warnings: &mut Vec<String>,
    ) {
        let Self {
            recipe, described, ..
        } = self;
        if let (Some(got), Some(own)) = (steps, recipe.steps)
            && got != own
        {
            warnings.push(format!(
                "num_inference_steps is {got}, but {described} is for {own}"
            ));
        }
        if let (Some(got), Some(own)) = (scale, recipe.true_cfg_scale) {
            let runs = |scale| Guidance::new(negative, scale).is_some();
            if got != own && (runs(got) || runs(own)) {
                let guidance = if own > 1.0 {
                    ""
                } else {
                    ", which is no guidance"
                };
                warnings.push(format!(
                    "true_cfg_scale is {got}, but {described} is for {own}{guidance}"
                ));
            }
        }
    }
}

/// The noise levels of a size, if the model's configuration is known.
fn levels_of(
    sampling: &Sampling,
    size: Size,
    limits: &Limits,
) -> Option<kiln_models::sampling::Schedule> {
    let multiple = limits.sizes.multiple;
    let tokens = (size.height / multiple) * (size.width / multiple);
    let scheduler = limits.scheduler.as_ref()?;
    Some(scheduler.schedule(sampling, tokens))
}

impl RequestSchedule {
    fn new(
        origin: ScheduleOrigin,
        name: Option<String>,
        sampling: &Sampling,
        size: Size,
        limits: &Limits,
    ) -> Self {
        let terminal = match sampling.levels {
            NoiseLevels::Shifted { terminal, .. } => terminal,
            NoiseLevels::Model | NoiseLevels::Sigmas(_) => None,
        };
        let levels = levels_of(sampling, size, limits);
        let stochastic = match &levels {
            Some(levels) => levels.stochastic,
            None => sampling.stochastic == Some(true),
        };
        let mut sigmas = levels.map(|it| it.sigmas).unwrap_or_default();
        // The level after the last step is 0 in every schedule.
        sigmas.pop();
        Self {
            origin,
            name,
            shift: sampling.shift(),
            terminal,
            stochastic,
            sigmas,
        }
    }
}

#[cfg(test)]
mod tests;
