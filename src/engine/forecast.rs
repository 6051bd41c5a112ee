//! The course of the queue if no other job is submitted: when each job starts and which is finished
//! when. It follows the rules of [`super::policy`] and [`super::riders`], from one end of a job's steps
//! to the next, and leaves out the turns that the oldest job gets by the second rule.

use std::time::Duration;

use super::cost::{Progress, Speed, Stage, Work};
use super::policy::{Candidate, favourite};
use super::riders::{Rider, Room, riders};

/// A job of the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queued<'a> {
    pub(super) candidate: Candidate,
    pub(super) work: &'a Work,
    pub(super) progress: Progress,
}

/// The expected course of one job.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Course {
    /// Number of jobs that are finished before this one is started.
    pub(super) position: usize,
    /// How long it takes until then. `None` if something is in between that has not been measured.
    pub(super) wait: Option<Duration>,
    /// When it is finished.
    pub(super) end: Option<Duration>,
}

/// The course of each job, in the order of `jobs`, which is that of their submission.
pub(super) fn courses(
    jobs: &[Queued<'_>],
    speed: &Speed,
    room: Room,
    max_started: usize,
) -> Vec<Course> {
    let mut run = Run {
        left: (0..jobs.len()).collect(),
        jobs: jobs.to_vec(),
        courses: vec![Course::default(); jobs.len()],
        clock: Some(0.0),
        finished: 0,
        speed,
    };
    let candidates = |run: &Run| -> Vec<Candidate> {
        let left = run.left.iter();
        left.map(|&job| run.jobs[job].candidate).collect()
    };
    while let Some(first) = favourite(&candidates(&run), max_started) {
        run.turn(first, room, max_started);
    }
    run.courses
}

struct Run<'a> {
    jobs: Vec<Queued<'a>>,
    /// Indices of the jobs that are not finished.
    left: Vec<usize>,
    courses: Vec<Course>,
    /// Seconds from now, as long as everything that happens has been measured.
    clock: Option<f64>,
    finished: usize,
    speed: &'a Speed,
}

impl Run<'_> {
    /// Works on the job at a place of `left` until the steps of a job are over, or until it is
    /// finished.
    fn turn(&mut self, place: usize, room: Room, max_started: usize) {
        let first = self.left[place];
        self.start(first);
        self.jobs[first].candidate.led = true;
        if self.jobs[first].progress.steps_left > 0 {
            self.step(place, room, max_started);
        }
        if self.jobs[first].progress.steps_left == 0 {
            let decode = self.jobs[first].work.of_stage(Stage::Decode);
            self.pass(Stage::Decode, decode);
            self.finished += 1;
            self.courses[first].end = self.now();
            self.left.remove(place);
        }
    }

    /// Makes steps until one of the jobs that share them has none left.
    fn step(&mut self, place: usize, room: Room, max_started: usize) {
        let left = self.left.iter().map(|&job| &self.jobs[job]);
        let (started, devices) = (
            left.clone().filter(|job| job.candidate.started).count(),
            self.speed.devices(),
        );
        let room = Room {
            places: room.places.min(Room::places(max_started, started, devices)),
            ..room
        };
        let waiting: Vec<Rider<'_>> = left
            .map(|job| Rider {
                work: job.work,
                started: job.candidate.started,
                alone: job.candidate.alone,
                adapters: job.candidate.adapters,
                has_steps: job.progress.steps_left > 0,
            })
            .collect();
        let mut pack: Vec<usize> = riders(&waiting, place, room)
            .into_iter()
            .map(|rider| self.left[rider])
            .collect();
        for &rider in &pack {
            self.start(rider);
        }
        pack.push(self.left[place]);
        let steps = pack.iter().map(|&job| self.jobs[job].progress.steps_left);
        let steps = steps.min().unwrap_or(0);
        let mut units = Vec::new();
        for &job in &pack {
            let job = &mut self.jobs[job];
            let done = job.work.expected_steps(job.progress, steps);
            units.extend(job.work.halved(done / steps.max(1) as f64));
            job.progress.done += done;
            job.progress.steps_left -= steps;
            job.candidate = job.candidate.after_steps(job.work, job.progress.steps_left);
        }
        self.pass(Stage::Step, self.speed.step_work(&units) * steps as f64);
    }

    fn start(&mut self, job: usize) {
        if self.jobs[job].candidate.started {
            return;
        }
        self.courses[job].position = self.finished;
        self.courses[job].wait = self.now();
        self.jobs[job].candidate.started = true;
        self.pass(Stage::Encode, self.jobs[job].work.of_stage(Stage::Encode));
    }

    fn pass(&mut self, stage: Stage, work: f64) {
        if work > 0.0 {
            let time = self.speed.time(stage, work);
            self.clock = self.clock.zip(time).map(|(clock, time)| clock + time);
        }
    }

    fn now(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.clock?).ok()
    }
}
