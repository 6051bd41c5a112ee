//! One generation on several backends, compared stage by stage.
//!
//! A [`Recording`] is a run with all it went through; a [`Comparison`] says how far one run is from
//! the reference, and a [`Report`] holds all of them, for a terminal or a file.

mod cost;
mod difference;
mod heat_map;
mod recording;
mod report;
mod ssim;
mod tolerance;

use kiln_models::job::{RgbImage, TraceTensor};
use serde::Serialize;

use self::difference::psnr;
use self::heat_map::heat_map;
use self::ssim::ssim;

pub use self::cost::{Cost, CostMeter};
pub use self::difference::Difference;
pub(crate) use self::recording::measured;
pub use self::recording::{Costs, Recording, record};
pub(crate) use self::report::Table;
pub use self::report::{Report, ReportError, ReportFormat, RunReport, Settings};
pub use self::tolerance::{PictureBound, Tolerance};

/// The picture before it is rounded to 8 bits, values from 0 to 1.
const FLOAT_PICTURE: &str = "image_float";
/// The picture as it is written to files, values from 0 to 255.
const PICTURE: &str = "image_u8";

/// How far one run is from the reference.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The backend.
    pub name: String,
    /// In the order in which they were computed; the 8-bit picture comes last.
    pub stages: Vec<StageDifference>,
    /// The first stage that is further off than the tolerance allows.
    pub first_over_tolerance: Option<String>,
    #[serde(skip)]
    pub picture: RgbImage,
    /// Where the pictures differ, brighter in proportion to the logarithm of the difference.
    #[serde(skip)]
    pub heat_map: RgbImage,
}

/// How far one stage of a run is from the reference's.
#[derive(Debug, Serialize)]
pub struct StageDifference {
    /// As in the files of `kiln generate --dump`.
    pub name: String,
    pub shape: Vec<usize>,
    #[serde(flatten)]
    pub difference: Difference,
    /// Of pictures only.
    #[serde(flatten)]
    pub picture: Option<PictureDifference>,
    pub within_tolerance: bool,
}

/// What is asked of pictures alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PictureDifference {
    /// Peak signal-to-noise ratio; `None` of equal pictures, whose ratio is infinite.
    pub psnr_db: Option<f64>,
    /// Structural similarity of the luma (Wang et al. 2004), 1 of equal pictures; `None` of
    /// pictures smaller than its window of 11×11.
    pub ssim: Option<f64>,
    /// Share of the values that are equal, from 0 to 1.
    pub equal_share: f64,
}

/// Why two runs cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error(
        "{stage} has the shape {ours:?} on {run} and {theirs:?} in the reference {reference}: they \
         are not of the same request or model"
    )]
    Shape {
        stage: String,
        run: String,
        ours: Vec<usize>,
        reference: String,
        theirs: Vec<usize>,
    },
}

impl Comparison {
    /// Compares every stage that both runs have.
    pub fn new(
        reference: &Recording,
        run: &Recording,
        tolerance: Tolerance,
    ) -> Result<Self, CompareError> {
        let mut stages = Vec::new();
        for ours in &run.trace {
            if let Some(theirs) = reference.stage(&ours.name) {
                check_shapes(reference, run, &ours.name, &theirs.shape, &ours.shape)?;
                stages.push(StageDifference::of_trace(theirs, ours, tolerance));
            }
        }
        let (theirs, ours) = (&reference.picture, &run.picture);
        let shape = |picture: &RgbImage| vec![1, picture.height, picture.width, 3];
        check_shapes(reference, run, PICTURE, &shape(theirs), &shape(ours))?;
        stages.push(StageDifference::of_pictures(theirs, ours, tolerance));

        let first_over = stages.iter().find(|stage| !stage.within_tolerance);
        Ok(Self {
            name: run.name.clone(),
            first_over_tolerance: first_over.map(|stage| stage.name.clone()),
            stages,
            picture: run.picture.clone(),
            heat_map: heat_map_of(reference, run),
        })
    }

    pub fn within_tolerance(&self) -> bool {
        self.first_over_tolerance.is_none()
    }

    /// The first stage that is further off than the tolerance allows.
    fn first_over(&self) -> Option<&StageDifference> {
        self.stage(self.first_over_tolerance.as_deref()?)
    }

    fn stage(&self, name: &str) -> Option<&StageDifference> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The step after which the latents are furthest off.
    fn worst_step(&self) -> Option<&StageDifference> {
        let steps = self.stages.iter().filter(|stage| stage.step().is_some());
        steps.max_by(|a, b| {
            let relative = |stage: &StageDifference| stage.difference.max_relative;
            relative(a).total_cmp(&relative(b))
        })
    }
}

impl StageDifference {
    fn of_trace(theirs: &TraceTensor, ours: &TraceTensor, tolerance: Tolerance) -> Self {
        let difference = Difference::between(&theirs.values, &ours.values);
        let picture = match ours.shape[..] {
            [1, height, width, 3] if ours.name == FLOAT_PICTURE => Some(PictureDifference {
                psnr_db: psnr(&theirs.values, &ours.values, 1.0),
                ssim: ssim(&theirs.values, &ours.values, [height, width], 1.0),
                equal_share: equal_share(&theirs.values, &ours.values),
            }),
            _ => None,
        };
        Self {
            name: ours.name.clone(),
            shape: ours.shape.clone(),
            within_tolerance: tolerance.allows(&difference),
            difference,
            picture,
        }
    }

    fn of_pictures(theirs: &RgbImage, ours: &RgbImage, tolerance: Tolerance) -> Self {
        let size = [ours.height, ours.width];
        let (theirs, ours) = (floats(&theirs.pixels), floats(&ours.pixels));
        let picture = PictureDifference {
            psnr_db: psnr(&theirs, &ours, 255.0),
            ssim: ssim(&theirs, &ours, size, 255.0),
            equal_share: equal_share(&theirs, &ours),
        };
        Self {
            name: PICTURE.to_owned(),
            shape: vec![1, size[0], size[1], 3],
            difference: Difference::between(&theirs, &ours),
            picture: Some(picture),
            within_tolerance: tolerance.picture.allows(&picture),
        }
    }

    /// The stage in words.
    fn label(&self) -> String {
        match self.name.as_str() {
            "prompt_embeds" => "prompt embeddings".to_owned(),
            "negative_prompt_embeds" => "negative prompt embeddings".to_owned(),
            "initial_noise" => "starting noise".to_owned(),
            FLOAT_PICTURE => "picture before rounding".to_owned(),
            PICTURE => "8-bit picture".to_owned(),
            name => match self.step() {
                Some(step) => format!("latents after step {step}"),
                None => name.to_owned(),
            },
        }
    }

    /// Of the latents after a step, which step, counted from 1.
    fn step(&self) -> Option<usize> {
        let index: usize = self.name.strip_prefix("latents_step")?.parse().ok()?;
        Some(index + 1)
    }
}

fn check_shapes(
    reference: &Recording,
    run: &Recording,
    stage: &str,
    theirs: &[usize],
    ours: &[usize],
) -> Result<(), CompareError> {
    if ours == theirs {
        return Ok(());
    }
    Err(CompareError::Shape {
        stage: stage.to_owned(),
        run: run.name.clone(),
        ours: ours.to_vec(),
        reference: reference.name.clone(),
        theirs: theirs.to_vec(),
    })
}

fn equal_share(reference: &[f32], values: &[f32]) -> f64 {
    let equal = reference.iter().zip(values).filter(|(a, b)| a == b).count();
    equal as f64 / values.len() as f64
}

fn floats(pixels: &[u8]) -> Vec<f32> {
    pixels.iter().map(|&value| f32::from(value)).collect()
}

/// From the pictures before rounding if both runs have them, otherwise from the 8-bit ones.
fn heat_map_of(reference: &Recording, run: &Recording) -> RgbImage {
    let floats = reference.stage(FLOAT_PICTURE).zip(run.stage(FLOAT_PICTURE));
    let pixels = if let Some((theirs, ours)) = floats {
        heat_map(&theirs.values, &ours.values)
    } else {
        let scaled = |recording: &Recording| -> Vec<f32> {
            let pixels = recording.picture.pixels.iter();
            pixels.map(|&value| f32::from(value) / 255.0).collect()
        };
        heat_map(&scaled(reference), &scaled(run))
    };
    RgbImage {
        height: run.picture.height,
        width: run.picture.width,
        pixels,
    }
}

#[cfg(test)]
mod tests;
