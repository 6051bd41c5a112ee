//! The tables of `kiln bench` and `kiln compare`, from fixed figures.

use kiln::bench::{BenchReport, Measurement, Run, Workload};
use kiln::compare::{
    CompareReport, CompareSettings, Comparison, ImageBound, Recording, RunReport, StageCosts,
    Tolerance,
};
use kiln::measure::Cost;
use kiln::request::{GenerationParams, GenerationRequest, Limits};
use kiln_models::families::qwen_image::TEMPLATE;
use kiln_models::flops::FlopCount;
use kiln_models::job::{RgbImage, TraceTensor};
use kiln_models::loading::ModelDType;
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::{ImageSizes, ModelDevice, ModelInfo};
use kiln_models::step_cache::StepCounts;

use crate::snapshot::assert_snapshot;

fn request() -> GenerationRequest {
    let params = GenerationParams {
        prompt: "a cat".to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        height: Some(32),
        width: Some(48),
        num_inference_steps: Some(2),
        seed: Some(7),
        ..GenerationParams::default()
    };
    GenerationRequest::new(params, &Limits::for_any_model(), NoiseGenerator::Cpu).unwrap()
}

fn cost(seconds: f64) -> Cost {
    Cost {
        seconds,
        memory_in_use: Some(3 << 30),
        memory_reserved: None,
        memory_peak: Some(5 << 30),
    }
}

#[test]
fn a_benchmark() {
    let info = ModelInfo {
        sizes: ImageSizes {
            multiple: 16,
            max_side: 4096,
            default_side: 1024,
        },
        vocab_size: 100,
        backend: "cuda",
        devices: vec![ModelDevice {
            index: 0,
            name: "GPU".to_owned(),
        }],
        dtype: "bf16",
    };
    let workload = Workload {
        request: request(),
        prompt_tokens: 9,
        template: &TEMPLATE,
    };
    let operations = FlopCount {
        encode: 1_000_000_000_000,
        modulation: 7,
        step: 2_000_000_000_000,
        denoise: 4_000_000_000_000,
        decode: 500_000_000_000,
    };
    let run = |seconds: f64| Run {
        encode: seconds,
        steps: vec![2.0 * seconds, 3.0 * seconds],
        counts: StepCounts {
            computed: 2,
            ..StepCounts::default()
        },
        decode: 0.5,
        total: 6.0 * seconds + 0.5,
        peak_memory_bytes: Some(7 << 30),
    };
    let measurement = Measurement {
        load: cost(12.5),
        warm_up: run(4.0),
        runs: vec![run(1.0), run(1.5), run(1.25)],
    };
    for (name, peak) in [("bench", None), ("bench-peak", Some(4.0))] {
        let model = "a model".to_owned();
        let report = BenchReport::new(
            model,
            &info,
            &workload,
            operations,
            measurement.clone(),
            peak,
        );
        assert_snapshot(name, &report.to_string());
    }
}

fn recording(name: &str, latents: f32, pixel: u8) -> Recording {
    let stage = |name: &str, values: &[f32]| TraceTensor {
        name: name.to_owned(),
        shape: vec![1, values.len()],
        values: values.to_vec(),
    };
    Recording {
        name: name.to_owned(),
        trace: vec![
            stage("prompt_embeds", &[1.0, -2.0]),
            stage("initial_noise", &[0.5, -0.25]),
            stage("latents_step0", &[latents, 4.0]),
            stage("latents_step1", &[2.0 * latents, 4.0]),
            stage("image_float", &[f32::from(pixel) / 255.0, 0.5, 0.5]),
        ],
        image: RgbImage {
            height: 1,
            width: 1,
            pixels: vec![pixel, 128, 128],
        },
    }
}

#[test]
fn a_comparison() {
    let tolerance = Tolerance {
        max_relative: 1e-3,
        image: ImageBound::EqualShare(0.999),
    };
    let reference = recording("flex", 1.0, 64);
    let compare = |other: &Recording| Comparison::new(&reference, other, tolerance).unwrap();
    let run = |name: &str| RunReport {
        name: name.to_owned(),
        device: format!("{name}:0 (a device)"),
        costs: StageCosts {
            load: cost(2.0),
            start: cost(0.5),
            steps: vec![cost(1.5), cost(0.75)],
            finish: cost(0.25),
        },
    };
    let report = CompareReport {
        kiln: "0.1.0",
        settings: CompareSettings::new("demo", ModelDType::F32, &request()),
        tolerance,
        reference: "flex".to_owned(),
        runs: ["flex", "ndarray", "wgpu"].map(run).into(),
        comparisons: vec![
            compare(&recording("ndarray", 1.000_01, 64)),
            compare(&recording("wgpu", 1.5, 70)),
        ],
        reference_image: reference.image.clone(),
    };
    assert_snapshot("compare", &report.summary());
}
