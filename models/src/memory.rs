//! Plans the memory of a job from the configurations, as [`crate::flops`] counts its operations.
//!
//! A plan follows the layers in the order in which they run, and adds up the tensors that exist at
//! the same time where there are most of them. Two facts decide a job's peak: the decoder's widest
//! layer, and the transformer's tokens. Convolutions are planned as flex computes them, with a copy
//! of their input. Weights are not part of a plan, because they are loaded before any job.
//!
//! The sums are exact for what is allocated. Allocators keep a part of what has been freed: glibc's
//! was measured to keep up to a quarter of a job's peak, and about 64 MiB of a large one.

use std::fmt;
use std::sync::Arc;

use crate::adapter::Totals;
use crate::families::qwen_image::{PATCH, TEMPLATE};
use crate::job::Job;
use crate::step_cache::{KeptResiduals, first_gated_step};
use crate::text_encoder::TextEncoderConfig;
use crate::transformer::TransformerConfig;
use crate::vae::{Blending, Levels, Span, Tiling, VaeConfig, VaeSettings};
use crate::weights::Precision;

/// Bytes of a value that is f32 whatever the model's type.
const F32: u64 = 4;

/// Largest number of bytes that an allocator keeps of memory that has been freed.
const MAX_KEPT: u64 = 64 << 20;

/// Values by which one image's padded planes exceed its pixels in a convolution on flex.
const PLANE_PADDING: u64 = 32;

/// Memory of a job in bytes, by stage. The stages are additional to [`MemoryPlan::held`], and never
/// run at the same time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// From the job's start to its end: embeddings, modulation table, latents, recorded stages, and the
    /// modulation that adapters change. The adapters themselves are not part of a plan, because jobs share
    /// them.
    pub held: u64,
    /// Encoding the prompts, generating the noise and making the modulation table.
    pub start: u64,
    /// One step, or one preview.
    pub step: u64,
    /// Decoding all images of the job.
    pub decode: u64,
}

impl MemoryPlan {
    /// The largest stage.
    pub fn stage(&self) -> u64 {
        self.start.max(self.step).max(self.decode)
    }

    /// The job's peak.
    pub fn peak(&self) -> u64 {
        self.held.saturating_add(self.stage())
    }
}

/// Plans the memory of jobs. Clones are cheap.
#[derive(Clone)]
pub struct MemoryModel(Arc<dyn Fn(&Job) -> MemoryPlan + Send + Sync>);

impl MemoryModel {
    pub fn new(plan: impl Fn(&Job) -> MemoryPlan + Send + Sync + 'static) -> Self {
        Self(Arc::new(plan))
    }

    /// The memory of three networks whose images are decoded with these settings.
    pub(crate) fn of_networks(
        text_encoder: TextEncoderConfig,
        transformer: TransformerConfig,
        vae: VaeConfig,
        settings: VaeSettings,
        precision: Precision,
    ) -> Self {
        let networks = Networks {
            text_encoder,
            transformer,
            vae,
            settings,
            element: precision.activations.size() as u64,
            weight: precision.model.size() as u64,
        };
        Self::new(move |job| networks.plan(job))
    }

    /// The plan of a job that is decoded as [`Job::decoding`] says.
    pub fn plan(&self, job: &Job) -> MemoryPlan {
        (self.0)(job)
    }
}

impl fmt::Debug for MemoryModel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("MemoryModel")
    }
}

struct Networks {
    text_encoder: TextEncoderConfig,
    transformer: TransformerConfig,
    vae: VaeConfig,
    settings: VaeSettings,
    /// Bytes of an activation.
    element: u64,
    /// Bytes of a weight.
    weight: u64,
}

impl Networks {
    fn plan(&self, job: &Job) -> MemoryPlan {
        let scale = self.vae.scale_factor();
        let latents = [job.size.height / scale, job.size.width / scale];
        let images = job.num_images as u64;
        let (dim, text_dim) = (
            self.transformer.dim() as u64,
            self.transformer.joint_attention_dim as u64,
        );
        let prompts: Vec<u64> = job.branches().map(|it| it.tokens.len() as u64).collect();
        let kept = |tokens: &u64| {
            let kept = tokens.saturating_sub(TEMPLATE.dropped_tokens as u64);
            kept.min(TEMPLATE.max_prompt_tokens as u64)
        };
        let text_tokens = images * prompts.iter().map(kept).sum::<u64>();
        let image_tokens = images * area(latents) / (PATCH * PATCH) as u64;
        // Latents of the job, in f32.
        let noise = F32 * image_tokens * self.transformer.in_channels as u64;

        let layers = self.transformer.num_layers as u64;
        let steps = job.sampling.steps as u64;
        let table = F32 * steps * dim * (12 * layers + 3);
        let adapters = Totals::of_job(&job.adapters);
        let changed_table = if adapters.changes_timestep {
            table
        } else {
            table.min(F32 * steps * adapters.modulation)
        };
        // The cache has the embeddings of one image, the job those of all.
        let embeddings = self.element * text_dim * (text_tokens + text_tokens / images.max(1));
        let pixels = images * job.size.pixels() as u64;
        let trace = if job.record {
            // The noise, the latents of every step, the embeddings, and the image in f32.
            noise * (steps + 1) + F32 * text_dim * text_tokens + 3 * F32 * pixels
        } else {
            0
        };
        let encode = prompts.iter().map(|&tokens| self.encode(tokens)).max();
        let modulation = 6 * dim * dim * self.weight;
        let branches = prompts.len() as u64;
        let kept = KeptResiduals::of(&job.cache, job.sampling.steps);
        let image_residual = self.element * dim * branches * image_tokens;
        let text_residual = self.element * dim * text_tokens;
        let residuals = kept.image as u64 * image_residual + kept.text as u64 * text_residual;
        // The tokens before the blocks, which a residual is counted from.
        let before = if kept.image > 0 {
            image_residual + if kept.text > 0 { text_residual } else { 0 }
        } else {
            0
        };
        // What a change computes before it is added to its layer's output.
        let change = (branches * image_tokens * adapters.image_values)
            .max(text_tokens * adapters.text_values);
        let step = self.step(branches * image_tokens, text_tokens)
            + self.element * change
            + (3 * branches + 2) * noise
            + before;
        // The difference of the halves that gated steps reuse.
        let gated = first_gated_step(job.sampling.steps, job.cfg_gate_step) < job.sampling.steps;
        let difference = if gated { noise } else { 0 };
        MemoryPlan {
            // The latents, and the velocity of the last step.
            held: table + changed_table + embeddings + trace + 2 * noise + residuals + difference,
            start: with_kept(encode.unwrap_or(0).max(modulation).max(4 * noise)),
            step: with_kept(step),
            decode: with_kept(self.decode_images(latents, images, self.settings.of(job.decoding))),
        }
    }

    /// The text encoder on a prompt of this many tokens: its MLP or its attention.
    fn encode(&self, tokens: u64) -> u64 {
        let config = &self.text_encoder;
        let (hidden, wide) = (config.hidden_size as u64, config.intermediate_size as u64);
        let kv = (config.num_key_value_heads * config.head_dim) as u64;
        let mlp = 2 * hidden + wide * (2 + u64::from(self.rounds()));
        // Queries, keys and values before and after their rotation, packed keys and values, output.
        let attention = 5 * hidden + 6 * kv;
        self.element * tokens * mlp.max(attention)
    }

    /// The transformer on this many tokens of all segments together: its attention or the MLP of the
    /// image stream.
    fn step(&self, image_tokens: u64, text_tokens: u64) -> u64 {
        let dim = self.transformer.dim() as u64;
        let (image, joint) = (image_tokens * dim, (image_tokens + text_tokens) * dim);
        // Residual, queries, keys and values, packed keys and values, output.
        let attention = 7 * joint;
        // Residual, hidden values four times as wide, output.
        let mlp = joint + image * (5 + 4 * u64::from(self.rounds()));
        let rope = F32 * (image_tokens + text_tokens) * self.transformer.attention_head_dim as u64;
        self.element * attention.max(mlp) + rope
    }

    /// Whether a linear layer rounds a copy of its input to the type of its weights.
    fn rounds(&self) -> bool {
        self.weight < self.element
    }

    fn decode_images(&self, latents: [usize; 2], images: u64, settings: VaeSettings) -> u64 {
        let scale = self.vae.scale_factor();
        let together = if settings.use_slicing { 1 } else { images };
        // An image's values in f32.
        let image = 3 * F32 * area(latents.map(|side| side * scale));
        let batch = match settings.tiling_of(latents, scale) {
            Some(Tiling::Exact { size }) => self.decode(latents, size / scale, together),
            Some(Tiling::Blended(tiles)) => self.decode_blended(latents, tiles, together),
            None => self.decode(latents, usize::MAX, together),
        };
        // The slices that are ready, or the whole batch once more while it is converted and read.
        (batch + (images - together) * image).max(2 * images * image)
    }

    /// Decoding in blended tiles: one tile's decoding, beside the tiles that are ready.
    fn decode_blended(&self, latents: [usize; 2], tiles: Blending, images: u64) -> u64 {
        let scale = self.vae.scale_factor();
        let tile = latents.map(|side| side.min(tiles.size / scale));
        let values = images * 3 * F32;
        let image = values * area(latents.map(|side| side * scale));
        let columns = latents[1].div_ceil((tiles.stride / scale).max(1));
        let row = values * area(tile.map(|side| side * scale)) * columns as u64;
        // Whole tiles are kept of the row that is being decoded and of the row above it.
        let kept = 2 * row;
        (self.decode(tile, usize::MAX, images) + image + kept).max(2 * image + kept)
    }

    /// The decoder network on a batch of this height and width in latents, in exact tiles of at most
    /// `size` latents.
    fn decode(&self, latents: [usize; 2], size: usize, images: u64) -> u64 {
        let mut widths: Vec<u64> = self.vae.widths().iter().map(|&it| it as u64).collect();
        widths.reverse();
        let (lowest, z) = (widths[0], self.vae.z_dim as u64);
        let mut whole = Peak::default();
        let level = Level::from(latents);
        whole.see(level.convolution(z, lowest));
        level.residual(lowest, lowest, &mut whole);
        // Input, its norm and a copy of it, queries, keys and values; packed values and output take
        // the place of some.
        whole.see(6 * lowest * level.pixels());

        let levels = Levels::of(&self.vae);
        let axes = latents.map(|side| levels.tiles(side, size));
        let is_tiled = axes.iter().any(|tiles| tiles.len() > 1);
        let [rows, columns] = axes.map(|tiles| longest(&tiles));
        let mut tile = Peak::default();
        let mut channels = lowest;
        // The values before the crop to a level's input; the middle block's output is counted below.
        let mut before = 0;
        for (index, &width) in widths.iter().enumerate() {
            let [input, output] =
                [0, 1].map(|end| Level::from([rows[index][end], columns[index][end]]));
            if is_tiled {
                tile.see(before + channels * input.pixels());
            }
            input.residual(channels, width, &mut tile);
            input.residual(width, width, &mut tile);
            channels = width;
            if index + 1 < widths.len() {
                let cropped = width * output.pixels();
                if is_tiled {
                    tile.see(width * input.pixels() + cropped);
                }
                let doubled = output.doubled();
                tile.see(cropped + width * doubled.pixels());
                tile.see(doubled.convolution(width, width / 2));
                channels = width / 2;
                before = channels * doubled.pixels();
            } else {
                tile.see(input.convolution(channels, 3));
            }
        }
        let bytes = |values: u64| self.element * images * values;
        let mut upper = bytes(tile.0);
        if is_tiled {
            // The middle block's output and the tiles that are ready stay.
            let pixels = area(latents.map(|side| side * self.vae.scale_factor()));
            upper += bytes(lowest * level.pixels()) + 3 * F32 * images * pixels;
        }
        let widest = widths.iter().max().copied().unwrap_or(0);
        // The transformed weights of one convolution.
        bytes(whole.0).max(upper) + F32 * 16 * widest * widest
    }
}

/// The lengths of the longest input and output of any tile, for each resolution.
fn longest(tiles: &[Vec<Span>]) -> Vec<[usize; 2]> {
    let count = tiles.first().map_or(0, Vec::len);
    let longest = |level: usize| {
        let spans = || tiles.iter().map(|spans| &spans[level]);
        let input = spans().map(|span| span.input.len()).max();
        let output = spans().map(|span| span.output.len()).max();
        [input.unwrap_or(0), output.unwrap_or(0)]
    };
    (0..count).map(longest).collect()
}

/// The largest number of values that exist at once.
#[derive(Default)]
struct Peak(u64);

impl Peak {
    fn see(&mut self, values: u64) {
        self.0 = self.0.max(values);
    }
}

/// Height and width of the decoder's values at one resolution.
#[derive(Clone, Copy)]
struct Level {
    height: usize,
    width: usize,
}

impl From<[usize; 2]> for Level {
    fn from([height, width]: [usize; 2]) -> Self {
        Self { height, width }
    }
}

impl Level {
    fn doubled(self) -> Self {
        Self {
            height: 2 * self.height,
            width: 2 * self.width,
        }
    }

    fn pixels(self) -> u64 {
        area([self.height, self.width])
    }

    /// Input, its copy and output of a convolution of 3x3 pixels.
    fn convolution(self, from: u64, to: u64) -> u64 {
        (from + to) * self.pixels() + self.copy(from)
    }

    /// The copy of a convolution's input: four planes by the parity of rows and columns, padded.
    fn copy(self, channels: u64) -> u64 {
        let plane = area([self.height.div_ceil(2) + 1, self.width.div_ceil(2) + 1]);
        4 * channels * (plane + PLANE_PADDING)
    }

    /// A residual block: its convolutions beside the shortcut.
    fn residual(self, from: u64, to: u64, peak: &mut Peak) {
        let pixels = self.pixels();
        let shortcut = to * pixels;
        if from != to {
            // The input, its copy and the shortcut; then the input's norm.
            peak.see(2 * from * (pixels + PLANE_PADDING) + shortcut);
        }
        peak.see(shortcut + self.convolution(from, to));
        peak.see(shortcut + self.convolution(to, to));
    }
}

/// Adds what the allocator keeps of memory that has been freed.
fn with_kept(bytes: u64) -> u64 {
    bytes + (bytes / 5).min(MAX_KEPT)
}

fn area([height, width]: [usize; 2]) -> u64 {
    height as u64 * width as u64
}

#[cfg(test)]
mod tests;
