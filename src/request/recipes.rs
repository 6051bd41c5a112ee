//! The recipes of published few-step models, and how their files are recognised.

use kiln_models::job::NoiseLevels;

use super::Recipe;

/// A recipe that kiln knows.
struct KnownRecipe {
    /// Its name in requests and answers.
    name: &'static str,
    /// Steps if neither the request nor the file's name has a number.
    steps: Option<usize>,
    /// `None` stands for the model's own.
    levels: fn() -> Option<NoiseLevels>,
    stochastic: bool,
    /// What the names of its adapters contain, in lower case with `-` for `_`. Empty if they are not
    /// recognised.
    files: &'static [&'static str],
    /// Whether the name of a file must have the number of steps after that.
    steps_in_name: bool,
    /// Whether its adapters change all twelve linear layers of each block, and nothing else.
    twelve_layers: bool,
}

/// All of them run without guidance.
const KNOWN: &[KnownRecipe] = &[
    // lightx2v/Qwen-Image-Lightning (V1.0, V1.1 and V2.0 with 4 and 8 steps, those for Edit and
    // Edit-2509), lightx2v/Qwen-Image-2512-Lightning and lightx2v/Qwen-Image-Edit-2511-Lightning. Its
    // `generate_with_diffusers.py` sets base_shift = max_shift = ln 3 and no shift_terminal.
    KnownRecipe {
        name: "lightning",
        steps: Some(4),
        levels: || Some(shifted(3.0, None)),
        stochastic: false,
        files: &["lightning"],
        steps_in_name: true,
        twelve_layers: true,
    },
    // Wuli-art/Qwen-Image-2512-Turbo-LoRA and -2-Steps: the published ComfyUI graphs shift by 3, with
    // the samplers euler and simple, cfg 1.
    KnownRecipe {
        name: "wuli-turbo",
        steps: Some(4),
        levels: || Some(shifted(3.0, None)),
        stochastic: false,
        files: &["turbo-lora"],
        steps_in_name: true,
        twelve_layers: true,
    },
    // MusePublic/Qwen-Image-Distill, `qwen_image_distill_3step.safetensors`: DMD2 with mu = ln 2.5 and
    // the model's terminal.
    KnownRecipe {
        name: "dmd2-3step",
        steps: Some(3),
        levels: || Some(shifted(2.5, Some(0.02))),
        stochastic: false,
        files: &["qwen-image-distill-3step"],
        steps_in_name: false,
        twelve_layers: false,
    },
    // DiffSynth-Studio/Qwen-Image-Distill-LoRA and -Distill-Full: 15 steps of the model's own schedule.
    KnownRecipe {
        name: "distill",
        steps: Some(15),
        levels: || None,
        stochastic: false,
        files: &["qwen-image-distill-lora"],
        steps_in_name: false,
        twelve_layers: false,
    },
    // inclusionAI/TwinFlow, `unified_sampler.py`: t = 1 - linspace(0.001, 0.5, 4), each step stochastic.
    KnownRecipe {
        name: "twinflow",
        steps: Some(4),
        levels: || Some(even(4, 0.999, 0.5)),
        stochastic: true,
        files: &[],
        steps_in_name: false,
        twelve_layers: false,
    },
    // The same with 2 steps: t = 1 - linspace(0.001, 0.6, 2).
    KnownRecipe {
        name: "twinflow-2step",
        steps: Some(2),
        levels: || Some(even(2, 0.999, 0.4)),
        stochastic: true,
        files: &[],
        steps_in_name: false,
        twelve_layers: false,
    },
];

/// The schedule of the model's configuration, as a request names it.
pub(super) const MODEL: &str = "model";

/// Largest number of steps that the name of a few-step adapter can mean. A greater number is that of
/// training steps.
const MAX_STEPS_IN_NAME: usize = 16;

/// Rank and alpha of Qwen-Image-Lightning.
const LIGHTNING_RANK_AND_ALPHA: (usize, f32) = (64, 8.0);

/// What the structure of an adapter says about where it comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fingerprint {
    /// Number of linear layers that the adapter changes.
    pub modules: usize,
    /// Blocks of the transformer.
    pub blocks: usize,
    /// Rank and alpha, if all modules have the same.
    pub uniform: Option<(usize, f32)>,
    /// Whether it changes a layer that makes the modulation of the timestep.
    pub changes_modulation: bool,
}

impl Fingerprint {
    /// Whether each block's twelve linear layers change, all with the same rank and alpha.
    fn changes_twelve_layers(&self) -> bool {
        self.uniform.is_some() && !self.changes_modulation && self.modules == 12 * self.blocks
    }
}

/// The recipe of an adapter that is recognised by the name of its file and its structure together.
/// `file_name` may have the names of folders before it.
///
/// A file that has only the name or only the structure is not recognised; the log says so.
pub fn known_recipe(file_name: &str, fingerprint: &Fingerprint) -> Option<Recipe> {
    let plain = file_name.to_lowercase().replace('_', "-");
    let found = KNOWN.iter().find_map(|known| {
        let mut marks = known.files.iter();
        let rest = marks.find_map(|mark| Some(plain.split_once(mark)?.1))?;
        let steps = steps_in(rest).filter(|steps| *steps <= MAX_STEPS_IN_NAME);
        let steps = if known.steps_in_name {
            Some(steps?)
        } else {
            known.steps
        };
        Some((
            known,
            Recipe {
                steps,
                ..known.recipe()
            },
        ))
    });
    let Some((known, recipe)) = found else {
        if fingerprint.changes_twelve_layers()
            && fingerprint.uniform == Some(LIGHTNING_RANK_AND_ALPHA)
        {
            tracing::info!(
                "adapter file {file_name:?} has the rank and alpha of Qwen-Image-Lightning, but not its \
                 name: if it is a few-step adapter, a JSON file beside it should give its steps and shift"
            );
        }
        return None;
    };
    let fits = if known.twelve_layers {
        fingerprint.changes_twelve_layers()
    } else {
        fingerprint.uniform.is_some()
    };
    if !fits {
        tracing::warn!(
            "adapter file {file_name:?} is named as one of recipe {}, but its layers are not those of \
             the published files: the recipe is not applied",
            known.name
        );
        return None;
    }
    Some(recipe)
}

/// The recipe that a request names; [`MODEL`] is one that says nothing.
pub(super) fn named_recipe(name: &str) -> Option<Recipe> {
    if name == MODEL {
        return Some(Recipe::named(MODEL));
    }
    let known = KNOWN.iter().find(|known| known.name == name)?;
    Some(known.recipe())
}

/// The names for [`named_recipe`].
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    std::iter::once(MODEL).chain(KNOWN.iter().map(|known| known.name))
}

/// The recipe of a checkpoint that has the noise levels of Lightning in its own configuration: its
/// steps are those in the name of its folder, or 4.
pub fn fused_lightning(folder: &str) -> Recipe {
    let steps = steps_in(&folder.to_lowercase().replace('_', "-"));
    let steps = steps.filter(|steps| *steps <= MAX_STEPS_IN_NAME);
    Recipe {
        steps: steps.or(KNOWN[0].steps),
        levels: None,
        ..KNOWN[0].recipe()
    }
}

impl KnownRecipe {
    fn recipe(&self) -> Recipe {
        Recipe {
            steps: self.steps,
            levels: (self.levels)(),
            stochastic: self.stochastic,
            true_cfg_scale: Some(1.0),
            ..Recipe::named(self.name)
        }
    }
}

const fn shifted(shift: f64, terminal: Option<f64>) -> NoiseLevels {
    NoiseLevels::Shifted { shift, terminal }
}

/// Evenly spaced levels, from the first to the last one.
fn even(steps: usize, first: f64, last: f64) -> NoiseLevels {
    let level = |step: usize| first + (last - first) * step as f64 / (steps - 1) as f64;
    NoiseLevels::Sigmas((0..steps).map(level).collect())
}

/// The first number before `step`, with or without `-` between them: 4 in `4steps-v1.0`.
fn steps_in(name: &str) -> Option<usize> {
    name.match_indices("step").find_map(|(at, _)| {
        let before = &name[..at];
        let before = before.strip_suffix('-').unwrap_or(before);
        let text = before.trim_end_matches(|it: char| it.is_ascii_digit());
        before[text.len()..].parse().ok().filter(|&steps| steps > 0)
    })
}

#[cfg(test)]
mod tests;
