//! Compares a packed forward of several segments with single forwards of each.

use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::transformer::{
    AdapterRuns, Segment, StepModulation, Transformer, TransformerConfig,
};

use crate::fixtures::{Component, F32, assert_close, config};

fn noise(seed: u64, rows: usize, columns: usize) -> Tensor<Flex, 2> {
    let values = randn(NoiseGenerator::Cpu, seed, rows * columns);
    Tensor::from_data(
        TensorData::new(values, [rows, columns]),
        (&FlexDevice, DType::F32),
    )
}

/// One forward of three image sizes, prompts and timesteps.
#[test]
fn packed_forward_equals_single_forwards() {
    let config = TransformerConfig::from_json(&config("base", "transformer")).unwrap();
    let source = Component::open("base", "transformer");
    let transformer = Transformer::<Flex>::load(&config, source, &FlexDevice, F32).unwrap();
    let table = transformer.modulation_table(&[0.9, 0.5, 0.1]);
    let segments: Vec<Segment> = [(2, 3, 11), (5, 4, 1), (1, 7, 23)]
        .into_iter()
        .enumerate()
        .map(|(row, (height, width, text_tokens))| Segment {
            height,
            width,
            text_tokens,
            row,
        })
        .collect();
    let images: Vec<_> = segments
        .iter()
        .map(|s| noise(s.row as u64, s.image_tokens(), config.in_channels))
        .collect();
    let texts: Vec<_> = segments
        .iter()
        .map(|s| noise(10 + s.row as u64, s.text_tokens, config.joint_attention_dim))
        .collect();

    let steps = (0..3).map(|row| table.step(row)).collect();
    let packed = transformer.forward(
        Tensor::cat(images.clone(), 0),
        Tensor::cat(texts.clone(), 0),
        &StepModulation::cat(steps),
        &transformer.pack(&segments),
        &AdapterRuns::none(),
    );
    let sizes = segments.iter().map(Segment::image_tokens).collect();
    for (index, part) in packed.split_with_sizes(sizes, 0).into_iter().enumerate() {
        let single = transformer.forward(
            images[index].clone(),
            texts[index].clone(),
            &table.step(index),
            &transformer.pack(&[Segment {
                row: 0,
                ..segments[index]
            }]),
            &AdapterRuns::none(),
        );
        let values = |x: Tensor<Flex, 2>| x.into_data().into_vec::<f32>().unwrap();
        assert_close(
            &format!("segment {index}"),
            &values(part),
            &values(single),
            2e-6,
        );
    }
}
