//! Progress on stderr, and log lines that do not run into it.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};

/// The progress bars on the terminal; [`LogLines`] hides them while it writes.
static ON_TERMINAL: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Progress of a generation on stderr: on a terminal a bar with the time left, elsewhere one line
/// per step.
pub(super) struct Progress {
    /// `None` without a terminal, and with `--quiet`.
    bar: Option<ProgressBar>,
    clock: Clock,
    /// The estimated end, after the first step.
    end: Arc<Mutex<Option<Instant>>>,
}

impl Progress {
    /// Starts with the loading of the model.
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            bar: bar(quiet, "loading, {elapsed} passed"),
            clock: Clock::start(0, 0.0),
            end: Arc::default(),
        }
    }

    /// Starts the generation: prompts are encoded, then the steps begin. Decoding takes as long as
    /// `decode_steps` steps.
    pub(super) fn started(&mut self, steps: usize, decode_steps: f64) {
        self.clock = Clock::start(steps, decode_steps);
        if let Some(bar) = &self.bar {
            bar.reset();
            bar.set_length(steps as u64);
            let line = style("{stage} {bar:30} step {pos}/{len}, {elapsed} passed, {left} left");
            let end = Arc::clone(&self.end);
            let left = move |_: &ProgressState, text: &mut dyn fmt::Write| {
                let end = *end.lock().unwrap_or_else(PoisonError::into_inner);
                text.write_str(&time_left(end)).ok();
            };
            bar.set_style(line.with_key("stage", write_stage).with_key("left", left));
        }
    }

    pub(super) fn step(&mut self, done: usize, total: usize) {
        let end = self.clock.step(done, Instant::now());
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else {
            let passed = self.clock.started.elapsed().as_secs_f64();
            tracing::info!("step {done}/{total}, {passed:.1} s");
        }
    }
}

impl Drop for Progress {
    /// Removes the bar, also after an error.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar without a length; `None` without a terminal, on one that cannot move the cursor, and with `quiet`.
pub(super) fn bar(quiet: bool, template: &str) -> Option<ProgressBar> {
    if quiet || !io::stderr().is_terminal() {
        return None;
    }
    let bar = ON_TERMINAL.add(ProgressBar::no_length());
    bar.set_style(style(template));
    bar.enable_steady_tick(Duration::from_millis(250));
    Some(bar).filter(|bar| !bar.is_hidden())
}

pub(super) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn write_stage(state: &ProgressState, text: &mut dyn fmt::Write) {
    let stage = match (state.pos(), state.len()) {
        (0, _) => "starting",
        (done, Some(steps)) if done >= steps => "decoding",
        _ => "denoising",
    };
    text.write_str(stage).ok();
}

/// The time until `end`; `?` before the first step has ended.
fn time_left(end: Option<Instant>) -> String {
    end.map_or("?".to_owned(), |end| {
        let left = end.saturating_duration_since(Instant::now());
        format!("{:#}", HumanDuration(left))
    })
}

/// Estimates the end from the finished steps.
#[derive(Debug, Clone, Copy)]
struct Clock {
    started: Instant,
    /// End of the first step, which is slower: it compiles, tunes and reads weights.
    first_step: Option<Instant>,
    steps: usize,
    decode_steps: f64,
}

impl Clock {
    fn start(steps: usize, decode_steps: f64) -> Self {
        Self {
            started: Instant::now(),
            first_step: None,
            steps,
            decode_steps,
        }
    }

    /// Notes that `done` steps have ended at `now`. Returns the estimated end of the generation.
    fn step(&mut self, done: usize, now: Instant) -> Instant {
        let (since, counted) = match self.first_step {
            Some(first) if done > 1 => (first, done - 1),
            _ => (self.started, done),
        };
        self.first_step.get_or_insert(now);
        let seconds = (now - since).as_secs_f64() / counted.max(1) as f64;
        let left = self.steps.saturating_sub(done) as f64 + self.decode_steps;
        let left = Duration::try_from_secs_f64(seconds * left).unwrap_or_default();
        now.checked_add(left).unwrap_or(now)
    }
}

/// Stderr, with the progress bars hidden during each write.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LogLines;

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        ON_TERMINAL.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_follows_from_the_steps_after_the_first() {
        let mut clock = Clock::start(10, 3.0);
        let after = |seconds| clock.started + Duration::from_secs(seconds);
        let times = [
            (1, after(20), 12),
            (2, after(22), 11),
            (4, after(26), 9),
            (10, after(38), 3),
        ];
        for (done, now, left) in times {
            let a_step = if done == 1 { 20 } else { 2 };
            assert_eq!(
                clock.step(done, now) - now,
                Duration::from_secs(a_step * left)
            );
        }
    }

    #[test]
    fn an_unknown_end_is_a_question_mark() {
        let mut clock = Clock::start(10, f64::NAN);
        let now = clock.started + Duration::from_secs(1);
        assert_eq!(clock.step(1, now), now);
        assert_eq!(time_left(None), "?");
        assert_eq!(time_left(Some(Instant::now())), "0s");
    }
}
