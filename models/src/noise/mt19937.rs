//! The noise of a torch CPU generator: MT19937 and two forms of the Box-Muller transform.
//!
//! Like torch, this module has two ways of drawing:
//!
//! - fewer than 16 values (`normal_distribution` in `ATen/core/DistributionsHelper.h`): pairs in f64 from
//!   53-bit uniforms;
//! - 16 values or more (`normal_fill` in `ATen/native/cpu/DistributionTemplates.h`): blocks of 16 in
//!   f32 from 24-bit uniforms, with the logarithm, sine and cosine of its AVX2 kernel
//!   (`ATen/native/cpu/avx_mathfun.h`), which are the f32 polynomials of the Cephes library.
//!
//! The second way repeats torch's arithmetic operation by operation, with a fused multiply-add where
//! torch's compiler emits one. All of these operations are correctly rounded, so every platform gives
//! the same bits.

use std::f32::consts::{FRAC_1_SQRT_2, PI, TAU};
use std::f64;

const STATE_LEN: usize = 624;
const SHIFT: usize = 397;

/// Number of values that torch transforms together, and the shortest draw that uses blocks.
const BLOCK: usize = 16;

/// The 32-bit Mersenne Twister, seeded as `ATen/core/MT19937RNGEngine.h` seeds it.
#[derive(Debug, Clone)]
struct Mt19937 {
    state: [u32; STATE_LEN],
    next: usize,
}

impl Mt19937 {
    /// Seeds with the low 32 bits of `seed`, as torch does.
    fn new(seed: u64) -> Self {
        let mut state = [0; STATE_LEN];
        let mut word = seed as u32;
        for (slot, index) in state.iter_mut().zip(1_u32..) {
            *slot = word;
            word = (word ^ (word >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(index);
        }
        Self {
            state,
            next: STATE_LEN,
        }
    }

    /// 32 random bits.
    fn next_u32(&mut self) -> u32 {
        if self.next == STATE_LEN {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// 64 random bits, the first word drawn on top.
    fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.next_u32());
        let low = u64::from(self.next_u32());
        high << 32 | low
    }

    /// A multiple of 2^-24 in `[0, 1)`, from the low 24 bits of one word.
    fn next_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// A multiple of 2^-53 in `[0, 1)`, from the low 53 bits of two words.
    fn next_f64(&mut self) -> f64 {
        (self.next_u64() & ((1 << 53) - 1)) as f64 / 9_007_199_254_740_992.0
    }

    /// Passes over `count` words.
    fn skip(&mut self, mut count: usize) {
        while count > STATE_LEN - self.next {
            count -= STATE_LEN - self.next;
            self.twist();
        }
        self.next += count;
    }

    fn twist(&mut self) {
        for i in 0..STATE_LEN {
            let low = self.state[(i + 1) % STATE_LEN];
            let mixed = (self.state[i] & 0x8000_0000) | (low & 0x7fff_ffff);
            let matrix = if low & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE_LEN] ^ (mixed >> 1) ^ matrix;
        }
        self.next = 0;
    }
}

/// Draws `count` standard normal values, as a CPU generator with this seed does in f32 after `draws` draws
/// of `count` values.
pub(super) fn randn(seed: u64, draws: usize, count: usize) -> Vec<f32> {
    let mut engine = Mt19937::new(seed);
    if count < BLOCK {
        // torch keeps the second value of a pair for the next draw.
        let pairs = normal_pairs(&mut engine);
        return pairs.skip(draws * count).take(count).collect();
    }
    let redrawn = if count.is_multiple_of(BLOCK) {
        0
    } else {
        BLOCK
    };
    engine.skip(draws * (count + redrawn));
    let mut values: Vec<f32> = (0..count).map(|_| engine.next_f32()).collect();
    let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
    blocks.iter_mut().for_each(box_muller);
    if !rest.is_empty()
        && let Some(tail) = values.last_chunk_mut::<BLOCK>()
    {
        // torch draws no partial block: it draws the last 16 values again, over finished ones.
        tail.fill_with(|| engine.next_f32());
        box_muller(tail);
    }
    values
}

/// Draws values in pairs of two uniforms each: first the cosine, then the sine.
fn normal_pairs(engine: &mut Mt19937) -> impl Iterator<Item = f32> {
    std::iter::repeat_with(|| {
        let angle = f64::consts::TAU * engine.next_f64();
        let radius = (-2.0 * (-engine.next_f64()).ln_1p()).sqrt();
        [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
    })
    .flatten()
}

/// Turns 16 uniforms into 16 normals: value `i` of the first half gives the radius and value `i + 8`
/// the angle of two results, the cosine at `i` and the sine at `i + 8`.
fn box_muller(block: &mut [f32; BLOCK]) {
    for i in 0..BLOCK / 2 {
        let radius = (-2.0 * ln(1.0 - block[i])).sqrt();
        let (sin, cos) = sin_cos(TAU * block[i + BLOCK / 2]);
        // Adding zero, torch's mean, makes a negative zero positive.
        block[i] = radius * cos + 0.0;
        block[i + BLOCK / 2] = radius * sin + 0.0;
    }
}

/// Cephes `logf` of a positive normal number: the mantissa `1 + x` in `[sqrt(1/2), sqrt(2))` goes
/// through `x - x²/2 + x³ P(x)`, and the exponent adds `ln 2` in two parts.
fn ln(value: f32) -> f32 {
    const P: [f32; 9] = [
        0.070_376_836,
        -0.115_146_1,
        0.116_769_984,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_57,
        0.200_007_14,
        -0.249_999_94,
        0.333_333_3,
    ];
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LN_2_HIGH: f32 = 0.693_359_4;

    let bits = value.to_bits();
    let mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f00_0000);
    let mut exponent = (bits >> 23) as f32 - 126.0;
    let mut x = mantissa - 1.0;
    if mantissa < FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let squared = x * x;
    let mut y = (horner(&P, x) * x).mul_add(squared, exponent * LN_2_LOW);
    y = squared.mul_add(-0.5, y);
    exponent.mul_add(LN_2_HIGH, x + y)
}

/// Cephes `sinf` and `cosf` of an angle in `[0, 2π]`: two polynomials on `[-π/4, π/4]` after taking
/// away a multiple of π/2 in three parts.
fn sin_cos(angle: f32) -> (f32, f32) {
    const FRAC_PI_4_PARTS: [f32; 3] = [0.785_156_25, 2.418_756_5e-4, 3.774_895e-8];
    const SIN: [f32; 3] = [-1.951_529_6e-4, 0.008_332_161, -0.166_666_55];
    const COS: [f32; 3] = [2.443_315_7e-5, -0.001_388_731_6, 0.041_666_646];

    // The nearest multiple of π/2, counted in π/4.
    let octant = ((angle * (4.0 / PI)) as u32 + 1) & !1;
    let x = FRAC_PI_4_PARTS
        .iter()
        .fold(angle, |x, part| (octant as f32).mul_add(-part, x));
    let squared = x * x;
    let cos = (horner(&COS, squared) * squared).mul_add(squared, -0.5 * squared) + 1.0;
    let sin = (horner(&SIN, squared) * squared).mul_add(x, x);
    match octant / 2 % 4 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// The polynomial with these coefficients, highest power first.
fn horner(coefficients: &[f32], x: f32) -> f32 {
    coefficients
        .iter()
        .copied()
        .reduce(|sum, next| sum.mul_add(x, next))
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_those_of_the_published_generator() {
        // The C++ standard, [rand.predef]: word 10000 of mt19937 with its default seed 5489.
        let mut engine = Mt19937::new(5489);
        let word = (0..10_000).map(|_| engine.next_u32()).last();
        assert_eq!(word, Some(4_123_659_995));
    }

    #[test]
    fn polynomials_are_near_the_true_functions() {
        for step in 1..=100_000_u32 {
            let uniform = step as f32 / 100_000.0;
            assert!((ln(uniform) - uniform.ln()).abs() < 2e-6);
            let angle = TAU * uniform;
            let (sin, cos) = sin_cos(angle);
            assert!((sin - angle.sin()).abs() < 2e-7);
            assert!((cos - angle.cos()).abs() < 2e-7);
        }
    }
}
