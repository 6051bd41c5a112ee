//! Comparisons of recordings of one pixel.

use super::heat_map::heat_colour;
use super::*;

const TOLERANCE: Tolerance = Tolerance {
    max_relative: 1e-3,
    image: ImageBound::EqualShare(0.999),
};

fn stage(name: &str, shape: &[usize], values: &[f32]) -> TraceTensor {
    TraceTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        values: values.to_vec(),
    }
}

/// A run of two steps whose image has one pixel; `red` is its first channel.
fn recording(name: &str, latents: [f32; 2], red: f32) -> Recording {
    Recording {
        name: name.to_owned(),
        trace: vec![
            stage("prompt_embeds", &[1, 1, 2], &[1.0, -2.0]),
            stage("latents_step0", &[1, 1, 2], &[latents[0], 4.0]),
            stage("latents_step1", &[1, 1, 2], &[latents[1], 4.0]),
            stage("image_float", &[1, 1, 1, 3], &[red, 0.5, 0.5]),
        ],
        image: RgbImage {
            height: 1,
            width: 1,
            pixels: vec![(red * 255.0).round() as u8, 128, 128],
        },
    }
}

#[test]
fn equal_runs_agree_at_every_stage() {
    let run = recording("a", [1.0, 2.0], 0.25);
    let comparison = Comparison::new(&run, &run, TOLERANCE).unwrap();
    assert!(comparison.within_tolerance());
    let labels: Vec<String> = comparison
        .stages
        .iter()
        .map(StageDifference::label)
        .collect();
    let expected = [
        "prompt embeddings",
        "latents after step 1",
        "latents after step 2",
        "image before rounding",
        "8-bit image",
    ];
    assert_eq!(labels, expected);
    let differences = comparison.stages.iter().map(|stage| stage.difference);
    assert!(
        differences
            .into_iter()
            .all(|difference| difference.max_abs == 0.0)
    );
    assert_eq!(comparison.heat_map.pixels, heat_colour(0.0));
}

#[test]
fn the_first_stage_over_the_tolerance_is_named() {
    let reference = recording("a", [1.0, 2.0], 0.25);
    // 0.003 of 4 is within 1e-3, 0.005 is not.
    let run = recording("b", [1.003, 2.005], 0.25);
    let comparison = Comparison::new(&reference, &run, TOLERANCE).unwrap();
    assert_eq!(
        comparison.first_over_tolerance.as_deref(),
        Some("latents_step1")
    );
    let worst = comparison.worst_step().unwrap();
    assert_eq!(worst.step(), Some(2));
    assert!((worst.difference.max_relative - 0.00125).abs() < 1e-6);
}

#[test]
fn the_8_bit_image_has_its_own_bound() {
    let reference = recording("a", [1.0, 2.0], 0.2529);
    // They differ by less than 1e-3 and round to neighbouring values.
    let run = recording("b", [1.0, 2.0], 0.2530);
    let comparison = Comparison::new(&reference, &run, TOLERANCE).unwrap();
    assert_eq!(comparison.first_over().unwrap().label(), "8-bit image");
    let image = comparison.stage(IMAGE_U8).unwrap().image.unwrap();
    assert!((image.equal_share - 2.0 / 3.0).abs() < 1e-12);
    let by_psnr = Tolerance {
        image: ImageBound::PsnrDb(36.0),
        ..TOLERANCE
    };
    let comparison = Comparison::new(&reference, &run, by_psnr).unwrap();
    assert!(comparison.within_tolerance());
}

#[test]
fn stages_missing_from_the_reference_are_skipped() {
    let mut reference = recording("a", [1.0, 2.0], 0.25);
    reference.trace.retain(|stage| stage.name != IMAGE_FLOAT);
    let run = recording("b", [1.0, 2.0], 0.5);
    let comparison = Comparison::new(&reference, &run, TOLERANCE).unwrap();
    assert!(comparison.stage(IMAGE_FLOAT).is_none());
    assert!(comparison.stage(IMAGE_U8).is_some());
    // Made from the 8-bit images then: 64 and 128 of 255.
    assert_eq!(comparison.heat_map.pixels, heat_colour(64.0 / 255.0));
}

#[test]
fn runs_of_different_shapes_are_not_compared() {
    let reference = recording("a", [1.0, 2.0], 0.25);
    let mut run = recording("b", [1.0, 2.0], 0.25);
    run.trace[0] = stage("prompt_embeds", &[1, 2, 1], &[1.0, -2.0]);
    let error = Comparison::new(&reference, &run, TOLERANCE).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "prompt_embeds has the shape [1, 2, 1] on b and [1, 1, 2] in the reference a"
        ),
        "{error}"
    );
    let mut run = recording("b", [1.0, 2.0], 0.25);
    run.trace.truncate(3);
    run.image = RgbImage {
        height: 1,
        width: 2,
        pixels: vec![0; 6],
    };
    assert!(Comparison::new(&reference, &run, TOLERANCE).is_err());
}
