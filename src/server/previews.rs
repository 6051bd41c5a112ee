//! How often a request has a preview.

use std::num::NonZeroUsize;

/// How often a preview is made while an image is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Previews {
    Never,
    /// After this number of steps, again and again.
    Every(NonZeroUsize),
    /// At most this number of previews, evenly spaced.
    Count(usize),
}

impl Previews {
    /// Steps from one preview to the next.
    pub(super) fn interval(self, steps: usize) -> Option<NonZeroUsize> {
        match self {
            Self::Never | Self::Count(0) => None,
            Self::Every(interval) => Some(interval),
            // After the last step there is the image itself.
            Self::Count(count) => NonZeroUsize::new(steps.div_ceil(count + 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_previews_are_made_than_were_asked_for() {
        for steps in 1..60 {
            for count in 0..4 {
                let interval = Previews::Count(count).interval(steps);
                let shown = interval.map_or(0, |interval| (steps - 1) / interval);
                assert!(shown <= count, "{shown} of {count} in {steps} steps");
                let usual = [20, 30, 50].contains(&steps);
                assert!(
                    !usual || shown == count,
                    "{shown} of {count} in {steps} steps"
                );
            }
        }
    }
}
