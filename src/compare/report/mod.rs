//! What is said about a comparison, on a terminal and in files.

mod chart;
mod html;
mod table;
mod tables;

use kiln_models::job::RgbImage;
use kiln_models::loading::ModelDType;
use serde::Serialize;

use crate::image::EncodeError;
use crate::request::GenerationRequest;

pub(crate) use self::table::Table;
use super::{Comparison, Costs, PictureBound, Tolerance};

/// All runs of one request, each compared with the reference. Serialises to the JSON report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// kiln's version.
    pub kiln: &'static str,
    pub settings: Settings,
    pub tolerance: Tolerance,
    /// The run, or the file, that the others are compared with.
    pub reference: String,
    /// What ran, in that order.
    pub runs: Vec<RunReport>,
    pub comparisons: Vec<Comparison>,
    #[serde(skip)]
    pub reference_picture: RgbImage,
}

/// What was drawn, and how.
#[derive(Debug, Serialize)]
pub struct Settings {
    pub model: String,
    pub dtype: &'static str,
    pub prompt: String,
    pub negative_prompt: Option<String>,
    pub true_cfg_scale: f64,
    pub height: usize,
    pub width: usize,
    pub num_inference_steps: usize,
    pub seed: u64,
    /// Whose noise the seed stands for: `cpu` or `cuda`.
    pub rng: &'static str,
}

/// One run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    pub name: String,
    /// The backend's name and device, for people.
    pub device: String,
    pub costs: Costs,
}

/// A kind of report file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportFormat {
    /// One file with the pictures in it, that loads nothing.
    Html,
    /// Every number.
    Json,
    /// Every number of the stages, and the costs in brief.
    Markdown,
}

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("a picture cannot be encoded")]
    Picture(#[from] EncodeError),
    #[error("the report cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

impl Settings {
    pub fn new(model: &str, dtype: ModelDType, request: &GenerationRequest) -> Self {
        Self {
            model: model.to_owned(),
            dtype: dtype.name(),
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            true_cfg_scale: request.true_cfg_scale,
            height: request.size.height,
            width: request.size.width,
            num_inference_steps: request.sampling.steps,
            seed: request.noise.seed,
            rng: request.noise.generator.name(),
        }
    }
}

impl Report {
    /// The file's text.
    pub fn render(&self, format: ReportFormat) -> Result<String, ReportError> {
        Ok(match format {
            ReportFormat::Html => html::page(self)?,
            ReportFormat::Json => serde_json::to_string_pretty(self)? + "\n",
            ReportFormat::Markdown => self.markdown(),
        })
    }

    /// What a terminal shows.
    pub fn summary(&self) -> String {
        let mut parts = vec![tables::agreement(self).to_string()];
        parts.extend(tables::costs(self).iter().map(ToString::to_string));
        parts.push(self.verdicts().join("\n"));
        parts.push(format!("The tolerance: {}.", self.tolerance.in_words()));
        parts.join("\n\n") + "\n"
    }

    fn markdown(&self) -> String {
        let mut parts = vec![format!("# {}", self.title())];
        let verdicts = self.verdicts().into_iter();
        parts.extend(verdicts.map(|verdict| format!("- {verdict}")));
        parts.push("## What was drawn".to_owned());
        // Indented: what people write in prompts is not Markdown.
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

    /// Settings and devices, in words.
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
            ("steps", settings.num_inference_steps.to_string()),
            ("seed", settings.seed.to_string()),
            ("noise", format!("of torch's {} generator", settings.rng)),
        ];
        facts.push(("tolerance", self.tolerance.in_words()));
        let runs = self.runs.iter();
        facts.extend(runs.map(|run| (run.name.as_str(), run.device.clone())));
        facts.push(("kiln", self.kiln.to_owned()));
        facts
    }

    /// One sentence a comparison.
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
    fn in_words(&self) -> String {
        let picture = match self.picture {
            PictureBound::EqualShare(share) => {
                format!(
                    "{} of the 8-bit values must be equal",
                    tables::percent(share)
                )
            }
            PictureBound::PsnrDb(psnr) => format!("the 8-bit picture must have {psnr} dB"),
        };
        format!(
            "a stage may be off by {:e} of its largest magnitude, and {picture}",
            self.max_relative
        )
    }
}
