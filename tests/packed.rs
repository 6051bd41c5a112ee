//! Jobs of the demo model that share their steps, and the encoding of their prompts, against each job
//! alone: within rounding with packing, to the bit without.

use kiln::checkpoint::Checkpoint;
use kiln::engine::{Engine, EngineSettings, SubmitOptions};
use kiln::runtime::{Runtime, RuntimeSettings};
use kiln_models::job::{Conditioning, Job, JobId, Noise, Output, Sampling, Size, TraceTensor};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::testing;

/// Difference of a value in company from the value alone, as a part of the largest magnitude of the
/// tensor.
const ROUNDING: f32 = 2e-6;

const PROMPTS: [&str; 5] = [
    "a large red circle on a blue background",
    "a small yellow square on a purple background",
    "a green triangle",
    "",
    "two words and then a few more of them, so that this prompt is the longest one of all",
];

fn pipeline() -> Box<dyn Pipeline> {
    Runtime::open(&RuntimeSettings::new("demo"))
        .unwrap()
        .pipeline
}

/// A random number generator with a fixed seed, so that a failure can be repeated.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % below
    }

    /// A recorded job of any prompt, size, number of steps and images, with or without guidance.
    fn job(&mut self) -> Job {
        let tokenizer = Checkpoint::demo().unwrap().tokenizer().unwrap();
        let mut prompt = || {
            tokenizer
                .encode_prompt(PROMPTS[self.next(PROMPTS.len())])
                .unwrap()
        };
        let (positive, negative) = (prompt(), prompt());
        let side = |numbers: &mut Self| 16 * (1 + numbers.next(6));
        Job {
            conditioning: positive.into(),
            guidance: testing::guidance(negative, 1.0 + self.next(3) as f64 * 1.5),
            size: Size {
                width: side(self),
                height: side(self),
            },
            sampling: Sampling::new(1 + self.next(4)),
            noise: Noise {
                seed: self.next(1000) as u64,
                generator: NoiseGenerator::Cpu,
            },
            num_images: 1 + self.next(2),
            record: true,
            ..testing::job(64, 1)
        }
    }
}

fn alone(pipeline: &mut dyn Pipeline, job: &Job) -> Output {
    pipeline.start(0, job.clone()).unwrap();
    while pipeline.step(&[0]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(0).unwrap()
}

/// Compares every recorded stage.
fn assert_close(packed: &[TraceTensor], alone: &[TraceTensor], what: &str) {
    assert_eq!(packed.len(), alone.len(), "{what}");
    for (packed, alone) in packed.iter().zip(alone) {
        assert_eq!((&packed.name, &packed.shape), (&alone.name, &alone.shape));
        let largest = alone
            .values
            .iter()
            .fold(0.0_f32, |max, it| max.max(it.abs()));
        let pairs = packed.values.iter().zip(&alone.values);
        let difference = pairs.fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(
            difference <= ROUNDING * largest.max(1.0),
            "{what}, {}: {difference} of {largest}",
            alone.name
        );
    }
}

#[test]
fn random_mixes_of_jobs_are_stepped_together_as_each_is_alone() {
    let mut pipeline = pipeline();
    for mix in 0..12 {
        let mut numbers = Numbers(mix);
        let jobs: Vec<Job> = (0..2 + numbers.next(4)).map(|_| numbers.job()).collect();
        let expected: Vec<Output> = jobs.iter().map(|job| alone(&mut *pipeline, job)).collect();
        if mix.is_multiple_of(2) {
            pipeline.drop_caches();
            let prompts: Vec<&Conditioning> = jobs.iter().flat_map(Job::branches).collect();
            pipeline.encode(&prompts).unwrap();
        }
        // Each joins at some step and leaves after its last.
        let mut waiting: Vec<(JobId, Job)> = (1..).zip(jobs.iter().cloned()).collect();
        let mut running: Vec<JobId> = Vec::new();
        while !waiting.is_empty() || !running.is_empty() {
            while !waiting.is_empty() && (running.is_empty() || numbers.next(2) == 0) {
                let (id, job) = waiting.remove(0);
                pipeline.start(id, job).unwrap();
                running.push(id);
            }
            let stepped: Vec<JobId> = running
                .iter()
                .copied()
                .filter(|_| numbers.next(4) > 0)
                .collect();
            for outcome in pipeline.step(&stepped).unwrap() {
                if outcome.steps_left == 0 {
                    running.retain(|&id| id != outcome.id);
                    let output = pipeline.finish(outcome.id).unwrap();
                    let expected = &expected[outcome.id as usize - 1];
                    let what = format!("mix {mix}, job {}", outcome.id);
                    assert_close(&output.trace, &expected.trace, &what);
                }
            }
        }
    }
}

#[test]
fn prompts_that_are_encoded_together_are_found_at_the_start() {
    let mut pipeline = pipeline();
    let mut numbers = Numbers(1);
    let job = numbers.job();
    let tokenizer = Checkpoint::demo().unwrap().tokenizer().unwrap();
    let prompts: Vec<Conditioning> = PROMPTS
        .iter()
        .map(|prompt| tokenizer.encode_prompt(prompt).unwrap().into())
        .collect();
    let too_short = Conditioning { tokens: vec![1] };
    let unknown = Conditioning {
        tokens: vec![u32::MAX; 50],
    };
    let mut all: Vec<&Conditioning> = prompts.iter().collect();
    // Invalid prompts and repeated ones are left out.
    all.extend([&too_short, &unknown, &prompts[0]]);
    pipeline.encode(&all).unwrap();
    let before = pipeline.caches().embeddings;
    assert_eq!((before.entries, before.misses), (5, 5));
    pipeline.encode(&all).unwrap();
    assert_eq!(pipeline.caches().embeddings, before);
    alone(&mut *pipeline, &job);
    let after = pipeline.caches().embeddings;
    assert_eq!(after.misses, 5);
    assert_eq!(after.hits, before.hits + job.branches().count() as u64);
    // A single prompt waits for its job.
    pipeline.drop_caches();
    pipeline.encode(&[&prompts[1]]).unwrap();
    assert_eq!(pipeline.caches().embeddings.entries, 0);
}

/// Generates jobs in one engine, all of them at once.
fn together(jobs: &[Job], max_step_tokens: usize) -> (Vec<Output>, u64) {
    let settings = EngineSettings {
        max_queue: jobs.len(),
        max_started: 16,
        max_memory: None,
        adapter_cache_bytes: usize::MAX,
        max_step_tokens: Some(max_step_tokens),
        warm_up: None,
    };
    let engine = Engine::start(pipeline(), settings);
    let submit = |job: &Job| {
        engine
            .submit(job.clone(), SubmitOptions::default())
            .unwrap()
    };
    // A first job, so that the others come together.
    let first = submit(&Job {
        size: Size::square(128),
        sampling: Sampling::new(2),
        ..jobs[0].clone()
    });
    let handles: Vec<_> = jobs.iter().map(submit).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let outputs = handles
        .into_iter()
        .map(|handle| runtime.block_on(handle.finished()).unwrap().output)
        .collect();
    runtime.block_on(first.finished()).unwrap();
    (outputs, engine.stats().shared_steps)
}

#[test]
fn eight_jobs_that_come_together_give_the_images_of_each_alone() {
    let mut numbers = Numbers(8);
    let jobs: Vec<Job> = (0..8).map(|_| numbers.job()).collect();
    let mut pipeline = pipeline();
    let expected: Vec<Output> = jobs.iter().map(|job| alone(&mut *pipeline, job)).collect();

    let (outputs, shared) = together(&jobs, 4096);
    assert!(shared > 0, "no step was shared");
    for (index, (output, expected)) in outputs.iter().zip(&expected).enumerate() {
        assert_close(&output.trace, &expected.trace, &format!("job {index}"));
        for (image, expected) in output.images.iter().zip(&expected.images) {
            let values = image.pixels.iter().zip(&expected.pixels);
            assert!(values.into_iter().all(|(a, b)| a.abs_diff(*b) <= 1));
        }
    }

    let (outputs, shared) = together(&jobs, 0);
    assert_eq!(shared, 0);
    assert_eq!(outputs, expected);
}
