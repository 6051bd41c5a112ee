//! How far runs may be apart, and why that far.

use kiln_models::loading::ModelDType;
use serde::Serialize;

use super::{Difference, PictureDifference};

/// How far a run may be from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// Of every stage but the 8-bit picture: the largest difference, relative to the largest
    /// magnitude of the reference.
    pub max_relative: f64,
    /// Of the 8-bit picture.
    pub picture: PictureBound,
}

/// What the 8-bit picture must keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PictureBound {
    /// At least this share of the values is equal, from 0 to 1.
    EqualShare(f64),
    /// The peak signal-to-noise ratio is at least this, in dB.
    PsnrDb(f64),
}

/// f32 has 24 significant bits, and backends sum in different orders. Measured for the demo model,
/// 20 steps with guidance, 128²: 3.0e-6 between flex and ndarray, 3.7e-6 between flex and diffusers.
/// The rest of 1e-3 is for GPUs, whose exponentials and reciprocals are coarser, and for deeper
/// models and more steps. 1e-3 is a quarter of an 8-bit step, so few values round to a neighbour.
const F32: Tolerance = Tolerance {
    max_relative: 1e-3,
    picture: PictureBound::EqualShare(0.999),
};

/// bf16 has 8 significant bits: a rounding moves a value by up to 0.2 %, and implementations round in
/// different places, flex not at all between layers. The bound is what the reference implementation needs:
/// diffusers' own bf16 and f32 pictures of the demo model, as above, differ by 5.5e-3 to 8.6e-2 and 49 to
/// 58 dB over 16 seeds. For two layers
/// of Qwen-Image's width they are 40 dB apart (README), rounded timesteps included. At such distances many
/// 8-bit values round to a neighbour (76.6 % are equal), so the picture is held to a signal-to-noise ratio
/// instead.
const BF16: Tolerance = Tolerance {
    max_relative: 1e-1,
    picture: PictureBound::PsnrDb(36.0),
};

/// f16 has 11 significant bits, 8 times as fine as bf16, and a factor of 8 is 18 dB. diffusers' own f16 and
/// f32 pictures of the demo model differ by up to 6.8e-3, and 62 dB and more, over the same seeds.
const F16: Tolerance = Tolerance {
    max_relative: 1e-2,
    picture: PictureBound::PsnrDb(54.0),
};

impl Tolerance {
    /// For runs in a type.
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

impl PictureBound {
    pub(super) fn allows(self, difference: &PictureDifference) -> bool {
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
    fn bounds_are_inclusive_and_nothing_infinite_is_within() {
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
    fn pictures_are_held_to_their_bound() {
        let picture = |psnr_db, equal_share| PictureDifference {
            psnr_db,
            ssim: None,
            equal_share,
        };
        let equal = PictureBound::EqualShare(0.999);
        assert!(equal.allows(&picture(Some(1.0), 0.999)));
        assert!(!equal.allows(&picture(Some(99.0), 0.9989)));
        let psnr = PictureBound::PsnrDb(36.0);
        assert!(psnr.allows(&picture(Some(36.0), 0.0)));
        assert!(psnr.allows(&picture(None, 1.0)));
        assert!(!psnr.allows(&picture(Some(35.9), 1.0)));
    }
}
