//! Products that are summed in registers: six rows with 32 columns.

use pulp::Simd;

pub(super) const ROWS: usize = 6;
pub(super) const COLUMNS: usize = 32;

/// The sums of six rows and 32 columns.
pub(super) type Tile = [[f32; COLUMNS]; ROWS];

/// Adds `left · right` to a tile.
///
/// All rows of `left` have one length; row `k` of `right` is 32 values from `k * stride` on.
///
/// Six rows of two registers are in use at once, which 16 registers hold, and which are enough to
/// keep two multipliers busy.
#[inline(always)]
pub(super) fn add<S: Simd>(
    simd: S,
    tile: &mut Tile,
    left: [&[f32]; ROWS],
    right: &[f32],
    stride: usize,
) {
    let depth = left[0].len();
    let left = left.map(|row| &row[..depth]);
    let width = 2 * S::F32_LANES;
    for first in (0..COLUMNS).step_by(width) {
        let place = first..first + width;
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        for (sums, tile) in sums.iter_mut().zip(tile.iter()) {
            sums.copy_from_slice(S::as_simd_f32s(&tile[place.clone()]).0);
        }
        for (k, right) in right.chunks(stride).take(depth).enumerate() {
            let right = S::as_simd_f32s(&right[place.clone()]).0;
            let right = [right[0], right[1]];
            for (sums, left) in sums.iter_mut().zip(left) {
                let left = simd.splat_f32s(left[k]);
                sums[0] = simd.mul_add_e_f32s(left, right[0], sums[0]);
                sums[1] = simd.mul_add_e_f32s(left, right[1], sums[1]);
            }
        }
        for (sums, tile) in sums.iter().zip(tile.iter_mut()) {
            S::as_mut_simd_f32s(&mut tile[place.clone()])
                .0
                .copy_from_slice(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    struct Product<'a> {
        left: &'a [f32],
        right: &'a [f32],
        depth: usize,
        stride: usize,
    }

    impl WithSimd for Product<'_> {
        type Output = Tile;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Tile {
            let mut tile = [[0.5; COLUMNS]; ROWS];
            let left = std::array::from_fn(|i| &self.left[i * self.depth..][..self.depth]);
            add(simd, &mut tile, left, self.right, self.stride);
            tile
        }
    }

    /// Small whole numbers, so that every sum is exact in any order, on every instruction set that
    /// this machine has.
    #[test]
    fn every_instruction_set_gives_the_exact_sums() {
        for (depth, stride) in [(1, 32), (7, 33), (130, 34)] {
            let left: Vec<f32> = (0..ROWS * depth).map(|i| (i % 7) as f32 - 3.0).collect();
            let right: Vec<f32> = (0..depth * stride).map(|i| (i % 5) as f32 - 2.0).collect();
            let exact: Tile = std::array::from_fn(|i| {
                std::array::from_fn(|j| {
                    let terms = (0..depth).map(|k| left[i * depth + k] * right[k * stride + j]);
                    terms.sum::<f32>() + 0.5
                })
            });
            let product = || Product {
                left: &left,
                right: &right,
                depth,
                stride,
            };
            assert_eq!(Arch::new().dispatch(product()), exact);
            assert_eq!(Scalar::vectorize(Scalar, product()), exact);
            #[cfg(target_arch = "x86_64")]
            if let Some(avx2) = pulp::x86::V3::try_new() {
                assert_eq!(Simd::vectorize(avx2, product()), exact);
            }
        }
    }
}
