//! After a panic in the middle of a job the painter draws the next one as if nothing had been.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_flex::{Flex, FlexDevice};
use bytes::Bytes;
use kiln_models::noise::NoiseGenerator;
use kiln_models::painter::{Job, JobId, Painter, Painting};
use kiln_models::qwen_image::{CheckpointParts, PainterSettings, QwenImage};
use kiln_models::vae::VaeSettings;
use kiln_models::{TensorInfo, TensorSource};

use crate::fixtures::{F32, parts};

/// Weights that cannot be read while it says so.
#[derive(Debug)]
struct Unreliable {
    source: Arc<dyn TensorSource>,
    is_broken: Arc<AtomicBool>,
}

impl TensorSource for Unreliable {
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
        assert!(!self.is_broken.load(Ordering::Relaxed), "{name} is gone");
        self.source.bytes(name)
    }
}

/// A painter of the smallest checkpoint, whose transformer's weights can be made unreadable.
fn painter() -> (QwenImage<Flex>, Arc<AtomicBool>) {
    let is_broken = Arc::new(AtomicBool::new(false));
    let whole = parts("base");
    let parts = CheckpointParts {
        transformer: Arc::new(Unreliable {
            source: Arc::clone(&whole.transformer),
            is_broken: Arc::clone(&is_broken),
        }),
        ..whole
    };
    let settings = PainterSettings {
        precision: F32,
        vae: VaeSettings::default(),
    };
    let painter = QwenImage::load(&parts, FlexDevice, "test".to_owned(), settings);
    (painter.unwrap(), is_broken)
}

fn job(steps: usize) -> Job {
    Job {
        prompt: (0..40).collect(),
        negative_prompt: None,
        true_cfg_scale: 1.0,
        height: 32,
        width: 32,
        num_inference_steps: steps,
        num_images: 1,
        seed: 7,
        noise_generator: NoiseGenerator::Cpu,
        record: false,
    }
}

fn paint(painter: &mut impl Painter, id: JobId, job: Job) -> Painting {
    painter.start(id, job).unwrap();
    while painter.step(&[id]).unwrap() != [0] {}
    painter.finish(id).unwrap()
}

#[test]
fn a_panic_loses_what_was_kept_and_nothing_else() {
    let (mut painter, is_broken) = painter();
    let expected = paint(&mut painter, 1, job(2));
    // In work while another one fails.
    painter.start(2, job(2)).unwrap();
    painter.step(&[2]).unwrap();

    // The schedule is new, and the layers that modulate for it cannot be read.
    is_broken.store(true, Ordering::Relaxed);
    let failed = catch_unwind(AssertUnwindSafe(|| painter.start(3, job(3))));
    assert!(failed.is_err(), "it started");
    is_broken.store(false, Ordering::Relaxed);
    painter.discard(3);

    painter.step(&[2]).unwrap();
    assert_eq!(painter.finish(2).unwrap(), expected);
    let before = painter.caches();
    assert_eq!(paint(&mut painter, 4, job(2)), expected);
    // Nothing that was made before the panic is trusted.
    let after = painter.caches();
    assert_eq!(after.embeddings.misses, before.embeddings.misses + 1);
    assert_eq!(after.modulation.misses, before.modulation.misses + 1);
    // What is made after it is kept again.
    assert_eq!(paint(&mut painter, 5, job(2)), expected);
    assert_eq!(painter.caches().embeddings.misses, after.embeddings.misses);
}
