//! Measures how many image tokens a step should have: the knee of the throughput of steps of one, two
//! and four jobs of one small size, after the warm-up image.

use std::time::Duration;

use kiln_models::job::{Job, Size};

use super::cost::Work;
use super::riders::DEFAULT_BUDGET;

/// Numbers of jobs that are stepped together.
const COPIES: [usize; 3] = [1, 2, 4];

/// Largest side of the jobs, in pixels.
const SIDE: usize = 512;

/// Steps of each number of jobs that are timed, after one that may compile and tune kernels.
const ROUNDS: usize = 3;

/// Part of the best throughput that a number of jobs must reach.
const ENOUGH: f64 = 0.95;

/// Nothing is measured if the step of one job is expected to take longer than this, because of the
/// warm-up image.
const MAX_EXPECTED: Duration = Duration::from_secs(20);
/// Nothing more is measured if a timed step of one job takes longer than this.
const MAX_STEP: Duration = Duration::from_millis(500);
/// No step begins after this time.
const MAX_TIME: Duration = Duration::from_secs(10);

/// A measurement in progress.
#[derive(Debug)]
pub(super) struct Calibration {
    job: Job,
    /// Number of steps made of the current number of jobs.
    round: usize,
    /// The shortest step of each number of jobs that has been timed.
    best: Vec<Duration>,
    spent: Duration,
    is_over: bool,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Knee {
    /// The budget.
    pub(super) tokens: usize,
    /// Number of jobs, and time of their step.
    pub(super) steps: Vec<(usize, Duration)>,
}

impl Calibration {
    /// Copies of the warm-up job, of a small size.
    pub(super) fn of(warm_up: &Job, side_multiple: usize) -> Self {
        let side = SIDE / side_multiple.max(1) * side_multiple.max(1);
        let side = side.max(side_multiple);
        let size = Size {
            width: warm_up.size.width.min(side),
            height: warm_up.size.height.min(side),
        };
        Self {
            job: Job {
                size,
                num_images: 1,
                record: false,
                ..warm_up.clone()
            },
            round: 0,
            best: Vec::new(),
            spent: Duration::ZERO,
            is_over: false,
        }
    }

    /// The job that is stepped.
    pub(super) fn job(&self) -> &Job {
        &self.job
    }

    /// Ends the measurement if a step of one job is expected to take too long.
    pub(super) fn expect(&mut self, step: Option<Duration>) {
        self.is_over |= step.is_some_and(|step| step > MAX_EXPECTED);
    }

    /// How many copies are stepped next; `None` at the end.
    pub(super) fn next(&self) -> Option<usize> {
        if self.is_over || self.spent > MAX_TIME {
            return None;
        }
        let current = self.best.len().saturating_sub(usize::from(self.round > 1));
        COPIES.get(current).copied()
    }

    /// Books one step of the copies of [`Calibration::next`]; `spent` is the time of all that was done
    /// for it.
    pub(super) fn book(&mut self, step: Option<Duration>, spent: Duration) {
        self.spent += spent;
        let Some(step) = step else {
            self.is_over = true;
            return;
        };
        // The first step is not timed.
        match self.round {
            0 => {}
            1 => self.best.push(step),
            _ => {
                if let Some(best) = self.best.last_mut() {
                    *best = step.min(*best);
                }
            }
        }
        self.is_over |= self.round > 0 && self.best.len() == 1 && step > MAX_STEP;
        self.round = (self.round + 1) % (ROUNDS + 1);
    }

    /// The budget: the smallest number of tokens with almost the best throughput, or the default if
    /// fewer than two numbers of jobs were timed.
    pub(super) fn knee(&self, work: &Work) -> Knee {
        // A step of fewer jobs that took longer was disturbed.
        let mut best = self.best.clone();
        for index in (1..best.len()).rev() {
            best[index - 1] = best[index - 1].min(best[index]);
        }
        let timed = best.into_iter().filter(|step| !step.is_zero());
        let steps: Vec<(usize, Duration)> = COPIES.into_iter().zip(timed).collect();
        let throughput = |(copies, step): &(usize, Duration)| *copies as f64 / step.as_secs_f64();
        let best = steps.iter().map(throughput).fold(0.0, f64::max);
        let enough = steps
            .iter()
            .find(|step| throughput(step) >= ENOUGH * best)
            .filter(|_| steps.len() > 1);
        Knee {
            tokens: enough.map_or(DEFAULT_BUDGET, |(copies, _)| copies * work.tokens()),
            steps,
        }
    }
}

impl Knee {
    /// The fixed part of a step as work of one device, from the shortest and the longest step.
    /// `work` gives the work of a step of this many jobs.
    pub(super) fn fixed(&self, work: impl Fn(usize) -> f64) -> f64 {
        let (Some((few, short)), Some((many, long))) = (self.steps.first(), self.steps.last())
        else {
            return 0.0;
        };
        let (short, long) = (short.as_secs_f64(), long.as_secs_f64());
        let (less, more) = (work(*few), work(*many));
        if more <= less {
            return 0.0;
        }
        // At least a tenth of the time grows with the work, whatever the measurement says.
        let slope = ((long - short) / (more - less)).max(0.1 * short / less.max(1.0));
        (short / slope - less).max(0.0)
    }
}
