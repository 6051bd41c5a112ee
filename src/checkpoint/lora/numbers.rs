//! Stored scalars, and the scale of a change from what declares it.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;

use super::content::{Content, Header, Stored};
use super::error::{DeclaredIn, LoraFault, shown};
use super::names::{LayerParts, Part};
use super::peft_config::{PeftConfig, parse_alpha};

/// How far two declared scales may be apart: as far as rounding to bf16 takes them.
const TOLERANCE: f32 = 1.0 / 256.0;

/// The values of all small tensors that are numbers of a change and not factors, by key.
#[derive(Debug, Default)]
pub(super) struct Scalars(BTreeMap<String, Vec<f32>>);

impl Scalars {
    /// The values of a tensor that was read.
    pub(super) fn get(&self, key: &str) -> &[f32] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// Refuses a file with the same header and other values.
    pub(super) fn check_unchanged(
        &self,
        content: &Content,
        header: &Header,
    ) -> Result<(), LoraFault> {
        for (key, values) in &self.0 {
            let stored = header.tensors.get(key).ok_or(LoraFault::Changed)?;
            let now = read_scalar(content, key, stored)?;
            // Values that have no effect need not be numbers.
            let bits = |values: &[f32]| values.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
            if bits(&now) != bits(values) {
                return Err(LoraFault::Changed);
            }
        }
        Ok(())
    }
}

/// Reads alphas, scales and shapes.
pub(super) fn read_scalars(
    content: &Content,
    header: &Header,
    parts: &[LayerParts],
) -> Result<Scalars, LoraFault> {
    let mut scalars = Scalars::default();
    for (part, key) in parts.iter().flat_map(|it| &it.keys) {
        let stored = &header.tensors[key];
        let values: usize = stored.shape.iter().product();
        let expected = match part {
            Part::Alpha | Part::Scale if values == 1 => None,
            Part::Alpha | Part::Scale => Some("one number"),
            Part::Reshape if values <= 8 => None,
            Part::Reshape => Some("the sizes of a shape"),
            _ => continue,
        };
        if let Some(expected) = expected {
            return Err(LoraFault::Shape {
                key: shown(key),
                found: stored.shape.clone(),
                expected: expected.to_owned(),
            });
        }
        let values = read_scalar(content, key, stored)?;
        scalars.0.insert(key.clone(), values);
    }
    Ok(scalars)
}

/// The values of a tensor of any type of numbers, as f32.
fn read_scalar(content: &Content, key: &str, stored: &Stored) -> Result<Vec<f32>, LoraFault> {
    let bytes = content.read(stored.range.clone())?;
    decode(stored.dtype, &bytes).ok_or_else(|| LoraFault::DType {
        key: shown(key),
        dtype: stored.dtype.to_string(),
    })
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (values, _) = bytes.as_chunks::<N>();
        values.iter().map(|it| value(*it)).collect()
    }
    Some(match dtype {
        Dtype::F64 => each(bytes, |it| f64::from_le_bytes(it) as f32),
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F16 => each(bytes, |it| f16::from_le_bytes(it).to_f32()),
        Dtype::BF16 => each(bytes, |it| bf16::from_le_bytes(it).to_f32()),
        Dtype::I64 => each(bytes, |it| i64::from_le_bytes(it) as f32),
        Dtype::U64 => each(bytes, |it| u64::from_le_bytes(it) as f32),
        Dtype::I32 => each(bytes, |it| i32::from_le_bytes(it) as f32),
        Dtype::U32 => each(bytes, |it| u32::from_le_bytes(it) as f32),
        Dtype::I16 => each(bytes, |it| f32::from(i16::from_le_bytes(it))),
        Dtype::U16 => each(bytes, |it| f32::from(u16::from_le_bytes(it))),
        Dtype::I8 => each(bytes, |it| f32::from(i8::from_le_bytes(it))),
        Dtype::U8 => each(bytes, |it| f32::from(u8::from_le_bytes(it))),
        _ => return None,
    })
}

/// What a file declares for all its layers.
#[derive(Debug)]
pub(super) struct Declared {
    peft: Option<PeftConfig>,
    metadata: Option<PeftConfig>,
    alpha: Option<f64>,
}

/// Alpha and scale of a change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Strength {
    pub(super) alpha: f32,
    pub(super) scale: f32,
}

impl Declared {
    /// `ss_network_alpha` of a header is not read: converters leave it in files whose factors have it
    /// already.
    pub(super) fn new(
        peft: Option<PeftConfig>,
        header: &BTreeMap<String, String>,
    ) -> Result<Self, LoraFault> {
        let metadata = header.get("lora_adapter_metadata");
        let metadata = metadata.map(|it| PeftConfig::parse_metadata(it));
        let alpha = header.get("lora_alpha").map(|it| parse_alpha(it));
        Ok(Self {
            peft,
            metadata: metadata.transpose()?.flatten(),
            alpha: alpha.transpose()?,
        })
    }

    /// The scale of a change of this rank, from the first that declares it: tensors of the layer,
    /// PEFT's configuration, the header. If none does, 1.
    ///
    /// # Errors
    /// If two of them declare different scales, or another rank.
    pub(super) fn strength(
        &self,
        module: &str,
        rank: usize,
        alpha: Option<f32>,
        scale: Option<f32>,
    ) -> Result<Strength, LoraFault> {
        let ranks = rank as f64;
        let of_alpha = |alpha: f64| {
            let alpha = if alpha == 0.0 { ranks } else { alpha };
            Strength {
                alpha: alpha as f32,
                scale: (alpha / ranks) as f32,
            }
        };
        let mut all = Vec::new();
        if let Some(scale) = scale {
            let alpha = scale * rank as f32;
            all.push((DeclaredIn::Tensor, Strength { alpha, scale }));
        } else if let Some(alpha) = alpha {
            all.push((DeclaredIn::Tensor, of_alpha(f64::from(alpha))));
        }
        for config in [&self.peft, &self.metadata].into_iter().flatten() {
            check_rank(config, module, rank)?;
            let (alpha, scale) = config.scale(module, ranks);
            all.push((config.place, Strength { alpha, scale }));
        }
        if let Some(alpha) = self.alpha {
            all.push((DeclaredIn::HeaderAlpha, of_alpha(alpha)));
        }
        let Some((place, first)) = all.first().copied() else {
            return Ok(of_alpha(ranks));
        };
        let differs = |it: f32| (it - first.scale).abs() > TOLERANCE * first.scale.abs();
        match all.iter().find(|(_, it)| differs(it.scale)) {
            Some((other, second)) => Err(LoraFault::ScaleDiffers {
                module: shown(module),
                first: (place, first.scale),
                second: (*other, second.scale),
            }),
            None => Ok(first),
        }
    }

    /// The scale of a LoKr of two whole factors, which have no rank: 1 whatever alpha is stored,
    /// and PEFT's alpha / r if a configuration of PEFT has them.
    pub(super) fn strength_without_rank(&self, module: &str, scale: Option<f32>) -> f32 {
        let peft = self.peft.as_ref().and_then(|config| {
            let rank = config.rank(module)?;
            (rank > 0.0).then(|| config.scale(module, rank).1)
        });
        scale.or(peft).unwrap_or(1.0)
    }
}

fn check_rank(config: &PeftConfig, module: &str, rank: usize) -> Result<(), LoraFault> {
    match config.rank(module) {
        Some(declared) if declared != rank as f64 => Err(LoraFault::RankDiffers {
            place: config.place,
            module: shown(module),
            declared,
            rank,
        }),
        _ => Ok(()),
    }
}
