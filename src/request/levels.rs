//! Noise levels as requests and recipes write them: a time shift, or a list of levels.

use std::sync::Arc;

use kiln_models::job::NoiseLevels;

use super::limits::{MAX_SHIFT, MIN_SHIFT};

/// A value of a schedule that is out of its bounds, or does not fit the others.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {message}")]
pub(super) struct InvalidLevels {
    /// `shift`, `terminal` or `sigmas`.
    pub(super) key: &'static str,
    pub(super) message: String,
}

/// The noise levels that these values stand for; `None` if there is none of them. `max_steps` bounds the
/// number of levels.
pub(super) fn noise_levels(
    shift: Option<f64>,
    terminal: Option<f64>,
    sigmas: Option<&[f64]>,
    max_steps: usize,
) -> Result<Option<NoiseLevels>, InvalidLevels> {
    let refused = |key, message: String| Err(InvalidLevels { key, message });
    if let Some(got) = shift
        && !(MIN_SHIFT..=MAX_SHIFT).contains(&got)
    {
        let message = format!("must be from {MIN_SHIFT} to {MAX_SHIFT}, got {got}");
        return refused("shift", message);
    }
    if let Some(got) = terminal
        && !(0.0..1.0).contains(&got)
    {
        let message = format!("must be from 0 to below 1, got {got}");
        return refused("terminal", message);
    }
    match (shift, terminal, sigmas) {
        (Some(_), _, Some(_)) => refused(
            "sigmas",
            "and shift both set the noise levels: give only one of them".to_owned(),
        ),
        (None, Some(_), _) => refused(
            "terminal",
            "is the last noise level of a shift: give shift as well".to_owned(),
        ),
        (Some(shift), terminal, None) => Ok(Some(NoiseLevels::Shifted {
            shift,
            // The reference treats 0 as absent.
            terminal: terminal.filter(|&terminal| terminal > 0.0),
        })),
        (None, None, Some(sigmas)) => Ok(Some(NoiseLevels::Sigmas(checked(sigmas, max_steps)?))),
        (None, None, None) => Ok(None),
    }
}

/// Noise levels that fall from at most 1, without the 0 that may end the list.
fn checked(sigmas: &[f64], max_steps: usize) -> Result<Arc<[f64]>, InvalidLevels> {
    let refused = |message: String| InvalidLevels {
        key: "sigmas",
        message,
    };
    let levels = match sigmas.split_last() {
        Some((&0.0, levels)) => levels,
        _ => sigmas,
    };
    if levels.is_empty() {
        let message = "has no noise level: give one above 0 for each step";
        return Err(refused(message.to_owned()));
    }
    if levels.len() > max_steps {
        let got = levels.len();
        let message = format!("may have {max_steps} noise levels at most, got {got}");
        return Err(refused(message));
    }
    for &level in levels {
        // A level that f32 cannot hold would be 0.
        if !(level <= 1.0 && level as f32 > 0.0) {
            let message = format!("must be above 0 and at most 1, got {level}");
            return Err(refused(message));
        }
    }
    for pair in levels.windows(2) {
        if pair[1] as f32 >= pair[0] as f32 {
            let message = format!(
                "must fall from step to step, got {} after {}",
                pair[1], pair[0]
            );
            return Err(refused(message));
        }
    }
    Ok(levels.into())
}
