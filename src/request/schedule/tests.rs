//! The order of the sources of a schedule, conflicts, warnings, and the adapters of a request.

use std::sync::LazyLock;

use kiln_models::noise::NoiseGenerator;
use kiln_models::sampling::{SchedulerConfig, TimeShift};
use kiln_models::step_cache::StepCounts;
use serde_json::json;

use super::super::{
    AdapterInfo, Catalogue, GenerationRequest, GivenAdapter, header_recipe, sidecar_recipe,
};
use super::*;

/// The scheduler of Qwen-Image.
fn scheduler() -> SchedulerConfig {
    SchedulerConfig {
        num_train_timesteps: 1000,
        shift: 1.0,
        use_dynamic_shifting: true,
        base_shift: 0.5,
        max_shift: 0.9,
        base_image_seq_len: 256,
        max_image_seq_len: 8192,
        shift_terminal: Some(0.02),
        time_shift_type: TimeShift::Exponential,
        stochastic_sampling: false,
    }
}

fn adapter(name: &str, rank: usize, recipe: Option<(Recipe, ScheduleOrigin)>) -> AdapterInfo {
    AdapterInfo {
        name: name.to_owned(),
        recipe,
        modules: 24,
        rank: Some(rank),
        bytes: 0,
        hash: format!("{name}-hash"),
    }
}

static LIMITS: LazyLock<Limits> = LazyLock::new(|| {
    let named = |name| Some((named_recipe(name).unwrap(), ScheduleOrigin::KnownName));
    let sidecar = |json| {
        let recipe = sidecar_recipe(json).unwrap().unwrap();
        Some((recipe, ScheduleOrigin::Sidecar))
    };
    let header = header_recipe(
        &[("base_schedule".to_owned(), "[0.9, 0.5, 0.0]".to_owned())]
            .into_iter()
            .collect(),
    );
    let header = header.unwrap().map(|it| (it, ScheduleOrigin::Header));
    let mut limits = Limits::for_any_model();
    limits.sizes.multiple = 16;
    limits.scheduler = Some(scheduler());
    limits.adapters = Catalogue::new([
        adapter("lightning", 64, named("lightning")),
        adapter(
            "lightning8",
            64,
            sidecar(r#"{"steps": 8, "shift": 3, "true_cfg_scale": 1}"#),
        ),
        adapter(
            "twin",
            64,
            sidecar(r#"{"steps": 4, "shift": 3, "true_cfg_scale": 1, "name": "x"}"#),
        ),
        adapter("distill", 64, named("distill")),
        adapter("twinflow", 64, named("twinflow")),
        adapter("list", 64, header),
        adapter("scale", 8, sidecar(r#"{"true_cfg_scale": 2.5}"#)),
        adapter("style", 256, None),
        adapter("huge", 512, None),
    ]);
    limits
});

/// A request with the keys of the images API, and `lora` as pairs of name and scale.
fn params(body: &Value) -> GenerationParams {
    let number = |key: &str| body[key].as_f64();
    let adapters = body["lora"].as_array().into_iter().flatten();
    let adapters = adapters.map(|entry| match entry.as_str() {
        Some(name) => GivenAdapter {
            name: name.to_owned(),
            scale: None,
        },
        None => GivenAdapter {
            name: entry[0].as_str().unwrap().to_owned(),
            scale: Some(entry[1].as_f64().unwrap_or(f64::NAN)),
        },
    });
    GenerationParams {
        prompt: "a fox".to_owned(),
        negative_prompt: body["negative_prompt"].as_str().map(str::to_owned),
        true_cfg_scale: number("true_cfg_scale"),
        num_inference_steps: number("steps").map(|steps| steps as i128),
        shift: number("shift"),
        sigmas: serde_json::from_value(body["sigmas"].clone()).unwrap(),
        schedule: GivenSchedule::from_json(&body["schedule"]).unwrap(),
        adapters: adapters.collect(),
        ..GenerationParams::default()
    }
}

fn check_with(body: &Value, limits: &Limits) -> Result<GenerationRequest, InvalidRequest> {
    GenerationRequest::new(params(body), limits, NoiseGenerator::Cpu)
}

fn check(body: &Value) -> GenerationRequest {
    check_with(body, &LIMITS).unwrap_or_else(|error| panic!("{body}: {error}"))
}

fn refused(body: &Value) -> (&'static str, String) {
    let error = check_with(body, &LIMITS).expect_err(&body.to_string());
    (error.param(), error.to_string())
}

/// A checked request in short: steps, scale, origin, name and noise levels.
fn used(body: &Value) -> (usize, f64, &'static str, Option<String>, Vec<f32>) {
    let request = check(body);
    let RequestSchedule {
        origin,
        name,
        sigmas,
        ..
    } = request.schedule;
    (
        request.sampling.steps,
        request.true_cfg_scale,
        origin.name(),
        name,
        sigmas,
    )
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{found:?}");
    let mut pairs = found.iter().zip(expected);
    assert!(
        pairs.all(|(a, b)| (a - b).abs() < 1e-6),
        "{found:?} {expected:?}"
    );
}

#[test]
fn the_first_source_that_has_a_value_gives_it() {
    let four = [1.0, 0.9, 0.75, 0.5];
    let text = |name: &str| Some(name.to_owned());
    let (steps, scale, origin, name, sigmas) = used(&json!({}));
    assert_eq!((steps, scale, origin, name), (50, 4.0, "model", None));
    assert!((sigmas[49] - 0.02).abs() < 1e-6);

    for (body, expected, levels) in [
        (
            json!({"lora": ["lightning"]}),
            (4, 1.0, "known_name", text("lightning")),
            &four[..],
        ),
        (
            json!({"lora": ["style", "lightning"]}),
            (4, 1.0, "known_name", text("lightning")),
            &four,
        ),
        (
            json!({"lora": ["twin"]}),
            (4, 1.0, "sidecar", text("x")),
            &four,
        ),
        (
            json!({"lora": ["list"]}),
            (2, 4.0, "header", text("base_schedule")),
            &[0.9, 0.5],
        ),
        (
            json!({"lora": ["lightning", "twin"]}),
            (4, 1.0, "known_name", text("lightning")),
            &four,
        ),
        // What the request has comes first, value by value.
        (
            json!({"lora": ["lightning"], "steps": 2}),
            (2, 1.0, "known_name", text("lightning")),
            &[1.0, 0.75],
        ),
        (
            json!({"lora": ["lightning"], "true_cfg_scale": 3}),
            (4, 3.0, "known_name", text("lightning")),
            &four,
        ),
        (
            json!({"lora": ["lightning"], "shift": 1, "steps": 2}),
            (2, 1.0, "request", None),
            &[1.0, 0.5],
        ),
        (
            json!({"lora": ["lightning"], "sigmas": [1, 0.3, 0]}),
            (2, 1.0, "request", None),
            &[1.0, 0.3],
        ),
        (
            json!({"lora": ["twinflow"], "sigmas": [0.8]}),
            (1, 1.0, "request", None),
            &[0.8],
        ),
        (
            json!({"sigmas": [1, 0.9, 0.75, 0.5]}),
            (4, 4.0, "request", None),
            &four,
        ),
        (
            json!({"sigmas": [0.5], "steps": 1}),
            (1, 4.0, "request", None),
            &[0.5],
        ),
        (
            json!({"schedule": "lightning"}),
            (4, 1.0, "request", text("lightning")),
            &four,
        ),
        (
            json!({"schedule": " Lightning ", "steps": 2}),
            (2, 1.0, "request", text("lightning")),
            &[1.0, 0.75],
        ),
        (
            json!({"schedule": "lightning", "lora": ["lightning8"], "steps": 4}),
            (4, 1.0, "request", text("lightning")),
            &four,
        ),
        (
            json!({"schedule": {"shift": 1}, "steps": 2}),
            (2, 4.0, "request", None),
            &[1.0, 0.5],
        ),
        // An adapter of scale 0 has no say.
        (
            json!({"lora": [["lightning", 0]], "sigmas": [1]}),
            (1, 4.0, "request", None),
            &[1.0],
        ),
    ] {
        let (steps, scale, origin, name, sigmas) = used(&body);
        assert_eq!((steps, scale, origin, name), expected, "{body}");
        assert_close(&sigmas, levels);
    }
}

#[test]
fn a_recipe_need_not_have_every_value() {
    let text = |name: &str| Some(name.to_owned());
    // The steps of an adapter come before those of the recipe that the request names.
    assert_eq!(
        used(&json!({"schedule": "lightning", "lora": ["lightning8"]})).0,
        8
    );
    assert_eq!(used(&json!({"lora": [["lightning", 0]]})).0, 50);
    // A recipe that only has a guidance scale leaves the schedule to the model.
    let (steps, scale, origin, ..) = used(&json!({"lora": ["scale"]}));
    assert_eq!((steps, scale, origin), (50, 2.5, "model"));
    // A recipe may keep the model's levels.
    let (steps, scale, origin, name, sigmas) = used(&json!({"lora": ["distill"]}));
    assert_eq!(
        (steps, scale, origin, name),
        (15, 1.0, "known_name", text("distill"))
    );
    assert!((sigmas[14] - 0.02).abs() < 1e-6);
    let dmd2 = used(&json!({"schedule": "dmd2-3step"}));
    assert_eq!(dmd2.0, 3);
    assert!((dmd2.4[1] - 0.6325).abs() < 5e-5 && (dmd2.4[2] - 0.02).abs() < 1e-6);
}

#[test]
fn the_sampler_is_that_of_the_request_the_recipe_or_the_model() {
    let sampler = |body: Value| {
        let request = check(&body);
        (request.sampling.stochastic, request.schedule.stochastic)
    };
    assert_eq!(sampler(json!({})), (None, false));
    assert_eq!(sampler(json!({"shift": 3})), (None, false));
    assert_eq!(
        sampler(json!({"lora": ["lightning"]})),
        (Some(false), false)
    );
    assert_eq!(sampler(json!({"lora": ["twinflow"]})), (Some(true), true));
    assert_eq!(
        sampler(json!({"schedule": "twinflow-2step"})),
        (Some(true), true)
    );
    let asked = json!({"schedule": {"stochastic": true}, "lora": ["lightning"]});
    assert_eq!(sampler(asked.clone()), (Some(true), true));
    assert_eq!(used(&asked).0, 4);
    let stochastic = Limits {
        scheduler: Some(SchedulerConfig {
            stochastic_sampling: true,
            ..scheduler()
        }),
        ..LIMITS.clone()
    };
    let request = check_with(&json!({}), &stochastic).unwrap();
    assert!(request.schedule.stochastic);
    let request = check_with(&json!({"schedule": {"stochastic": false}}), &stochastic).unwrap();
    assert!(!request.schedule.stochastic);
}

#[test]
fn a_fused_model_gives_its_own_recipe() {
    let fused = Limits {
        scheduler: Some(SchedulerConfig {
            base_shift: 3_f64.ln(),
            max_shift: 3_f64.ln(),
            shift_terminal: None,
            ..scheduler()
        }),
        model_recipe: Some(super::super::fused_lightning("tiny-8steps")),
        ..LIMITS.clone()
    };
    assert!(fused.scheduler.as_ref().unwrap().is_lightning());
    assert!(!scheduler().is_lightning());
    let used = |body| check_with(&body, &fused).unwrap();
    let request = used(json!({"negative_prompt": "blurry"}));
    assert_eq!((request.sampling.steps, request.true_cfg_scale), (8, 1.0));
    assert_eq!(request.guidance(), None);
    assert_eq!(request.schedule.origin, ScheduleOrigin::Model);
    assert_eq!(request.schedule.name.as_deref(), Some("lightning"));
    assert_close(&request.schedule.sigmas[..3], &[1.0, 0.954_545_5, 0.9]);
    assert!(request.warnings.is_empty());
    let request =
        used(json!({"negative_prompt": "blurry", "true_cfg_scale": 4, "steps": 50, "shift": 2}));
    assert_eq!(request.sampling.steps, 50);
    assert!(request.guidance().is_some());
    let expected = [
        "shift replaces the noise levels of recipe lightning of the model",
        "num_inference_steps is 50, but recipe lightning of the model is for 8",
        "true_cfg_scale is 4, but recipe lightning of the model is for 1, which is no guidance",
    ];
    assert_eq!(request.warnings, expected);
    // The same levels under another name are no conflict.
    assert!(used(json!({"shift": 3})).warnings.is_empty());
    // An adapter's recipe comes before the model's.
    let request = used(json!({"lora": ["list"]}));
    assert_eq!((request.sampling.steps, request.true_cfg_scale), (2, 1.0));
    assert_eq!(request.schedule.origin, ScheduleOrigin::Header);
}

#[test]
fn values_that_do_not_fit_the_recipe_are_kept_and_named() {
    let warnings = |body: Value| check(&body).warnings;
    assert!(warnings(json!({"lora": ["lightning"]})).is_empty());
    assert!(warnings(json!({"lora": ["lightning"], "steps": 4, "true_cfg_scale": 1})).is_empty());
    // Without a negative prompt there is no guidance, whatever the scale.
    assert!(warnings(json!({"lora": ["lightning"], "true_cfg_scale": 4})).is_empty());
    assert!(warnings(json!({"lora": ["lightning"], "negative_prompt": "x"})).is_empty());
    assert!(warnings(json!({"lora": ["lightning"], "sigmas": [1, 0.9, 0.75, 0.5]})).is_empty());
    let of = "recipe lightning of adapter \"lightning\"";
    for (body, expected) in [
        (
            json!({"steps": 50}),
            format!("num_inference_steps is 50, but {of} is for 4"),
        ),
        (
            json!({"true_cfg_scale": 4, "negative_prompt": ""}),
            format!("true_cfg_scale is 4, but {of} is for 1, which is no guidance"),
        ),
        (
            json!({"shift": 5}),
            format!("shift replaces the noise levels of {of}"),
        ),
        (
            json!({"sigmas": [1, 0.5]}),
            format!("sigmas replaces the noise levels of {of}"),
        ),
        (
            json!({"schedule": "model"}),
            format!("schedule replaces the noise levels of {of}"),
        ),
    ] {
        let mut body = body;
        body["lora"] = json!(["lightning"]);
        assert_eq!(warnings(body.clone()), [expected], "{body}");
    }
    let scale = json!({"lora": ["scale"], "true_cfg_scale": 4, "negative_prompt": ""});
    let expected = "true_cfg_scale is 4, but recipe custom of adapter \"scale\" is for 2.5";
    assert_eq!(warnings(scale), [expected]);
}

#[test]
fn conflicts_name_both_sides() {
    let levels = "both set the noise levels: give only one of them";
    for (body, param, message) in [
        (json!({"shift": 3, "sigmas": [1]}), "sigmas", format!("shift and sigmas {levels}")),
        (json!({"shift": 3, "schedule": "model"}), "schedule", format!("shift and schedule {levels}")),
        (json!({"sigmas": [1], "schedule": "model"}), "schedule", format!("sigmas and schedule {levels}")),
        (
            json!({"sigmas": [1, 0.5], "steps": 4}),
            "num_inference_steps",
            "num_inference_steps is 4, but sigmas has 2 noise levels, one for each step: leave \
             num_inference_steps out, or give other noise levels"
                .to_owned(),
        ),
        (
            json!({"lora": ["twinflow"], "steps": 8}),
            "num_inference_steps",
            "num_inference_steps is 8, but recipe twinflow of adapter \"twinflow\" has 4 noise levels, \
             one for each step: leave num_inference_steps out, or give other noise levels"
                .to_owned(),
        ),
        (
            json!({"lora": ["lightning", "style", "lightning8"]}),
            "adapters",
            "adapters \"lightning\" and \"lightning8\" have different recipes, lightning and custom: use \
             one of them, or give the noise levels with shift, sigmas or schedule"
                .to_owned(),
        ),
        (json!({"sigmas": [0.5, 0.6]}), "sigmas", "sigmas must fall from step to step, got 0.6 after 0.5".to_owned()),
        (json!({"sigmas": [1.1]}), "sigmas", "sigmas must be above 0 and at most 1, got 1.1".to_owned()),
        (json!({"shift": 0}), "shift", "shift must be from 0.001 to 100, got 0".to_owned()),
    ] {
        assert_eq!(refused(&body), (param, message), "{body}");
    }
    let limits = Limits {
        max_steps: 3,
        ..LIMITS.clone()
    };
    for body in [
        json!({"sigmas": [1, 0.9, 0.75, 0.5]}),
        json!({"schedule": {"sigmas": [1, 0.9, 0.75, 0.5]}}),
        json!({"schedule": "lightning"}),
    ] {
        assert!(check_with(&body, &limits).is_err(), "{body}");
    }
    // A request that gives the schedule itself may have adapters with different recipes.
    let body = json!({"lora": ["lightning", "lightning8"], "schedule": "lightning"});
    let request = check(&body);
    assert_eq!((request.sampling.steps, request.true_cfg_scale), (4, 1.0));
    let expected = "adapters \"lightning\" and \"lightning8\" have different recipes: what the request leaves \
                    out is that of \"lightning\"";
    assert_eq!(request.warnings, [expected]);
}

#[test]
fn schedules_are_read_from_names_and_objects() {
    let read = |value: Value| GivenSchedule::from_json(&value);
    for nothing in [json!(null), json!(""), json!("  ")] {
        assert_eq!(read(nothing), Ok(None));
    }
    let levels = GivenSchedule::Levels {
        levels: Some(NoiseLevels::Shifted {
            shift: 2.5,
            terminal: Some(0.02),
        }),
        stochastic: Some(true),
    };
    let object = json!({"shift": 2.5, "terminal": 0.02, "stochastic": true, "sigmas": null});
    assert_eq!(read(object), Ok(Some(levels)));
    for (value, param, message) in [
        (
            json!("lighting"),
            "schedule",
            "must be one of model, lightning, wuli-turbo, dmd2-3step, distill, twinflow, twinflow-2step, or \
             an object with shift and terminal, sigmas, stochastic, got \"lighting\"",
        ),
        (json!(3), "schedule", "must be one of model"),
        (
            json!({}),
            "schedule",
            "needs shift, sigmas or stochastic in an object",
        ),
        (
            json!({"shift": 1000}),
            "schedule.shift",
            "must be from 0.001 to 100, got 1000",
        ),
        (
            json!({"terminal": 0.02}),
            "schedule.terminal",
            "is the last noise level of a shift",
        ),
        (
            json!({"shift": 3, "sigmas": [1]}),
            "schedule.sigmas",
            "and shift both set the noise levels",
        ),
        (
            json!({"sigmas": [1, 2]}),
            "schedule.sigmas",
            "must be above 0 and at most 1, got 2",
        ),
        (json!({"sigmas": "1"}), "schedule.sigmas", "invalid type"),
        (json!({"mu": 1}), "schedule.mu", "unknown field `mu`"),
        (
            json!({"stochastic": 1}),
            "schedule.stochastic",
            "invalid type",
        ),
    ] {
        let error = read(value.clone()).unwrap_err();
        assert_eq!(error.param, param, "{value}");
        assert!(error.message.starts_with(message), "{value}: {error}");
    }
}

#[test]
fn adapters_are_looked_up_and_bounded() {
    let request = check(&json!({"lora": [["style", 0.5], ["lightning", -8], ["huge", 0]]}));
    let chosen = request.adapters.iter();
    let chosen: Vec<_> = chosen.map(|it| (it.info.name.as_str(), it.scale)).collect();
    assert_eq!(chosen, [("style", 0.5), ("lightning", -8.0)]);
    let nine: Vec<String> = (0..9).map(|index| format!("a{index}")).collect();
    for (lora, message) in [
        (
            json!(["none"]),
            "there is no adapter \"none\": available are distill, huge, lightning, ",
        ),
        (json!([["none", 0]]), "there is no adapter \"none\""),
        (json!(["../style"]), "there is no adapter \"../style\""),
        (
            json!(["style", ["style", 0]]),
            "adapter \"style\" is in the request twice: give it once",
        ),
        (
            json!([["style", null]]),
            "the scale of adapter \"style\" must be from -8 to 8, got NaN",
        ),
        (
            json!([["style", 8.1]]),
            "the scale of adapter \"style\" must be from -8 to 8, got 8.1",
        ),
        (
            json!(["huge", "scale"]),
            "the ranks of a request's adapters may be 512 together at most, got 520",
        ),
        (json!(nine), "a request may have 8 adapters at most, got 9"),
    ] {
        let (param, error) = refused(&json!({"lora": lora}));
        assert_eq!(param, "adapters", "{error}");
        assert!(error.starts_with(message), "{error}");
    }
    let none = Limits::for_any_model();
    let error = check_with(&json!({"lora": ["x"]}), &none).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no adapter \"x\": none is available"
    );
    let many = (0..25).map(|index| adapter(&format!("a{index:02}"), 1, None));
    let many = Limits {
        adapters: Catalogue::new(many),
        ..none
    };
    let error = check_with(&json!({"lora": ["x"]}), &many).unwrap_err();
    assert!(
        error.to_string().ends_with("a18, a19 and 5 more"),
        "{error}"
    );
}

#[test]
fn the_answer_has_the_schedule_as_json() {
    let schedule = |body| serde_json::to_value(check(&body).schedule).unwrap();
    assert_eq!(
        schedule(json!({"lora": ["lightning8"], "steps": 4})),
        json!({
            "origin": "sidecar", "name": "custom", "shift": 3.0, "terminal": null,
            "sigmas": [1.0_f32, 0.9_f32, 0.75_f32, 0.5_f32],
        })
    );
    assert_eq!(
        schedule(json!({"schedule": {"sigmas": [0.5], "stochastic": true}})),
        json!({
            "origin": "request", "name": null, "shift": null, "terminal": null, "stochastic": true,
            "sigmas": [0.5],
        })
    );
}

#[test]
fn metadata_names_the_schedule_and_the_adapters() {
    let text = |body| {
        let text = check(&body).metadata_text("m", 0, None, StepCounts::default());
        text.split_once("RNG: CPU, ").unwrap().1.to_owned()
    };
    let version = format!("Version: kiln {}", crate::version::TAG);
    assert_eq!(text(json!({})), version);
    assert_eq!(text(json!({"shift": 3})), format!("Shift: 3, {version}"));
    assert_eq!(
        text(json!({"sigmas": [1, 0.5]})),
        format!("Sigmas: \"1, 0.5\", {version}")
    );
    assert_eq!(
        text(json!({"lora": [["lightning", 0.8]]})),
        format!(
            "Schedule: lightning (known_name), Shift: 3, Lora: lightning:0.8, Lora hashes: \"lightning: \
             lightning-hash\", {version}"
        )
    );
    assert_eq!(
        text(json!({"lora": ["style", "scale"], "schedule": "dmd2-3step"})),
        format!(
            "Schedule: dmd2-3step (request), Shift: 2.5, Shift terminal: 0.02, Lora: \"style:1, scale:1\", \
             Lora hashes: \"style: style-hash, scale: scale-hash\", {version}"
        )
    );
    let stochastic = check(&json!({"schedule": "twinflow"}));
    let stochastic = stochastic.metadata_text("m", 0, None, StepCounts::default());
    assert!(
        stochastic.contains("Sampler: Euler stochastic, "),
        "{stochastic}"
    );
}
