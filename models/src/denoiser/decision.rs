//! Whether a step of a job reuses what an earlier step computed: decided once by the conditional half,
//! for both halves, which may run on two devices.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_ops::FusedOps;

use super::lane::LaneJob;
use crate::pipeline::PipelineError;

/// A decision that one half makes and both obey.
#[derive(Debug, Default)]
pub(super) struct Decision {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Open,
    /// Whether the step is reused.
    Made(bool),
    /// The half that decides has failed.
    Abandoned,
}

impl Decision {
    /// No code that holds this lock can panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the decision. A later call changes nothing: a forward that is run again decides as the
    /// first one.
    pub(super) fn make(&self, reuse: bool) {
        let mut state = self.lock();
        if !matches!(*state, State::Made(_)) {
            *state = State::Made(reuse);
            self.changed.notify_all();
        }
    }

    pub(super) fn is_made(&self) -> bool {
        matches!(*self.lock(), State::Made(_))
    }

    /// Waits for the decision.
    ///
    /// # Errors
    /// If the half that decides has failed.
    pub(super) fn wait(&self) -> Result<bool, PipelineError> {
        let mut state = self.lock();
        loop {
            match *state {
                State::Made(reuse) => return Ok(reuse),
                State::Abandoned => return Err(PipelineError::OtherHalf),
                State::Open => {
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn abandon(&self) {
        let mut state = self.lock();
        if matches!(*state, State::Open) {
            *state = State::Abandoned;
            self.changed.notify_all();
        }
    }
}

/// Abandons decisions when it is dropped, so that no half waits for one that has failed.
#[derive(Debug)]
pub(super) struct Decides(Vec<Arc<Decision>>);

impl Decides {
    /// The decisions that halves of these jobs make.
    pub(super) fn of<B: FusedOps>(jobs: &[LaneJob<B>]) -> Self {
        let halves = jobs.iter().flat_map(|job| &job.halves);
        let deciding = halves.filter(|half| half.pass.decides);
        Self(
            deciding
                .map(|half| Arc::clone(&half.pass.decision))
                .collect(),
        )
    }
}

impl Drop for Decides {
    fn drop(&mut self) {
        for decision in &self.0 {
            decision.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decision_stays() {
        let decision = Arc::new(Decision::default());
        let decides = Decides(vec![Arc::clone(&decision)]);
        decision.make(true);
        decision.make(false);
        drop(decides);
        assert!(decision.wait().unwrap());
    }

    #[test]
    fn a_half_does_not_wait_for_one_that_has_failed() {
        let decision = Arc::new(Decision::default());
        drop(Decides(vec![Arc::clone(&decision)]));
        assert!(matches!(decision.wait(), Err(PipelineError::OtherHalf)));
    }
}
