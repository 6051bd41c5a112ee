//! Recipes of sidecars and headers.

use serde_json::json;

use super::*;

fn read(json: &serde_json::Value) -> Recipe {
    sidecar_recipe(&json.to_string()).unwrap().unwrap()
}

fn refused(json: &serde_json::Value) -> String {
    sidecar_recipe(&json.to_string()).unwrap_err()
}

#[test]
fn every_field_of_a_sidecar_is_read() {
    let recipe = read(&json!({
        "name": "my few steps", "steps": 3.0, "shift": 2.5, "terminal": 0.02, "true_cfg_scale": 1,
        "stochastic": true, "sigmas": null,
    }));
    let expected = Recipe {
        name: "my few steps".to_owned(),
        steps: Some(3),
        levels: Some(NoiseLevels::Shifted {
            shift: 2.5,
            terminal: Some(0.02),
        }),
        stochastic: true,
        true_cfg_scale: Some(1.0),
    };
    assert_eq!(recipe, expected);
    let recipe = read(&json!({"sigmas": [1, 0.7, 0.4, 0]}));
    assert_eq!((recipe.name.as_str(), recipe.steps), ("custom", Some(3)));
    let sigmas = NoiseLevels::Sigmas([1.0, 0.7, 0.4].into());
    assert_eq!(recipe.levels, Some(sigmas));
    assert_eq!(read(&json!({"steps": 4})).levels, None);
    let shift = read(&json!({"shift": 3, "terminal": 0}));
    let levels = NoiseLevels::Shifted {
        shift: 3.0,
        terminal: None,
    };
    assert_eq!(shift.levels, Some(levels));
}

#[test]
fn a_sidecar_that_says_nothing_is_no_recipe() {
    for text in ["null", "{}", r#"{"steps": null}"#, r#"{"name": "x"}"#] {
        assert_eq!(sidecar_recipe(text), Ok(None), "{text}");
    }
}

#[test]
fn an_invalid_sidecar_is_refused_with_its_field() {
    for (sidecar, message) in [
        (
            json!({"step": 4}),
            "unknown field `step`, expected one of `name`, `steps`",
        ),
        (json!({"steps": 0}), "steps must be from 1 to 1000, got 0"),
        (
            json!({"steps": 1001}),
            "steps must be from 1 to 1000, got 1001",
        ),
        (
            json!({"shift": 0}),
            "shift must be from 0.001 to 100, got 0",
        ),
        (
            json!({"shift": 3, "terminal": 1}),
            "terminal must be from 0 to below 1, got 1",
        ),
        (
            json!({"terminal": 0.02}),
            "terminal is the last noise level of a shift: give shift as well",
        ),
        (
            json!({"sigmas": [1, 0.5], "terminal": 0.1}),
            "terminal is the last noise level",
        ),
        (
            json!({"shift": 3, "sigmas": [1]}),
            "sigmas and shift both set the noise levels",
        ),
        (json!({"sigmas": []}), "sigmas has no noise level"),
        (json!({"sigmas": [0]}), "sigmas has no noise level"),
        (
            json!({"sigmas": [0.5, 0.5]}),
            "sigmas must fall from step to step, got 0.5 after 0.5",
        ),
        (
            json!({"sigmas": [1.5, 0.5]}),
            "sigmas must be above 0 and at most 1, got 1.5",
        ),
        (
            json!({"sigmas": [0.5, -0.5]}),
            "sigmas must be above 0 and at most 1, got -0.5",
        ),
        (
            json!({"sigmas": [0.5, 0, 0]}),
            "sigmas must be above 0 and at most 1, got 0",
        ),
        (
            json!({"sigmas": [0.5, 1e-50]}),
            "sigmas must be above 0 and at most 1, got 0.0",
        ),
        (
            json!({"sigmas": [1, 0.5], "steps": 3}),
            "steps is 3, but sigmas has 2 noise levels",
        ),
        (
            json!({"true_cfg_scale": 21}),
            "true_cfg_scale must be from 0 to 20, got 21",
        ),
        (
            json!({"name": "", "steps": 4}),
            "name must have from 1 to 64 bytes",
        ),
        (
            json!({"name": "a\nb", "steps": 4}),
            "name must have from 1 to 64 bytes",
        ),
        (json!({"steps": "4"}), "invalid type: string"),
        (json!([4]), "invalid"),
    ] {
        let error = refused(&sidecar);
        assert!(error.starts_with(message), "{sidecar}: {error}");
    }
    assert!(sidecar_recipe("{").is_err());
}

#[test]
fn headers_have_kilns_own_key_or_that_of_vllm_omni() {
    let read = |entries: &[(&str, &str)]| {
        let entries = entries.iter();
        let entries = entries.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        header_recipe(&entries.collect())
    };
    assert_eq!(read(&[("format", "pt")]), Ok(None));
    let base = ("base_schedule", "[1.0, 0.7, 0.4, 0.15, 0.0]");
    let recipe = read(&[base]).unwrap().unwrap();
    assert_eq!(
        (recipe.name.as_str(), recipe.steps),
        ("base_schedule", Some(4))
    );
    let sigmas = NoiseLevels::Sigmas([1.0, 0.7, 0.4, 0.15].into());
    assert_eq!(recipe.levels, Some(sigmas));
    let own = ("kiln.schedule", r#"{"steps": 4, "shift": 3}"#);
    assert_eq!(read(&[base, own]).unwrap().unwrap().steps, Some(4));
    for (entry, message) in [
        (
            ("kiln.schedule", r#"{"x": 1}"#),
            "`kiln.schedule` of the header: unknown field `x`",
        ),
        (
            ("base_schedule", "1.0"),
            "`base_schedule` of the header: invalid type",
        ),
        (
            ("base_schedule", "[0.5, 0.7]"),
            "`base_schedule` of the header: sigmas must fall",
        ),
    ] {
        let error = read(&[entry]).unwrap_err();
        assert!(error.starts_with(message), "{error}");
    }
}
