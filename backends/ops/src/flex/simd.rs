//! Auto-vectorised loops over slices, dispatched to the widest SIMD that the CPU supports.

/// Runs `body`, compiled for the CPU's best instruction set. All functions it calls must be inlined:
/// others are compiled for the baseline.
#[inline(always)]
pub(super) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Number of independent partial sums, which shorten the chain of dependent additions.
const LANES: usize = 32;

/// Sum of `f(x)` over a slice.
#[inline(always)]
pub(super) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|&x| f(x)).sum();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Computes `eˣ` to about 1 ulp as `2ⁿ · eʳ` with `|r| ≤ ln 2 / 2`. `x` is clamped to -87.3..88.3:
/// the result is never 0 (at least about the smallest normal number) and never infinite.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to a whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.3 { 88.3 } else { x };
    let x = if x < -87.3 { -87.3 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    // Minimax coefficients of Cephes' expf.
    let mut poly = 1.987_569_2e-4_f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.5,
    ] {
        poly = poly.mul_add(r, coefficient);
    }
    let power = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    (poly.mul_add(r * r, r) + 1.0) * f32::from_bits(power)
}

/// Rounds to the nearest bf16, ties to even. Its bits are the lower 16 of the result.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u32 {
    const NAN: u32 = 0x7fc0;
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { NAN } else { rounded }
}

#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Computes GELU's tanh approximation as `x · sigmoid(2u)`, which equals `0.5 x (1 + tanh u)`.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};
    const TWICE_ROOT_2_OVER_PI: f32 = FRAC_2_SQRT_PI * SQRT_2;
    x / (1.0 + exp(-TWICE_ROOT_2_OVER_PI * (x + 0.044_715 * x * x * x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0_f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(
            worst < 2.0 * f64::from(f32::EPSILON),
            "relative error {worst:e}"
        );
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 2e-38 && exp(1e30).is_finite());
    }

    #[test]
    fn bf16_rounds_to_the_nearest() {
        let ties = [
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_7fff,
            0x3f80_8001,
            0x7f7f_ffff,
        ];
        for bits in ties.into_iter().chain((0..=u32::MAX).step_by(65_521)) {
            let x = f32::from_bits(bits);
            let expected = burn_tensor::bf16::from_f32(x);
            if x.is_nan() {
                assert!(f32::from_bits(bf16_bits(x) << 16).is_nan());
            } else {
                assert_eq!(bf16_bits(x), u32::from(expected.to_bits()), "{x:e}");
            }
        }
    }

    #[test]
    fn activations_match_their_formulas() {
        for i in -2000..2000 {
            let x = i as f32 * 0.01;
            let wide = f64::from(x);
            let silu_exact = wide / (1.0 + (-wide).exp());
            let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044_715 * wide.powi(3));
            let gelu_exact = 0.5 * wide * (1.0 + u.tanh());
            assert!((f64::from(silu(x)) - silu_exact).abs() < 2e-6, "silu {x}");
            assert!(
                (f64::from(gelu_tanh(x)) - gelu_exact).abs() < 2e-6,
                "gelu {x}"
            );
        }
    }

    #[test]
    fn reductions_cover_every_value() {
        for len in [0_usize, 1, 31, 32, 33, 100] {
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(
                sum(&values, |x| x),
                (len * len.saturating_sub(1) / 2) as f32
            );
        }
    }
}
