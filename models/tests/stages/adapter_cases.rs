//! The adapters and cases of `tests/fixtures/lora`, made by `tests/reference/make_lora_fixtures.py`, and
//! checks of a backend's whole pipeline with them. The tests of the GPU backends include this file and
//! `fixtures.rs`.
//!
//! The adapters are built from the files' tensors by what `adapters.json` says of them, without the
//! reader of adapter files, so that these checks are about running alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use kiln_models::adapter::{Adapter, AdapterTarget, AdapterUse, Change, Factors, HostMatrix};
use kiln_models::families::CheckpointParts;
use kiln_models::job::{
    Conditioning, Decoding, Guidance, Job, JobId, Noise, NoiseLevels, Output, Sampling, Size,
};
use kiln_models::loading::{LoadOptions, ModelDType};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::step_cache::CachePolicy;
use kiln_models::transformer::TransformerConfig;
use kiln_models::{StoredDType, TensorInfo};
use serde_json::Value;

use crate::fixtures::{Stages, assert_close, config, folder, parts, read};

/// Largest allowed difference in f32, relative to a stage's largest magnitude: that of the tests without
/// adapters.
const F32_TOLERANCE: f32 = 2e-5;
/// As for f32, in models of 16-bit weights, where the reference rounds every activation.
const BF16_TOLERANCE: f32 = 3e-2;
const F16_TOLERANCE: f32 = 1e-2;
/// Smallest share of equal 8-bit values in f32; the others may differ by 1.
const EQUAL_PIXELS: f64 = 0.999;
/// Smallest ratio of signal to noise of 8-bit images in bf16 and f16, in dB.
const MIN_PSNR: f64 = 45.0;
/// Largest difference between an image that is generated with others in one step and alone, on a CPU.
pub(crate) const PACKED: f32 = 2e-6;

fn lora_folder() -> PathBuf {
    folder().join("lora")
}

fn list(file: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(lora_folder().join(file)).unwrap()).unwrap()
}

fn entry(file: &str, name: &str) -> Value {
    let mut entries = list(file).into_iter();
    entries.find(|entry| entry["name"] == name).unwrap()
}

/// Names of the cases whose adapters [`adapter`] can build.
pub(crate) fn case_names() -> Vec<String> {
    let names = list("cases.json").into_iter();
    let names = names.map(|case| case["name"].as_str().unwrap().to_owned());
    names.filter(|name| name != "fused_qkv").collect()
}

/// Builds an adapter of `adapters.json`.
pub(crate) fn adapter(name: &str) -> Arc<Adapter> {
    let entry = entry("adapters.json", name);
    let mut file = lora_folder()
        .join("adapters")
        .join(entry["file"].as_str().unwrap());
    if file.is_dir() {
        file = file.join("adapter_model.safetensors");
    }
    let tensors = read(&file);
    let config = config(entry["checkpoint"].as_str().unwrap(), "transformer");
    let config = TransformerConfig::from_json(&config).unwrap();
    let changes = config.adapter_targets().into_iter();
    let changes = changes.filter_map(|target| {
        let factors = factors(&entry, &tensors, &target)?;
        let scale = entry["scales"].get(&target.path).unwrap_or(&entry["scale"]);
        let scale = scale.as_f64().unwrap() as f32;
        Some((target.path, Change { factors, scale }))
    });
    let changes: BTreeMap<_, _> = changes.collect();
    assert!(!changes.is_empty(), "{name} changes nothing");
    Arc::new(Adapter::new(name, changes))
}

/// The factors of a layer, if the file has them.
fn factors(
    entry: &Value,
    tensors: &BTreeMap<String, (TensorInfo, Bytes)>,
    target: &AdapterTarget,
) -> Option<Factors> {
    let under = target.path.replace('.', "_");
    let matrix = |factor: &str| {
        let name = entry["factors"].get(factor)?.as_str().unwrap();
        let name = name.replace("{path}", &target.path);
        let (info, bytes) = tensors.get(&name.replace("{under}", &under))?;
        Some(HostMatrix {
            shape: <[usize; 2]>::try_from(info.shape.as_slice()).unwrap(),
            dtype: info.dtype.clone(),
            bytes: bytes.clone(),
        })
    };
    // A factor of LoKr, whole or as a product.
    let whole = |factor: &str| {
        matrix(factor).or_else(|| {
            let [a, b] = ["a", "b"].map(|part| matrix(&format!("{factor}_{part}")));
            Some(product(&a?, &b?))
        })
    };
    let factors = if let Some(down) = matrix("down") {
        let up = matrix("up").unwrap();
        Factors::LowRank { down, up }
    } else if let Some(left) = whole("left") {
        let right = whole("right").unwrap();
        Factors::Kronecker { left, right }
    } else {
        let [w1_a, w1_b, w2_a, w2_b] = ["w1_a", "w1_b", "w2_a", "w2_b"].map(&matrix);
        hadamard([w1_a?, w2_a?], [w1_b?, w2_b?])
    };
    assert_eq!(factors.shape(), [target.d_out, target.d_in], "{target:?}");
    Some(factors)
}

fn values(matrix: &HostMatrix) -> Vec<f64> {
    assert_eq!(matrix.dtype, StoredDType::F32);
    let values = matrix.bytes.chunks_exact(4);
    let values = values.map(|v| f32::from_le_bytes(v.try_into().unwrap()));
    values.map(f64::from).collect()
}

/// A matrix whose element of a row and a column is what `element` returns.
fn matrix_of(shape: [usize; 2], element: impl Fn(usize, usize) -> f64) -> HostMatrix {
    let [rows, columns] = shape;
    let element = &element;
    let values = (0..rows).flat_map(|row| (0..columns).map(move |column| element(row, column)));
    HostMatrix::from_f32(shape, &values.map(|v| v as f32).collect::<Vec<_>>())
}

fn product(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let ([rows, inner], [_, columns]) = (a.shape, b.shape);
    let (a, b) = (values(a), values(b));
    matrix_of([rows, columns], |row, column| {
        let terms = (0..inner).map(|i| a[row * inner + i] * b[i * columns + column]);
        terms.sum()
    })
}

/// The elementwise product of two products of low rank has the product of their ranks.
fn hadamard(up: [HostMatrix; 2], down: [HostMatrix; 2]) -> Factors {
    let (rank, d_out, d_in) = (up[0].shape[1], up[0].shape[0], down[0].shape[1]);
    let [up_1, up_2] = up.each_ref().map(values);
    let [down_1, down_2] = down.each_ref().map(values);
    Factors::LowRank {
        down: matrix_of([rank * rank, d_in], |i, column| {
            down_1[i / rank * d_in + column] * down_2[i % rank * d_in + column]
        }),
        up: matrix_of([d_out, rank * rank], |row, i| {
            up_1[row * rank + i / rank] * up_2[row * rank + i % rank]
        }),
    }
}

/// The adapters of a case.
pub(crate) fn uses(case: &Value) -> Vec<AdapterUse> {
    let uses = case["adapters"].as_array().unwrap().iter();
    let uses = uses.map(|it| AdapterUse {
        adapter: adapter(it["name"].as_str().unwrap()),
        scale: it["scale"].as_f64().unwrap() as f32,
    });
    uses.collect()
}

/// A case of `cases.json` and its recorded stages.
pub(crate) fn case(name: &str) -> (Value, Stages) {
    let file = lora_folder()
        .join("cases")
        .join(format!("{name}.safetensors"));
    (entry("cases.json", name), Stages(read(&file)))
}

/// The job of a case, with these adapters.
pub(crate) fn job(case: &Value, reference: &Stages, adapters: Vec<AdapterUse>) -> Job {
    let side = |name: &str| case[name].as_u64().unwrap() as usize;
    let negative = reference.0.contains_key("negative_token_ids");
    Job {
        conditioning: reference.ids("token_ids").into(),
        guidance: Guidance::new(
            negative.then(|| reference.ids("negative_token_ids").into()),
            case["true_cfg_scale"].as_f64().unwrap(),
        ),
        size: Size {
            height: side("height"),
            width: side("width"),
        },
        sampling: Sampling {
            levels: case["shift"].as_f64().map_or(NoiseLevels::Model, |shift| {
                NoiseLevels::Shifted {
                    shift,
                    terminal: None,
                }
            }),
            ..Sampling::new(side("num_inference_steps"))
        },
        noise: Noise {
            seed: case["seed"].as_u64().unwrap(),
            generator: NoiseGenerator::Cpu,
        },
        num_images: 1,
        decoding: Decoding::default(),
        cache: CachePolicy::Off,
        cfg_gate_step: None,
        adapters,
        record: true,
    }
}

/// Opens the checkpoint of a case in the case's type.
pub(crate) fn open_case(
    case: &Value,
    open: &impl Fn(&CheckpointParts, LoadOptions) -> Box<dyn Pipeline>,
) -> Box<dyn Pipeline> {
    let options = LoadOptions {
        dtype: ModelDType::named(case["dtype"].as_str().unwrap()),
        ..LoadOptions::default()
    };
    open(&parts(case["checkpoint"].as_str().unwrap()), options)
}

pub(crate) fn generate(pipeline: &mut dyn Pipeline, job: Job) -> Output {
    pipeline.start(0, job).unwrap();
    while pipeline.step(&[0]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(0).unwrap()
}

/// Generates the image of the case of this name, and compares every recorded stage.
pub(crate) fn generates_what_diffusers_generates(
    name: &str,
    open: &impl Fn(&CheckpointParts, LoadOptions) -> Box<dyn Pipeline>,
) {
    let (case, reference) = case(name);
    let mut pipeline = open_case(&case, open);
    let output = generate(&mut *pipeline, job(&case, &reference, uses(&case)));
    compare(&case, &reference, &output);
}

/// Compares the stages and the image of a case with the reference.
pub(crate) fn compare(case: &Value, reference: &Stages, output: &Output) {
    let name = &case["name"];
    let dtype = case["dtype"].as_str().unwrap();
    let tolerance = match dtype {
        "f32" => F32_TOLERANCE,
        "bf16" => BF16_TOLERANCE,
        _ => F16_TOLERANCE,
    };
    let mut compared = 0;
    for stage in &output.trace {
        let latents = stage.name.starts_with("latents_step");
        if !latents || !reference.0.contains_key(&stage.name) {
            continue;
        }
        assert_eq!(
            stage.shape,
            reference.shape(&stage.name),
            "{name} {}",
            stage.name
        );
        let expected = reference.values(&stage.name);
        assert_close(
            &format!("{name} {}", stage.name),
            &stage.values,
            &expected,
            tolerance,
        );
        compared += 1;
    }
    let steps = case["num_inference_steps"].as_u64().unwrap();
    assert_eq!(compared, steps, "{name}: the latents after each step");

    let expected = &reference.0["image_u8"].1;
    let actual = &output.images[0].pixels;
    assert_eq!(actual.len(), expected.len());
    let differences = || actual.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    let squares: f64 = differences().map(|d| f64::from(d).powi(2)).sum();
    let psnr = 10.0 * (255.0_f64.powi(2) * expected.len() as f64 / squares).log10();
    println!("{name}: {psnr:.1} dB");
    if dtype == "f32" {
        let equal = differences().filter(|&d| d == 0).count() as f64 / expected.len() as f64;
        assert!(
            differences().all(|d| d <= 1) && equal >= EQUAL_PIXELS,
            "{name}: {equal}"
        );
    } else {
        assert!(psnr >= MIN_PSNR, "{name}: {psnr:.1} dB");
    }
}

/// Adapters for the base checkpoint of every kind: linear layers of the blocks, modulation, layers
/// outside the blocks, the time embedding, and a matrix that has no low rank.
const OF_EVERY_KIND: [&str; 6] = [
    "twelve",
    "second",
    "modulation",
    "outside",
    "time",
    "lokr_whole",
];

/// Jobs of 3 steps with no adapter, with one of every kind, and with two, of several sizes, with and
/// without guidance.
pub(crate) fn mixed_jobs() -> Vec<Job> {
    let (case, reference) = case("two");
    let adapters = OF_EVERY_KIND.map(|name| AdapterUse {
        adapter: adapter(name),
        scale: 0.8,
    });
    let [twelve, second, modulation, ..] = adapters.clone();
    let scaled = |of: &AdapterUse, scale| AdapterUse {
        scale,
        ..of.clone()
    };
    let mut sets = vec![Vec::new()];
    sets.extend(adapters.map(|it| vec![it]));
    sets.extend([
        vec![twelve.clone(), second.clone()],
        vec![scaled(&second, -0.5), twelve.clone()],
        vec![scaled(&twelve, 0.3)],
        vec![modulation, scaled(&second, 1.2)],
        Vec::new(),
    ]);
    let sizes = [(32, 48), (16, 16), (64, 32), (48, 80)];
    let sets = sets.into_iter().enumerate();
    let negative = Conditioning::from(reference.ids("negative_token_ids"));
    let jobs = sets.map(|(index, adapters)| {
        let (height, width) = sizes[index % sizes.len()];
        let job = job(&case, &reference, adapters);
        Job {
            size: Size { width, height },
            sampling: Sampling::new(3),
            conditioning: if index % 4 == 3 {
                negative.clone()
            } else {
                job.conditioning.clone()
            },
            guidance: job.guidance.clone().filter(|_| index % 3 != 1),
            num_images: 1 + index % 2,
            noise: Noise {
                seed: index as u64,
                ..job.noise
            },
            ..job
        }
    });
    jobs.collect()
}

/// Generates jobs with and without adapters, in one step and in turns, and compares each with itself
/// alone. In turns the images are equal within `in_turns`: to the bit if it is 0.
pub(crate) fn jobs_do_not_depend_on_their_company(
    pipeline: &mut dyn Pipeline,
    in_one_step: f32,
    in_turns: f32,
) {
    let jobs = mixed_jobs();
    let alone: Vec<Output> = jobs
        .iter()
        .map(|job| generate(pipeline, job.clone()))
        .collect();
    let ids: Vec<JobId> = (0..jobs.len() as JobId).collect();
    let all = std::slice::from_ref(&ids);
    let each: Vec<Vec<JobId>> = ids.iter().map(|id| vec![*id]).collect();
    for (groups, tolerance) in [(all, in_one_step), (&each, in_turns)] {
        start_all(pipeline, &jobs);
        for _ in 0..jobs[0].sampling.steps {
            for group in groups {
                pipeline.step(group).unwrap();
            }
        }
        for (id, alone) in ids.iter().zip(&alone) {
            assert_same(&pipeline.finish(*id).unwrap(), alone, tolerance);
        }
    }
}

/// Steps jobs in groups of random members and order, and compares each with itself alone. A job that was
/// in no group with others is equal to the bit.
pub(crate) fn groups_of_any_order_change_nothing(pipeline: &mut dyn Pipeline, rounds: u64) {
    let jobs = mixed_jobs();
    let alone: Vec<Output> = jobs
        .iter()
        .map(|job| generate(pipeline, job.clone()))
        .collect();
    let mut random = Random(7);
    for _ in 0..rounds {
        start_all(pipeline, &jobs);
        let mut left: BTreeMap<JobId, usize> = (0..jobs.len() as JobId).map(|id| (id, 3)).collect();
        let mut grouped = vec![false; jobs.len()];
        while !left.is_empty() {
            let mut ids: Vec<JobId> = left.keys().copied().collect();
            random.shuffle(&mut ids);
            // Often one job alone.
            let size = if random.below(2) == 0 {
                1
            } else {
                1 + random.below(ids.len())
            };
            ids.truncate(size);
            for outcome in pipeline.step(&ids).unwrap() {
                grouped[outcome.id as usize] |= size > 1;
                if outcome.steps_left == 0 {
                    left.remove(&outcome.id);
                }
            }
        }
        for (id, alone) in alone.iter().enumerate() {
            let output = pipeline.finish(id as JobId).unwrap();
            let tolerance = if grouped[id] { PACKED } else { 0.0 };
            assert_same(&output, alone, tolerance);
        }
    }
}

fn start_all(pipeline: &mut dyn Pipeline, jobs: &[Job]) {
    for (id, job) in jobs.iter().enumerate() {
        pipeline.start(id as JobId, job.clone()).unwrap();
    }
}

/// Asserts that all stages of two runs are equal within a tolerance: to the bit if it is 0.
pub(crate) fn assert_same(actual: &Output, expected: &Output, tolerance: f32) {
    if tolerance <= 0.0 {
        assert!(actual == expected, "the values differ");
        return;
    }
    assert_eq!(actual.trace.len(), expected.trace.len());
    for (actual, expected) in actual.trace.iter().zip(&expected.trace) {
        assert_eq!(actual.name, expected.name);
        assert_close(&actual.name, &actual.values, &expected.values, tolerance);
    }
}

/// Switches between no adapter, one and another, and compares every image with the first of its kind.
pub(crate) fn switching_leaves_no_trace(pipeline: &mut dyn Pipeline, switches: usize) {
    let (case, reference) = case("two");
    let with = |name: Option<&str>| {
        let adapters = name.map(|name| AdapterUse {
            adapter: adapter(name),
            scale: 1.0,
        });
        let job = job(&case, &reference, adapters.into_iter().collect());
        Job {
            size: Size::square(16),
            ..job
        }
    };
    let (base, first, second) = (with(None), with(Some("twelve")), with(Some("modulation")));
    let expected = [&base, &first, &second].map(|job| generate(pipeline, job.clone()));
    for (index, output) in expected.iter().enumerate() {
        let others = expected.iter().skip(index + 1);
        let mut others = others.filter(|other| other.images == output.images);
        assert!(others.next().is_none(), "two of the images are the same");
    }
    assert!(
        generate(pipeline, base.clone()) == expected[0],
        "the base after two adapters"
    );
    for index in 0..switches {
        let (job, expected) = [(&first, &expected[1]), (&second, &expected[2])][index % 2];
        assert!(
            &generate(pipeline, job.clone()) == expected,
            "switch {index}"
        );
    }
    assert!(
        generate(pipeline, base) == expected[0],
        "the base after {switches} switches"
    );
}

/// A small generator of random numbers (xorshift64), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, self.below(index + 1));
        }
    }
}
