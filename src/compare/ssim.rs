//! Structural similarity of images.
//!
//! Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error
//! visibility to structural similarity", IEEE Transactions on Image Processing 13 (4), 2004.

/// The paper's window: 11×11, a Gaussian of standard deviation 1.5.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
/// The paper's constants, before they are scaled by the range of the values and squared.
const K1: f64 = 0.01;
const K2: f64 = 0.03;
/// Luma of RGB, as in ITU-R BT.601.
const LUMA: [f64; 3] = [0.299, 0.587, 0.114];

/// Mean structural similarity of the luma of two RGB images, over all positions at which the window
/// lies within the image; 1 for equal images. `None` for images smaller than the window.
///
/// # Shapes
/// - reference, values: `[height, width, 3]`, values from 0 to `range`
/// - size: `[height, width]`
///
/// # Panics
/// If the number of values does not match `size`.
pub(super) fn ssim(reference: &[f32], values: &[f32], size: [usize; 2], range: f64) -> Option<f64> {
    let [height, width] = size;
    assert_eq!([reference.len(), values.len()], [height * width * 3; 2]);
    if height < WINDOW || width < WINDOW {
        return None;
    }
    let (x, y) = (luma(reference), luma(values));
    let weighted = |plane: &[f64]| blur(plane, width);
    let product =
        |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
    let (mean_x, mean_y) = (weighted(&x), weighted(&y));
    let square_x = weighted(&product(&x, &x));
    let square_y = weighted(&product(&y, &y));
    let cross = weighted(&product(&x, &y));

    let (c1, c2) = ((K1 * range).powi(2), (K2 * range).powi(2));
    let at = |i: usize| {
        let (mx, my) = (mean_x[i], mean_y[i]);
        let variances = square_x[i] - mx * mx + square_y[i] - my * my;
        let covariance = cross[i] - mx * my;
        let luminance = (2.0 * mx * my + c1) / (mx * mx + my * my + c1);
        luminance * (2.0 * covariance + c2) / (variances + c2)
    };
    Some((0..mean_x.len()).map(at).sum::<f64>() / mean_x.len() as f64)
}

fn luma(rgb: &[f32]) -> Vec<f64> {
    let weigh = |pixel: &[f32]| pixel.iter().zip(LUMA).map(|(&v, w)| f64::from(v) * w).sum();
    rgb.chunks_exact(3).map(weigh).collect()
}

/// The weighted mean of the window at every position at which it lies within the plane.
fn blur(plane: &[f64], width: usize) -> Vec<f64> {
    let centre = (WINDOW / 2) as f64;
    let gaussian = |i: usize| (-(i as f64 - centre).powi(2) / (2.0 * SIGMA * SIGMA)).exp();
    let sum: f64 = (0..WINDOW).map(gaussian).sum();
    let weights: [f64; WINDOW] = std::array::from_fn(|i| gaussian(i) / sum);
    let mean = |values: &[f64]| values.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>();

    let rows = plane.chunks_exact(width);
    let across: Vec<f64> = rows.flat_map(|row| row.windows(WINDOW).map(mean)).collect();
    let width = width + 1 - WINDOW;
    let down = |first: usize| -> f64 {
        let column = across[first..].iter().step_by(width);
        column.zip(weights).map(|(v, w)| v * w).sum()
    };
    let height = across.len() / width + 1 - WINDOW;
    (0..height * width).map(down).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same values as `test_image` of `tests/reference/ssim_values.py`.
    fn test_image(height: usize, width: usize, change: usize) -> Vec<f32> {
        let mut values = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for c in 0..3 {
                    let ramp = (y * 5 + x * 3 + c * 40) % 200;
                    values.push((ramp + (x * 31 + y * 17 + c * 7) * change % 23) as f32);
                }
            }
        }
        values
    }

    /// The numbers are printed by `tests/reference/ssim_values.py` (numpy 2.4.6).
    #[test]
    fn values_match_the_reference_script() {
        for (height, width, off_by_1, off_by_5) in [
            (11, 11, 0.938_062_296_894_087, 0.907_201_574_009_762),
            (16, 29, 0.937_555_935_143_475, 0.905_859_879_847_150),
            (40, 24, 0.953_444_756_180_040, 0.934_087_347_573_150),
        ] {
            let [a, b, c] = [0, 1, 5].map(|change| test_image(height, width, change));
            let size = [height, width];
            let first = ssim(&a, &b, size, 255.0).unwrap();
            let second = ssim(&b, &c, size, 255.0).unwrap();
            assert!((first - off_by_1).abs() < 1e-10, "{first}");
            assert!((second - off_by_5).abs() < 1e-10, "{second}");
        }
        let scaled: Vec<f32> = test_image(16, 29, 0).iter().map(|v| v / 255.0).collect();
        let inverted: Vec<f32> = scaled.iter().map(|v| 1.0 - v).collect();
        let value = ssim(&scaled, &inverted, [16, 29], 1.0).unwrap();
        // The looser bound is for f32: values between 0 and 1 are not exact in it.
        assert!((value - -0.395_048_813_190_259).abs() < 1e-5, "{value}");
    }

    #[test]
    fn equal_images_have_similarity_1_and_small_images_none() {
        let a = test_image(12, 13, 5);
        assert!((ssim(&a, &a, [12, 13], 255.0).unwrap() - 1.0).abs() < 1e-12);
        let small = test_image(10, 64, 5);
        assert_eq!(ssim(&small, &small, [10, 64], 255.0), None);
    }
}
