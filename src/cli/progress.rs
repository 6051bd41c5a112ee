use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// Denoising steps on stderr: a bar with the time left on a terminal, a line a step elsewhere.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Progress {
    pub(super) fn new(steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
            let template = "{bar:30} step {pos}/{len}, {elapsed} passed, {left} left";
            let style = ProgressStyle::with_template(template);
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.with_style(style.with_key("left", write_time_left))
        });
        Self {
            bar,
            started: Instant::now(),
        }
    }

    /// The prompts are encoded from now on, then the steps begin.
    pub(super) fn started(&mut self) {
        self.started = Instant::now();
        if let Some(bar) = &self.bar {
            bar.reset();
            bar.enable_steady_tick(Duration::from_millis(500));
        }
    }

    pub(super) fn step(&self, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else {
            let passed = self.started.elapsed().as_secs_f64();
            tracing::info!("step {done}/{total}, {passed:.1} s");
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Nothing is known before the first step is over.
fn write_time_left(state: &ProgressState, text: &mut dyn fmt::Write) {
    let left = match state.pos() {
        0 => "?".to_owned(),
        _ => format!("{:#}", HumanDuration(state.eta())),
    };
    text.write_str(&left).ok();
}
