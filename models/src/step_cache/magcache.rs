//! MagCache: which steps to reuse, from how much the residual's magnitude changes between steps.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::error::{CacheError, check_threshold};

/// Magnitude ratios of Qwen-Image with 50 steps, as the authors of MagCache publish them.
pub const QWEN_IMAGE_RATIOS: [f64; 50] = [
    1.0, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281, //
    1.11719, 1.07812, 1.07031, 1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812,
    1.07031, //
    1.03125, 1.07812, 1.04688, 1.04688, 1.04688, 1.03906, 1.01562, 1.03125, 1.02344,
    1.02344, //
    1.02344, 1.03906, 1.0, 1.01562, 1.0, 0.99219, 1.00781, 0.98047, 0.95703, 0.96875, //
    0.99219, 0.92578, 0.92578, 0.90625, 0.85938, 0.80469, 0.87891, 0.75, 0.60938, 0.55078,
];

/// Settings of MagCache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MagCache {
    /// A step is reused while the sum of the errors since the last computed step is below this.
    pub threshold: f64,
    /// Number of steps in a row that are reused at most.
    pub max_skips: usize,
    /// Part of the steps at the start that is computed.
    pub retention: f64,
    /// Ratio of the residual's magnitude to that of the step before, for each step; the first is 1.
    /// Jobs with another number of steps take the nearest. `None` if nothing was measured.
    pub ratios: Option<Arc<[f64]>>,
}

impl MagCache {
    /// Computes 30 of 50 steps with [`QWEN_IMAGE_RATIOS`].
    pub fn balanced(ratios: Option<Arc<[f64]>>) -> Self {
        Self {
            threshold: 0.12,
            max_skips: 2,
            retention: 0.2,
            ratios,
        }
    }

    /// Computes 24 of 50 steps with [`QWEN_IMAGE_RATIOS`].
    pub fn fast(ratios: Option<Arc<[f64]>>) -> Self {
        Self {
            threshold: 0.24,
            max_skips: 3,
            retention: 0.2,
            ratios,
        }
    }

    /// Which steps are computed. The first and the last one always are. Without ratios every second
    /// step after the first part is reused, unless the threshold or the number of skips is 0.
    pub fn mask(&self, steps: usize) -> Arc<[bool]> {
        let first = (steps as f64 * self.retention) as usize;
        let mut since = Skipped::default();
        let mask = (0..steps).map(|step| {
            if step < first {
                return true;
            }
            let next = match self.ratios.as_deref() {
                Some(ratios) => since.and(ratio(ratios, step, steps)),
                None if since.steps == 0 && self.threshold > 0.0 => since.and(1.0),
                None => since.and(f64::INFINITY),
            };
            let reused = step > 0
                && step + 1 < steps
                && next.error < self.threshold
                && next.steps <= self.max_skips;
            since = if reused { next } else { Skipped::default() };
            !reused
        });
        mask.collect()
    }

    /// # Errors
    ///
    /// If a setting is out of its bounds.
    pub fn check(&self) -> Result<(), CacheError> {
        check_threshold("mag_threshold", self.threshold)?;
        if !(0.0..=1.0).contains(&self.retention) {
            return Err(CacheError::Retention(self.retention));
        }
        let Some(ratios) = self.ratios.as_deref() else {
            return Ok(());
        };
        if ratios.is_empty() {
            return Err(CacheError::NoRatios);
        }
        let wrong = ratios.iter().position(|it| !it.is_finite() || *it <= 0.0);
        wrong.map_or(Ok(()), |index| {
            let value = ratios[index];
            Err(CacheError::Ratio { index, value })
        })
    }
}

/// The steps that were reused since the last computed one.
#[derive(Debug, Clone, Copy)]
struct Skipped {
    steps: usize,
    /// Product of their ratios.
    magnitude: f64,
    /// Sum of the distances of the products from 1.
    error: f64,
}

impl Default for Skipped {
    fn default() -> Self {
        Self {
            steps: 0,
            magnitude: 1.0,
            error: 0.0,
        }
    }
}

impl Skipped {
    /// These steps and one more.
    fn and(self, ratio: f64) -> Self {
        let magnitude = self.magnitude * ratio;
        Self {
            steps: self.steps + 1,
            magnitude,
            error: self.error + (1.0 - magnitude).abs(),
        }
    }
}

/// The ratio of a step, the nearest one if there are ratios of another number of steps.
fn ratio(ratios: &[f64], step: usize, steps: usize) -> f64 {
    let last = ratios.len().saturating_sub(1);
    let index = if ratios.len() == steps || steps < 2 {
        step
    } else {
        // Halves go to the even index, as numpy and torch round.
        (step as f64 * last as f64 / (steps - 1) as f64).round_ties_even() as usize
    };
    ratios.get(index.min(last)).copied().unwrap_or(1.0)
}

#[cfg(test)]
mod tests {
    use super::super::text;
    use super::*;

    fn qwen() -> Arc<[f64]> {
        QWEN_IMAGE_RATIOS.into()
    }

    fn of(threshold: f64, max_skips: usize, retention: f64) -> MagCache {
        MagCache {
            threshold,
            max_skips,
            retention,
            ratios: Some(qwen()),
        }
    }

    /// The masks that the authors' program gives with these settings and 50 steps.
    #[test]
    fn masks_of_fifty_steps_are_those_of_the_authors() {
        for (settings, computed, mask) in [
            (
                of(0.06, 2, 0.2),
                37,
                "11111111111111110111010101010101001001010111111111",
            ),
            (
                MagCache::balanced(Some(qwen())),
                30,
                "11111111110101010101010101001001001001001010111111",
            ),
            (
                of(0.15, 3, 0.2),
                27,
                "11111111110101010010101001000100100010010010110111",
            ),
            (
                MagCache::fast(Some(qwen())),
                24,
                "11111111110100100100100100010001000100010001010111",
            ),
        ] {
            let steps = settings.mask(50);
            assert_eq!(text(&steps), mask, "{settings:?}");
            assert_eq!(steps.iter().filter(|&&it| it).count(), computed);
        }
    }

    #[test]
    fn the_first_and_the_last_step_are_always_computed() {
        for steps in 1..60 {
            for ratios in [Some(qwen()), None, Some([1.0; 5].into())] {
                let settings = MagCache {
                    threshold: 1e9,
                    max_skips: 100,
                    retention: 0.0,
                    ratios,
                };
                let mask = settings.mask(steps);
                assert_eq!(mask.len(), steps);
                assert!(mask[0] && mask[steps - 1], "{steps}: {}", text(&mask));
            }
        }
        let all = of(1e9, 100, 0.0).mask(10);
        assert_eq!(text(&all), "1000000001");
    }

    #[test]
    fn nothing_is_reused_with_a_threshold_or_a_number_of_skips_of_0() {
        for ratios in [Some(qwen()), None] {
            for (threshold, max_skips) in [(0.0, 2), (0.5, 0)] {
                let settings = MagCache {
                    threshold,
                    max_skips,
                    retention: 0.2,
                    ratios: ratios.clone(),
                };
                assert_eq!(text(&settings.mask(20)), "1".repeat(20));
            }
        }
    }

    #[test]
    fn without_ratios_every_second_step_after_the_first_fifth_is_reused() {
        let mask = MagCache::balanced(None).mask(20);
        assert_eq!(text(&mask), "11110101010101010101");
        assert_eq!(text(&MagCache::fast(None).mask(9)), "101010101");
        let computed = MagCache::balanced(None).mask(50);
        assert_eq!(computed.iter().filter(|&&it| it).count(), 30);
    }

    /// As `numpy.round(numpy.linspace(0, 4, 9))` takes them: 0 0 1 2 2 2 3 4 4.
    #[test]
    fn ratios_of_another_number_of_steps_are_the_nearest() {
        let ratios = [0.0, 1.0, 2.0, 3.0, 4.0];
        let taken: Vec<f64> = (0..9).map(|step| ratio(&ratios, step, 9)).collect();
        assert_eq!(taken, [0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 4.0]);
        let fewer: Vec<f64> = (0..3).map(|step| ratio(&ratios, step, 3)).collect();
        assert_eq!(fewer, [0.0, 2.0, 4.0]);
    }

    #[test]
    fn settings_out_of_their_bounds_are_refused_by_name() {
        assert_eq!(MagCache::balanced(Some(qwen())).check(), Ok(()));
        assert_eq!(MagCache::fast(None).check(), Ok(()));
        let error = |settings: MagCache| settings.check().unwrap_err().to_string();
        assert_eq!(
            error(of(-1.0, 2, 0.2)),
            "mag_threshold must be a finite number of at least 0, got -1"
        );
        assert_eq!(
            error(of(0.1, 2, 1.5)),
            "mag_retention_ratio must be from 0 to 1, got 1.5"
        );
        assert_eq!(
            error(MagCache::balanced(Some([].into()))),
            "mag_ratios must not be empty"
        );
        assert_eq!(
            error(MagCache::balanced(Some([1.0, 0.0].into()))),
            "mag_ratios must be finite numbers above 0, got 0 at index 1"
        );
    }
}
