//! Recipes: the noise levels, steps and guidance that an adapter or a distilled model was trained for.

use std::fmt;

use kiln_models::job::NoiseLevels;

/// What a request gets where it names no value of its own.
#[derive(Debug, Clone, PartialEq)]
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

/// Where the noise levels of a request come from, the first that names some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
