//! Settings of Cache-DiT's `DBCache`.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::error::{CacheError, check_threshold};

/// What a step does that [`DbCache::steps_mask`] does not name as computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MaskPolicy {
    /// Decides as a step without a mask.
    #[default]
    Dynamic,
    /// Reuses the last computed step without comparing.
    Static,
}

/// Settings of [`CachePolicy::DbCache`](super::CachePolicy::DbCache), with Cache-DiT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DbCache {
    /// Number of first blocks that every step runs, at least 1: `Fn_compute_blocks`.
    pub fn_compute_blocks: usize,
    /// Number of last blocks that every step runs: `Bn_compute_blocks`.
    pub bn_compute_blocks: usize,
    /// Number of first steps that are computed. With [`DbCache::steps_mask`] the mask alone decides.
    pub max_warmup_steps: usize,
    /// Number of steps that are reused at most; `None` for any number.
    pub max_cached_steps: Option<usize>,
    /// Number of steps in a row that are reused at most; `None` for any number. Counted as Cache-DiT
    /// counts: a step that is computed because of the threshold does not end the count.
    pub max_continuous_cached_steps: Option<usize>,
    /// A step is reused if the relative change of the first blocks' residual is below this. 0 reuses
    /// no step, 1 and more every step that the other settings allow.
    pub residual_diff_threshold: f64,
    /// Order of the extrapolation of a reused residual: 0 takes the last computed one, 1 adds the
    /// difference to the one before (`TaylorSeer`).
    pub taylorseer_order: usize,
    /// Steps that are computed, one entry for each step of the job: Cache-DiT's
    /// `steps_computation_mask`.
    pub steps_mask: Option<Arc<[bool]>>,
    /// What the other steps of [`DbCache::steps_mask`] do.
    pub steps_mask_policy: MaskPolicy,
}

/// The defaults of vLLM-Omni and SGLang.
impl Default for DbCache {
    fn default() -> Self {
        Self {
            fn_compute_blocks: 1,
            bn_compute_blocks: 0,
            max_warmup_steps: 4,
            max_cached_steps: None,
            max_continuous_cached_steps: Some(3),
            residual_diff_threshold: 0.24,
            taylorseer_order: 0,
            steps_mask: None,
            steps_mask_policy: MaskPolicy::Dynamic,
        }
    }
}

impl DbCache {
    /// Checks everything that is known without the model, for a job of this many steps.
    ///
    /// # Errors
    ///
    /// If a setting is out of its bounds.
    pub fn check(&self, steps: usize) -> Result<(), CacheError> {
        if self.fn_compute_blocks == 0 {
            return Err(CacheError::NoFirstBlocks);
        }
        check_threshold("residual_diff_threshold", self.residual_diff_threshold)?;
        if self.taylorseer_order > 1 {
            return Err(CacheError::Order(self.taylorseer_order));
        }
        let entries = self.steps_mask.as_ref().map_or(steps, |mask| mask.len());
        if entries != steps {
            return Err(CacheError::MaskLength { entries, steps });
        }
        Ok(())
    }

    /// Checks the numbers of blocks against the transformer's.
    ///
    /// # Errors
    ///
    /// If the transformer has fewer blocks than the first and the last ones together.
    pub fn check_layers(&self, layers: usize) -> Result<(), CacheError> {
        let (first, last) = (self.fn_compute_blocks, self.bn_compute_blocks);
        if first.saturating_add(last) > layers {
            return Err(CacheError::TooManyBlocks {
                first,
                last,
                layers,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_their_bounds_are_refused_by_name() {
        assert_eq!(DbCache::default().check(50), Ok(()));
        let of = |change: fn(&mut DbCache)| {
            let mut settings = DbCache::default();
            change(&mut settings);
            settings.check(50).unwrap_err().to_string()
        };
        assert_eq!(
            of(|it| it.fn_compute_blocks = 0),
            "Fn_compute_blocks must be at least 1, got 0"
        );
        assert_eq!(
            of(|it| it.residual_diff_threshold = f64::NAN),
            "residual_diff_threshold must be a finite number of at least 0, got NaN"
        );
        assert_eq!(
            of(|it| it.residual_diff_threshold = -0.1),
            "residual_diff_threshold must be a finite number of at least 0, got -0.1"
        );
        assert_eq!(
            of(|it| it.taylorseer_order = 2),
            "taylorseer_order must be 0 or 1, got 2"
        );
        assert_eq!(
            of(|it| it.steps_mask = Some([true; 49].into())),
            "the steps mask must have one entry for each of the 50 steps, got 49"
        );
    }

    #[test]
    fn the_first_and_last_blocks_are_at_most_all_blocks() {
        let settings = DbCache {
            fn_compute_blocks: 2,
            bn_compute_blocks: 2,
            ..DbCache::default()
        };
        assert_eq!(settings.check_layers(4), Ok(()));
        assert_eq!(
            settings.check_layers(3).unwrap_err().to_string(),
            "Fn_compute_blocks and Bn_compute_blocks together must be at most 3, the blocks of this \
             model's transformer, got 2 and 2"
        );
    }
}
