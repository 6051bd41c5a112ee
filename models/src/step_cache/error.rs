//! What is wrong with the settings of a step cache.

use super::MIN_CACHED_STEPS;

/// A setting of a step cache that is out of its bounds. Messages have the names that requests and
/// `--cache-config` use.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CacheError {
    #[error("a step cache needs num_inference_steps of at least {MIN_CACHED_STEPS}, got {0}")]
    TooFewSteps(usize),
    #[error("Fn_compute_blocks must be at least 1, got 0")]
    NoFirstBlocks,
    #[error(
        "Fn_compute_blocks and Bn_compute_blocks together must be at most {layers}, the blocks of \
         this model's transformer, got {first} and {last}"
    )]
    TooManyBlocks {
        first: usize,
        last: usize,
        layers: usize,
    },
    #[error("{name} must be a finite number of at least 0, got {value}")]
    Threshold { name: &'static str, value: f64 },
    #[error("taylorseer_order must be 0 or 1, got {0}")]
    Order(usize),
    #[error("the steps mask must have one entry for each of the {steps} steps, got {entries}")]
    MaskLength { entries: usize, steps: usize },
    #[error("mag_retention_ratio must be from 0 to 1, got {0}")]
    Retention(f64),
    #[error("mag_ratios must not be empty")]
    NoRatios,
    #[error("mag_ratios must be finite numbers above 0, got {value} at index {index}")]
    Ratio { index: usize, value: f64 },
    #[error("the predefined steps masks are for 4, 6, and 8 or more steps, got {0}")]
    NoPresetMask(usize),
    #[error("scm_compute_bins and scm_cache_bins must cover all {steps} steps, got {sum} together")]
    ShortBins { sum: usize, steps: usize },
    #[error("cfg_gate_step must be from 0 to 1, got {0}")]
    Gate(f64),
}

/// Checks a threshold.
pub(super) fn check_threshold(name: &'static str, value: f64) -> Result<(), CacheError> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(CacheError::Threshold { name, value })
    }
}
