//! One model on several devices. The CPU is taken twice: two devices must give the images of one.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use kiln::backend::LoadSettings;
use kiln::checkpoint::Checkpoint;
use kiln::runtime::{LoadFormat, ModelSettings, Runtime, RuntimeSettings};
use kiln_models::job::{Job, JobId, Noise, Output, Size};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::step_cache::{CachePolicy, DbCache};
use kiln_models::testing;
use serde_json::json;

use crate::shape::write_demo_shape;

fn settings(backend: &str, split_guidance: Option<bool>) -> RuntimeSettings {
    RuntimeSettings {
        load: LoadSettings {
            backend: backend.parse().unwrap(),
            split_guidance,
            ..LoadSettings::default()
        },
        ..RuntimeSettings::new("demo")
    }
}

fn pipeline(backend: &str, split_guidance: Option<bool>) -> Box<dyn Pipeline> {
    let runtime = Runtime::open(&settings(backend, split_guidance)).unwrap();
    runtime.pipeline
}

/// A guided job.
fn job(height: usize, width: usize, num_images: usize, steps: usize) -> Job {
    let tokenizer = Checkpoint::demo().unwrap().tokenizer().unwrap();
    let tokens = |text| tokenizer.encode_prompt(text).unwrap();
    Job {
        conditioning: tokens("a large red circle on a blue background").into(),
        guidance: testing::guidance(tokens("a small star"), 4.0),
        size: Size { height, width },
        noise: Noise {
            seed: (height + width + num_images) as u64,
            generator: NoiseGenerator::Cpu,
        },
        num_images,
        ..testing::job(height, steps)
    }
}

/// Jobs of several sizes and numbers of images, with and without guidance, gates and caches.
fn jobs() -> Vec<Job> {
    let mut jobs = Vec::new();
    for (height, width) in [(16, 16), (64, 64), (128, 48), (80, 176)] {
        for num_images in 1..=3 {
            let guided = job(height, width, num_images, 2);
            let plain = Job {
                guidance: None,
                ..guided.clone()
            };
            jobs.extend([guided, plain]);
        }
    }
    let mask: Arc<[bool]> = (0..8).map(|step| step % 3 != 2).collect();
    let residual = |residual_diff_threshold| {
        CachePolicy::DbCache(DbCache {
            residual_diff_threshold,
            ..DbCache::default()
        })
    };
    for cache in [
        CachePolicy::Off,
        CachePolicy::Mask(mask),
        residual(0.05),
        residual(0.24),
        residual(10.0),
    ] {
        // The first and the fifth of eight steps are the first gated ones.
        for cfg_gate_step in [None, Some(0.125), Some(0.625)] {
            jobs.push(Job {
                cache: cache.clone(),
                cfg_gate_step,
                ..job(64, 96, 1, 8)
            });
        }
    }
    jobs.push(Job {
        record: true,
        ..job(64, 64, 2, 3)
    });
    jobs
}

fn generate(pipeline: &mut dyn Pipeline, id: JobId, job: Job) -> Output {
    pipeline.start(id, job).unwrap();
    while pipeline.step(&[id]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(id).unwrap()
}

#[test]
fn a_model_knows_its_devices() {
    let one = Runtime::open(&settings("flex", None)).unwrap().info;
    let two = Runtime::open(&settings("flex:0+0", None)).unwrap().info;
    assert_eq!((one.device_count(), two.device_count()), (1, 2));
    assert_eq!(two.devices[0], two.devices[1]);
    assert_eq!(two.device(), format!("{0}, {0}", one.device()));
    assert!(one.device().starts_with("flex:0 ("), "{}", one.device());
    assert_eq!((one.sizes, one.dtype), (two.sizes, two.dtype));
}

#[test]
fn several_devices_give_the_image_of_one_to_the_bit() {
    let mut one = pipeline("flex", None);
    let others = [
        ("flex:0+0", None),
        ("flex:0+0", Some(true)),
        ("flex:0+0", Some(false)),
        ("flex:0+0+0", None),
    ];
    let mut others = others.map(|(backend, split)| {
        let name = format!("{backend} {split:?}");
        (name, pipeline(backend, split))
    });
    for (id, job) in jobs().into_iter().enumerate() {
        let id = id as JobId;
        let expected = generate(&mut *one, id, job.clone());
        for (name, pipeline) in &mut others {
            let output = generate(&mut **pipeline, id, job.clone());
            assert!(output == expected, "{name}: {job:?}");
        }
    }
}

/// Jobs that take turns, some stepped together, in any order of starts and ends.
#[test]
fn jobs_beside_each_other_on_two_devices_give_the_images_of_each_alone() {
    let mut one = pipeline("flex", None);
    let mut two = pipeline("flex:0+0", None);
    let jobs = [
        job(64, 64, 1, 4),
        Job {
            guidance: None,
            ..job(48, 80, 2, 3)
        },
        job(128, 64, 1, 2),
    ];
    let alone: Vec<Output> = jobs
        .iter()
        .map(|job| generate(&mut *one, 0, job.clone()))
        .collect();
    for (id, job) in jobs.into_iter().enumerate() {
        two.start(id as JobId, job).unwrap();
    }
    for ids in [[2, 0], [1, 0], [0, 2], [1, 0]] {
        for id in ids {
            two.step(&[id]).unwrap();
        }
    }
    assert_eq!(two.step(&[1]).unwrap()[0].steps_left, 0);
    for id in [2, 0, 1] {
        assert!(two.finish(id).unwrap() == alone[id as usize], "job {id}");
    }
}

#[test]
fn a_cancelled_job_leaves_nothing_on_either_device() {
    let mut two = pipeline("flex:0+0", Some(true));
    let job = || job(64, 48, 1, 4);
    let expected = generate(&mut *two, 0, job());
    two.start(1, job()).unwrap();
    two.step(&[1]).unwrap();
    two.discard(1);
    assert!(generate(&mut *two, 1, job()) == expected);
    two.drop_caches();
    assert!(generate(&mut *two, 2, job()) == expected);
}

#[test]
fn work_on_several_devices_is_counted_for_each() {
    let mut two = pipeline("flex:0+0", Some(true));
    generate(&mut *two, 0, job(32, 32, 1, 3));
    let uses = two.device_use();
    assert_eq!(uses.len(), 2);
    for used in uses {
        assert_eq!(used.device, "flex:0");
        assert!(used.busy_seconds > 0.0, "{used:?}");
        assert!(used.forwards >= 3, "{used:?}");
        assert!(used.memory.in_use.is_some(), "{used:?}");
    }
}

/// Names the folder and the devices that [`child`] loads.
const LOAD: &str = "KILN_TEST_DEVICES";

#[test]
#[ignore = "a process of `memory_of`"]
fn child() {
    let text = std::env::var(LOAD).unwrap();
    let (folder, backend) = text.rsplit_once(' ').unwrap();
    let mut settings = settings(backend, None);
    settings.model = ModelSettings {
        load_format: LoadFormat::Dummy,
        ..ModelSettings::new(folder)
    };
    let mut pipeline = Runtime::open(&settings).unwrap().pipeline;
    generate(&mut *pipeline, 0, job(32, 32, 1, 1));
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon"));
    println!("{}", line.unwrap());
}

/// KiB that a process takes, apart from files, with a model on these devices.
fn memory_of(folder: &Path, backend: &str) -> f64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "devices::child", "--ignored", "--nocapture"])
        .env(LOAD, format!("{} {backend}", folder.display()))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let line = stdout.lines().find_map(|line| line.split_once("RssAnon:"));
    let (_, kib) = line.unwrap_or_else(|| panic!("{backend}: {stdout}"));
    kib.trim_end_matches("kB").trim().parse().unwrap()
}

/// Configurations of the demo model with a transformer of many blocks.
fn deep_model(to: &Path) {
    write_demo_shape(to, |file, config| {
        if file.starts_with("transformer") {
            config["num_layers"] = json!(60);
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_cpu_that_is_taken_twice_has_the_weights_once() {
    let folder = tempfile::tempdir().unwrap();
    deep_model(folder.path());
    let [one, two] = ["flex", "flex:0+0"].map(|backend| memory_of(folder.path(), backend));
    assert!(one > 60_000.0, "the model takes {one} KiB");
    assert!(two < 1.2 * one, "one device takes {one} KiB, two {two} KiB");
}
