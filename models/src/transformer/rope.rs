//! Rotary positions of image and text tokens, as `QwenEmbedRope` of diffusers computes them.
//!
//! An image token has three positions: frame, row and column. The frame is 0; rows and columns are
//! centred on 0. A text token has one position, used on all three axes; the first one is
//! `max(height / 2, width / 2)` of the image.

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::{FusedOps, Rope};

use super::{Segment, TransformerConfig};

/// The rotary base; the reference fixes it.
const THETA: f32 = 10_000.0;

/// Computes the tables of the image tokens of all segments, `[tokens, head_dim / 2]` f32.
pub fn image_rope<B: FusedOps>(
    config: &TransformerConfig,
    segments: &[Segment],
    device: &B::Device,
) -> Rope<B> {
    let positions = segments.iter().flat_map(|segment| {
        let centred = |index: usize, side: usize| index as f32 - (side - side / 2) as f32;
        let (height, width) = (segment.height, segment.width);
        (0..height).flat_map(move |row| {
            (0..width).map(move |column| [0.0, centred(row, height), centred(column, width)])
        })
    });
    tables(config, positions, device)
}

/// Computes the tables of the text tokens of all segments, `[tokens, head_dim / 2]` f32.
pub fn text_rope<B: FusedOps>(
    config: &TransformerConfig,
    segments: &[Segment],
    device: &B::Device,
) -> Rope<B> {
    let positions = segments.iter().flat_map(|segment| {
        let first = (segment.height / 2).max(segment.width / 2);
        (first..first + segment.text_tokens).map(|position| [position as f32; 3])
    });
    tables(config, positions, device)
}

/// Computes the cosines and sines of `position · THETA^(-i / dim)` for each even `i` below each
/// axis' `dim`, in f32, as tables `[tokens, head_dim / 2]`.
fn tables<B: FusedOps>(
    config: &TransformerConfig,
    positions: impl Iterator<Item = [f32; 3]>,
    device: &B::Device,
) -> Rope<B> {
    let frequencies: Vec<(usize, f32)> = config
        .axes_dims_rope
        .iter()
        .enumerate()
        .flat_map(|(axis, &dim)| {
            (0..dim)
                .step_by(2)
                .map(move |i| (axis, 1.0 / THETA.powf(i as f32 / dim as f32)))
        })
        .collect();
    let half = frequencies.len();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for position in positions {
        for &(axis, frequency) in &frequencies {
            let (s, c) = (position[axis] * frequency).sin_cos();
            cos.push(c);
            sin.push(s);
        }
    }
    let tensor = |values: Vec<f32>| {
        let tokens = values.len() / half;
        Tensor::from_data(
            TensorData::new(values, [tokens, half]),
            (device, DType::F32),
        )
    };
    Rope {
        cos: tensor(cos),
        sin: tensor(sin),
    }
}
