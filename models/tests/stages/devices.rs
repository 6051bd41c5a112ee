//! One device against several: the same images to the bit, and a failure of one device loses nothing
//! else. On a CPU backend a device is a thread, so several can be had anywhere.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use burn_flex::{Flex, FlexDevice};
use kiln_models::families;
use kiln_models::job::{Job, JobId, Output, Size};
use kiln_models::loading::DEFAULT_ADAPTER_CACHE_BYTES;
use kiln_models::pipeline::{ModelDevice, Pipeline, PipelineError};
use kiln_models::session::{BeforeForward, SessionDevice, SessionSettings};
use kiln_models::step_cache::{CachePolicy, DbCache};
use kiln_models::testing::guidance;

use crate::failure::{generate, job, settings};
use crate::fixtures::parts;

/// A pipeline on this many devices.
fn on_devices(count: usize, before_forward: Option<BeforeForward>) -> Box<dyn Pipeline> {
    let device = |index| SessionDevice::<Flex> {
        device: FlexDevice,
        info: ModelDevice {
            index,
            name: "fake".to_owned(),
        },
    };
    let settings = SessionSettings {
        devices: (0..count).map(device).collect(),
        adapter_cache_bytes: DEFAULT_ADAPTER_CACHE_BYTES,
        before_forward,
        ..settings()
    };
    families::open(&parts("base"), settings).unwrap()
}

/// Calls this function before each forward pass and each probe, with the number of the device.
fn calling(
    call: impl Fn(usize) -> Result<(), PipelineError> + Send + Sync + 'static,
) -> BeforeForward {
    BeforeForward(Arc::new(call))
}

fn recorded(job: Job) -> Job {
    Job {
        record: true,
        ..job
    }
}

fn guided(job: Job) -> Job {
    Job {
        guidance: guidance((3..44).collect(), 4.0),
        ..job
    }
}

/// Policies with reused steps of every kind.
pub(crate) fn policies() -> Vec<CachePolicy> {
    let mask = [true, true, false, true, false, false, true, false];
    let probe = DbCache {
        max_warmup_steps: 2,
        // The checkpoint is random: some steps are below this, some above.
        residual_diff_threshold: 0.1,
        max_continuous_cached_steps: Some(2),
        ..DbCache::default()
    };
    vec![
        CachePolicy::Off,
        CachePolicy::Mask(mask.into()),
        CachePolicy::DbCache(probe),
    ]
}

/// Jobs of several sizes and numbers of images, with and without guidance, a gate and caches.
fn jobs() -> Vec<Job> {
    let mut jobs = Vec::new();
    for (index, cache) in policies().into_iter().enumerate() {
        for (width, height, num_images) in [(32, 32, 1), (48, 16, 2), (16, 80, 3)] {
            let plain = Job {
                size: Size { width, height },
                num_images,
                cache: cache.clone(),
                ..recorded(job(8))
            };
            let gated = Job {
                cfg_gate_step: Some(0.5),
                ..guided(plain.clone())
            };
            jobs.extend([guided(plain.clone()), gated]);
            if index == 0 || num_images == 1 {
                jobs.push(plain);
            }
        }
    }
    jobs
}

/// Steps all jobs together until each has ended.
fn generate_together(pipeline: &mut dyn Pipeline, jobs: &[Job]) -> Vec<Output> {
    for (id, job) in jobs.iter().enumerate() {
        pipeline.start(id as JobId, job.clone()).unwrap();
    }
    let mut left: Vec<JobId> = (0..jobs.len() as JobId).collect();
    while !left.is_empty() {
        let outcomes = pipeline.step(&left).unwrap();
        left.retain(|id| outcomes.iter().any(|it| it.id == *id && it.steps_left > 0));
    }
    let ids = 0..jobs.len() as JobId;
    ids.map(|id| pipeline.finish(id).unwrap()).collect()
}

#[test]
fn a_job_is_the_same_on_one_device_and_on_two() {
    let (mut one, mut two) = (on_devices(1, None), on_devices(2, None));
    for job in jobs() {
        let expected = generate(&mut *one, 1, job.clone());
        assert_eq!(generate(&mut *two, 1, job.clone()), expected, "{job:?}");
    }
}

#[test]
fn jobs_that_take_turns_are_the_same_on_one_device_and_on_three() {
    let (mut one, mut three) = (on_devices(1, None), on_devices(3, None));
    let jobs: Vec<Job> = jobs().into_iter().take(12).collect();
    let alone: Vec<Output> = jobs
        .iter()
        .map(|job| generate(&mut *one, 1, job.clone()))
        .collect();
    for (id, job) in jobs.iter().enumerate() {
        three.start(id as JobId, job.clone()).unwrap();
    }
    let ids: Vec<JobId> = (0..jobs.len() as JobId).collect();
    for _ in 0..8 {
        for id in &ids {
            three.step(&[*id]).unwrap();
        }
    }
    for (id, expected) in alone.iter().enumerate() {
        assert_eq!(&three.finish(id as JobId).unwrap(), expected);
    }
}

#[test]
fn jobs_in_one_step_are_spread_over_the_devices() {
    let used = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&used);
    let mut pipeline = on_devices(
        3,
        Some(calling(move |device| {
            log.lock().unwrap().push(device);
            Ok(())
        })),
    );
    let used_by = |pipeline: &mut dyn Pipeline, ids: &[JobId]| {
        used.lock().unwrap().clear();
        pipeline.step(ids).unwrap();
        let mut used = used.lock().unwrap().clone();
        used.sort_unstable();
        used
    };
    for id in 0..4 {
        let job = if id == 3 { job(8) } else { guided(job(8)) };
        pipeline.start(id, job).unwrap();
    }
    assert_eq!(used_by(&mut *pipeline, &[0]), [0, 1]);
    assert_eq!(used_by(&mut *pipeline, &[3]), [0]);
    assert_eq!(used_by(&mut *pipeline, &[0, 1]), [0, 1, 2]);
    assert_eq!(used_by(&mut *pipeline, &[0, 1, 2, 3]), [0, 1, 2]);
}

#[test]
fn the_halves_of_a_job_run_at_the_same_time() {
    // Each half waits for the other one.
    let barrier = Arc::new(Barrier::new(2));
    let both = calling(move |_| {
        barrier.wait();
        Ok(())
    });
    let mut pipeline = on_devices(2, Some(both));
    pipeline.start(1, guided(job(2))).unwrap();
    assert_eq!(pipeline.step(&[1]).unwrap()[0].steps_left, 1);
}

#[test]
fn a_slow_device_changes_nothing() {
    let mut one = on_devices(1, None);
    for slow in 0..2 {
        let late = calling(move |device| {
            if device == slow {
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let mut two = on_devices(2, Some(late));
        for cache in policies() {
            let job = Job {
                cache,
                ..guided(recorded(job(6)))
            };
            let expected = generate(&mut *one, 1, job.clone());
            assert_eq!(generate(&mut *two, 1, job), expected);
        }
    }
}

/// What a device does in the forward passes from `first` on, `times` times.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Error,
    Panic,
}

/// A pipeline on two devices, one of which fails in its third forward pass this often.
fn failing(device: usize, fault: Fault, times: usize) -> Box<dyn Pipeline> {
    let passes = AtomicUsize::new(0);
    let call = move |at: usize| {
        if at != device {
            return Ok(());
        }
        let pass = passes.fetch_add(1, Ordering::Relaxed);
        if pass < 2 || pass - 2 >= times {
            return Ok(());
        }
        match fault {
            Fault::Error => Err(PipelineError::Device("no memory is left".to_owned())),
            Fault::Panic => panic!("the kernel is gone"),
        }
    };
    on_devices(2, Some(calling(call)))
}

#[test]
fn a_failure_in_either_half_loses_no_other_job_and_no_step() {
    let mut one = on_devices(1, None);
    for cache in policies() {
        let wanted = Job {
            cache,
            ..guided(recorded(job(6)))
        };
        let expected = generate(&mut *one, 1, wanted.clone());
        for device in [0, 1] {
            for fault in [Fault::Error, Fault::Panic] {
                let mut pipeline = failing(device, fault, 1);
                pipeline.start(1, wanted.clone()).unwrap();
                pipeline.start(2, wanted.clone()).unwrap();
                pipeline.step(&[1]).unwrap();
                pipeline.step(&[2]).unwrap();
                let step = std::panic::AssertUnwindSafe(|| pipeline.step(&[2]));
                match (fault, std::panic::catch_unwind(step)) {
                    (Fault::Error, Ok(Err(PipelineError::Device(report)))) => {
                        let label = if device == 0 {
                            "test:0 (fake)"
                        } else {
                            "test:1 (fake)"
                        };
                        assert_eq!(report, format!("{label}: no memory is left"));
                    }
                    (Fault::Panic, Err(_)) => {}
                    (fault, other) => panic!("{fault:?} in device {device}: {other:?}"),
                }
                // The step was not made: made again, it is right, and so is the other job.
                for id in [1, 2] {
                    while pipeline.step(&[id]).unwrap()[0].steps_left > 0 {}
                    assert_eq!(pipeline.finish(id).unwrap(), expected);
                }
            }
        }
    }
}

#[test]
fn a_device_that_fails_for_good_is_named_by_the_probe() {
    for device in [0, 1] {
        let mut pipeline = failing(device, Fault::Error, usize::MAX);
        pipeline.start(1, guided(job(6))).unwrap();
        pipeline.step(&[1]).unwrap();
        pipeline.step(&[1]).unwrap();
        pipeline.step(&[1]).unwrap_err();
        pipeline.discard(1);
        let report = pipeline.probe().unwrap_err().to_string();
        let label = format!("test:{device} (fake)");
        assert!(report.contains(&label), "{report}");
    }
}

#[test]
fn a_job_that_is_discarded_halfway_and_made_again_is_the_same() {
    for count in [1, 2] {
        let mut pipeline = on_devices(count, None);
        for cache in policies() {
            let wanted = Job {
                cache,
                ..guided(recorded(job(8)))
            };
            let expected = generate(&mut *pipeline, 1, wanted.clone());
            pipeline.start(2, wanted.clone()).unwrap();
            for _ in 0..4 {
                pipeline.step(&[2]).unwrap();
            }
            pipeline.discard(2);
            assert_eq!(generate(&mut *pipeline, 2, wanted), expected);
        }
    }
}

#[test]
fn cached_jobs_in_one_step_are_as_each_alone() {
    for count in [1, 2] {
        let mut pipeline = on_devices(count, None);
        let jobs = jobs();
        let alone: Vec<Output> = jobs
            .iter()
            .map(|job| generate(&mut *pipeline, 1, job.clone()))
            .collect();
        let together = generate_together(&mut *pipeline, &jobs);
        for ((alone, together), job) in alone.iter().zip(&together).zip(&jobs) {
            assert_eq!(together.steps, alone.steps, "{job:?}");
            for (a, b) in alone.trace.iter().zip(&together.trace) {
                // Each gated step adds the rounding of an earlier one, times the guidance scale.
                let tolerance = if job.cfg_gate_step.is_some() {
                    1e-5
                } else {
                    2e-6
                };
                crate::fixtures::assert_close(&a.name, &b.values, &a.values, tolerance);
            }
        }
    }
}

#[test]
fn a_mask_of_ones_changes_no_bit() {
    let mut pipeline = on_devices(1, None);
    let exact = guided(recorded(job(8)));
    let expected = generate(&mut *pipeline, 1, exact.clone());
    let masked = Job {
        cache: CachePolicy::Mask([true; 8].into()),
        ..exact.clone()
    };
    assert_eq!(generate(&mut *pipeline, 1, masked), expected);
    let never = DbCache {
        residual_diff_threshold: 0.0,
        ..DbCache::default()
    };
    let probed = Job {
        cache: CachePolicy::DbCache(never),
        ..exact.clone()
    };
    assert_eq!(generate(&mut *pipeline, 1, probed), expected);
    let open = Job {
        cfg_gate_step: Some(1.0),
        ..exact
    };
    assert_eq!(generate(&mut *pipeline, 1, open), expected);
}

#[test]
fn the_steps_of_a_job_are_counted() {
    let mut pipeline = on_devices(1, None);
    let mask = [true, true, false, true, false, false, true, false];
    let cached = Job {
        cache: CachePolicy::Mask(mask.into()),
        cfg_gate_step: Some(0.5),
        ..guided(job(8))
    };
    pipeline.start(1, cached).unwrap();
    let mut works = Vec::new();
    loop {
        let outcome = pipeline.step(&[1]).unwrap()[0];
        works.push(outcome.work);
        if outcome.steps_left == 0 {
            break;
        }
    }
    assert_eq!(works, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.0]);
    let steps = pipeline.finish(1).unwrap().steps;
    assert_eq!((steps.computed, steps.skipped, steps.gated), (4, 4, 4));
}
