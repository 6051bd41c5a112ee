//! The pipeline's thread: carries out one plan at a time.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use kiln_models::job::{Conditioning, Decoding, Job, JobId};
use kiln_models::panic_message;
use kiln_models::pipeline::{Pipeline, PipelineError, StepOutcome};
use tracing::Span;

use super::JobError;
use super::plan::{Booked, Holdings, Outcome, Plan};
use super::shared::{Shared, Task};

pub(super) struct Worker {
    pipeline: Box<dyn Pipeline>,
    shared: Arc<Shared>,
}

impl Worker {
    pub(super) fn new(pipeline: Box<dyn Pipeline>, shared: Arc<Shared>) -> Self {
        Self { pipeline, shared }
    }

    /// Works until the engine has stopped.
    pub(super) fn run(mut self) {
        let mut task = self.shared.next(None);
        while let Some(booked) = self.execute(task) {
            task = self.shared.next(Some(booked));
        }
    }

    /// Carries out a plan. `None` if there is nothing to do.
    pub(super) fn execute(&mut self, task: Task) -> Option<Booked> {
        let Task { plan, spans } = task;
        let span = match plan.jobs() {
            [id] => span_of(*id, &spans),
            _ => Span::none(),
        };
        let entered = span.enter();
        let (outcome, took) = match plan {
            Plan::Encode(ids, prompts) => {
                let prompts: Vec<&Conditioning> = prompts.iter().collect();
                let (encoded, took) = self.call(|pipeline| pipeline.encode(&prompts));
                if let Err(error) = &encoded {
                    tracing::warn!(?ids, %error, "encoding prompts together failed, each job's are encoded alone");
                }
                (Outcome::Encoded(ids, encoded), took)
            }
            Plan::LoadAdapters(id, adapters) => {
                let (loaded, took) = self.call(|pipeline| pipeline.load_adapters(&adapters));
                if let Err(error) = &loaded {
                    tracing::warn!(job = id, %error, "uploading adapters ahead failed, they are uploaded when the job is started");
                }
                (Outcome::LoadedAdapters(id, loaded), took)
            }
            Plan::Start(id, job) => {
                log_decoding(id, job.decoding);
                let (started, took) = self.call(|pipeline| pipeline.start(id, job));
                (Outcome::Started(id, self.discard_failed(id, started)), took)
            }
            Plan::Step(ids) => self.step(&ids, &spans),
            Plan::Time(job, copies) => self.time(&job, copies),
            Plan::Preview(id) => {
                let (preview, took) = self.call(|pipeline| pipeline.preview(id));
                if let Err(error) = &preview {
                    tracing::warn!(job = id, %error, "a preview could not be made");
                }
                (Outcome::Previewed(id, preview.ok()), took)
            }
            Plan::Finish(id) => {
                let (output, took) = self.call(|pipeline| pipeline.finish(id));
                (Outcome::Finished(id, self.discard_failed(id, output)), took)
            }
            Plan::Measure { drop_caches } => (self.measure(drop_caches), Duration::ZERO),
            Plan::Decode(id, decoding) => {
                log_decoding(id, decoding);
                self.pipeline.set_decoding(id, decoding);
                (Outcome::DecodingChanged, Duration::ZERO)
            }
            Plan::Discard(id) => {
                self.discard(id);
                (Outcome::Discarded, Duration::ZERO)
            }
            Plan::Sleep | Plan::End => return None,
        };
        let errors = outcome.errors();
        let of_file = errors.iter().find(|error| error.is_of_model_file());
        let lost = match of_file {
            Some(error) => Some(JobError::clone(error)),
            None if errors.iter().any(|error| error.may_be_of_device()) => self.probe().err(),
            None => None,
        };
        drop(entered);
        Some(Booked {
            outcome,
            took,
            lost,
            holdings: Holdings::of(self.pipeline.as_ref()),
        })
    }

    /// Steps the jobs together. If that fails, no job has advanced, and each is stepped alone, so
    /// that only the jobs fail that fail alone.
    fn step(&mut self, ids: &[JobId], spans: &HashMap<JobId, Span>) -> (Outcome, Duration) {
        let (together, mut took) = self.call(|pipeline| in_order(ids, &pipeline.step(ids)?));
        let outcome = match (together, ids) {
            (Ok(outcomes), _) => {
                let steps = ids.iter().zip(outcomes);
                Outcome::Stepped(steps.map(|(&id, outcome)| (id, Ok(outcome))).collect())
            }
            (Err(error), &[id]) => {
                Outcome::Stepped(vec![(id, self.discard_failed(id, Err(error)))])
            }
            (Err(error), _) => {
                tracing::warn!(?ids, %error, "a step of several jobs failed, each is stepped alone");
                let mut steps = Vec::with_capacity(ids.len());
                for &id in ids {
                    let _entered = span_of(id, spans).entered();
                    let (step, alone) = self.call(|pipeline| {
                        let outcomes = in_order(&[id], &pipeline.step(&[id])?)?;
                        Ok(outcomes[0])
                    });
                    steps.push((id, self.discard_failed(id, step), alone));
                    took += alone;
                }
                Outcome::SteppedAlone(steps)
            }
        };
        (outcome, took)
    }

    /// Times one step of copies of a job. Starting and discarding them is part of the call's time.
    fn time(&mut self, job: &Job, copies: usize) -> (Outcome, Duration) {
        // The scheduler counts its ids from 0.
        let ids: Vec<JobId> = (0..copies as JobId).map(|copy| JobId::MAX - copy).collect();
        let began = self.shared.clock.now();
        let start = |pipeline: &mut dyn Pipeline| {
            let mut started = ids.iter();
            started.try_for_each(|&id| pipeline.start(id, job.clone()))
        };
        let (started, _) = self.call(start);
        let stepped = started.and_then(|()| {
            let (stepped, took) = self.call(|pipeline| pipeline.step(&ids));
            stepped.map(|_| took)
        });
        for &id in &ids {
            self.discard(id);
        }
        if let Err(error) = &stepped {
            tracing::warn!(%error, copies, "the step of several jobs could not be timed");
        }
        let took = self.shared.clock.now().saturating_duration_since(began);
        (Outcome::Timed(copies, stepped.ok()), took)
    }

    fn discard_failed<T>(&mut self, id: JobId, result: Result<T, JobError>) -> Result<T, JobError> {
        if result.is_err() {
            self.discard(id);
        }
        result
    }

    fn discard(&mut self, id: JobId) {
        let (discarded, _) = self.call(|pipeline| {
            pipeline.discard(id);
            Ok(())
        });
        if let Err(error) = discarded {
            tracing::error!(job = id, %error, "discarding a job failed");
        }
    }

    /// Measures the memory that is free. A measurement that fails knows nothing.
    fn measure(&mut self, drop_caches: bool) -> Outcome {
        let (room, _) = self.call(|pipeline| {
            if drop_caches {
                pipeline.drop_caches();
            }
            Ok(pipeline.memory_room())
        });
        Outcome::Measured {
            room: room.ok().flatten(),
            dropped_caches: drop_caches,
        }
    }

    /// Tests whether the device still computes. A device that fails once is tested again.
    fn probe(&mut self) -> Result<(), JobError> {
        let (first, _) = self.call(|pipeline| pipeline.probe());
        first.or_else(|_| self.call(|pipeline| pipeline.probe()).0)
    }

    /// Calls the pipeline. Returns the result and the time of the call; a panic is an error.
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Pipeline) -> Result<T, PipelineError>,
    ) -> (Result<T, JobError>, Duration) {
        let started = self.shared.clock.now();
        let pipeline = self.pipeline.as_mut();
        let result = caught(|| call(pipeline));
        let took = self.shared.clock.now().saturating_duration_since(started);
        (result, took)
    }
}

fn log_decoding(id: JobId, decoding: Decoding) {
    let how = match decoding {
        Decoding::AsSet => return,
        Decoding::Sliced => "one at a time",
        Decoding::Tiled(_) => "one at a time and in tiles",
    };
    let tile_size = match decoding {
        Decoding::Tiled(size) => Some(size),
        _ => None,
    };
    tracing::info!(
        job = id,
        tile_size,
        "there is no memory to decode the images whole and together: they are decoded {how}"
    );
}

fn span_of(id: JobId, spans: &HashMap<JobId, Span>) -> Span {
    spans.get(&id).cloned().unwrap_or_else(Span::none)
}

/// The outcomes of the jobs, in the order of `ids`.
fn in_order(ids: &[JobId], outcomes: &[StepOutcome]) -> Result<Vec<StepOutcome>, PipelineError> {
    let outcome_of = |id: &JobId| {
        let outcome = outcomes.iter().find(|outcome| outcome.id == *id);
        outcome.copied().ok_or(PipelineError::UnknownJob(*id))
    };
    ids.iter().map(outcome_of).collect()
}

/// Runs a call of a pipeline. A panic is an error.
pub(crate) fn caught<T>(call: impl FnOnce() -> Result<T, PipelineError>) -> Result<T, JobError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => Ok(outcome?),
        Err(payload) => Err(JobError::Panicked(panic_message(payload.as_ref()))),
    }
}

/// However the thread ends, every job ends, so that no handle waits for ever.
impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}
