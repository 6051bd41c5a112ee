//! The demo model's pipeline, called directly. The images of a job must not depend on concurrent jobs,
//! on caches filled by earlier jobs, or on previews.

use kiln::checkpoint::Checkpoint;
use kiln::runtime::{Runtime, RuntimeSettings};
use kiln_models::job::{Job, JobId, Noise, Output, RgbImage, Size};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::{CacheUse, Pipeline, PipelineError};
use kiln_models::testing;

fn pipeline() -> Box<dyn Pipeline> {
    let settings = RuntimeSettings::new("demo");
    Runtime::open(&settings).unwrap().pipeline
}

fn job(prompt: &str, side: usize, steps: usize) -> Job {
    let tokenizer = Checkpoint::demo().unwrap().tokenizer().unwrap();
    Job {
        conditioning: tokenizer.encode_prompt(prompt).unwrap().into(),
        guidance: testing::guidance(tokenizer.encode_prompt(" ").unwrap(), 4.0),
        noise: Noise {
            seed: 7,
            generator: NoiseGenerator::Cpu,
        },
        ..testing::job(side, steps)
    }
}

fn generate(pipeline: &mut dyn Pipeline, id: JobId, job: Job) -> Output {
    pipeline.start(id, job).unwrap();
    while pipeline.step(&[id]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(id).unwrap()
}

/// Peak signal-to-noise ratio in dB.
fn psnr(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
    let mean = squares.sum::<f64>() / a.len() as f64;
    20.0 * 255_f64.log10() - 10.0 * mean.log10()
}

fn values(image: &RgbImage) -> Vec<f64> {
    image.pixels.iter().map(|&value| value.into()).collect()
}

#[test]
fn previews_approach_the_image_and_do_not_change_it() {
    let mut pipeline = pipeline();
    let job = || job("a large red circle on a blue background", 128, 8);
    let plain = generate(&mut *pipeline, 1, job());
    let image = values(&plain.images[0]);

    pipeline.start(2, job()).unwrap();
    let too_early = pipeline.preview(2).unwrap_err();
    assert!(matches!(too_early, PipelineError::NothingToShow(2)));
    let mut closeness = Vec::new();
    loop {
        let steps_left = pipeline.step(&[2]).unwrap()[0].steps_left;
        let preview = pipeline.preview(2).unwrap();
        assert_eq!((preview.height, preview.width), (128, 128));
        if steps_left == 0 {
            // After the last step the preview is the image.
            assert_eq!(preview, plain.images[0]);
            break;
        }
        closeness.push(psnr(&values(&preview), &image));
    }
    assert!(closeness.iter().all(|&close| close > 20.0), "{closeness:?}");
    assert!(closeness[6] > 50.0, "{closeness:?}");
    assert_eq!(pipeline.finish(2).unwrap(), plain);
}

/// Averages each square of `factor` × `factor` pixels.
fn shrunk(image: &RgbImage, factor: usize) -> Vec<f64> {
    let (height, width) = (image.height / factor, image.width / factor);
    let mut shrunk = vec![0.0; height * width * 3];
    for (index, &value) in image.pixels.iter().enumerate() {
        let (pixel, channel) = (index / 3, index % 3);
        let (row, column) = (pixel / image.width / factor, pixel % image.width / factor);
        shrunk[(row * width + column) * 3 + channel] += f64::from(value);
    }
    let pixels = (factor * factor) as f64;
    shrunk.iter().map(|sum| sum / pixels).collect()
}

/// The demo model is not trained at this size, so only the background of the image is comparable.
#[test]
fn previews_of_large_images_are_scaled_down() {
    let mut pipeline = pipeline();
    let large = Job {
        size: Size {
            height: 512,
            width: 64,
        },
        ..job("a small white triangle on a green background", 64, 2)
    };
    pipeline.start(1, large).unwrap();
    while pipeline.step(&[1]).unwrap()[0].steps_left > 0 {}
    let preview = pipeline.preview(1).unwrap();
    assert_eq!((preview.height, preview.width), (256, 32));
    let output = pipeline.finish(1).unwrap();
    let closeness = psnr(&values(&preview), &shrunk(&output.images[0], 2));
    assert!(closeness > 15.0, "{closeness}");
}

#[test]
fn the_preview_of_several_images_shows_the_first() {
    let mut pipeline = pipeline();
    let two = Job {
        num_images: 2,
        ..job("a large red circle on a blue background", 64, 3)
    };
    pipeline.start(1, two).unwrap();
    while pipeline.step(&[1]).unwrap()[0].steps_left > 0 {}
    let preview = pipeline.preview(1).unwrap();
    let [first, second] = pipeline.finish(1).unwrap().images.try_into().unwrap();
    assert_ne!(first, second);
    let closeness = [&first, &second].map(|image| psnr(&values(&preview), &values(image)));
    // Decoding one image and decoding a batch of two differ by rounding.
    assert!(closeness[0] > 50.0, "{closeness:?}");
    assert!(closeness[1] < 40.0, "{closeness:?}");
}

fn hits_and_misses(cache: CacheUse) -> (u64, u64) {
    (cache.hits, cache.misses)
}

#[test]
fn images_do_not_depend_on_cached_values_of_earlier_jobs() {
    let (mut fresh, mut used) = (pipeline(), pipeline());
    let circle = || job("a large red circle on a blue background", 64, 3);
    let square = || job("a small yellow square on a purple background", 64, 3);
    let expected = generate(&mut *fresh, 1, circle());
    assert_eq!(hits_and_misses(fresh.caches().embeddings), (0, 2));
    assert_eq!(hits_and_misses(fresh.caches().modulation), (0, 1));

    // The negative prompt and the schedule are cached from the square.
    generate(&mut *used, 1, square());
    let misses_only = generate(&mut *used, 2, circle());
    assert_eq!(hits_and_misses(used.caches().embeddings), (1, 3));
    assert_eq!(hits_and_misses(used.caches().modulation), (1, 1));
    // Now both prompts and the schedule are cached.
    let hits_only = generate(&mut *used, 3, circle());
    assert_eq!(hits_and_misses(used.caches().embeddings), (3, 3));
    assert_eq!(hits_and_misses(used.caches().modulation), (2, 1));
    assert_eq!(misses_only, expected);
    assert_eq!(hits_only, expected);

    // Another number of steps has another schedule.
    generate(&mut *used, 4, job("", 64, 2));
    assert_eq!(hits_and_misses(used.caches().modulation), (2, 2));
    let caches = used.caches();
    assert_eq!(
        (caches.embeddings.entries, caches.modulation.entries),
        (4, 2)
    );
    for cache in [caches.embeddings, caches.modulation] {
        assert!(
            cache.bytes > 0 && cache.bytes <= cache.max_bytes,
            "{cache:?}"
        );
    }
}

#[test]
fn images_do_not_depend_on_concurrent_jobs() {
    let mut pipeline = pipeline();
    let jobs = || {
        [
            job("a large red circle on a blue background", 64, 4),
            Job {
                guidance: None,
                ..job("a green square on a white background", 96, 3)
            },
        ]
    };
    let alone = jobs().map(|job| generate(&mut *pipeline, 0, job));
    for (id, job) in (1..).zip(jobs()) {
        pipeline.start(id, job).unwrap();
    }
    // Interleaved steps, as the engine makes them.
    for id in [1, 2, 1, 1, 2, 2, 1] {
        pipeline.step(&[id]).unwrap();
    }
    let beside = [1, 2].map(|id| pipeline.finish(id).unwrap());
    assert_eq!(beside, alone);
}

#[test]
fn jobs_that_take_turns_do_not_rebuild_their_position_tables() {
    let mut pipeline = pipeline();
    pipeline.start(1, job("a red circle", 64, 4)).unwrap();
    pipeline.start(2, job("a red circle", 96, 4)).unwrap();
    for id in [1, 2, 1, 2, 1, 2, 1, 2] {
        pipeline.step(&[id]).unwrap();
    }
    assert_eq!(hits_and_misses(pipeline.caches().positions), (6, 2));
}
