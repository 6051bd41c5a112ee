//! Compares runs of one request on several backends, stage by stage.
//!
//! A [`Recording`] holds the values of every stage of a run. A [`Comparison`] measures how far one
//! recording is from the reference. A [`CompareReport`] presents all comparisons on a terminal or
//! in a file.

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

pub use self::difference::Difference;
pub use self::recording::{Recording, StageCosts, record};
pub use self::report::{CompareReport, CompareSettings, ReportError, ReportFormat, RunReport};
pub use self::tolerance::{ImageBound, Tolerance};

/// Name of the stage that is the image before rounding to 8 bits, with values from 0 to 1.
const IMAGE_FLOAT: &str = "image_float";
/// Name of the stage that is the image as written to files, with values from 0 to 255.
const IMAGE_U8: &str = "image_u8";

/// The differences between one run and the reference.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Name of the backend.
    pub name: String,
    /// The stages in the order of computation; the 8-bit image is the last.
    pub stages: Vec<StageDifference>,
    /// Name of the first stage that exceeds the tolerance.
    pub first_over_tolerance: Option<String>,
    #[serde(skip)]
    pub image: RgbImage,
    /// Map of the differences between the images; brightness is proportional to the logarithm of
    /// the difference.
    #[serde(skip)]
    pub heat_map: RgbImage,
}

/// The difference between one stage of a run and the same stage of the reference.
#[derive(Debug, Serialize)]
pub struct StageDifference {
    /// Name of the stage, as in the files of `kiln generate --dump`.
    pub name: String,
    pub shape: Vec<usize>,
    #[serde(flatten)]
    pub difference: Difference,
    /// `None` if the stage is not an image.
    #[serde(flatten)]
    pub image: Option<ImageDifference>,
    pub within_tolerance: bool,
}

/// Measures that are defined for images only.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ImageDifference {
    /// Peak signal-to-noise ratio; `None` for equal images, whose ratio is infinite.
    pub psnr_db: Option<f64>,
    /// Structural similarity of the luma (Wang et al. 2004), 1 for equal images; `None` for images
    /// smaller than its window of 11×11 pixels.
    pub ssim: Option<f64>,
    /// Share of equal values, from 0 to 1.
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
        let (theirs, ours) = (&reference.image, &run.image);
        let shape = |image: &RgbImage| vec![1, image.height, image.width, 3];
        check_shapes(reference, run, IMAGE_U8, &shape(theirs), &shape(ours))?;
        stages.push(StageDifference::of_images(theirs, ours, tolerance));

        let first_over = stages.iter().find(|stage| !stage.within_tolerance);
        Ok(Self {
            name: run.name.clone(),
            first_over_tolerance: first_over.map(|stage| stage.name.clone()),
            stages,
            image: run.image.clone(),
            heat_map: heat_map_of(reference, run),
        })
    }

    pub fn within_tolerance(&self) -> bool {
        self.first_over_tolerance.is_none()
    }

    /// The first stage that exceeds the tolerance.
    fn first_over(&self) -> Option<&StageDifference> {
        self.stage(self.first_over_tolerance.as_deref()?)
    }

    fn stage(&self, name: &str) -> Option<&StageDifference> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The step after which the latents have the largest relative difference.
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
        let image = match ours.shape[..] {
            [1, height, width, 3] if ours.name == IMAGE_FLOAT => Some(ImageDifference {
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
            image,
        }
    }

    fn of_images(theirs: &RgbImage, ours: &RgbImage, tolerance: Tolerance) -> Self {
        let size = [ours.height, ours.width];
        let (theirs, ours) = (floats(&theirs.pixels), floats(&ours.pixels));
        let image = ImageDifference {
            psnr_db: psnr(&theirs, &ours, 255.0),
            ssim: ssim(&theirs, &ours, size, 255.0),
            equal_share: equal_share(&theirs, &ours),
        };
        Self {
            name: IMAGE_U8.to_owned(),
            shape: vec![1, size[0], size[1], 3],
            difference: Difference::between(&theirs, &ours),
            image: Some(image),
            within_tolerance: tolerance.image.allows(&image),
        }
    }

    /// Human-readable name of the stage.
    fn label(&self) -> String {
        match self.name.as_str() {
            "prompt_embeds" => "prompt embeddings".to_owned(),
            "negative_prompt_embeds" => "negative prompt embeddings".to_owned(),
            "initial_noise" => "initial noise".to_owned(),
            IMAGE_FLOAT => "image before rounding".to_owned(),
            IMAGE_U8 => "8-bit image".to_owned(),
            name => match self.step() {
                Some(step) => format!("latents after step {step}"),
                None => name.to_owned(),
            },
        }
    }

    /// The number of the denoising step, counted from 1, if the stage is the latents after a step.
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

/// Uses the images before rounding if both runs have them, otherwise the 8-bit images.
fn heat_map_of(reference: &Recording, run: &Recording) -> RgbImage {
    let floats = reference.stage(IMAGE_FLOAT).zip(run.stage(IMAGE_FLOAT));
    let pixels = if let Some((theirs, ours)) = floats {
        heat_map(&theirs.values, &ours.values)
    } else {
        let scaled = |recording: &Recording| -> Vec<f32> {
            let pixels = recording.image.pixels.iter();
            pixels.map(|&value| f32::from(value) / 255.0).collect()
        };
        heat_map(&scaled(reference), &scaled(run))
    };
    RgbImage {
        height: run.image.height,
        width: run.image.width,
        pixels,
    }
}

#[cfg(test)]
mod tests;
