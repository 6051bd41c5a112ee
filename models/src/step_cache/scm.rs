//! Cache-DiT's steps computation masks: bins of steps that are computed in turn with bins of steps
//! that may be reused.

use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::sync::Arc;

use super::error::CacheError;

/// Cache-DiT's predefined masks, the one that computes the most steps first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScmPreset {
    Slow,
    Medium,
    Fast,
    Ultra,
}

impl ScmPreset {
    pub const ALL: [Self; 4] = [Self::Slow, Self::Medium, Self::Fast, Self::Ultra];

    /// The name that requests and `--cache-config` use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::Medium => "medium",
            Self::Fast => "fast",
            Self::Ultra => "ultra",
        }
    }
}

impl FromStr for ScmPreset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let preset = Self::ALL.into_iter().find(|preset| preset.name() == name);
        preset.ok_or_else(|| format!("must be slow, medium, fast or ultra, got {name:?}"))
    }
}

/// The mask of a preset. The last step is always computed.
///
/// # Errors
///
/// If Cache-DiT has no mask for this number of steps: below 8 it has those of 4 and 6.
pub fn scm_mask(preset: ScmPreset, steps: usize) -> Result<Arc<[bool]>, CacheError> {
    let bins = match steps {
        29.. => Bins::of_28(preset).grown(steps).cut(steps),
        16..=28 => Bins::of_28(preset).cut(steps),
        10..=15 => Bins::of_15(preset).cut(steps),
        8 | 9 => Bins::of_few(preset, steps),
        6 => Bins::new(&[3, 1], &[2]),
        4 => Bins::new(&[2, 1], &[1]),
        _ => return Err(CacheError::NoPresetMask(steps)),
    };
    let mut mask = bins.mask(steps);
    if let Some(last) = mask.last_mut() {
        *last = true;
    }
    Ok(mask.into())
}

/// The mask of these bins: `compute_bins[0]` steps are computed, then `cache_bins[0]` may be reused,
/// and so on.
///
/// # Errors
///
/// If the bins have fewer steps together than the job.
pub fn scm_mask_of_bins(
    compute_bins: &[usize],
    cache_bins: &[usize],
    steps: usize,
) -> Result<Arc<[bool]>, CacheError> {
    let all = compute_bins.iter().chain(cache_bins);
    let sum = all.fold(0, |sum: usize, &bin| sum.saturating_add(bin));
    if sum < steps {
        return Err(CacheError::ShortBins { sum, steps });
    }
    Ok(Bins::new(compute_bins, cache_bins).mask(steps).into())
}

#[derive(Debug, Clone)]
struct Bins {
    compute: Vec<usize>,
    cache: Vec<usize>,
}

impl Bins {
    fn new(compute: &[usize], cache: &[usize]) -> Self {
        Self {
            compute: compute.to_vec(),
            cache: cache.to_vec(),
        }
    }

    fn of_28(preset: ScmPreset) -> Self {
        match preset {
            ScmPreset::Slow => Self::new(&[8, 3, 3, 2, 1, 1], &[1, 2, 2, 2, 3]),
            ScmPreset::Medium => Self::new(&[6, 2, 2, 2, 2, 1], &[1, 3, 3, 3, 3]),
            ScmPreset::Fast => Self::new(&[6, 1, 1, 1, 1, 1], &[1, 3, 4, 5, 4]),
            ScmPreset::Ultra => Self::new(&[4, 1, 1, 1, 1], &[2, 5, 6, 7]),
        }
    }

    fn of_15(preset: ScmPreset) -> Self {
        match preset {
            ScmPreset::Slow => Self::new(&[4, 2, 2, 2, 1], &[1, 1, 1, 1]),
            ScmPreset::Medium => Self::new(&[4, 2, 1, 1, 1], &[1, 1, 2, 2]),
            ScmPreset::Fast => Self::new(&[3, 1, 1, 1, 1], &[1, 2, 2, 3]),
            ScmPreset::Ultra => Self::new(&[2, 1, 1, 1, 1], &[1, 2, 3, 3]),
        }
    }

    /// The bins of 8 steps; those of 9 begin with one computed step more.
    fn of_few(preset: ScmPreset, steps: usize) -> Self {
        let mut bins = match preset {
            ScmPreset::Slow => Self::new(&[5, 1, 1], &[1]),
            ScmPreset::Medium => Self::new(&[4, 1, 1], &[1, 1]),
            ScmPreset::Fast => Self::new(&[3, 1, 1], &[1, 2]),
            ScmPreset::Ultra => Self::new(&[2, 1, 1], &[2, 2]),
        };
        if steps == 9 && preset == ScmPreset::Slow {
            return Self::new(&[5, 2, 1], &[1]);
        }
        bins.compute[0] += steps - 8;
        bins
    }

    fn sum(&self) -> usize {
        self.compute.iter().chain(&self.cache).sum()
    }

    /// Lengthens the bins in turn until they have this many steps: all but the last computed one by
    /// half of their share, at least by one step, and the last computed one by one step.
    fn grown(mut self, steps: usize) -> Self {
        let first = self.clone();
        let half = steps as f64 / 28.0 * 0.5;
        let by = |bin: usize| ((bin as f64 * half) as usize).max(1);
        let last = self.compute.len() - 1;
        while self.sum() < steps {
            for (index, &cache) in first.cache.iter().enumerate() {
                self.compute[index] += by(first.compute[index]);
                if self.sum() >= steps {
                    return self;
                }
                self.cache[index] += by(cache);
                if self.sum() >= steps {
                    return self;
                }
            }
            self.compute[last] += 1;
        }
        self
    }

    /// Takes steps from the last reused and the last computed bin in turn until there are this many.
    fn cut(mut self, steps: usize) -> Self {
        let mut reused = true;
        while self.sum() > steps {
            let bins = if reused {
                &mut self.cache
            } else {
                &mut self.compute
            };
            if let Some(last) = bins.last_mut() {
                *last -= 1;
                if *last == 0 {
                    bins.pop();
                }
            }
            reused = !reused;
        }
        self
    }

    fn mask(&self, steps: usize) -> Vec<bool> {
        let longest = self.compute.len().max(self.cache.len());
        let mut mask = Vec::with_capacity(steps);
        for index in 0..longest {
            for (bins, computed) in [(&self.compute, true), (&self.cache, false)] {
                let bin = bins.get(index).copied().unwrap_or(0);
                mask.extend(std::iter::repeat_n(computed, bin.min(steps - mask.len())));
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::super::text;
    use super::*;

    /// As Cache-DiT 1.5.0 makes them, from slow to ultra.
    const MASKS: [(usize, [&str; 4]); 10] = [
        (6, ["111001", "111001", "111001", "111001"]),
        (8, ["11111011", "11110101", "11101001", "11001001"]),
        (9, ["111110111", "111110101", "111101001", "111001001"]),
        (
            12,
            [
                "111101101111",
                "111101101001",
                "111010010011",
                "110100100011",
            ],
        ),
        (
            16,
            [
                "1111111101110011",
                "1111110110001001",
                "1111100000000001",
                "1100000000000001",
            ],
        ),
        (
            20,
            [
                "11111111011100111001",
                "11111101100011000101",
                "11111101000000000001",
                "11110000000000000001",
            ],
        ),
        (
            28,
            [
                "1111111101110011100110010001",
                "1111110110001100011000110001",
                "1111110100010000100000100001",
                "1111001000001000000100000001",
            ],
        ),
        (
            29,
            [
                "11111111111101110011100110011",
                "11111111101100011000110001101",
                "11111111101000100001000001001",
                "11111100100000100000010000001",
            ],
        ),
        (
            33,
            [
                "111111111111001110011100110010001",
                "111111111001110001100011000110001",
                "111111111001100010000100000100001",
                "111111000110000000100000010000001",
            ],
        ),
        (
            50,
            [
                "11111111111111111111110011111000111110001110001101",
                "11111111111111110011100000111000001110000011100001",
                "11111111111001100000110000000110000000001100000001",
                "11111110001100000000011000000000001100000000000001",
            ],
        ),
    ];

    #[test]
    fn presets_compute_as_many_steps_as_those_of_cache_dit() {
        for (steps, computed) in [
            (50, [38, 29, 20, 14]),
            (28, [18, 15, 11, 8]),
            (20, [15, 12, 8, 5]),
            (8, [7, 6, 5, 4]),
        ] {
            let counts = ScmPreset::ALL.map(|preset| {
                let mask = scm_mask(preset, steps).unwrap();
                assert_eq!(mask.len(), steps);
                mask.iter().filter(|&&it| it).count()
            });
            assert_eq!(counts, computed, "{steps} steps");
        }
    }

    #[test]
    fn masks_are_those_of_cache_dit() {
        for (steps, masks) in MASKS {
            for (preset, expected) in ScmPreset::ALL.iter().zip(masks) {
                assert_eq!(
                    text(&scm_mask(*preset, steps).unwrap()),
                    expected,
                    "{preset:?}"
                );
            }
        }
    }

    #[test]
    fn every_number_of_steps_from_8_has_masks_with_the_last_step_computed() {
        for steps in (8..200).chain([4, 6]) {
            for preset in ScmPreset::ALL {
                let mask = scm_mask(preset, steps).unwrap();
                assert_eq!(mask.len(), steps);
                assert!(mask[0] && mask[steps - 1], "{preset:?} {steps}");
            }
        }
        let error = scm_mask(ScmPreset::Fast, 7).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the predefined steps masks are for 4, 6, and 8 or more steps, got 7"
        );
    }

    #[test]
    fn bins_of_a_request_are_taken_in_turn_and_must_reach_the_end() {
        let mask = |compute: &[usize], cache: &[usize], steps| {
            scm_mask_of_bins(compute, cache, steps).map(|mask| text(&mask))
        };
        assert_eq!(mask(&[2, 1], &[3, 2], 8).unwrap(), "11000100");
        assert_eq!(mask(&[2, 9], &[3], 8).unwrap(), "11000111");
        assert_eq!(mask(&[2, 1, 2], &[1], 6).unwrap(), "110111");
        assert_eq!(mask(&[1, 0], &[2, 5], 8).unwrap(), "10000000");
        assert_eq!(
            mask(&[2], &[3], 8).unwrap_err().to_string(),
            "scm_compute_bins and scm_cache_bins must cover all 8 steps, got 5 together"
        );
        assert!(mask(&[usize::MAX, 5], &[1], 8).is_ok());
    }

    #[test]
    fn unknown_presets_are_refused_with_the_known_ones() {
        assert_eq!(
            "turbo".parse::<ScmPreset>().unwrap_err(),
            "must be slow, medium, fast or ultra, got \"turbo\""
        );
    }
}
