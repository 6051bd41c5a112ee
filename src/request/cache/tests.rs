//! Reading, writing and applying step caches.

use kiln_models::step_cache::{MaskPolicy, QWEN_IMAGE_RATIOS};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn read(value: &Value) -> CacheChoice {
    CacheChoice::from_json(value).unwrap().unwrap()
}

fn refused(value: &Value) -> String {
    CacheChoice::from_json(value).unwrap_err().to_string()
}

fn qwen_image() -> StepCaches {
    StepCaches {
        mag_ratios: Some(QWEN_IMAGE_RATIOS.into()),
        blocks: Some(60),
        ..StepCaches::default()
    }
}

/// The number of steps that a mask computes.
fn computed(policy: &CachePolicy) -> usize {
    match policy {
        CachePolicy::Mask(mask) => mask.iter().filter(|&&computed| computed).count(),
        other => panic!("no mask: {other:?}"),
    }
}

#[test]
fn names_are_read_in_any_case_and_nothing_is_absent() {
    for (text, choice) in [
        ("off", CacheChoice::Off),
        ("Balanced", CacheChoice::Balanced),
        (" FAST ", CacheChoice::Fast),
        ("auto", CacheChoice::Auto),
        ("dbcache", CacheChoice::DbCache(DbCacheChoice::default())),
        ("dbcache", read(&json!({"mode": "DBCache"}))),
        ("magcache", read(&json!({"mode": "magcache"}))),
    ] {
        assert_eq!(read(&json!(text)), choice, "{text}");
    }
    for value in [json!(null), json!(""), json!("  ")] {
        assert_eq!(CacheChoice::from_json(&value), Ok(None), "{value}");
    }
}

#[test]
fn all_settings_of_cache_dit_are_read() {
    let object = json!({
        "mode": "dbcache", "Fn_compute_blocks": 8, "Bn_compute_blocks": 2.0, "max_warmup_steps": 6,
        "max_cached_steps": 20, "max_continuous_cached_steps": -1, "residual_diff_threshold": 0.12,
        "enable_taylorseer": true, "taylorseer_order": 1, "scm_preset": null,
    });
    let expected = DbCache {
        fn_compute_blocks: 8,
        bn_compute_blocks: 2,
        max_warmup_steps: 6,
        max_cached_steps: Some(20),
        max_continuous_cached_steps: None,
        residual_diff_threshold: 0.12,
        taylorseer_order: 1,
        ..DbCache::default()
    };
    let CacheChoice::DbCache(choice) = read(&object) else {
        panic!("another cache")
    };
    assert_eq!(choice.settings, expected);
    assert_eq!(choice.mask, None);
    // As in SGLang, the order alone turns nothing on.
    let order = read(&json!({"mode": "dbcache", "taylorseer_order": 1}));
    assert_eq!(order, CacheChoice::DbCache(DbCacheChoice::default()));
}

#[test]
fn masks_are_read_under_the_names_of_all_three_programs() {
    let mask = |object: Value| match read(&object) {
        CacheChoice::DbCache(choice) => (choice.mask, choice.settings.steps_mask_policy),
        other => panic!("{other:?}"),
    };
    let preset = Some(StepsMask::Preset(ScmPreset::Fast));
    for object in [
        json!({"mode": "dbcache", "scm_preset": "Fast", "scm_policy": "static"}),
        json!({"mode": "dbcache", "scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}),
        json!({"mode": "dbcache", "scm_preset": "fast", "steps_computation_policy": "static"}),
    ] {
        assert_eq!(mask(object), (preset.clone(), MaskPolicy::Static));
    }
    let bins = Some(StepsMask::Bins {
        compute: vec![6, 1, 1],
        cache: vec![2, 3],
    });
    for object in [
        json!({"mode": "dbcache", "scm_compute_bins": [6, 1, 1], "scm_cache_bins": [2, 3]}),
        json!({"mode": "dbcache", "scm_compute_bins": "6, 1,1", "scm_cache_bins": "2,3"}),
    ] {
        assert_eq!(mask(object), (bins.clone(), MaskPolicy::Dynamic));
    }
    let steps = json!({"mode": "dbcache", "steps_computation_mask": [1, true, 0, 1.0]});
    let expected = StepsMask::Steps([true, true, false, true].into());
    assert_eq!(mask(steps).0, Some(expected));
    let none = json!({"mode": "dbcache", "scm_preset": "none", "scm_policy": "static"});
    assert_eq!(mask(none), (None, MaskPolicy::Dynamic));
}

#[test]
fn what_is_wrong_is_named_with_what_is_known() {
    for (value, message) in [
        (
            json!("slow"),
            "must be one of off, balanced, fast, auto, dbcache, magcache, or an object with a mode, \
             got \"slow\"",
        ),
        (
            json!(true),
            "must be one of off, balanced, fast, auto, dbcache, magcache, or an object with a mode, \
             got true",
        ),
        (
            json!({}),
            "mode is required in an object: dbcache or magcache",
        ),
        (
            json!({"mode": "teacache"}),
            "mode must be one of dbcache, magcache, got \"teacache\"",
        ),
        (
            json!({"mode": "magcache", "max_warmup_steps": 4}),
            "unknown key max_warmup_steps; known are mode, mag_threshold, mag_max_skip_steps, \
             mag_retention_ratio, mag_ratios, mag_calibrate",
        ),
        (
            json!({"mode": "dbcache", "Fn_compute_blocks": 0}),
            "Fn_compute_blocks must be from 1 to 10000, got 0",
        ),
        (
            json!({"mode": "dbcache", "max_warmup_steps": "4"}),
            "max_warmup_steps must be an integer from 0 to 10000, got \"4\"",
        ),
        (
            json!({"mode": "dbcache", "max_cached_steps": -2}),
            "max_cached_steps must be from 0 to 10000, got -2",
        ),
        (
            json!({"mode": "dbcache", "residual_diff_threshold": -0.1}),
            "residual_diff_threshold must be a number from 0 to 1000, got -0.1",
        ),
        (
            json!({"mode": "dbcache", "taylorseer_order": 2}),
            "taylorseer_order must be 0 or 1, got 2",
        ),
        (
            json!({"mode": "dbcache", "enable_taylorseer": 1}),
            "enable_taylorseer must be true or false, got 1",
        ),
    ] {
        assert_eq!(refused(&value), message, "{value}");
    }
    let long = refused(&json!("x".repeat(10_000)));
    assert!(long.len() < 300, "{}", long.len());
}

#[test]
fn wrong_masks_and_wrong_settings_of_magcache_are_named() {
    for (value, message) in [
        (
            json!({"mode": "dbcache", "scm_preset": "quick"}),
            "scm_preset must be one of none, slow, medium, fast, ultra, got \"quick\"",
        ),
        (
            json!({"mode": "dbcache", "scm_policy": "lazy"}),
            "scm_policy must be one of dynamic, static, got \"lazy\"",
        ),
        (
            json!({"mode": "dbcache", "scm_compute_bins": [1]}),
            "scm_compute_bins needs scm_cache_bins as well",
        ),
        (
            json!({"mode": "dbcache", "scm_compute_bins": "1,x", "scm_cache_bins": [1]}),
            "scm_compute_bins must be an integer from 0 to 10000, got nothing",
        ),
        (
            json!({"mode": "dbcache", "scm_preset": "fast", "scm_steps_mask_policy": "slow"}),
            "scm_preset and scm_steps_mask_policy were given different values: give only one of them",
        ),
        (
            json!({"mode": "dbcache", "scm_preset": "fast", "steps_computation_mask": [1]}),
            "scm_preset and steps_computation_mask both say which steps are computed: give only one \
             of them",
        ),
        (
            json!({"mode": "dbcache", "steps_computation_mask": [1, 2]}),
            "steps_computation_mask must be a list of 0 and 1, got 2",
        ),
        (
            json!({"mode": "dbcache", "steps_computation_mask": []}),
            "steps_computation_mask must have from 1 to 1000 entries, got 0",
        ),
        (
            json!({"mode": "magcache", "mag_threshold": "x"}),
            "mag_threshold must be a number from 0 to 1000, got \"x\"",
        ),
        (
            json!({"mode": "magcache", "mag_retention_ratio": 1.1}),
            "mag_retention_ratio must be a number from 0 to 1, got 1.1",
        ),
        (
            json!({"mode": "magcache", "mag_ratios": [1, 0]}),
            "mag_ratios must be a list of numbers above 0, 1000 at most, got 0",
        ),
        (
            json!({"mode": "magcache", "mag_ratios": {}}),
            "mag_ratios must be a list, got an object",
        ),
        (
            json!({"mode": "magcache", "mag_calibrate": true}),
            "mag_calibrate is not available here: kiln bench --calibrate-cache measures mag_ratios",
        ),
    ] {
        assert_eq!(refused(&value), message, "{value}");
    }
}

#[test]
fn the_names_of_sglang_stand_for_dbcache() {
    let of = |enable, params: Value| CacheChoice::of_cache_dit(enable, Some(&params));
    let plain = CacheChoice::DbCache(DbCacheChoice::default());
    assert_eq!(of(None, json!(null)), Ok(None));
    assert_eq!(of(Some(true), json!(null)), Ok(Some(plain.clone())));
    assert_eq!(of(Some(true), json!({})), Ok(Some(plain.clone())));
    assert_eq!(of(None, json!({})), Ok(Some(plain)));
    assert_eq!(of(Some(false), json!(null)), Ok(Some(CacheChoice::Off)));
    let params = json!({"max_warmup_steps": 2});
    assert_eq!(of(Some(false), params.clone()), Ok(Some(CacheChoice::Off)));
    let same = read(&json!({"mode": "dbcache", "max_warmup_steps": 2}));
    assert_eq!(of(None, params), Ok(Some(same)));
    for enable in [None, Some(true), Some(false)] {
        let error = of(enable, json!({"mode": "dbcache"})).unwrap_err();
        assert!(
            error.to_string().starts_with("unknown key mode; "),
            "{error}"
        );
        let error = of(enable, json!([])).unwrap_err();
        assert_eq!(error.to_string(), "must be an object, got a list");
    }
}

#[test]
fn a_configuration_has_the_settings_of_its_backend() {
    let object = |value: Value| -> Map<String, Value> { serde_json::from_value(value).unwrap() };
    let config = object(json!({"max_warmup_steps": 8, "mag_ratios": [1.0, 1.5]}));
    let choice = CacheChoice::of_cache_dit_config(&config).unwrap();
    assert_eq!(
        choice,
        read(&json!({"mode": "dbcache", "max_warmup_steps": 8}))
    );
    assert_eq!(mag_ratios(&config), Ok(Some([1.0, 1.5].into())));
    let error = only_mag_ratios(&config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown key max_warmup_steps; known are mag_ratios"
    );
    let choice = CacheChoice::of_mag_cache_config(&Map::new()).unwrap();
    let expected = MagCache {
        threshold: 0.24,
        max_skips: 5,
        retention: 0.1,
        ratios: None,
    };
    assert_eq!(choice, CacheChoice::MagCache(expected));
    let error = CacheChoice::of_mag_cache_config(&object(json!({"rel_l1_thresh": 0.2})));
    assert!(error.is_err());
}

#[test]
fn the_presets_compute_thirty_and_twenty_four_of_fifty_steps() {
    let caches = qwen_image();
    let steps = |choice| computed(&caches.policy(&choice, 50).unwrap());
    assert_eq!(steps(CacheChoice::Balanced), 30);
    assert_eq!(steps(CacheChoice::Fast), 24);
    let authors = json!({
        "mode": "magcache", "mag_threshold": 0.06, "mag_max_skip_steps": 2,
        "mag_retention_ratio": 0.2,
    });
    assert_eq!(steps(read(&authors)), 37);
    // The request's own ratios.
    let flat = json!({
        "mode": "magcache", "mag_max_skip_steps": 1, "mag_retention_ratio": 0,
        "mag_ratios": [1, 1],
    });
    assert_eq!(steps(read(&flat)), 26);
    for choice in [CacheChoice::Off, CacheChoice::Auto] {
        assert_eq!(caches.policy(&choice, 50), Ok(CachePolicy::Off));
    }
    // Nothing is known of another model: every second step after the first fifth.
    let other = StepCaches::default();
    let policy = other.policy(&CacheChoice::Fast, 20).unwrap();
    assert!((12..=13).contains(&computed(&policy)), "{policy:?}");
}

#[test]
fn a_cache_fits_the_steps_and_the_model() {
    let caches = qwen_image();
    let masked = read(&json!({"mode": "dbcache", "scm_preset": "fast"}));
    let CachePolicy::DbCache(settings) = caches.policy(&masked, 50).unwrap() else {
        panic!("another policy")
    };
    assert_eq!(settings.steps_mask.unwrap().len(), 50);
    let refused = |value: Value, steps| {
        let cache = caches.resolve(Some(read(&value).into()), steps);
        cache.unwrap_err().to_string()
    };
    assert_eq!(
        refused(json!("fast"), 7),
        "cache needs at least 8 steps, got 7: ask for more steps, or leave cache out"
    );
    let blocks = json!({"mode": "dbcache", "Fn_compute_blocks": 60, "Bn_compute_blocks": 1});
    assert!(refused(blocks, 50).contains("at most 60"));
    let mask = json!({"mode": "dbcache", "steps_computation_mask": [1, 1, 0, 1, 1, 0, 1, 1]});
    assert!(refused(mask, 9).contains("9 steps"));
    let bins = json!({"mode": "dbcache", "scm_compute_bins": [4], "scm_cache_bins": [4]});
    assert!(refused(bins, 9).starts_with("cache: scm_compute_bins"));
}

#[test]
fn a_default_is_for_requests_that_say_nothing_and_have_the_steps() {
    let caches = StepCaches {
        default: CacheChoice::Balanced,
        ..qwen_image()
    };
    let resolve = |given, steps| caches.resolve(given, steps).unwrap();
    assert_eq!(resolve(None, 50).name(), Some("balanced"));
    assert_eq!(computed(&resolve(None, 50).policy), 30);
    assert_eq!(resolve(None, 7), RequestCache::default());
    assert_eq!(
        resolve(Some(CacheChoice::Off.into()), 50),
        RequestCache::default()
    );
    let fast = resolve(Some(CacheChoice::Fast.into()), 50);
    assert_eq!((fast.name(), computed(&fast.policy)), (Some("fast"), 24));
    let auto = resolve(Some(CacheChoice::Auto.into()), 4);
    assert_eq!((auto.name(), auto.policy), (Some("auto"), CachePolicy::Off));
    // A mask of another number of steps.
    let mask = json!({"mode": "dbcache", "steps_computation_mask": [1, 1, 0, 1, 1, 0, 1, 1]});
    let caches = StepCaches {
        default: read(&mask),
        ..qwen_image()
    };
    assert_eq!(caches.resolve(None, 8).unwrap().name(), Some("dbcache"));
    assert_eq!(caches.resolve(None, 9).unwrap().name(), None);
}

#[test]
fn the_gate_is_a_part_of_at_least_eight_steps() {
    assert_eq!(cfg_gate_step(None, 1), Ok(None));
    assert_eq!(cfg_gate_step(Some(1.0), 1), Ok(None));
    assert_eq!(cfg_gate_step(Some(0.0), 8), Ok(Some(0.0)));
    assert_eq!(cfg_gate_step(Some(0.5), 50), Ok(Some(0.5)));
    for got in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let error = cfg_gate_step(Some(got), 50).unwrap_err();
        assert_eq!(error.param(), "cfg_gate_step");
        let expected = format!("cfg_gate_step must be from 0 to 1, got {got}");
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(
        cfg_gate_step(Some(0.5), 7).unwrap_err().to_string(),
        "cfg_gate_step needs at least 8 steps, got 7: ask for more steps, or leave cfg_gate_step out"
    );
}

fn choice() -> impl Strategy<Value = CacheChoice> {
    let cap = || proptest::option::of(0usize..100);
    // Few digits: serde_json does not read all digits of a number exactly.
    let number = |range: std::ops::Range<u32>| range.prop_map(|it| f64::from(it) / 1000.0);
    let threshold = || number(0..1_000_000);
    let bins = || proptest::collection::vec(0usize..100, 1..10);
    let mask = prop_oneof![
        Just(None),
        proptest::sample::select(&ScmPreset::ALL[..])
            .prop_map(|preset| Some(StepsMask::Preset(preset))),
        (bins(), bins()).prop_map(|(compute, cache)| Some(StepsMask::Bins { compute, cache })),
        proptest::collection::vec(any::<bool>(), 1..60)
            .prop_map(|steps| Some(StepsMask::Steps(steps.into()))),
    ];
    let blocks = (1usize..60, 0usize..60, 0usize..100, 0usize..2);
    let db_cache = (blocks, cap(), cap(), threshold(), mask, any::<bool>());
    let db_cache = db_cache.prop_map(|(blocks, cached, continuous, threshold, mask, is_static)| {
        let (first, last, warmup, order) = blocks;
        let policy = if is_static && mask.is_some() {
            MaskPolicy::Static
        } else {
            MaskPolicy::Dynamic
        };
        let settings = DbCache {
            fn_compute_blocks: first,
            bn_compute_blocks: last,
            max_warmup_steps: warmup,
            max_cached_steps: cached,
            max_continuous_cached_steps: continuous,
            residual_diff_threshold: threshold,
            taylorseer_order: order,
            steps_mask: None,
            steps_mask_policy: policy,
        };
        CacheChoice::DbCache(DbCacheChoice { settings, mask })
    });
    let ratios = proptest::option::of(proptest::collection::vec(number(1..1_000_000), 1..60));
    let mag_cache = (threshold(), 0usize..100, number(0..1001), ratios).prop_map(
        |(threshold, max_skips, retention, ratios)| {
            CacheChoice::MagCache(MagCache {
                threshold,
                max_skips,
                retention,
                ratios: ratios.map(Into::into),
            })
        },
    );
    prop_oneof![
        1 => Just(CacheChoice::Off),
        1 => Just(CacheChoice::Balanced),
        1 => Just(CacheChoice::Fast),
        1 => Just(CacheChoice::Auto),
        4 => db_cache,
        4 => mag_cache,
    ]
}

proptest! {
    #[test]
    fn a_cache_reads_as_it_is_written(choice in choice()) {
        let text = choice.to_json().to_string();
        let value: Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(CacheChoice::from_json(&value), Ok(Some(choice)), "{}", text);
    }

    #[test]
    fn every_cache_has_a_policy_or_an_error_for_any_steps(choice in choice(), steps in 1usize..200) {
        let policy = qwen_image().policy(&choice, steps);
        if let Ok(CachePolicy::Mask(mask)) = &policy {
            prop_assert_eq!(mask.len(), steps);
            prop_assert!(steps >= 8 && mask[0]);
        }
    }
}
