//! Distances between values and reference values.

use serde::Serialize;

/// The distance between the values of a stage and those of the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    pub max_abs: f64,
    pub mean_abs: f64,
    /// Largest absolute value of the reference.
    pub magnitude: f64,
    /// `max_abs / magnitude`; 0 if both are 0.
    pub max_relative: f64,
    /// `mean_abs / magnitude`; 0 if both are 0.
    pub mean_relative: f64,
    /// Cosine similarity; 1 if all values of both are 0.
    pub cosine: f64,
    /// Number of positions at which either value is infinite or NaN. The other measures exclude
    /// these positions.
    pub non_finite: usize,
}

impl Difference {
    /// # Panics
    /// If the lengths differ.
    pub fn between(reference: &[f32], values: &[f32]) -> Self {
        assert_eq!(reference.len(), values.len(), "stages of different lengths");
        let pairs = reference
            .iter()
            .zip(values)
            .filter(|(a, b)| a.is_finite() && b.is_finite());
        let (mut count, mut max_abs, mut sum_abs, mut magnitude) = (0_u32, 0.0_f64, 0.0, 0.0_f64);
        let (mut dot, mut a_squared, mut b_squared) = (0.0, 0.0, 0.0);
        for (&a, &b) in pairs {
            let (a, b) = (f64::from(a), f64::from(b));
            count += 1;
            max_abs = max_abs.max((a - b).abs());
            sum_abs += (a - b).abs();
            magnitude = magnitude.max(a.abs());
            dot += a * b;
            a_squared += a * a;
            b_squared += b * b;
        }
        let mean_abs = sum_abs / f64::from(count.max(1));
        let relative = |abs: f64| if abs == 0.0 { 0.0 } else { abs / magnitude };
        let cosine = match f64::sqrt(a_squared * b_squared) {
            0.0 if a_squared == b_squared => 1.0,
            0.0 => 0.0,
            norms => dot / norms,
        };
        Self {
            max_abs,
            mean_abs,
            magnitude,
            max_relative: relative(max_abs),
            mean_relative: relative(mean_abs),
            cosine,
            non_finite: values.len() - count as usize,
        }
    }
}

/// Peak signal-to-noise ratio in dB of values from 0 to `peak`; `None` (infinite) for equal values.
///
/// # Panics
/// If the lengths differ.
pub(super) fn psnr(reference: &[f32], values: &[f32], peak: f64) -> Option<f64> {
    assert_eq!(reference.len(), values.len(), "images of different sizes");
    let squares = reference
        .iter()
        .zip(values)
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
    let mean = squares.sum::<f64>() / values.len() as f64;
    (mean > 0.0).then(|| 10.0 * (peak * peak / mean).log10())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * a.abs().max(b.abs())
    }

    #[test]
    fn distances_are_absolute_and_relative_to_the_largest_magnitude() {
        let difference = Difference::between(&[1.0, -4.0, 0.5, 0.0], &[1.0, -3.0, 1.0, 0.0]);
        assert_eq!((difference.max_abs, difference.mean_abs), (1.0, 0.375));
        assert_eq!(difference.magnitude, 4.0);
        assert_eq!(
            (difference.max_relative, difference.mean_relative),
            (0.25, 0.09375)
        );
        let expected = 13.5 / (17.25_f64 * 11.0).sqrt();
        assert!(close(difference.cosine, expected));
        assert_eq!(difference.non_finite, 0);
    }

    #[test]
    fn equal_values_have_distance_0() {
        let difference = Difference::between(&[0.3, -0.7], &[0.3, -0.7]);
        assert_eq!((difference.max_abs, difference.max_relative), (0.0, 0.0));
        assert!(close(difference.cosine, 1.0));
        let nothing = Difference::between(&[0.0, 0.0], &[0.0, -0.0]);
        assert_eq!((nothing.max_relative, nothing.cosine), (0.0, 1.0));
    }

    #[test]
    fn the_relative_difference_from_zeros_is_infinite() {
        let difference = Difference::between(&[0.0, 0.0], &[0.0, 1e-20]);
        assert_eq!(difference.max_relative, f64::INFINITY);
        assert_eq!(difference.cosine, 0.0);
    }

    #[test]
    fn non_finite_values_are_counted_and_excluded() {
        let reference = [1.0, f32::NAN, f32::INFINITY, 2.0, 1.0];
        let values = [1.0, 1.0, f32::INFINITY, 2.5, f32::NEG_INFINITY];
        let difference = Difference::between(&reference, &values);
        assert_eq!(difference.non_finite, 3);
        assert_eq!((difference.max_abs, difference.mean_abs), (0.5, 0.25));
        assert_eq!(difference.magnitude, 2.0);
        assert_eq!(Difference::between(&[f32::NAN], &[0.0]).max_abs, 0.0);
    }

    #[test]
    fn psnr_follows_its_definition() {
        // One of four values off by 10: the mean square is 25.
        let value = psnr(&[0.0, 10.0, 20.0, 30.0], &[0.0, 10.0, 20.0, 40.0], 255.0).unwrap();
        assert!(close(value, 20.0 * (255.0_f64 / 5.0).log10()));
        assert_eq!(psnr(&[0.1, 0.2], &[0.1, 0.2], 1.0), None);
    }
}
