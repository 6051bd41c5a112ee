//! Step caches: which steps of a job run the transformer's blocks, and which reuse what an earlier
//! step computed.
//!
//! A reused step adds the change that the blocks made to the image tokens in the last computed step
//! to the tokens of its own latents, and applies its own output norm. The state of a cache belongs to
//! one job, so that jobs that share a forward pass do not change each other.

mod dbcache;
mod error;
mod magcache;
mod scm;
mod state;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use dbcache::{DbCache, MaskPolicy};
pub use error::CacheError;
pub use magcache::{MagCache, QWEN_IMAGE_RATIOS};
pub use scm::{ScmPreset, scm_mask, scm_mask_of_bins};
pub(crate) use state::{Decide, Next, StepCache};

/// Smallest number of steps of a job that may have a step cache.
pub const MIN_CACHED_STEPS: usize = 8;

/// Which steps of a job run the transformer's blocks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub enum CachePolicy {
    /// All steps.
    #[default]
    Off,
    /// Those that are true here, known before the first step. The first step is always computed, and
    /// so are steps that the mask does not reach. [`MagCache::mask`] makes such a mask.
    Mask(Arc<[bool]>),
    /// Those in which the first blocks change the image tokens otherwise than in the last computed
    /// step: Cache-DiT's `DBCache`.
    DbCache(DbCache),
    /// All steps. With [`Job::record`](crate::job::Job::record) the trace has a tensor
    /// `residual_ratio_step{i}` of every step `i` but the first, with one value for each half: the
    /// mean over the image tokens of `‖R_i‖ / ‖R_{i-1}‖`, where `R_i` is the change that all blocks
    /// made to a token.
    Calibrate,
}

impl CachePolicy {
    /// Checks everything that is known without the model.
    ///
    /// # Errors
    ///
    /// If a cache has fewer steps than [`MIN_CACHED_STEPS`], or a setting is out of its bounds.
    pub fn check(&self, steps: usize) -> Result<(), CacheError> {
        match self {
            Self::Off | Self::Calibrate => return Ok(()),
            Self::Mask(_) => {}
            Self::DbCache(settings) => settings.check(steps)?,
        }
        if steps < MIN_CACHED_STEPS {
            return Err(CacheError::TooFewSteps(steps));
        }
        Ok(())
    }
}

/// Tensors that the cache of a job keeps between its steps, for each half that runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct KeptResiduals {
    /// Residuals of the image tokens, each `[image tokens, dim]`.
    pub(crate) image: usize,
    /// Residuals of the text tokens, each `[text tokens, dim]`.
    pub(crate) text: usize,
}

impl KeptResiduals {
    /// Those of the step that keeps the most.
    pub(crate) fn of(policy: &CachePolicy, steps: usize) -> Self {
        let order = StepCache::new(policy, steps).order();
        let kept = |next| match next {
            Next::Compute { keep: true } => Self {
                image: 1 + order,
                text: 0,
            },
            // The residual of the first blocks, and those of the blocks between them and the last.
            Next::Probe { tail, .. } => Self {
                image: 2 + order,
                text: if tail > 0 { 1 + order } else { 0 },
            },
            Next::Compute { keep: false } | Next::Reuse => Self::default(),
        };
        let most = cheapest_steps(policy, steps).map(kept);
        most.max_by_key(|kept| kept.image).unwrap_or_default()
    }
}

/// What every step of a job runs if every comparison allows its reuse.
pub(crate) fn cheapest_steps(policy: &CachePolicy, steps: usize) -> impl Iterator<Item = Next> {
    let mut cache = StepCache::new(policy, steps);
    (0..steps).map(move |_| {
        let next = cache.next();
        cache.book(next.may_reuse());
        next
    })
}

/// The first step that guidance does not compute its unconditional half in: SGLang's `cfg_gate_step`
/// as a part of all steps, rounded down, and at least 1. `steps` if no step is gated.
pub fn first_gated_step(steps: usize, cfg_gate_step: Option<f64>) -> usize {
    match cfg_gate_step {
        Some(gate) => ((steps as f64 * gate) as usize).max(1).min(steps),
        None => steps,
    }
}

/// Checks a `cfg_gate_step`.
///
/// # Errors
///
/// If it is no number from 0 to 1.
pub fn check_gate(cfg_gate_step: f64) -> Result<(), CacheError> {
    if (0.0..=1.0).contains(&cfg_gate_step) {
        Ok(())
    } else {
        Err(CacheError::Gate(cfg_gate_step))
    }
}

/// What the steps of a job have run so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StepCounts {
    /// Steps that ran the transformer's blocks.
    #[serde(rename = "computed_steps")]
    pub computed: usize,
    /// Steps that reused what an earlier step computed.
    #[serde(rename = "skipped_steps")]
    pub skipped: usize,
    /// Steps, computed or skipped, that did not run the unconditional half because of
    /// [`Job::cfg_gate_step`](crate::job::Job::cfg_gate_step).
    #[serde(rename = "gated_steps")]
    pub gated: usize,
}

/// A mask as text: `1` for a computed step, `0` for a reused one.
#[cfg(test)]
fn text(mask: &[bool]) -> String {
    let digits = mask
        .iter()
        .map(|&computed| if computed { '1' } else { '0' });
    digits.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_a_part_of_the_steps_rounded_down_and_never_the_first_step() {
        for (steps, gate, first) in [
            (50, None, 50),
            (50, Some(1.0), 50),
            (50, Some(0.5), 25),
            (50, Some(0.7), 35),
            (9, Some(0.5), 4),
            (20, Some(0.0), 1),
            (1, Some(0.0), 1),
            (1, None, 1),
        ] {
            assert_eq!(first_gated_step(steps, gate), first, "{gate:?} of {steps}");
        }
    }

    #[test]
    fn a_gate_is_a_number_from_0_to_1() {
        for gate in [0.0, 0.5, 1.0] {
            assert_eq!(check_gate(gate), Ok(()));
        }
        for gate in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            check_gate(gate).unwrap_err();
        }
        let error = check_gate(1.5).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cfg_gate_step must be from 0 to 1, got 1.5"
        );
    }

    #[test]
    fn a_cache_keeps_residuals_only_if_a_step_reuses_them() {
        let kept = |policy: &CachePolicy| {
            let kept = KeptResiduals::of(policy, 8);
            (kept.image, kept.text)
        };
        let dbcache = |order, tail, most| {
            CachePolicy::DbCache(DbCache {
                taylorseer_order: order,
                bn_compute_blocks: tail,
                max_cached_steps: most,
                ..DbCache::default()
            })
        };
        assert_eq!(kept(&CachePolicy::Off), (0, 0));
        assert_eq!(kept(&CachePolicy::Calibrate), (1, 0));
        assert_eq!(kept(&CachePolicy::Mask([true; 8].into())), (0, 0));
        let mask = [true, true, true, true, false, true, true, true];
        assert_eq!(kept(&CachePolicy::Mask(mask.into())), (1, 0));
        assert_eq!(kept(&dbcache(0, 0, None)), (2, 0));
        assert_eq!(kept(&dbcache(1, 0, None)), (3, 0));
        assert_eq!(kept(&dbcache(0, 2, None)), (2, 1));
        assert_eq!(kept(&dbcache(1, 2, None)), (3, 2));
        assert_eq!(kept(&dbcache(1, 2, Some(0))), (0, 0));
    }

    #[test]
    fn caches_need_eight_steps() {
        let mask = CachePolicy::Mask([true, false].repeat(4).into());
        let dbcache = CachePolicy::DbCache(DbCache::default());
        for cache in [mask, dbcache] {
            assert_eq!(cache.check(8), Ok(()));
            assert_eq!(cache.check(7), Err(CacheError::TooFewSteps(7)));
        }
        for all in [CachePolicy::Off, CachePolicy::Calibrate] {
            assert_eq!(all.check(1), Ok(()));
        }
        assert_eq!(
            CacheError::TooFewSteps(7).to_string(),
            "a step cache needs num_inference_steps of at least 8, got 7"
        );
    }
}
