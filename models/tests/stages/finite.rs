//! Values that are not numbers end the job that has them, at the stage that computed them.

use std::sync::Arc;

use bytes::Bytes;
use kiln_models::families::CheckpointParts;
use kiln_models::job::{Guidance, Job};
use kiln_models::pipeline::{Pipeline, PipelineError};
use kiln_models::{NotFinite, Stage, TensorInfo, TensorSource};

use crate::failure::{generate, job, open};
use crate::fixtures::parts;

/// A source with one tensor whose first value is replaced.
#[derive(Debug)]
struct Damaged {
    source: Arc<dyn TensorSource>,
    tensor: &'static str,
    value: f32,
}

impl TensorSource for Damaged {
    fn origin(&self) -> String {
        self.source.origin()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name)
    }

    fn bytes(&self, name: &str) -> Bytes {
        let bytes = self.source.bytes(name);
        if name != self.tensor {
            return bytes;
        }
        let mut bytes = bytes.to_vec();
        bytes[..4].copy_from_slice(&self.value.to_le_bytes());
        bytes.into()
    }
}

/// A pipeline of the smallest checkpoint with `value` in a tensor of one component.
fn damaged(component: &str, tensor: &'static str, value: f32) -> Box<dyn Pipeline> {
    let mut parts = parts("base");
    let CheckpointParts {
        text_encoder,
        transformer,
        vae,
        ..
    } = &mut parts;
    let source = match component {
        "text_encoder" => text_encoder,
        "transformer" => transformer,
        _ => vae,
    };
    assert!(source.info(tensor).is_some(), "{:?}", source.names());
    *source = Arc::new(Damaged {
        source: Arc::clone(source),
        tensor,
        value,
    });
    open(&parts)
}

fn stage(error: &PipelineError) -> Stage {
    match error {
        PipelineError::NotFinite(NotFinite { stage, dtype }) => {
            assert_eq!(*dtype, "f32");
            *stage
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_damaged_weight_ends_the_job_at_the_stage_of_its_network() {
    for value in [f32::NAN, f32::INFINITY] {
        let mut pipeline = damaged("text_encoder", "model.language_model.norm.weight", value);
        let error = pipeline.start(1, job(2)).unwrap_err();
        assert_eq!(stage(&error), Stage::TextEncoding);

        let mut pipeline = damaged("transformer", "proj_out.weight", value);
        pipeline.start(1, job(2)).unwrap();
        let error = pipeline.step(&[1]).unwrap_err();
        assert_eq!(stage(&error), Stage::Step { step: 1, steps: 2 });

        let mut pipeline = damaged("vae", "decoder.conv_out.bias", value);
        pipeline.start(1, job(1)).unwrap();
        pipeline.step(&[1]).unwrap();
        let preview = pipeline.preview(1).unwrap_err();
        assert_eq!(stage(&preview), Stage::Decoding);
        let error = pipeline.finish(1).unwrap_err();
        assert_eq!(stage(&error), Stage::Decoding);
        assert!(matches!(
            pipeline.finish(1).unwrap_err(),
            PipelineError::UnknownJob(1)
        ));
    }
}

/// A layer of the modulation, which is read for each schedule.
#[test]
fn a_damaged_modulation_layer_ends_the_job_at_the_first_step() {
    let mut pipeline = damaged("transformer", "norm_out.linear.bias", f32::NAN);
    pipeline.start(1, job(3)).unwrap();
    let error = pipeline.step(&[1]).unwrap_err();
    assert_eq!(stage(&error), Stage::Step { step: 1, steps: 3 });
}

#[test]
fn only_the_job_whose_values_are_not_numbers_ends() {
    let mut pipeline = open(&parts("base"));
    let expected = generate(&mut *pipeline, 1, job(2));
    // A scale that f32 does not hold. Requests with it are refused before they become jobs.
    let bad = Job {
        guidance: Guidance::new(Some(job(1).conditioning), 1e39),
        ..job(2)
    };
    pipeline.start(2, job(2)).unwrap();
    pipeline.start(3, bad).unwrap();
    let error = pipeline.step(&[2, 3]).unwrap_err();
    assert_eq!(stage(&error), Stage::Step { step: 1, steps: 2 });
    // No job has advanced.
    assert_eq!(pipeline.step(&[2]).unwrap()[0].steps_left, 1);
    pipeline.step(&[3]).unwrap_err();
    pipeline.discard(3);
    pipeline.step(&[2]).unwrap();
    assert_eq!(pipeline.finish(2).unwrap(), expected);
}

#[test]
fn a_recorded_job_goes_on_and_names_the_first_stage() {
    let mut pipeline = damaged("transformer", "proj_out.weight", f32::NAN);
    let recorded = Job {
        record: true,
        ..job(2)
    };
    let output = generate(&mut *pipeline, 1, recorded);
    let found = output.not_finite.unwrap();
    assert_eq!(found.stage, Stage::Step { step: 1, steps: 2 });
    let trace = |name| output.trace.iter().find(|it| it.name == name).unwrap();
    assert!(trace("prompt_embeds").values.iter().all(|v| v.is_finite()));
    for name in ["latents_step0", "latents_step1", "image_float"] {
        assert!(trace(name).values.iter().any(|v| v.is_nan()), "{name}");
    }
}

#[test]
fn a_recorded_image_is_within_its_bounds() {
    // Far above the brightest pixel.
    let mut pipeline = damaged("vae", "decoder.conv_out.bias", 9.0);
    let recorded = Job {
        record: true,
        ..job(1)
    };
    let output = generate(&mut *pipeline, 1, recorded);
    assert_eq!(output.not_finite, None);
    let image = &output.trace.last().unwrap().values;
    assert!(image.iter().all(|v| (0.0..=1.0).contains(v)));
    assert_eq!(image[0], 1.0);
    assert_eq!(output.images[0].pixels[0], 255);
}
