//! Exact tiles against the whole decode.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::tensor::{Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use burn_ndarray::{NdArray, NdArrayDevice};
use bytes::Bytes;
use kiln_models::config::ConfigText;
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::vae::{Tiling, VaeConfig, VaeDecoder, VaeSettings};
use kiln_models::{StoredDType, TensorInfo, TensorSource};
use kiln_ops::FusedOps;

use crate::fixtures::{Component, F32, config};

/// Largest difference of values from -1 to 1 on a backend whose kernels add up in another order for
/// another size.
const TOLERANCE: f32 = 1e-6;

/// Random weights that keep the variance of the values, of the shapes that a network asks for.
#[derive(Debug, Default)]
struct RandomWeights(Mutex<HashMap<String, Vec<usize>>>);

impl TensorSource for RandomWeights {
    fn origin(&self) -> String {
        "random weights".to_owned()
    }

    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(TensorInfo {
            shape: self.0.lock().unwrap().get(name)?.clone(),
            dtype: StoredDType::F32,
            file: self.origin(),
        })
    }

    fn declare(&self, name: &str, shape: &[usize]) -> Option<TensorInfo> {
        let mut declared = self.0.lock().unwrap();
        declared.insert(name.to_owned(), shape.to_vec());
        drop(declared);
        self.info(name)
    }

    fn bytes(&self, name: &str) -> Bytes {
        let shape = self.info(name).unwrap().shape;
        let count = shape.iter().product();
        let seed = name
            .bytes()
            .fold(7, |seed, byte| 31 * seed % 65_521 + u64::from(byte));
        let is_norm = name.ends_with("gamma");
        let inputs: usize = if shape.len() >= 4 && !is_norm {
            // A causal convolution uses one of its temporal slices.
            shape[1] * shape[shape.len() - 2] * shape[shape.len() - 1]
        } else {
            2500
        };
        let mean = f32::from(u8::from(is_norm));
        let deviation = 1.0 / (inputs as f32).sqrt();
        let values = randn(NoiseGenerator::Cpu, seed, count).into_iter();
        values
            .flat_map(|value| (mean + deviation * value).to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    }
}

/// Qwen-Image's decoder with random weights.
fn qwen_image<B: FusedOps>(device: &B::Device) -> VaeDecoder<B> {
    with_random_weights(
        r#""base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
           "temperal_downsample": [false, true, true]"#,
        device,
    )
}

fn with_random_weights<B: FusedOps>(fields: &str, device: &B::Device) -> VaeDecoder<B> {
    let ones = vec![1; 16];
    let config = VaeConfig::from_json(&ConfigText {
        file: "config.json".to_owned(),
        text: format!(
            r#"{{"_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "latents_mean": {ones:?},
                "latents_std": {ones:?}, {fields}}}"#
        ),
    });
    VaeDecoder::load(
        &config.unwrap(),
        Arc::<RandomWeights>::default(),
        device,
        F32,
    )
    .unwrap()
}

fn demo<B: FusedOps>(device: &B::Device) -> VaeDecoder<B> {
    let config = VaeConfig::from_json(&config("demo", "vae")).unwrap();
    VaeDecoder::load(&config, Component::open("demo", "vae"), device, F32).unwrap()
}

fn latents<B: FusedOps>([images, height, width]: [usize; 3], device: &B::Device) -> Tensor<B, 4> {
    let count = images * 16 * height * width;
    let values = randn(NoiseGenerator::Cpu, (height * 1000 + width) as u64, count);
    Tensor::from_data(TensorData::new(values, [images, 16, height, width]), device)
}

fn decode<B: FusedOps>(
    vae: &VaeDecoder<B>,
    latents: &Tensor<B, 4>,
    tiling: Option<Tiling>,
) -> Vec<f32> {
    let settings = VaeSettings {
        tiling,
        ..VaeSettings::default()
    };
    vae.decode(latents.clone(), settings)
        .into_data()
        .to_vec()
        .unwrap()
}

/// Decodes whole and in exact tiles of each of these sizes in pixels; the largest difference may be
/// `tolerance`.
fn compare<B: FusedOps>(
    vae: &VaeDecoder<B>,
    shape: [usize; 3],
    sizes: &[usize],
    tolerance: f32,
    device: &B::Device,
) {
    let latents = latents(shape, device);
    let whole = decode(vae, &latents, None);
    let largest = whole
        .iter()
        .fold(0.0_f32, |largest, x| largest.max(x.abs()));
    assert!(largest > 0.1, "{largest}");
    for &size in sizes {
        let tiled = decode(vae, &latents, Some(Tiling::Exact { size }));
        let pairs = whole.iter().zip(&tiled);
        let difference = pairs.fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        // Relative to values from -1 to 1, which a trained decoder returns.
        let difference = difference / largest.max(1.0);
        println!("{shape:?} in tiles of {size}: {difference:e}");
        assert!(
            difference <= tolerance,
            "{shape:?} in tiles of {size}: {difference:e}"
        );
    }
}

/// All squares of 16 to 512 pixels.
#[test]
fn tiles_of_the_demo_equal_the_whole_image_to_the_bit_at_every_size() {
    let vae = demo::<Flex>(&FlexDevice);
    for side in (2..=64).step_by(2) {
        // Tiles of 1 to 5 latents where they are few; and such that a remainder is left.
        let small = if side <= 12 {
            &[8, 16, 24, 32, 40][..]
        } else {
            &[]
        };
        let half = 8 * (side / 2 + 1);
        let sizes = [small, &[half, 72][..]].concat();
        compare(&vae, [1, side, side], &sizes, 0.0, &FlexDevice);
    }
}

/// Rectangles of every height, with a width and a tile that vary with it.
#[test]
fn tiles_equal_the_whole_rectangle_to_the_bit() {
    let vae = demo::<Flex>(&FlexDevice);
    for height in (2..=64).step_by(2) {
        let width = 2 + 2 * (height * 19 % 31);
        let size = 8 * (5 + height * 7 % 29);
        compare(
            &vae,
            [1 + height / 2 % 2, height, width],
            &[size],
            0.0,
            &FlexDevice,
        );
    }
}

#[test]
fn tiles_on_ndarray_equal_the_whole_image() {
    let device = NdArrayDevice::Cpu;
    let vae = demo::<NdArray>(&device);
    for shape in [[1, 6, 6], [2, 9, 13], [1, 24, 16]] {
        compare(&vae, shape, &[8, 24, 56, 64], TOLERANCE, &device);
    }
}

#[test]
fn decoders_of_other_depths_have_exact_tiles_too() {
    for fields in [
        r#""base_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 3, "temperal_downsample": [true]"#,
        r#""base_dim": 8, "dim_mult": [2, 1, 1], "num_res_blocks": 0,
           "temperal_downsample": [true, false]"#,
        r#""base_dim": 4, "dim_mult": [1, 1, 2, 2, 4], "num_res_blocks": 1,
           "temperal_downsample": [true, false, false, false]"#,
    ] {
        let vae = with_random_weights::<Flex>(fields, &FlexDevice);
        for shape in [[1, 12, 12], [2, 7, 15], [1, 33, 5]] {
            compare(&vae, shape, &[16, 32, 48, 80, 112], 0.0, &FlexDevice);
        }
    }
}

#[test]
fn tiles_of_1_to_5_latents_equal_qwen_images_whole_decode_to_the_bit() {
    let vae = qwen_image::<Flex>(&FlexDevice);
    compare(&vae, [1, 10, 7], &[8, 16, 24, 32, 40], 0.0, &FlexDevice);
}

/// 256², 512² and 1024×512 pixels: takes minutes.
#[test]
#[ignore = "takes minutes"]
fn large_images_of_qwen_images_decoder_equal_the_whole_decode() {
    let vae = qwen_image::<Flex>(&FlexDevice);
    compare(&vae, [1, 32, 32], &[40, 64, 128, 200], 0.0, &FlexDevice);
    compare(&vae, [1, 64, 64], &[128, 256, 360], 0.0, &FlexDevice);
    compare(&vae, [1, 64, 128], &[256, 512], 0.0, &FlexDevice);
}
