//! Register-tiled matrix products: tiles of 6 rows × 32 columns.

use std::ops::{Deref, DerefMut};

use pulp::Simd;

pub(super) const ROWS: usize = 6;
pub(super) const COLUMNS: usize = 32;

/// One value for each of the 32 columns. Aligned, because a load across two cache lines takes twice
/// the time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(align(64))]
pub(super) struct Lane(pub(super) [f32; COLUMNS]);

impl Deref for Lane {
    type Target = [f32; COLUMNS];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Lane {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// The sums of a tile, by row.
pub(super) type Tile = [Lane; ROWS];

/// The six rows from `top` on. If fewer are left before `end`, the last one is repeated.
#[inline(always)]
pub(super) fn rows<'a>(
    top: usize,
    end: usize,
    row: impl Fn(usize) -> &'a [f32],
) -> [&'a [f32]; ROWS] {
    std::array::from_fn(|i| row((top + i).min(end - 1)))
}

/// Transposes up to 32 rows: lane `i` receives the `i`-th value of every row.
#[inline(always)]
pub(super) fn interleave<'a>(lanes: &mut [Lane], rows: impl Iterator<Item = &'a [f32]>) {
    for (column, row) in rows.enumerate() {
        for (lane, value) in lanes.iter_mut().zip(row) {
            lane[column] = *value;
        }
    }
}

/// Adds `left · right` to a tile. All rows of `left` have the length of `right`.
///
/// The inner loop keeps six rows of two registers as sums: they fit 16 registers, and are enough
/// independent sums to keep two FMA units busy.
#[inline(always)]
pub(super) fn add<S: Simd>(simd: S, tile: &mut Tile, left: [&[f32]; ROWS], right: &[Lane]) {
    let [a, b, c, d, e, f] = left;
    let width = 2 * S::F32_LANES;
    for first in (0..COLUMNS).step_by(width) {
        let place = first..first + width;
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        for (sums, tile) in sums.iter_mut().zip(tile.iter()) {
            sums.copy_from_slice(S::as_simd_f32s(&tile[place.clone()]).0);
        }
        // Zipped iterators avoid bounds checks.
        let rows = a.iter().zip(b).zip(c).zip(d).zip(e).zip(f).zip(right);
        for ((((((a, b), c), d), e), f), right) in rows {
            let right = S::as_simd_f32s(&right[place.clone()]).0;
            let right = [right[0], right[1]];
            for (sums, left) in sums.iter_mut().zip([a, b, c, d, e, f]) {
                let left = simd.splat_f32s(*left);
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
        right: &'a [Lane],
    }

    impl WithSimd for Product<'_> {
        type Output = Tile;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Tile {
            let mut tile = [Lane([0.5; COLUMNS]); ROWS];
            let depth = self.right.len();
            let left = std::array::from_fn(|i| &self.left[i * depth..][..depth]);
            add(simd, &mut tile, left, self.right);
            tile
        }
    }

    /// The inputs are small integers, so that sums are exact in any order, on every instruction set
    /// that this machine supports.
    #[test]
    fn every_instruction_set_gives_the_exact_sums() {
        for depth in [1, 7, 130] {
            let left: Vec<f32> = (0..ROWS * depth).map(|i| (i % 7) as f32 - 3.0).collect();
            let right: Vec<Lane> = (0..depth)
                .map(|k| {
                    Lane(std::array::from_fn(|j| {
                        ((k * COLUMNS + j) % 5) as f32 - 2.0
                    }))
                })
                .collect();
            let exact: Tile = std::array::from_fn(|i| {
                Lane(std::array::from_fn(|j| {
                    let terms = (0..depth).map(|k| left[i * depth + k] * right[k][j]);
                    terms.sum::<f32>() + 0.5
                }))
            });
            let product = || Product {
                left: &left,
                right: &right,
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
