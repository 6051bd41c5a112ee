//! The networks as burn modules: parameter counts, printing, visitors and mappers.

use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use kiln_models::TensorSource;
use kiln_models::text_encoder::{TextEncoder, TextEncoderConfig};
use kiln_models::transformer::{Transformer, TransformerConfig};
use kiln_models::vae::{VaeConfig, VaeDecoder, VaeSettings};

use crate::fixtures::{Component, F32, config};

/// Two of the fixtures, and the checkpoint that ships with kiln.
const CHECKPOINTS: [&str; 3] = ["base", "odd", "demo"];

fn text_encoder(checkpoint: &str) -> (TextEncoder<Flex>, Arc<dyn TensorSource>) {
    let config = TextEncoderConfig::from_json(&config(checkpoint, "text_encoder")).unwrap();
    let source = Component::open(checkpoint, "text_encoder");
    let network = TextEncoder::load(&config, Arc::clone(&source), &FlexDevice, F32);
    (network.unwrap(), source)
}

fn transformer(checkpoint: &str) -> (Transformer<Flex>, Arc<dyn TensorSource>) {
    let config = TransformerConfig::from_json(&config(checkpoint, "transformer")).unwrap();
    let source = Component::open(checkpoint, "transformer");
    let network = Transformer::load(&config, Arc::clone(&source), &FlexDevice, F32);
    (network.unwrap(), source)
}

fn vae(checkpoint: &str) -> (VaeDecoder<Flex>, Arc<dyn TensorSource>) {
    let config = VaeConfig::from_json(&config(checkpoint, "vae")).unwrap();
    let source = Component::open(checkpoint, "vae");
    let network = VaeDecoder::load(&config, Arc::clone(&source), &FlexDevice, F32);
    (network.unwrap(), source)
}

/// Counts parameters and their elements, as a visitor and as a mapper that negates them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    params: usize,
    elements: usize,
}

impl Counts {
    fn add<const D: usize>(&mut self, tensor: &Tensor<Flex, D>) {
        self.params += 1;
        self.elements += tensor.shape().num_elements();
    }

    /// The parameters that a network should load of a component: all tensors whose names contain none
    /// of `not_loaded`, and of a 3-D convolution's weight only the last temporal slice.
    fn expected(source: &dyn TensorSource, not_loaded: &[&str]) -> Self {
        let mut counts = Self::default();
        for name in source.names() {
            if not_loaded.iter().any(|part| name.contains(part)) {
                continue;
            }
            let shape = source.info(&name).unwrap().shape;
            let elements: usize = shape.iter().product();
            let slices = if shape.len() == 5 { shape[2] } else { 1 };
            counts.params += 1;
            counts.elements += elements / slices;
        }
        counts
    }
}

impl ModuleVisitor<Flex> for Counts {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
        self.add(&param.val());
    }
}

impl ModuleMapper<Flex> for Counts {
    fn map_float<const D: usize>(
        &mut self,
        param: Param<Tensor<Flex, D>>,
    ) -> Param<Tensor<Flex, D>> {
        self.add(&param.val());
        param.map(Tensor::neg)
    }
}

/// Asserts that `num_params`, a visitor and a mapper see the expected parameters.
fn assert_counts(network: impl Module<Flex>, expected: &Counts) {
    assert!(expected.params > 0);
    assert_eq!(network.num_params(), expected.elements);
    let mut visited = Counts::default();
    network.visit(&mut visited);
    assert_eq!(&visited, expected);
    let mut mapped = Counts::default();
    drop(network.map(&mut mapped));
    assert_eq!(&mapped, expected);
}

#[test]
fn text_encoder_parameters_are_the_loaded_tensors() {
    for checkpoint in CHECKPOINTS {
        let (network, source) = text_encoder(checkpoint);
        let unused = ["visual.", "lm_head.", "rotary_emb"];
        assert_counts(network, &Counts::expected(&*source, &unused));
    }
}

#[test]
fn transformer_parameters_are_the_loaded_tensors_without_modulation() {
    for checkpoint in CHECKPOINTS {
        let (network, source) = transformer(checkpoint);
        let deferred = [".img_mod.", ".txt_mod.", "norm_out."];
        assert_counts(network, &Counts::expected(&*source, &deferred));
    }
}

#[test]
fn vae_parameters_are_the_loaded_tensors_of_one_frame() {
    for checkpoint in CHECKPOINTS {
        let (network, source) = vae(checkpoint);
        let not_loaded = ["encoder.", ".time_conv."];
        let mut expected = Counts::expected(&*source, &not_loaded);
        // Part of the encoder, although its name is also the end of `post_quant_conv`.
        expected.params -= 2;
        for name in ["quant_conv.weight", "quant_conv.bias"] {
            let shape = source.info(name).unwrap().shape;
            expected.elements -= shape.iter().product::<usize>();
        }
        assert_counts(network, &expected);
    }
}

/// Negating every parameter changes the output; negating them again restores it.
#[test]
fn mapped_parameters_are_those_that_a_forward_uses() {
    let (network, _) = vae("base");
    let latents = Tensor::<Flex, 4>::from_data(
        TensorData::new(vec![0.5_f32; 16 * 16], [1, 16, 4, 4]),
        &FlexDevice,
    );
    let decode = |network: &VaeDecoder<Flex>| {
        network
            .decode(latents.clone(), VaeSettings::default())
            .into_data()
    };
    let original = decode(&network);
    let negated = network.map(&mut Counts::default());
    assert_ne!(decode(&negated), original);
    let restored = negated.map(&mut Counts::default());
    assert_eq!(decode(&restored), original);
}

/// burn 0.21 prints the types of derived modules in quotes.
#[test]
fn networks_print_their_layers() {
    let encoder = text_encoder("base").0.to_string();
    let transformer = transformer("base").0.to_string();
    let vae = vae("base").0.to_string();
    for (text, parts) in [
        (
            encoder,
            [
                r#"embed_tokens: "Embedding" {"#,
                r#"q_proj: "Linear" {"#,
                r#"norm: "RmsNorm" {"#,
            ],
        ),
        (
            transformer,
            [
                "blocks: Vec<0..2>",
                r#"to_out: "Linear" {"#,
                "img_mod: DeferredLinear {transformer_blocks.0.img_mod.1: 32 -> 192}",
            ],
        ),
        (
            vae,
            [
                r#"mid_block: "MidBlock" {"#,
                r#"conv1: "Conv2d" {"#,
                r#"norm1: "ChannelNorm" {"#,
            ],
        ),
    ] {
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
