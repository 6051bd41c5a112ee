//! A panic in the middle of a job leaves the pipeline and its other jobs usable.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_flex::{Flex, FlexDevice};
use bytes::Bytes;
use kiln_models::families::{self, CheckpointParts};
use kiln_models::job::{Job, JobId, Output};
use kiln_models::loading::DEFAULT_ADAPTER_CACHE_BYTES;
use kiln_models::pipeline::{ModelDevice, Pipeline, PipelineError};
use kiln_models::session::{SessionDevice, SessionSettings};
use kiln_models::testing;
use kiln_models::vae::VaeSettings;
use kiln_models::{FileFault, FileProblem, TensorInfo, TensorSource};

use crate::fixtures::{F32, parts};

/// A source whose tensors cannot be read while `is_broken` is set, and whose file has changed while
/// `is_changed` is set.
#[derive(Debug)]
struct Unreliable {
    source: Arc<dyn TensorSource>,
    is_broken: Arc<AtomicBool>,
    is_changed: Arc<AtomicBool>,
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

    fn check_files(&self) -> Result<(), FileFault> {
        if self.is_changed.load(Ordering::Relaxed) {
            return Err(FileFault {
                file: "transformer/weights".to_owned(),
                problem: FileProblem::Changed,
            });
        }
        self.source.check_files()
    }
}

/// A pipeline of the smallest checkpoint, and the switches that make the transformer's weights
/// unreadable and changed.
fn pipeline() -> (Box<dyn Pipeline>, [Arc<AtomicBool>; 2]) {
    let switches = [false; 2].map(|off| Arc::new(AtomicBool::new(off)));
    let [is_broken, is_changed] = &switches;
    let whole = parts("base");
    let parts = CheckpointParts {
        transformer: Arc::new(Unreliable {
            source: Arc::clone(&whole.transformer),
            is_broken: Arc::clone(is_broken),
            is_changed: Arc::clone(is_changed),
        }),
        ..whole
    };
    (open(&parts), switches)
}

/// A pipeline in f32.
pub(crate) fn open(parts: &CheckpointParts) -> Box<dyn Pipeline> {
    families::open(parts, settings()).unwrap()
}

/// Settings of a session on one device, in f32.
pub(crate) fn settings() -> SessionSettings<Flex> {
    SessionSettings {
        device: FlexDevice,
        backend: "test",
        devices: vec![SessionDevice {
            device: FlexDevice,
            info: ModelDevice {
                index: 0,
                name: "fake".to_owned(),
            },
        }],
        split_guidance: None,
        device_memory: None,
        precision: F32,
        vae: VaeSettings::default(),
        adapter_cache_bytes: DEFAULT_ADAPTER_CACHE_BYTES,
        before_forward: None,
    }
}

pub(crate) fn job(steps: usize) -> Job {
    Job {
        conditioning: (0..40).collect::<Vec<u32>>().into(),
        ..testing::job(32, steps)
    }
}

pub(crate) fn generate(pipeline: &mut dyn Pipeline, id: JobId, job: Job) -> Output {
    pipeline.start(id, job).unwrap();
    while pipeline.step(&[id]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(id).unwrap()
}

#[test]
fn a_panic_empties_the_caches_and_loses_nothing_else() {
    let (mut pipeline, [is_broken, _]) = pipeline();
    let expected = generate(&mut *pipeline, 1, job(2));
    // This job is unfinished while another one fails.
    pipeline.start(2, job(2)).unwrap();
    pipeline.step(&[2]).unwrap();

    // Job 3 has a new schedule, and the modulation layers' weights cannot be read.
    is_broken.store(true, Ordering::Relaxed);
    let failed = catch_unwind(AssertUnwindSafe(|| pipeline.start(3, job(3))));
    assert!(failed.is_err(), "the job started");
    is_broken.store(false, Ordering::Relaxed);
    pipeline.discard(3);

    pipeline.step(&[2]).unwrap();
    assert_eq!(pipeline.finish(2).unwrap(), expected);
    let before = pipeline.caches();
    assert_eq!(generate(&mut *pipeline, 4, job(2)), expected);
    // The panic emptied the caches.
    let after = pipeline.caches();
    assert_eq!(after.embeddings.misses, before.embeddings.misses + 1);
    assert_eq!(after.modulation.misses, before.modulation.misses + 1);
    // Entries made after the panic are kept.
    assert_eq!(generate(&mut *pipeline, 5, job(2)), expected);
    assert_eq!(pipeline.caches().embeddings.misses, after.embeddings.misses);
}

#[test]
fn a_changed_file_fails_every_call_that_may_have_read_it() {
    let (mut pipeline, [_, is_changed]) = pipeline();
    let expected = generate(&mut *pipeline, 1, job(2));
    pipeline.start(2, job(2)).unwrap();
    pipeline.step(&[2]).unwrap();

    is_changed.store(true, Ordering::Relaxed);
    let is_of_file = |error: PipelineError| match error {
        PipelineError::File(fault) => assert_eq!(fault.file, "transformer/weights"),
        other => panic!("{other}"),
    };
    is_of_file(pipeline.start(3, job(3)).unwrap_err());
    is_of_file(pipeline.preview(2).unwrap_err());
    is_of_file(pipeline.step(&[2]).unwrap_err());
    is_changed.store(false, Ordering::Relaxed);

    // The step that failed was not made.
    assert_eq!(pipeline.step(&[2]).unwrap()[0].steps_left, 0);
    is_changed.store(true, Ordering::Relaxed);
    is_of_file(pipeline.finish(2).unwrap_err());
    is_changed.store(false, Ordering::Relaxed);
    assert_eq!(generate(&mut *pipeline, 4, job(2)), expected);
}
