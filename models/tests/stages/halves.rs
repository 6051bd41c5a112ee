//! The halves of a job on two devices: each half alone, with a share of the cores, must give what one
//! forward of both gives.

use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use kiln_models::Precision;
use kiln_models::adapter::AdapterUse;
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::transformer::{AdapterRuns, Segment, Transformer, TransformerConfig};
use kiln_ops::FusedOps;

use crate::adapter_cases::adapter;
use crate::fixtures::{Component, F32, config};

/// Weights of the demo model as they are stored.
const BF16: Precision = Precision {
    model: DType::BF16,
    activations: DType::F32,
};

fn noise(seed: u64, rows: usize, columns: usize) -> Tensor<Flex, 2> {
    let values = randn(NoiseGenerator::Cpu, seed, rows * columns);
    let data = TensorData::new(values, [rows, columns]);
    Tensor::from_data(data, (&FlexDevice, DType::F32))
}

fn values(tensor: Tensor<Flex, 2>) -> Vec<f32> {
    tensor.into_data().into_vec().unwrap()
}

#[test]
fn halves_alone_equal_both_in_one_forward_to_the_bit() {
    let none: [AdapterUse; 0] = [];
    let adapters = ["twelve", "second"].map(|name| AdapterUse {
        adapter: adapter(name),
        scale: 0.7,
    });
    for (checkpoint, precision, adapters) in [
        ("base", F32, &none[..]),
        ("base", F32, &adapters),
        ("demo", BF16, &none),
    ] {
        let config = TransformerConfig::from_json(&config(checkpoint, "transformer")).unwrap();
        let source = Component::open(checkpoint, "transformer");
        let transformer = Transformer::<Flex>::load(&config, source, &FlexDevice, precision);
        let transformer = transformer.unwrap();
        let adapters = transformer.load_adapters(adapters, precision.model);
        let modulation = transformer.modulation_table(&[0.7]).step(0);
        let cores = [0, 1].map(|part| Flex::cores(part, 2));
        for (height, width) in [(1, 1), (2, 3), (4, 4), (8, 8), (5, 11), (16, 16)] {
            for images in 1..=3 {
                for text_tokens in [[1, 1], [11, 2], [17, 23]] {
                    let segments = text_tokens.map(|text_tokens| {
                        let segment = Segment {
                            height,
                            width,
                            text_tokens,
                            row: 0,
                        };
                        vec![segment; images]
                    });
                    let tokens = height * width * images;
                    let latents = noise(1, tokens, config.in_channels);
                    let texts = [0, 1].map(|half| {
                        let rows = text_tokens[half] * images;
                        noise(2 + half as u64, rows, config.joint_attention_dim)
                    });
                    let both = transformer.forward(
                        Tensor::cat(vec![latents.clone(), latents.clone()], 0),
                        Tensor::cat(texts.to_vec(), 0),
                        &modulation,
                        &transformer.pack(&segments.concat()),
                        &AdapterRuns::of(
                            text_tokens
                                .map(|text| (&*adapters, (tokens, text * images)))
                                .into_iter(),
                        ),
                    );
                    let both = values(both);
                    for (half, expected) in both.chunks(both.len() / 2).enumerate() {
                        let alone = || {
                            let packing = transformer.pack(&segments[half]);
                            let text = texts[half].clone();
                            let rows = (tokens, text.dims()[0]);
                            let runs = [(&*adapters, rows)];
                            values(transformer.forward(
                                latents.clone(),
                                text,
                                &modulation,
                                &packing,
                                &AdapterRuns::of(runs.into_iter()),
                            ))
                        };
                        let what = format!(
                            "{checkpoint}, {} adapters: half {half} of {images} {height}x{width}, {text_tokens:?}",
                            adapters.len()
                        );
                        assert!(alone() == expected, "{what}");
                        assert!(
                            cores[half].run(alone) == expected,
                            "{what}, a share of the cores"
                        );
                    }
                }
            }
        }
    }
}
