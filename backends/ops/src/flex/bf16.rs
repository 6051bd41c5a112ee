//! Matrix products with the AVX-512 bf16 dot product instruction (`vdpbf16ps`).

#![expect(unsafe_code, reason = "the instructions are called as intrinsics")]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_load_si512,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
};
use std::ops::Range;

use burn_flex::FlexTensor;
use burn_tensor::{DType, bf16};
use rayon::prelude::*;

use super::matrix::parts;
use super::simd;
use super::thin::{self, Input, LANE, Product, Sums};

/// Values that a task rounds to bf16.
const CHUNK: usize = 1 << 14;
/// Rows of a tile: rows of the left matrix.
const ROWS: usize = 6;
/// Columns of a tile: rows of the right matrix. 6 rows of 4 registers leave 8 of the 32 registers for
/// the operands.
pub(super) const COLUMNS: usize = 64;
/// Pairs of values that are multiplied before the sums are written back: as many as keep a panel in
/// the L2 cache.
const PAIRS: usize = 1024;

/// Two consecutive bf16 values of a row, the first in the lower half.
pub(super) type Pair = u32;
/// Transposed pairs of up to [`COLUMNS`] rows: `[pairs, COLUMNS]`.
pub(super) type Panel = Vec<[Pair; COLUMNS]>;

/// The sums of a tile.
type Tile = [[f32; COLUMNS]; ROWS];

/// Proof that the CPU has AVX-512 with bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Instructions(());

impl Bf16Instructions {
    /// Returns the proof if the CPU has the instructions.
    pub(super) fn detect() -> Option<Self> {
        let available =
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        available.then_some(Self(()))
    }
}

/// Adds `left · rightᵀ` to `sums`.
///
/// # Shapes
/// - left: `[rows, d_in]` in the layout of [`pairs_of_rows`]
/// - right: `[columns, d_in]`, at most [`COLUMNS`] rows
/// - sums: `[rows, COLUMNS]`; columns past those of `right` are unspecified
/// - panel: scratch memory, reused between calls
pub(super) fn add_product(
    _: Bf16Instructions,
    sums: &mut [[f32; COLUMNS]],
    left: &[Pair],
    (right, d_in): (&[bf16], usize),
    panel: &mut Panel,
) {
    let pairs = d_in.div_ceil(2);
    assert_eq!(left.len(), sums.len() * pairs, "rows of the left matrix");
    assert!(right.len() <= COLUMNS * d_in, "columns of the right matrix");
    for first in (0..pairs).step_by(PAIRS) {
        let count = PAIRS.min(pairs - first);
        panel.resize(PAIRS.min(pairs), [0; COLUMNS]);
        let panel = &mut panel[..count];
        interleave(panel, (right, d_in), first);
        for (index, sums) in sums.chunks_mut(ROWS).enumerate() {
            // A tile with fewer rows repeats its last row.
            let row = |i: usize| {
                let row = index * ROWS + i.min(sums.len() - 1);
                &left[row * pairs + first..][..count]
            };
            let rows = std::array::from_fn(row);
            // SAFETY: the caller has proof that the CPU has the instructions.
            let tile = unsafe { tile(rows, panel) };
            for (sums, tile) in sums.iter_mut().zip(tile) {
                sums.iter_mut().zip(tile).for_each(|(sum, x)| *sum += x);
            }
        }
    }
}

/// Rounds rows of `d_in` values to bf16 and packs them as `[rows, d_in / 2]` pairs; if `d_in` is odd,
/// each row is padded with a zero.
pub(super) fn pairs_of_rows(values: &[f32], d_in: usize) -> Vec<Pair> {
    let length = d_in.div_ceil(2);
    let mut pairs = vec![0; values.len() / d_in * length];
    let rows = pairs.par_chunks_mut(length).zip(values.par_chunks(d_in));
    rows.with_min_len(CHUNK.div_ceil(d_in))
        .for_each(|(pairs, row)| simd::vectorised(|| pairs_of_row(pairs, row, 1.0)));
    pairs
}

/// Scales a row and rounds it to pairs.
#[inline(always)]
fn pairs_of_row(pairs: &mut [Pair], row: &[f32], scale: f32) {
    let (whole, last) = row.as_chunks::<2>();
    for (pair, &[first, second]) in pairs.iter_mut().zip(whole) {
        *pair = simd::bf16_bits(scale * first) | simd::bf16_bits(scale * second) << 16;
    }
    if let (&[last], Some(pair)) = (last, pairs.last_mut()) {
        *pair = simd::bf16_bits(scale * last);
    }
}

/// Transposes rows into a panel, from their pair `first` on.
fn interleave(panel: &mut [[Pair; COLUMNS]], (rows, d_in): (&[bf16], usize), first: usize) {
    /// Panel rows that are written for all columns before the next ones: they stay in the L1 cache.
    const PLACES: usize = 64;
    for (block, panel) in panel.chunks_mut(PLACES).enumerate() {
        let start = 2 * (first + block * PLACES);
        for (column, row) in rows.chunks_exact(d_in).enumerate() {
            let end = d_in.min(start + 2 * panel.len());
            let (pairs, last) = row[start..end].as_chunks::<2>();
            for (places, pair) in panel.iter_mut().zip(pairs) {
                places[column] = join(pair[0], pair[1]);
            }
            if let ([last], Some(places)) = (last, panel.last_mut()) {
                places[column] = join(*last, bf16::ZERO);
            }
        }
    }
}

fn join(first: bf16, second: bf16) -> Pair {
    Pair::from(first.to_bits()) | Pair::from(second.to_bits()) << 16
}

/// Computes the products of six rows with all columns of a panel.
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(rows: [&[Pair]; ROWS], panel: &[[Pair; COLUMNS]]) -> Tile {
    const REGISTERS: usize = COLUMNS / 16;
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
    let rows = rows.map(|row| &row[..panel.len()]);
    for (place, columns) in panel.iter().enumerate() {
        // SAFETY: 64 words are four registers of 16, and any bits are bf16 values.
        let columns: [__m512bh; REGISTERS] = unsafe { std::mem::transmute(*columns) };
        for (sums, row) in sums.iter_mut().zip(rows) {
            let both: __m512i = _mm512_set1_epi32(row[place].cast_signed());
            // SAFETY: any bits are bf16 values.
            let both: __m512bh = unsafe { std::mem::transmute(both) };
            for (sum, columns) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, both, columns);
            }
        }
    }
    // SAFETY: four registers are 64 values.
    sums.map(|row| unsafe { std::mem::transmute::<[__m512; REGISTERS], [f32; COLUMNS]>(row) })
}

impl Product for Bf16Instructions {
    type Term = Pair;
    type Stored = bf16;
    const STORED: DType = DType::BF16;
    const COLUMNS: usize = COLUMNS;

    fn stored(matrix: &FlexTensor) -> &[bf16] {
        matrix.storage()
    }

    fn terms(length: usize) -> usize {
        length.div_ceil(2)
    }

    fn rows(self, input: Input<'_>, rows: Range<usize>) -> Option<&[Pair]> {
        let pairs = Self::terms(input.length);
        input.pairs.get(rows.start * pairs..rows.end * pairs)
    }

    fn convert<'a>(self, rows: impl Iterator<Item = (&'a [f32], &'a mut [Pair])>, scale: f32) {
        simd::vectorised(|| rows.for_each(|(row, pairs)| pairs_of_row(pairs, row, scale)));
    }

    fn column(row: &[bf16], first: usize, places: &mut [Pair], width: usize) {
        let (pairs, last) = row[2 * first..].as_chunks::<2>();
        let last = last.first().map(|last| [*last, bf16::ZERO]);
        let places = places.iter_mut().step_by(width);
        for (place, pair) in places.zip(pairs.iter().copied().chain(last)) {
            *place = join(pair[0], pair[1]);
        }
    }

    fn add(self, left: &[Pair], panel: &thin::Panel<Pair>, sums: Sums<'_>) {
        sums.check(left, panel);
        // SAFETY: `self` is proof that the CPU has the instructions, and the sizes are checked.
        unsafe {
            match panel.width / LANE {
                1 => add_thin::<12, 1>(left, panel, sums),
                2 => add_thin::<12, 2>(left, panel, sums),
                3 => add_thin::<6, 3>(left, panel, sums),
                _ => add_thin::<6, 4>(left, panel, sums),
            }
        }
    }
}

/// Computes [`Product::add`] in tiles of `HEIGHT` rows and the panel's registers.
///
/// # Safety
/// The sizes are those that [`Sums::check`] checks.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_thin<const HEIGHT: usize, const REGISTERS: usize>(
    left: &[Pair],
    panel: &thin::Panel<Pair>,
    sums: Sums<'_>,
) {
    let right = panel.values();
    for terms in parts(panel.terms) {
        for top in (0..sums.rows).step_by(HEIGHT) {
            let left = &left[top * panel.terms..][..HEIGHT * panel.terms];
            let mut tile = [[_mm512_setzero_ps(); REGISTERS]; HEIGHT];
            for place in terms.clone() {
                let columns: [__m512bh; REGISTERS] = std::array::from_fn(|register| {
                    let index = place * panel.width + register * LANE;
                    // SAFETY: a panel has `width` values for each term, that begin on a cache line;
                    // any bits are bf16 values.
                    unsafe {
                        let columns: *const __m512i = right.as_ptr().add(index).cast();
                        std::mem::transmute(_mm512_load_si512(columns))
                    }
                });
                for (row, tile) in tile.iter_mut().enumerate() {
                    // SAFETY: there are `HEIGHT` rows of `panel.terms` pairs.
                    let pair = unsafe { *left.get_unchecked(row * panel.terms + place) };
                    let pair: __m512i = _mm512_set1_epi32(pair.cast_signed());
                    // SAFETY: any bits are bf16 values.
                    let pair: __m512bh = unsafe { std::mem::transmute(pair) };
                    for (sum, columns) in tile.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, columns);
                    }
                }
            }
            for (row, tile) in (top..sums.rows).zip(tile) {
                for (register, added) in tile.into_iter().enumerate() {
                    let columns = panel.columns - register * LANE;
                    let mask = u16::MAX >> (LANE - columns.min(LANE));
                    let place = row * sums.stride + sums.first + register * LANE;
                    // SAFETY: the mask has the columns in use, which are inside the slice.
                    unsafe {
                        let place = sums.values.as_mut_ptr().add(place);
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), added);
                        _mm512_mask_storeu_ps(place, mask, sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inputs are small integers, so that sums are exact in any order.
    #[test]
    fn sums_of_products_are_exact() {
        let Some(instructions) = Bf16Instructions::detect() else {
            return;
        };
        let mut panel = Panel::new();
        for (rows, columns, d_in) in [(1, 1, 1), (6, 64, 2), (13, 5, 7), (7, 63, 2051)] {
            let left: Vec<f32> = (0..rows * d_in).map(|i| (i % 7) as f32 - 3.0).collect();
            let right: Vec<f32> = (0..columns * d_in).map(|i| (i % 5) as f32 - 2.0).collect();
            let narrow: Vec<bf16> = right.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut sums = vec![[0.5; COLUMNS]; rows];
            let pairs = pairs_of_rows(&left, d_in);
            add_product(instructions, &mut sums, &pairs, (&narrow, d_in), &mut panel);
            for (row, sums) in left.chunks(d_in).zip(&sums) {
                for (column, &sum) in right.chunks(d_in).zip(sums) {
                    let exact: f32 = row.iter().zip(column).map(|(a, b)| a * b).sum();
                    assert_eq!(sum, exact + 0.5, "{rows} {columns} {d_in}");
                }
            }
        }
    }

    #[test]
    fn rows_of_odd_length_are_padded_with_a_zero() {
        assert_eq!(
            pairs_of_rows(&[1.0, -2.0, 0.5, 1.0, 1.0, 1.0], 3),
            [0xc000_3f80, 0x3f00, 0x3f80_3f80, 0x3f80]
        );
    }
}
