//! Reports of comparisons, for a terminal and for files.

mod chart;
mod html;
mod tables;

use kiln_models::job::{RgbImage, Sampling};
use kiln_models::loading::ModelDType;
use serde::Serialize;
use serde_json::Value;

use crate::image::EncodeError;
use crate::request::GenerationRequest;

use super::{Comparison, ImageBound, StageCosts, Tolerance};

/// Comparisons of all runs of one request with the reference. Serialises to the JSON report.
#[derive(Debug, Serialize)]
pub struct CompareReport {
    /// kiln's version.
    pub kiln: &'static str,
    pub settings: CompareSettings,
    pub tolerance: Tolerance,
    /// Name of the run or the dump file that the others are compared with.
    pub reference: String,
    /// The runs in order of execution.
    pub runs: Vec<RunReport>,
    pub comparisons: Vec<Comparison>,
    #[serde(skip)]
    pub reference_image: RgbImage,
}

/// The request, the model and the dtype of all runs.
#[derive(Debug, Serialize)]
pub struct CompareSettings {
    pub model: String,
    pub dtype: &'static str,
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub true_cfg_scale: f64,
    pub height: usize,
    pub width: usize,
    #[serde(flatten)]
    pub sampling: Sampling,
    /// The step cache, as in a request.
    pub cache: Value,
    /// Part of the steps after which guidance was gated, 1 for none.
    pub cfg_gate_step: f64,
    pub seed: u64,
    /// The torch generator whose noise the seed selects: `cpu` or `cuda`.
    pub rng: &'static str,
}

/// Device and costs of one run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    pub name: String,
    /// Human-readable names of the backend and the device.
    pub device: String,
    pub costs: StageCosts,
}

/// Format of a report file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportFormat {
    /// One self-contained file with the images embedded.
    Html,
    /// All numbers.
    Json,
    /// All numbers of the stages, and a summary of the costs.
    Markdown,
}

/// Why a report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("an image cannot be encoded")]
    Image(#[from] EncodeError),
    #[error("the report cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

impl CompareSettings {
    pub fn new(model: &str, dtype: ModelDType, request: &GenerationRequest) -> Self {
        Self {
            model: model.to_owned(),
            dtype: dtype.name(),
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            true_cfg_scale: request.true_cfg_scale,
            height: request.size.height,
            width: request.size.width,
            sampling: request.sampling.clone(),
            cache: request.cache.choice.to_json(),
            cfg_gate_step: request.cfg_gate_step.unwrap_or(1.0),
            seed: request.noise.seed,
            rng: request.noise.generator.name(),
        }
    }
}

impl CompareReport {
    /// Formats the report as the text of a file.
    pub fn render(&self, format: ReportFormat) -> Result<String, ReportError> {
        Ok(match format {
            ReportFormat::Html => html::page(self)?,
            ReportFormat::Json => serde_json::to_string_pretty(self)? + "\n",
            ReportFormat::Markdown => self.markdown(),
        })
    }

    /// Formats the summary that is printed to the terminal.
    pub fn summary(&self) -> String {
        let mut parts = vec![tables::agreement(self).to_string()];
        parts.extend(tables::costs(self).iter().map(ToString::to_string));
        parts.push(self.verdicts().join("\n"));
        parts.push(format!("The tolerance: {}.", self.tolerance.describe()));
        parts.join("\n\n") + "\n"
    }

    fn markdown(&self) -> String {
        let mut parts = vec![format!("# {}", self.title())];
        let verdicts = self.verdicts().into_iter();
        parts.extend(verdicts.map(|verdict| format!("- {verdict}")));
        parts.push("## Request".to_owned());
        // Indented as a code block: prompts are not Markdown.
        let facts = self.facts().into_iter();
        let facts = facts.map(|(name, value)| format!("    {name}: {value}"));
        parts.push(facts.collect::<Vec<_>>().join("\n"));
        parts.push("## Agreement".to_owned());
        parts.push(tables::agreement(self).to_string());
        parts.push("## Time and memory".to_owned());
        parts.extend(tables::costs(self).iter().map(ToString::to_string));
        parts.push("## Every stage".to_owned());
        let comparisons = self.comparisons.iter();
        parts.extend(comparisons.map(|comparison| tables::stages(self, comparison).to_string()));
        parts.join("\n\n") + "\n"
    }

    fn title(&self) -> String {
        let names: Vec<&str> = self.comparisons.iter().map(|c| c.name.as_str()).collect();
        format!("{} compared with {}", names.join(", "), self.reference)
    }

    /// Names and values of the settings and the devices.
    fn facts(&self) -> Vec<(&str, String)> {
        let settings = &self.settings;
        let guidance = match &settings.negative_prompt {
            Some(negative) if settings.true_cfg_scale > 1.0 => {
                format!("{} away from {negative:?}", settings.true_cfg_scale)
            }
            _ => "none".to_owned(),
        };
        let mut facts = vec![
            ("model", settings.model.clone()),
            ("type", settings.dtype.to_owned()),
            ("prompt", format!("{:?}", settings.prompt)),
            ("guidance", guidance),
            ("size", format!("{}x{}", settings.width, settings.height)),
            ("steps", settings.sampling.steps.to_string()),
            ("seed", settings.seed.to_string()),
            ("noise", format!("of torch's {} generator", settings.rng)),
        ];
        if settings.cache != "off" {
            let name = settings.cache.as_str().map(str::to_owned);
            facts.push(("cache", name.unwrap_or_else(|| settings.cache.to_string())));
        }
        if settings.cfg_gate_step < 1.0 {
            facts.push(("guidance gate", settings.cfg_gate_step.to_string()));
        }
        facts.push(("tolerance", self.tolerance.describe()));
        let runs = self.runs.iter();
        facts.extend(runs.map(|run| (run.name.as_str(), run.device.clone())));
        facts.push(("kiln", self.kiln.to_owned()));
        facts
    }

    /// One sentence for each comparison.
    fn verdicts(&self) -> Vec<String> {
        let verdict = |comparison: &Comparison| {
            let (name, reference) = (&comparison.name, &self.reference);
            match comparison.first_over() {
                None => format!("{name} agrees with {reference} at every stage."),
                Some(stage) => format!(
                    "{name} does not agree with {reference}: the first stage over the tolerance \
                     is the {}.",
                    stage.label()
                ),
            }
        };
        self.comparisons.iter().map(verdict).collect()
    }
}

impl Tolerance {
    /// Human-readable description.
    fn describe(&self) -> String {
        let image = match self.image {
            ImageBound::EqualShare(share) => {
                format!(
                    "at least {} of the 8-bit values must be equal",
                    tables::percent(share)
                )
            }
            ImageBound::PsnrDb(psnr) => format!("the 8-bit image must have at least {psnr} dB"),
        };
        format!(
            "a stage may differ by {:e} of its largest magnitude, and {image}",
            self.max_relative
        )
    }
}
