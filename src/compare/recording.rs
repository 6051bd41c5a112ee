use std::slice::from_ref;

use kiln_models::painter::{Job, JobId, PaintError, Painter, RgbImage, TraceTensor};
use serde::Serialize;

use crate::engine::{JobError, caught};

use super::cost::{Cost, CostMeter};

/// Everything one run of one request went through.
#[derive(Debug, Clone)]
pub struct Recording {
    /// The backend, or the file.
    pub name: String,
    /// In the order in which they were computed.
    pub trace: Vec<TraceTensor>,
    pub picture: RgbImage,
}

/// What the stages of a run cost.
#[derive(Debug, Clone, Serialize)]
pub struct Costs {
    /// Weights onto the device.
    pub load: Cost,
    /// Prompts, noise and schedule.
    pub start: Cost,
    /// Denoising; the first step may compile and tune kernels.
    pub steps: Vec<Cost>,
    /// The VAE, and rounding to 8 bits.
    pub finish: Cost,
}

impl Costs {
    /// Named parts of the run, in order. There are no later steps after a single one.
    pub(super) fn phases(&self) -> [(&'static str, &[Cost]); 5] {
        let (first, later) = self.steps.split_at(self.steps.len().min(1));
        [
            ("load", from_ref(&self.load)),
            ("prompts, noise, schedule", from_ref(&self.start)),
            ("first step", first),
            ("later steps", later),
            ("VAE and picture", from_ref(&self.finish)),
        ]
    }
}

impl Recording {
    pub(super) fn stage(&self, name: &str) -> Option<&TraceTensor> {
        self.trace.iter().find(|stage| stage.name == name)
    }
}

/// Runs a job of one image and records it; `on_step` hears how many steps are done.
///
/// Recording reads every stage back from the device, so each stage's time is its own.
pub fn record(
    name: String,
    painter: &mut dyn Painter,
    load: Cost,
    job: Job,
    mut on_step: impl FnMut(usize),
) -> Result<(Recording, Costs), JobError> {
    const ID: JobId = 0;
    let total = job.num_inference_steps;
    let job = Job {
        record: true,
        ..job
    };
    let ((), start) = measured(painter, |painter| painter.start(ID, job))?;
    let mut steps = Vec::with_capacity(total);
    for done in 1..=total {
        let (_, cost) = measured(painter, |painter| painter.step(&[ID]))?;
        steps.push(cost);
        on_step(done);
    }
    let (mut painting, finish) = measured(painter, |painter| painter.finish(ID))?;
    let recording = Recording {
        name,
        trace: painting.trace,
        picture: painting.images.swap_remove(0),
    };
    let costs = Costs {
        load,
        start,
        steps,
        finish,
    };
    Ok((recording, costs))
}

fn measured<T>(
    painter: &mut dyn Painter,
    stage: impl FnOnce(&mut dyn Painter) -> Result<T, PaintError>,
) -> Result<(T, Cost), JobError> {
    let meter = CostMeter::start();
    let outcome = caught(|| stage(painter))?;
    Ok((outcome, meter.stop(painter.memory())))
}
