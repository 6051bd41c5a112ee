//! When previews are made.

use std::num::NonZeroUsize;

use kiln_models::job::{Job, Output};

use super::bench::{Bench, Call, PANIC_IN_PREVIEW, behaving, job, ms, received, settings};
use crate::engine::{Event, SubmitOptions, Timings};

/// Runs a job with a preview every so many steps. Returns the steps that were shown, the values
/// that the previews were marked with, and the end.
fn run(job: Job, every: usize) -> (Vec<usize>, Vec<u8>, Output, Timings, Vec<Call>) {
    let mut bench = Bench::new(settings(0, 1));
    let options = SubmitOptions {
        preview_every: NonZeroUsize::new(every),
        ..SubmitOptions::default()
    };
    let mut handle = bench.shared.submit(job, options).unwrap();
    bench.run();
    let (mut steps, mut marks) = (Vec::new(), Vec::new());
    let mut last_step = 0;
    for event in received(&mut handle) {
        match event {
            Event::Step { done, .. } => last_step = done,
            Event::Preview { step, image } => {
                assert_eq!(step, last_step);
                steps.push(step);
                marks.push(image.pixels[1]);
            }
            Event::Finished(finished) => {
                let calls = bench.calls();
                return (steps, marks, finished.output, finished.timings, calls);
            }
            _ => {}
        }
    }
    panic!("the job did not finish");
}

#[test]
fn previews_come_after_every_so_many_steps_but_the_last() {
    for (total, every, expected) in [
        (5, 2, vec![2, 4]),
        (6, 2, vec![2, 4]),
        (4, 1, vec![1, 2, 3]),
        (5, 5, vec![]),
        (5, 9, vec![]),
    ] {
        let (steps, marks, _, timings, _) = run(job(1, 2, total), every);
        assert_eq!(steps, expected, "every {every} of {total}");
        // The pipeline marks a preview with the steps that are left.
        let left: Vec<u8> = expected.iter().map(|step| (total - step) as u8).collect();
        assert_eq!(marks, left);
        assert_eq!(timings.previews, ms(5) * expected.len() as u32);
    }
}

#[test]
fn there_are_no_previews_unless_asked_for() {
    let (steps, _, _, _, calls) = run(job(1, 2, 5), 0);
    assert!(steps.is_empty());
    assert!(!calls.contains(&Call::Preview(1)));
}

#[test]
fn a_preview_that_cannot_be_made_is_left_out_and_the_job_goes_on() {
    let (steps, _, output, _, calls) = run(behaving(PANIC_IN_PREVIEW, job(1, 2, 4)), 2);
    assert!(calls.contains(&Call::Preview(1)));
    assert!(steps.is_empty());
    assert_eq!(output.images[0].pixels, [1, 255, 255]);
}

#[test]
fn nobody_who_has_gone_is_shown_a_preview() {
    let mut bench = Bench::new(settings(0, 1));
    let options = SubmitOptions {
        preview_every: NonZeroUsize::new(1),
        ..SubmitOptions::default()
    };
    let handle = bench.shared.submit(job(1, 4, 5), options).unwrap();
    bench.at(ms(10), move || drop(handle));
    bench.run();
    assert_eq!(
        bench.calls(),
        [Call::Start(1), Call::Step(1), Call::Discard(1)]
    );
}
