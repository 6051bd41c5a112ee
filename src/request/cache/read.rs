//! Step caches as requests and `--cache-config` write them.

use std::sync::Arc;

use kiln_models::step_cache::{DbCache, MagCache, MaskPolicy, ScmPreset};
use serde_json::{Map, Value};

use super::fields::{Fields, InvalidCache, described, word, wrong};
use super::{CacheChoice, DbCacheChoice, StepsMask};

/// The names of Cache-DiT, SGLang (`scm_preset`, `scm_policy`) and vLLM-Omni (`scm_steps_mask_policy`,
/// `scm_steps_policy`) for the settings of [`DbCache`].
pub const DBCACHE_KEYS: &[&str] = &[
    "Fn_compute_blocks",
    "Bn_compute_blocks",
    "max_warmup_steps",
    "max_cached_steps",
    "max_continuous_cached_steps",
    "residual_diff_threshold",
    "enable_taylorseer",
    "taylorseer_order",
    "scm_preset",
    "scm_steps_mask_policy",
    "scm_compute_bins",
    "scm_cache_bins",
    "steps_computation_mask",
    "scm_policy",
    "scm_steps_policy",
    "steps_computation_policy",
];

/// vLLM-Omni's names for the settings of [`MagCache`].
pub const MAGCACHE_KEYS: &[&str] = &[
    "mag_threshold",
    "mag_max_skip_steps",
    "mag_retention_ratio",
    MAG_RATIOS,
    "mag_calibrate",
];

pub(super) const MAG_RATIOS: &str = "mag_ratios";
pub(super) const MODE: &str = "mode";

/// The texts that stand for a cache.
const NAMES: &str = "off, balanced, fast, auto, dbcache, magcache";

/// Words for a predefined mask; `none` is no mask.
const PRESETS: [(&str, Option<ScmPreset>); 5] = [
    ("none", None),
    (ScmPreset::Slow.name(), Some(ScmPreset::Slow)),
    (ScmPreset::Medium.name(), Some(ScmPreset::Medium)),
    (ScmPreset::Fast.name(), Some(ScmPreset::Fast)),
    (ScmPreset::Ultra.name(), Some(ScmPreset::Ultra)),
];

const POLICIES: [(&str, MaskPolicy); 2] = [
    ("dynamic", MaskPolicy::Dynamic),
    ("static", MaskPolicy::Static),
];

type Read = fn(&Fields<'_>) -> Result<CacheChoice, InvalidCache>;

impl CacheChoice {
    /// Reads a request's `cache`: the name of a cache, or an object with its `mode` and settings.
    /// `null` and blank texts count as absent.
    ///
    /// ```
    /// use kiln::request::CacheChoice;
    /// use serde_json::json;
    ///
    /// let read = |value| CacheChoice::from_json(&value);
    /// assert_eq!(read(json!("fast")), Ok(Some(CacheChoice::Fast)));
    /// assert_eq!(read(json!(null)), Ok(None));
    /// let given = read(json!({"mode": "dbcache", "max_warmup_steps": 8}))?.unwrap();
    /// assert_eq!(given.name(), "dbcache");
    /// assert_eq!(
    ///     read(json!("slow")).unwrap_err().to_string(),
    ///     "must be one of off, balanced, fast, auto, dbcache, magcache, or an object with a mode, \
    ///      got \"slow\""
    /// );
    /// # Ok::<(), kiln::request::InvalidCache>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If there is no such cache, or a key or a value is invalid.
    pub fn from_json(value: &Value) -> Result<Option<Self>, InvalidCache> {
        match value {
            Value::Null => Ok(None),
            Value::Object(object) => Self::of_object(object).map(Some),
            Value::String(text) if text.trim().is_empty() => Ok(None),
            Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
                "off" => Ok(Some(Self::Off)),
                "balanced" => Ok(Some(Self::Balanced)),
                "fast" => Ok(Some(Self::Fast)),
                "auto" => Ok(Some(Self::Auto)),
                "dbcache" => db_cache(&Fields::new(&Map::new(), &[])?).map(Some),
                "magcache" => mag_cache(&Fields::new(&Map::new(), &[])?).map(Some),
                _ => Err(unknown_cache(value)),
            },
            other => Err(unknown_cache(other)),
        }
    }

    fn of_object(object: &Map<String, Value>) -> Result<Self, InvalidCache> {
        let mode = object.get(MODE).filter(|mode| !mode.is_null());
        let Some(mode) = mode else {
            let message = "is required in an object: dbcache or magcache";
            return Err(wrong(MODE, message));
        };
        let modes: [(&str, (&[&str], Read)); 2] = [
            ("dbcache", (DBCACHE_KEYS, db_cache)),
            ("magcache", (MAGCACHE_KEYS, mag_cache)),
        ];
        let Some((keys, read)) = word(MODE, mode, &modes)? else {
            let message = "must be one of dbcache, magcache, got nothing";
            return Err(wrong(MODE, message));
        };
        read(&Fields::new(object, &[&[MODE], keys])?)
    }

    /// Reads SGLang's `enable_cache_dit` and `cache_dit_params`. Parameters without
    /// `enable_cache_dit` turn the cache on.
    ///
    /// # Errors
    ///
    /// If a key or a value of the parameters is invalid.
    pub fn of_cache_dit(
        enable: Option<bool>,
        params: Option<&Value>,
    ) -> Result<Option<Self>, InvalidCache> {
        let params = match params {
            None | Some(Value::Null) => None,
            Some(Value::Object(object)) => Some(object),
            Some(other) => {
                let got = described(other);
                return Err(InvalidCache::Whole(format!("must be an object, got {got}")));
            }
        };
        let given = params.map(|object| db_cache(&Fields::new(object, &[DBCACHE_KEYS])?));
        let given = given.transpose()?;
        Ok(match enable {
            Some(false) => Some(Self::Off),
            Some(true) => given.or_else(|| Some(Self::DbCache(DbCacheChoice::default()))),
            None => given,
        })
    }

    /// The cache of vLLM-Omni's `--cache-backend` `cache_dit`, with the settings of its
    /// `--cache-config`.
    ///
    /// # Errors
    ///
    /// If a key or a value is invalid.
    pub fn of_cache_dit_config(config: &Map<String, Value>) -> Result<Self, InvalidCache> {
        db_cache(&Fields::new(config, &[DBCACHE_KEYS, &[MAG_RATIOS]])?)
    }

    /// The cache of vLLM-Omni's `--cache-backend` `mag_cache`, with the settings of its
    /// `--cache-config`.
    ///
    /// # Errors
    ///
    /// If a key or a value is invalid.
    pub fn of_mag_cache_config(config: &Map<String, Value>) -> Result<Self, InvalidCache> {
        mag_cache(&Fields::new(config, &[MAGCACHE_KEYS])?)
    }
}

/// Reads the `mag_ratios` of a `--cache-config`, beside any other keys.
///
/// # Errors
///
/// If the ratios are invalid.
pub fn mag_ratios(config: &Map<String, Value>) -> Result<Option<Arc<[f64]>>, InvalidCache> {
    let ratios = Fields::unchecked(config).ratios(MAG_RATIOS)?;
    Ok(ratios.map(Into::into))
}

/// Refuses a `--cache-config` with another key than `mag_ratios`.
///
/// # Errors
///
/// If there is one.
pub fn only_mag_ratios(config: &Map<String, Value>) -> Result<(), InvalidCache> {
    Fields::new(config, &[&[MAG_RATIOS]]).map(|_| ())
}

fn unknown_cache(value: &Value) -> InvalidCache {
    let got = described(value);
    InvalidCache::Whole(format!(
        "must be one of {NAMES}, or an object with a mode, got {got}"
    ))
}

/// Missing settings are those of vLLM-Omni and SGLang, which are [`DbCache`]'s defaults.
fn db_cache(fields: &Fields<'_>) -> Result<CacheChoice, InvalidCache> {
    let default = DbCache::default();
    let order = match fields.count("taylorseer_order", 0)? {
        Some(order @ 2..) => {
            let message = format!("must be 0 or 1, got {order}");
            return Err(wrong("taylorseer_order", message));
        }
        order => order.unwrap_or(1),
    };
    let policy = fields.any(&["scm_policy", "scm_steps_policy", "steps_computation_policy"])?;
    let policy = match policy {
        Some((key, value)) => word(key, value, &POLICIES)?,
        None => None,
    };
    let mask = steps_mask(fields)?;
    let count = |key, min, default| Ok(fields.count(key, min)?.unwrap_or(default));
    let settings = DbCache {
        fn_compute_blocks: count("Fn_compute_blocks", 1, default.fn_compute_blocks)?,
        bn_compute_blocks: count("Bn_compute_blocks", 0, default.bn_compute_blocks)?,
        max_warmup_steps: count("max_warmup_steps", 0, default.max_warmup_steps)?,
        max_cached_steps: fields.cap("max_cached_steps", default.max_cached_steps)?,
        max_continuous_cached_steps: fields.cap(
            "max_continuous_cached_steps",
            default.max_continuous_cached_steps,
        )?,
        residual_diff_threshold: fields
            .threshold("residual_diff_threshold")?
            .unwrap_or(default.residual_diff_threshold),
        taylorseer_order: match fields.flag("enable_taylorseer")? {
            Some(true) => order,
            _ => 0,
        },
        steps_mask: None,
        // Without a mask the policy means nothing.
        steps_mask_policy: policy
            .filter(|_| mask.is_some())
            .unwrap_or(default.steps_mask_policy),
    };
    Ok(CacheChoice::DbCache(DbCacheChoice { settings, mask }))
}

fn steps_mask(fields: &Fields<'_>) -> Result<Option<StepsMask>, InvalidCache> {
    let preset = match fields.any(&["scm_preset", "scm_steps_mask_policy"])? {
        Some((key, value)) => word(key, value, &PRESETS)?.flatten(),
        None => None,
    };
    let bins = match (
        fields.bins("scm_compute_bins")?,
        fields.bins("scm_cache_bins")?,
    ) {
        (Some(compute), Some(cache)) => Some(StepsMask::Bins { compute, cache }),
        (None, None) => None,
        (Some(_), None) => return Err(wrong("scm_compute_bins", "needs scm_cache_bins as well")),
        (None, Some(_)) => return Err(wrong("scm_cache_bins", "needs scm_compute_bins as well")),
    };
    let steps = fields.mask("steps_computation_mask")?;
    let mut masks = [
        ("scm_preset", preset.map(StepsMask::Preset)),
        ("scm_compute_bins", bins),
        (
            "steps_computation_mask",
            steps.map(|steps| StepsMask::Steps(steps.into())),
        ),
    ]
    .into_iter()
    .filter_map(|(key, mask)| Some((key, mask?)));
    match (masks.next(), masks.next()) {
        (Some((key, _)), Some((other, _))) => Err(wrong(
            key,
            format!("and {other} both say which steps are computed: give only one of them"),
        )),
        (first, _) => Ok(first.map(|(_, mask)| mask)),
    }
}

/// Missing settings are those of vLLM-Omni.
fn mag_cache(fields: &Fields<'_>) -> Result<CacheChoice, InvalidCache> {
    if fields.flag("mag_calibrate")? == Some(true) {
        let message = "is not available here: kiln bench --calibrate-cache measures mag_ratios";
        return Err(wrong("mag_calibrate", message));
    }
    let skips = fields.count("mag_max_skip_steps", 0)?;
    let retention = fields.number("mag_retention_ratio", 1.0)?;
    Ok(CacheChoice::MagCache(MagCache {
        threshold: fields.threshold("mag_threshold")?.unwrap_or(0.24),
        max_skips: skips.unwrap_or(5),
        retention: retention.unwrap_or(0.1),
        ratios: fields.ratios(MAG_RATIOS)?.map(Into::into),
    }))
}
