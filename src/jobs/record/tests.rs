//! Requests and jobs as JSON.

use std::cell::Cell;
use std::sync::Arc;

use kiln_models::job::NoiseLevels;
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::ImageSizes;
use kiln_models::sampling::{SchedulerConfig, TimeShift};
use kiln_models::step_cache::QWEN_IMAGE_RATIOS;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use crate::image::ImageFormat;
use crate::request::{
    AdapterInfo, CacheChoice, Catalogue, ChosenAdapter, GenerationParams, GivenAdapter,
    GivenSchedule, Limits, Recipe, ScheduleOrigin, StepCaches,
};

use super::*;

/// A finite number, of any size and with all of its bits.
fn number() -> impl Strategy<Value = f64> {
    use proptest::num::f64::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO
}

/// Noise levels that fall from at most 1.
fn falling() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(0.001..1.0f64, 1..40).prop_map(|mut sigmas| {
        sigmas.sort_by(|a, b| b.total_cmp(a));
        sigmas.dedup();
        sigmas
    })
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let levels = prop_oneof![
        Just(None),
        Just(Some(NoiseLevels::Model)),
        (0.001..100.0f64, proptest::option::of(0.0..0.9f64))
            .prop_map(|(shift, terminal)| Some(NoiseLevels::Shifted { shift, terminal })),
        falling().prop_map(|levels| Some(NoiseLevels::Sigmas(levels.into()))),
    ];
    let (steps, scale) = (
        proptest::option::of(1..20usize),
        proptest::option::of(0.0..20.0f64),
    );
    (any::<String>(), steps, levels, any::<bool>(), scale).prop_map(
        |(name, steps, levels, stochastic, true_cfg_scale)| Recipe {
            name,
            steps,
            levels,
            stochastic,
            true_cfg_scale,
        },
    )
}

fn adapter(name: &str) -> impl Strategy<Value = AdapterInfo> + use<> {
    let name = name.to_owned();
    let origin = select(vec![
        ScheduleOrigin::Sidecar,
        ScheduleOrigin::Header,
        ScheduleOrigin::KnownName,
    ]);
    let recipe = proptest::option::of((recipe(), origin));
    let rank = proptest::option::of(1..64usize);
    (recipe, any::<usize>(), rank, any::<u64>()).prop_map(move |(recipe, modules, rank, bytes)| {
        AdapterInfo {
            name: name.clone(),
            recipe,
            modules,
            rank,
            bytes,
            hash: format!("{bytes:x}"),
        }
    })
}

fn limits() -> impl Strategy<Value = Limits> {
    let merged = (adapter("merged"), number());
    let merged = merged.prop_map(|(info, scale)| ChosenAdapter {
        info: Arc::new(info),
        scale,
    });
    let scheduler = (any::<bool>(), 0.1..4.0f64).prop_map(|(dynamic, shift)| SchedulerConfig {
        num_train_timesteps: 1000,
        shift,
        use_dynamic_shifting: dynamic,
        base_shift: 0.5,
        max_shift: 0.9,
        base_image_seq_len: 256,
        max_image_seq_len: 8192,
        shift_terminal: Some(0.02),
        time_shift_type: TimeShift::Exponential,
        stochastic_sampling: false,
    });
    (
        adapter("one"),
        adapter("two"),
        proptest::option::weighted(0.3, merged),
        proptest::option::of(scheduler),
        any::<bool>(),
    )
        .prop_map(|(one, two, merged, scheduler, has_ratios)| Limits {
            adapters: Catalogue::new([one, two]),
            merged,
            scheduler,
            caches: StepCaches {
                default: CacheChoice::Auto,
                mag_ratios: has_ratios.then(|| QWEN_IMAGE_RATIOS.into()),
                blocks: Some(60),
            },
            ..Limits::for_sizes(ImageSizes {
                multiple: 16,
                max_side: 2048,
                default_side: 1024,
            })
        })
}

fn cache() -> impl Strategy<Value = Value> {
    prop_oneof![
        select(vec![
            "off", "balanced", "fast", "auto", "dbcache", "magcache"
        ])
        .prop_map(Value::from),
        (0.0..2.0f64, 0..2usize).prop_map(|(threshold, order)| json!({
            "mode": "dbcache", "residual_diff_threshold": threshold, "taylorseer_order": order,
            "enable_taylorseer": true, "max_cached_steps": 9,
        })),
        select(vec!["slow", "medium", "fast", "ultra"])
            .prop_map(|preset| json!({"mode": "dbcache", "scm_preset": preset})),
        (0.0..1.0f64, prop::collection::vec(0.5..1.5f64, 1..60)).prop_map(
            |(threshold, ratios)| json!({
                "mode": "magcache", "mag_threshold": threshold, "mag_ratios": ratios,
            })
        ),
    ]
}

/// The levels of a request: its `num_inference_steps`, `shift`, `sigmas` and `schedule`.
fn schedule() -> impl Strategy<Value = (Option<i128>, Option<f64>, Option<Vec<f64>>, Value)> {
    let steps = proptest::option::of(1..60i128);
    prop_oneof![
        steps
            .clone()
            .prop_map(|steps| (steps, None, None, Value::Null)),
        (steps.clone(), 0.001..100.0f64).prop_map(|(steps, shift)| (
            steps,
            Some(shift),
            None,
            Value::Null
        )),
        falling().prop_map(|sigmas| (None, None, Some(sigmas), Value::Null)),
        select(vec!["model", "lightning", "distill"]).prop_map(|name| (
            None,
            None,
            None,
            json!(name)
        )),
        (steps, 0.1..9.0f64, 0.0..0.5f64, any::<bool>()).prop_map(
            |(steps, shift, terminal, stochastic)| {
                let levels =
                    json!({"shift": shift, "terminal": terminal, "stochastic": stochastic});
                (steps, None, None, levels)
            }
        ),
    ]
}

fn params() -> impl Strategy<Value = GenerationParams> {
    let adapters = prop_oneof![
        3 => Just(vec![]),
        1 => Just(vec!["one"]),
        1 => Just(vec!["two", "one"]),
    ];
    let scale = proptest::option::of(-8.0..8.0f64);
    let text = (any::<String>(), proptest::option::of(any::<String>()));
    let size = (16..2048i128, 16..2048i128);
    let numbers = (
        proptest::option::of(0.0..20.0f64),
        proptest::option::of(any::<u64>()),
        proptest::option::of(0.0..1.0f64),
        1..3i128,
    );
    (text, size, numbers, schedule(), cache(), (adapters, scale)).prop_map(
        |(text, size, numbers, (steps, shift, sigmas, schedule), cache, (adapters, scale))| {
            let cache = CacheChoice::from_json(&cache).unwrap();
            let adapters = adapters.into_iter().map(|name| GivenAdapter {
                name: name.to_owned(),
                scale,
            });
            GenerationParams {
                prompt: text.0,
                negative_prompt: text.1,
                height: Some(size.0),
                width: Some(size.1),
                true_cfg_scale: numbers.0,
                seed: numbers.1.map(Into::into),
                cfg_gate_step: numbers.2,
                num_images: Some(numbers.3),
                num_inference_steps: steps,
                fallback_steps: None,
                shift,
                sigmas,
                schedule: GivenSchedule::from_json(&schedule).unwrap(),
                cache: cache.map(Into::into),
                adapters: adapters.collect(),
            }
        },
    )
}

fn stored(request: GenerationRequest) -> StoredRequest {
    StoredRequest {
        request,
        encoding: Encoding {
            format: ImageFormat::Webp,
            quality: 73,
        },
        model: "a/model".to_owned(),
    }
}

/// The value that its JSON is read as. Every bit must be the same: `Debug` tells apart what `==` does
/// not, such as 0 and -0.
fn assert_survives(request: StoredRequest) {
    let text = serde_json::to_string(&request).unwrap();
    let read: StoredRequest = serde_json::from_str(&text).unwrap();
    assert_eq!(read, request);
    assert_eq!(format!("{read:?}"), format!("{request:?}"));
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
}

#[test]
fn every_valid_request_survives_as_json_to_the_bit() {
    let valid = Cell::new(0);
    proptest!(ProptestConfig::with_cases(1000), |(params in params(), limits in limits())| {
        if let Ok(request) = GenerationRequest::new(params, &limits, NoiseGenerator::Cuda) {
            valid.set(valid.get() + 1);
            assert_survives(stored(request));
        }
    });
    assert!(
        valid.get() > 300,
        "only {} requests were valid",
        valid.get()
    );
}

#[test]
fn numbers_of_any_size_survive() {
    let limits = Limits::for_any_model();
    let request =
        GenerationRequest::new(GenerationParams::default(), &limits, NoiseGenerator::Cpu).unwrap();
    let values = (
        number(),
        number(),
        any::<u64>(),
        adapter("one"),
        any::<u32>(),
    );
    proptest!(|((first, second, seed, info, level) in values)| {
        let mut request = request.clone();
        request.true_cfg_scale = first;
        request.cfg_gate_step = Some(second);
        request.noise.seed = seed;
        let level = f32::from_bits(level);
        if level.is_finite() {
            request.schedule.sigmas.push(level);
        }
        request.schedule.shift = Some(second);
        let mut info = info;
        if let Some((recipe, _)) = &mut info.recipe {
            recipe.true_cfg_scale = Some(first);
            recipe.levels = Some(NoiseLevels::Sigmas([first, second].into()));
        }
        let info = Arc::new(info);
        request.merged = Some(ChosenAdapter { info: Arc::clone(&info), scale: first });
        request.adapters.push(ChosenAdapter { info, scale: second });
        assert_survives(stored(request));
    });
}

/// A store written by one version is read by the next one: fields that are added must have a default.
#[test]
fn a_stored_job_of_this_version_is_read() {
    let limits = Limits::for_any_model();
    let params = GenerationParams {
        seed: Some(7),
        ..GenerationParams::default()
    };
    let request = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu).unwrap();
    let job = NewJob {
        owner: Owner::anyone(),
        request: stored(request),
        idempotency: Some(IdempotencyKey::new("k", b"{}")),
        webhook: None,
        trace: None,
    };
    let job = job.into_stored("demo", 1_000);
    let written = serde_json::to_value(&job).unwrap();
    let expected: Value = serde_json::from_str(include_str!("stored_job.json")).unwrap();
    assert_eq!(written, expected, "{written:#}");
    assert_eq!(serde_json::from_value::<StoredJob>(expected).unwrap(), job);
}

#[test]
fn the_id_of_a_job_depends_on_its_owner_and_its_key() {
    let id = |owner: &Owner, key: &str| JobId::new(owner, Some(&IdempotencyKey::new(key, b"")));
    let (one, other) = (Owner::of_key("one"), Owner::of_key("other"));
    assert_eq!(id(&one, "a"), id(&one, "a"));
    assert_ne!(id(&one, "a"), id(&one, "b"));
    assert_ne!(id(&one, "a"), id(&other, "a"));
    assert_ne!(JobId::new(&one, None), JobId::new(&one, None));
    for id in [id(&one, "a"), JobId::new(&one, None)] {
        assert_eq!(JobId::parse(id.as_str()), Some(id));
    }
    for text in [
        "",
        "job-",
        "job-1",
        "job-00c0ffee00c0ffee00c0ffeg",
        "JOB-00c0ffee00c0ffee00c0ffee",
    ] {
        assert_eq!(JobId::parse(text), None, "{text}");
    }
}
