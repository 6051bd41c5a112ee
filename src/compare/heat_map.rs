//! Heat maps of the differences between two images.

/// A heat map resolves differences from `10^-HEAT_MAP_DECADES` to 1, the difference between black
/// and white.
pub(super) const HEAT_MAP_DECADES: i32 = 8;

/// Five evenly spaced colours of matplotlib's colour map "inferno".
const STOPS: [[f64; 3]; 5] = [
    [0.0, 0.0, 4.0],
    [87.0, 16.0, 110.0],
    [188.0, 55.0, 84.0],
    [249.0, 142.0, 9.0],
    [252.0, 255.0, 164.0],
];

/// The colour of a difference: black up to `10^-HEAT_MAP_DECADES`, above it brighter in proportion
/// to the logarithm.
pub(super) fn heat_colour(difference: f64) -> [u8; 3] {
    let decades = f64::from(HEAT_MAP_DECADES);
    let share = if difference.is_nan() {
        1.0
    } else {
        (difference.log10() / decades + 1.0).clamp(0.0, 1.0)
    };
    let position = share * (STOPS.len() - 1) as f64;
    let below = (position as usize).min(STOPS.len() - 2);
    let part = position - below as f64;
    let (from, to) = (STOPS[below], STOPS[below + 1]);
    std::array::from_fn(|channel| {
        (from[channel] + part * (to[channel] - from[channel])).round() as u8
    })
}

/// Maps the largest difference of the three channels of each pixel to a colour. Takes RGB values
/// from 0 to 1, returns 8-bit RGB values.
///
/// # Shapes
/// - reference, values, output: `[height, width, 3]`
pub(super) fn heat_map(reference: &[f32], values: &[f32]) -> Vec<u8> {
    let pixels = reference.chunks_exact(3).zip(values.chunks_exact(3));
    let colour = |(theirs, ours): (&[f32], &[f32])| {
        let channels = theirs.iter().zip(ours);
        let differences = channels.map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
        let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
        heat_colour(differences.fold(0.0, larger))
    };
    pixels.flat_map(colour).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pixel_shows_its_largest_difference() {
        let reference = [0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2];
        let values = [0.5, 0.5, 0.5, 1e-6, 1.0, 0.0, 0.2, f32::NAN, 0.2];
        let colours = heat_map(&reference, &values);
        let expected = [[0, 0, 4], [252, 255, 164], [252, 255, 164]];
        assert_eq!(colours, expected.concat());
    }

    #[test]
    fn colours_follow_the_logarithm() {
        assert_eq!(heat_colour(0.0), [0, 0, 4]);
        assert_eq!(heat_colour(1e-9), [0, 0, 4]);
        assert_eq!(heat_colour(1e-4), [188, 55, 84]);
        // Halfway between the first two stops.
        assert_eq!(heat_colour(1e-7), [44, 8, 57]);
        assert_eq!(heat_colour(2.0), [252, 255, 164]);
    }
}
