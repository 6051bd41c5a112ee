//! The step cache of a request: what was asked for, and the policy that it is for a job.

mod auto;
mod fields;
mod read;
mod write;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use kiln_models::step_cache::{
    CacheError, CachePolicy, DbCache, MIN_CACHED_STEPS, MagCache, ScmPreset, check_gate, scm_mask,
    scm_mask_of_bins,
};

use super::InvalidRequest;

pub use self::fields::InvalidCache;
pub use self::read::{DBCACHE_KEYS, MAGCACHE_KEYS, mag_ratios, only_mag_ratios};

/// The step cache that a request asks for.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub enum CacheChoice {
    /// Every step is computed.
    #[default]
    Off,
    /// [`MagCache::balanced`] with the ratios of the model.
    Balanced,
    /// [`MagCache::fast`] with the ratios of the model.
    Fast,
    /// The engine may choose a cache, if the request would be late without one.
    Auto,
    /// Cache-DiT's `DBCache`, which decides at each step.
    DbCache(DbCacheChoice),
    /// MagCache, whose steps are known before the first one. Without ratios those of the model are
    /// used.
    MagCache(MagCache),
}

/// [`DbCache`] for any number of steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DbCacheChoice {
    /// The settings without a mask.
    pub settings: DbCache,
    /// Makes [`DbCache::steps_mask`].
    pub mask: Option<StepsMask>,
}

/// Which steps are computed, whatever they change: Cache-DiT's steps computation masks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepsMask {
    Preset(ScmPreset),
    /// `compute[0]` steps are computed, then `cache[0]` may be reused, and so on.
    Bins {
        compute: Vec<usize>,
        cache: Vec<usize>,
    },
    /// One entry for each step.
    Steps(Arc<[bool]>),
}

/// A step cache as a request gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenCache {
    pub choice: CacheChoice,
    /// The name under which it was given, for messages: `cache` or `enable_cache_dit`.
    pub param: &'static str,
}

/// The step cache of a checked request.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RequestCache {
    pub choice: CacheChoice,
    /// The choice for the number of steps of the request.
    pub policy: CachePolicy,
    /// What [`CacheChoice::Auto`] leaves to the engine, the one that computes most first.
    pub auto: Vec<(CacheChoice, CachePolicy)>,
}

/// What a server and its model know of step caches.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepCaches {
    /// The cache of requests that name none. It is not applied to requests with fewer than
    /// [`MIN_CACHED_STEPS`] steps.
    pub default: CacheChoice,
    /// MagCache's ratios of the model; `None` if they have not been measured.
    pub mag_ratios: Option<Arc<[f64]>>,
    /// Number of the transformer's blocks; `None` if it is not known.
    pub blocks: Option<usize>,
}

impl CacheChoice {
    /// The name in answers, logs and metadata.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Balanced => "balanced",
            Self::Fast => "fast",
            Self::Auto => "auto",
            Self::DbCache(_) => "dbcache",
            Self::MagCache(_) => "magcache",
        }
    }
}

impl From<CacheChoice> for GivenCache {
    fn from(choice: CacheChoice) -> Self {
        let param = "cache";
        Self { choice, param }
    }
}

impl RequestCache {
    /// [`CacheChoice::name`], or `None` if every step is computed.
    pub fn name(&self) -> Option<&'static str> {
        (self.choice != CacheChoice::Off).then(|| self.choice.name())
    }
}

impl StepCaches {
    /// The policy of a job of this many steps. [`CacheChoice::Auto`] computes every step, as
    /// [`CacheChoice::Off`] does.
    ///
    /// # Errors
    ///
    /// If there are fewer than [`MIN_CACHED_STEPS`] steps, or a setting does not fit the number of
    /// steps or the model.
    pub fn policy(&self, choice: &CacheChoice, steps: usize) -> Result<CachePolicy, CacheError> {
        let ratios = || self.mag_ratios.clone();
        let settings = match choice {
            CacheChoice::Off | CacheChoice::Auto => return Ok(CachePolicy::Off),
            _ if steps < MIN_CACHED_STEPS => return Err(CacheError::TooFewSteps(steps)),
            CacheChoice::Balanced => MagCache::balanced(ratios()),
            CacheChoice::Fast => MagCache::fast(ratios()),
            CacheChoice::MagCache(settings) => MagCache {
                ratios: settings.ratios.clone().or_else(ratios),
                ..settings.clone()
            },
            CacheChoice::DbCache(choice) => return self.db_cache(choice, steps),
        };
        settings.check()?;
        Ok(CachePolicy::Mask(settings.mask(steps)))
    }

    fn db_cache(&self, choice: &DbCacheChoice, steps: usize) -> Result<CachePolicy, CacheError> {
        let mask = choice
            .mask
            .as_ref()
            .map(|mask| mask.of(steps))
            .transpose()?;
        let settings = DbCache {
            steps_mask: mask,
            ..choice.settings.clone()
        };
        settings.check(steps)?;
        if let Some(blocks) = self.blocks {
            settings.check_layers(blocks)?;
        }
        Ok(CachePolicy::DbCache(settings))
    }

    /// The cache of a request of this many steps: the given one, or the default.
    ///
    /// # Errors
    ///
    /// If the given one cannot be applied. The default is left out then.
    pub(super) fn resolve(
        &self,
        given: Option<GivenCache>,
        steps: usize,
    ) -> Result<RequestCache, InvalidRequest> {
        let (choice, policy) = match given {
            Some(GivenCache { choice, param }) => {
                let policy = self.policy(&choice, steps).map_err(|error| match error {
                    CacheError::TooFewSteps(steps) => InvalidRequest::TooFewSteps { param, steps },
                    error => InvalidRequest::Cache { param, error },
                })?;
                (choice, policy)
            }
            None => match self.policy(&self.default, steps) {
                Ok(policy) => (self.default.clone(), policy),
                Err(_) => return Ok(RequestCache::default()),
            },
        };
        let auto = match choice {
            CacheChoice::Auto => self.auto(steps),
            _ => Vec::new(),
        };
        Ok(RequestCache {
            choice,
            policy,
            auto,
        })
    }
}

/// The gate, unless it gates no step.
pub(super) fn cfg_gate_step(
    given: Option<f64>,
    steps: usize,
) -> Result<Option<f64>, InvalidRequest> {
    match given {
        Some(got) if check_gate(got).is_err() => Err(InvalidRequest::CfgGateStep { got }),
        Some(gate) if gate < 1.0 && steps < MIN_CACHED_STEPS => Err(InvalidRequest::TooFewSteps {
            param: "cfg_gate_step",
            steps,
        }),
        given => Ok(given.filter(|gate| *gate < 1.0)),
    }
}

impl StepsMask {
    fn of(&self, steps: usize) -> Result<Arc<[bool]>, CacheError> {
        match self {
            Self::Preset(preset) => scm_mask(*preset, steps),
            Self::Bins { compute, cache } => scm_mask_of_bins(compute, cache, steps),
            Self::Steps(mask) => Ok(Arc::clone(mask)),
        }
    }
}
