//! Tolerances of comparisons, with the measurements they follow from.

use kiln_models::loading::ModelDType;
use serde::Serialize;

use super::{Difference, ImageDifference};

/// Largest accepted difference between a run and the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// Bound of [`Difference::max_relative`] of every stage except the 8-bit image.
    pub max_relative: f64,
    /// Bound of the 8-bit image. The name in JSON reports is `picture`.
    #[serde(rename = "picture")]
    pub image: ImageBound,
}

/// Bound of the difference between 8-bit images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageBound {
    /// Smallest share of equal values, from 0 to 1.
    EqualShare(f64),
    /// Smallest peak signal-to-noise ratio, in dB.
    PsnrDb(f64),
}

/// f32 has 24 significant bits, and backends sum in different orders. Measured for the demo model,
/// 20 steps with guidance, 128²: 3.0e-6 between flex and ndarray, 3.7e-6 between flex and diffusers.
/// The margin up to 1e-3 is for GPUs, whose exponentials and reciprocals are less accurate, and for
/// deeper models and more steps. 1e-3 is a quarter of an 8-bit step, so few values round to a neighbour.
const F32: Tolerance = Tolerance {
    max_relative: 1e-3,
    image: ImageBound::EqualShare(0.999),
};

/// bf16 has 8 significant bits: a rounding changes a value by up to 0.2 %, and implementations round at
/// different points; flex does not round between layers. The bound covers the reference implementation:
/// diffusers' own bf16 and f32 images of the demo model, as above, differ by 5.5e-3 to 8.6e-2 and 49 to
/// 58 dB over 16 seeds. For two layers of Qwen-Image's width they differ by 40 dB (README), rounded
/// timesteps included. At such distances many 8-bit values round to a neighbour (76.6 % are equal), so the
/// bound of the image is a signal-to-noise ratio.
const BF16: Tolerance = Tolerance {
    max_relative: 1e-1,
    image: ImageBound::PsnrDb(36.0),
};

/// f16 has 11 significant bits, 8 times the resolution of bf16, and a factor of 8 is 18 dB. diffusers' own
/// f16 and f32 images of the demo model differ by up to 6.8e-3 and by at least 62 dB, over the same seeds.
const F16: Tolerance = Tolerance {
    max_relative: 1e-2,
    image: ImageBound::PsnrDb(54.0),
};

impl Tolerance {
    /// The tolerance for runs in a dtype.
    pub fn of(dtype: ModelDType) -> Self {
        match dtype {
            ModelDType::F32 => F32,
            ModelDType::Bf16 => BF16,
            ModelDType::F16 => F16,
        }
    }

    pub(super) fn allows(&self, difference: &Difference) -> bool {
        difference.non_finite == 0 && difference.max_relative <= self.max_relative
    }
}

impl ImageBound {
    pub(super) fn allows(self, difference: &ImageDifference) -> bool {
        match self {
            Self::EqualShare(least) => difference.equal_share >= least,
            Self::PsnrDb(least) => difference.psnr_db.is_none_or(|psnr| psnr >= least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive_and_non_finite_values_exceed_them() {
        let off_by = |value| Difference::between(&[1.0, 0.0], &[1.0, value]);
        let tolerance = Tolerance {
            max_relative: 0.5,
            ..F32
        };
        assert!(tolerance.allows(&off_by(0.5)));
        assert!(!tolerance.allows(&off_by(0.501)));
        assert!(!tolerance.allows(&off_by(f32::NAN)));
        assert!(!tolerance.allows(&off_by(f32::INFINITY)));
    }

    #[test]
    fn image_bounds_are_inclusive() {
        let image = |psnr_db, equal_share| ImageDifference {
            psnr_db,
            ssim: None,
            equal_share,
        };
        let equal = ImageBound::EqualShare(0.999);
        assert!(equal.allows(&image(Some(1.0), 0.999)));
        assert!(!equal.allows(&image(Some(99.0), 0.9989)));
        let psnr = ImageBound::PsnrDb(36.0);
        assert!(psnr.allows(&image(Some(36.0), 0.0)));
        assert!(psnr.allows(&image(None, 1.0)));
        assert!(!psnr.allows(&image(Some(35.9), 1.0)));
    }
}
