//! Step caches in requests and answers.

use kiln_models::step_cache::StepCounts;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::request::{CacheChoice, GivenCache, InvalidCache};

use super::invalid::InvalidBody;

/// Reads `cache`, or SGLang's `enable_cache_dit` and `cache_dit_params`.
pub(super) fn given_cache(
    cache: Option<&Value>,
    enable_cache_dit: Option<bool>,
    cache_dit_params: Option<&Value>,
) -> Result<Option<GivenCache>, InvalidBody> {
    let given = cache.map_or(Ok(None), CacheChoice::from_json);
    let given = given.map_err(|error| invalid("cache", error))?;
    let of_sglang = CacheChoice::of_cache_dit(enable_cache_dit, cache_dit_params)
        .map_err(|error| invalid("cache_dit_params", error))?;
    let other = if enable_cache_dit.is_some() {
        "enable_cache_dit"
    } else {
        "cache_dit_params"
    };
    match (given, of_sglang) {
        (Some(_), Some(_)) => Err(InvalidBody::value(
            "cache".to_owned(),
            &format!("stands for the same as {other}: give only one of them"),
        )),
        (Some(choice), None) => Ok(Some(choice.into())),
        (None, choice) => Ok(choice.map(|choice| GivenCache {
            choice,
            param: other,
        })),
    }
}

/// An error with the path of its key in the body.
fn invalid(field: &str, error: InvalidCache) -> InvalidBody {
    match error {
        InvalidCache::Unknown { key, known } => {
            let param = format!("{field}.{key}");
            InvalidBody::Unknown { param, known }
        }
        InvalidCache::Value { key, message } => {
            InvalidBody::value(format!("{field}.{key}"), &message)
        }
        InvalidCache::Whole(message) => InvalidBody::value(field.to_owned(), &message),
    }
}

/// What the steps of a request ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names are the API's")]
pub(super) struct StepFacts {
    /// Steps that ran the whole transformer.
    computed_steps: usize,
    /// Steps that reused what an earlier step computed, because of a step cache.
    skipped_steps: usize,
    /// Steps, computed or skipped, that left the half of the negative prompt out, because of
    /// `cfg_gate_step`.
    gated_steps: usize,
}

impl From<StepCounts> for StepFacts {
    fn from(counts: StepCounts) -> Self {
        Self {
            computed_steps: counts.computed,
            skipped_steps: counts.skipped,
            gated_steps: counts.gated,
        }
    }
}

/// Which steps of a request were computed, as they are reported: `1` for a computed step, `0` for a
/// skipped one.
#[derive(Debug, Default)]
pub(super) struct ComputedSteps {
    text: String,
    last: StepCounts,
}

impl ComputedSteps {
    /// Adds the step after which there are these counts.
    pub(super) fn add(&mut self, counts: StepCounts) {
        let computed = counts.computed > self.last.computed;
        self.text.push(if computed { '1' } else { '0' });
        self.last = counts;
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// A step cache: `off`, a name, or an object with a `mode` and its settings.
#[derive(ToSchema)]
#[schema(as = Cache)]
#[serde(untagged)]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
pub(super) enum CacheField {
    Name(CacheName),
    DbCache(DbCacheField),
    MagCache(MagCacheField),
}

/// `balanced` computes about 60 % of 50 steps and `fast` about half of them; which steps is known
/// before the first one. `dbcache` and `magcache` have the default settings. `auto` computes every step
/// unless the server has more to do than it can do in time.
#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
pub(super) enum CacheName {
    Off,
    Balanced,
    Fast,
    Auto,
    Dbcache,
    Magcache,
}

/// Cache-DiT's `DBCache`: a step is reused if its first blocks change the image little since the last
/// computed step.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
pub(super) struct DbCacheField {
    mode: DbCacheMode,
    #[serde(flatten)]
    settings: CacheDitParams,
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
enum DbCacheMode {
    Dbcache,
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
enum MagCacheMode {
    Magcache,
}

/// Settings of Cache-DiT's `DBCache`. The defaults are those of vLLM-Omni and SGLang.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(
    dead_code,
    non_snake_case,
    reason = "only for the document, with the names of Cache-DiT"
)]
pub(super) struct CacheDitParams {
    /// First blocks of the transformer that every step runs, 1 by default.
    #[schema(minimum = 1, maximum = 10000)]
    Fn_compute_blocks: Option<usize>,
    /// Last blocks of the transformer that every step runs, 0 by default.
    #[schema(maximum = 10000)]
    Bn_compute_blocks: Option<usize>,
    /// First steps that are computed, 4 by default.
    #[schema(maximum = 10000)]
    max_warmup_steps: Option<usize>,
    /// Steps that are reused at most; -1, the default, for any number.
    #[schema(minimum = -1, maximum = 10000)]
    max_cached_steps: Option<i64>,
    /// Steps in a row that are reused at most, 3 by default; -1 for any number.
    #[schema(minimum = -1, maximum = 10000)]
    max_continuous_cached_steps: Option<i64>,
    /// A step is reused if the relative change of the first blocks' result is below this, 0.24 by
    /// default.
    #[schema(minimum = 0, maximum = 1000)]
    residual_diff_threshold: Option<f64>,
    /// Extrapolates what is reused from the last two computed steps.
    enable_taylorseer: Option<bool>,
    /// 1, the default, or 0, which turns `enable_taylorseer` off.
    #[schema(maximum = 1)]
    taylorseer_order: Option<usize>,
    /// Predefined steps that are computed in any case.
    scm_preset: Option<ScmPresetName>,
    /// Alias of `scm_preset`.
    scm_steps_mask_policy: Option<ScmPresetName>,
    /// Numbers of steps that are computed, in turn with those of `scm_cache_bins`: a list, or a text
    /// with commas.
    scm_compute_bins: Option<Bins>,
    /// Numbers of steps that may be reused.
    scm_cache_bins: Option<Bins>,
    /// 1 for each step that is computed in any case, and 0 for each other step.
    steps_computation_mask: Option<Vec<u8>>,
    /// Whether the other steps are compared before they are reused: `dynamic`, the default, or
    /// `static`.
    scm_policy: Option<ScmPolicyName>,
    /// Alias of `scm_policy`.
    scm_steps_policy: Option<ScmPolicyName>,
    /// Alias of `scm_policy`.
    steps_computation_policy: Option<ScmPolicyName>,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
enum Bins {
    Numbers(Vec<usize>),
    Text(String),
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
enum ScmPresetName {
    None,
    Slow,
    Medium,
    Fast,
    Ultra,
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
enum ScmPolicyName {
    Dynamic,
    Static,
}

/// MagCache: which steps are reused follows from how much the model's residual changes from step to
/// step. The names and the defaults are those of vLLM-Omni.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only for the document: caches are read by hand")]
pub(super) struct MagCacheField {
    mode: MagCacheMode,
    /// Steps are reused while the sum of their errors is below this, 0.24 by default.
    #[schema(minimum = 0, maximum = 1000)]
    mag_threshold: Option<f64>,
    /// Steps in a row that are reused at most, 5 by default.
    #[schema(maximum = 10000)]
    mag_max_skip_steps: Option<usize>,
    /// Part of the steps at the start that is computed, 0.1 by default.
    #[schema(minimum = 0, maximum = 1)]
    mag_retention_ratio: Option<f64>,
    /// Ratio of the residual's magnitude to that of the step before, for each step. Default: the
    /// model's.
    mag_ratios: Option<Vec<f64>>,
    /// Must not be true: `kiln bench --calibrate-cache` measures the ratios.
    mag_calibrate: Option<bool>,
}
