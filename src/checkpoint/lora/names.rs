//! What the keys of an adapter file name: a layer of the model, and a part of its change.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use kiln_models::adapter::AdapterTarget;

use super::LoraOptions;
use super::content::Header;
use super::error::{LoraFault, Refusal, shown};
use super::foreign;

/// Words before the path of a layer, one after another in any order.
const WORDS: [&str; 10] = [
    "transformer",
    "diffusion_model",
    "model",
    "base_model",
    "peft_model",
    "unet",
    // Of whole training wrappers.
    "pipe",
    "dit",
    "module",
    "_orig_mod",
];

/// Prefixes of paths that have underscores in place of dots.
pub(super) const UNDERSCORED: [&str; 3] = ["lora_unet_", "lora_transformer_", "lycoris_"];

/// Layers that some files store as one: the fused name, and the names of its thirds.
const FUSED: [(&str, [&str; 3]); 3] = [
    ("attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("attn.to_added_qkv", ADDED),
    ("attn.add_qkv_proj", ADDED),
];
const ADDED: [&str; 3] = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"];

/// Layers whose name ends in a 0 that some files leave out.
const SHORTENED: (&str, &str) = ("attn.to_out", "attn.to_out.0");

/// A part of the change of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The factors of LoRA.
    Down,
    Up,
    /// The factors of LoKr, whole or as products.
    Left,
    LeftA,
    LeftB,
    Right,
    RightA,
    RightB,
    /// The factors of LoHa.
    FirstA,
    FirstB,
    SecondA,
    SecondB,
    /// The whole change.
    Diff,
    Alpha,
    /// Takes the place of alpha / rank.
    Scale,
    /// The shape that the layer is to have.
    Reshape,
}

/// What a key ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Part(Part),
    Refused(Refusal),
}

/// A layer of the model, or three that the file stores as one.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// Its path, with the name of the fused layer.
    pub(super) name: String,
    /// One or three.
    pub(super) targets: Vec<AdapterTarget>,
}

/// The parts of the change of one layer, by their keys.
#[derive(Debug)]
pub(super) struct LayerParts {
    pub(super) layer: Layer,
    pub(super) keys: BTreeMap<Part, String>,
}

/// Sorts the keys of a file by layer.
///
/// # Errors
/// If a key is unknown, is refused by name, or is there twice.
pub(super) fn parts(
    header: &Header,
    targets: &[AdapterTarget],
    options: &LoraOptions,
) -> Result<Vec<LayerParts>, LoraFault> {
    let index = Index::new(targets);
    let keys = || header.tensors.keys().map(String::as_str);
    let mut foreign = keys().filter(|key| !foreign::is_text_encoder(key));
    if let Some((key, family)) = foreign.find_map(|key| Some((key, index.family_of(key)?))) {
        return Err(LoraFault::UnknownKey {
            key: shown(key),
            family: Some(family),
        });
    }
    let mut layers: BTreeMap<usize, LayerParts> = BTreeMap::new();
    for key in keys() {
        if foreign::is_without_effect(key) {
            continue;
        }
        let refused = |refusal| LoraFault::Refused {
            key: shown(key),
            refusal,
        };
        if foreign::is_text_encoder(key) {
            if options.ignore_text_encoder {
                continue;
            }
            return Err(refused(Refusal::TextEncoder));
        }
        let (stem, part) = match split(key) {
            Some((stem, Ending::Part(part))) => (stem, part),
            Some((_, Ending::Refused(refusal))) => return Err(refused(refusal)),
            None if index.is_weight(key) => return Err(refused(Refusal::WholeWeight)),
            None => {
                return Err(LoraFault::UnknownKey {
                    key: shown(key),
                    family: None,
                });
            }
        };
        let Some(place) = index.find(&stem) else {
            return Err(if foreign::is_norm(&stem) {
                refused(Refusal::Norm)
            } else {
                LoraFault::UnknownKey {
                    key: shown(key),
                    family: None,
                }
            });
        };
        let layer = layers.entry(place).or_insert_with(|| LayerParts {
            layer: index.layers[place].clone(),
            keys: BTreeMap::new(),
        });
        match layer.keys.entry(part) {
            Entry::Vacant(entry) => entry.insert(key.to_owned()),
            Entry::Occupied(entry) => {
                return Err(LoraFault::Twice {
                    first: shown(entry.get()),
                    second: shown(key),
                });
            }
        };
    }
    if layers.is_empty() {
        return Err(LoraFault::NoModule);
    }
    Ok(layers.into_values().collect())
}

/// Splits a key into the path of a layer and what it ends in; `None` if its end is unknown.
pub(super) fn split(key: &str) -> Option<(String, Ending)> {
    let components: Vec<&str> = key.split('.').collect();
    (0..components.len()).find_map(|at| {
        let (stem, end) = components.split_at(at);
        let (marker, tail) = end.split_first()?;
        // `to_q_lora.down.weight`
        if let (Some(name), ["down" | "up", ..]) = (marker.strip_suffix("_lora"), tail) {
            let stem = [stem, &[name]].concat().join(".");
            return Some((stem, ending("lora", tail)?));
        }
        Some((stem.join("."), ending(marker, tail)?))
    })
}

/// What a component of a key means, with those that follow it.
fn ending(marker: &str, tail: &[&str]) -> Option<Ending> {
    // PEFT puts the name of the adapter in between.
    let slot = matches!(tail, [] | [_] | [_, "weight"]);
    let plain = matches!(tail, [] | ["weight"]);
    let alone = tail.is_empty();
    let part = match (marker, tail) {
        ("lora_A" | "lora_B" | "lora_down" | "lora_up", ["bias"] | [_, "bias"]) => {
            return Some(Ending::Refused(Refusal::Bias));
        }
        ("lora_A", _) if slot => Part::Down,
        ("lora_B", _) if slot => Part::Up,
        ("lora_down", _) if plain => Part::Down,
        ("lora_up", _) if plain => Part::Up,
        ("lora" | "lora_linear_layer", ["down"] | ["down", "weight"]) => Part::Down,
        ("lora" | "lora_linear_layer", ["up"] | ["up", "weight"]) => Part::Up,
        ("lokr_w1", _) if slot => Part::Left,
        ("lokr_w1_a", _) if slot => Part::LeftA,
        ("lokr_w1_b", _) if slot => Part::LeftB,
        ("lokr_w2", _) if slot => Part::Right,
        ("lokr_w2_a", _) if slot => Part::RightA,
        ("lokr_w2_b", _) if slot => Part::RightB,
        ("hada_w1_a", _) if slot => Part::FirstA,
        ("hada_w1_b", _) if slot => Part::FirstB,
        ("hada_w2_a", _) if slot => Part::SecondA,
        ("hada_w2_b", _) if slot => Part::SecondB,
        ("diff", _) if alone => Part::Diff,
        ("alpha", _) if alone => Part::Alpha,
        ("scale", _) if alone => Part::Scale,
        ("reshape_weight", _) if alone => Part::Reshape,
        _ => return foreign::refusal(marker, tail).map(Ending::Refused),
    };
    Some(Ending::Part(part))
}

/// The layers of a model by every name that files have for them.
struct Index {
    layers: Vec<Layer>,
    /// Index of a layer by its path, with dots or with underscores.
    names: HashMap<String, usize>,
}

impl Index {
    fn new(targets: &[AdapterTarget]) -> Self {
        let mut index = Self {
            layers: Vec::new(),
            names: HashMap::new(),
        };
        let by_path: HashMap<&str, &AdapterTarget> =
            targets.iter().map(|it| (it.path.as_str(), it)).collect();
        for target in targets {
            index.add(&target.path, vec![target.clone()]);
            if let Some(block) = target.path.strip_suffix(SHORTENED.1) {
                index.name(&format!("{block}{}", SHORTENED.0), index.layers.len() - 1);
            }
            for (fused, thirds) in FUSED {
                let Some(block) = target.path.strip_suffix(thirds[0]) else {
                    continue;
                };
                let thirds = thirds.map(|third| by_path.get(format!("{block}{third}").as_str()));
                let thirds: Vec<AdapterTarget> = thirds
                    .into_iter()
                    .flatten()
                    .map(|it| (*it).clone())
                    .collect();
                let [first, second, third] = thirds.as_slice() else {
                    continue;
                };
                let shape = |it: &AdapterTarget| (it.d_in, it.d_out);
                if shape(first) == shape(second) && shape(first) == shape(third) {
                    index.add(&format!("{block}{fused}"), thirds);
                }
            }
        }
        index
    }

    fn add(&mut self, path: &str, targets: Vec<AdapterTarget>) {
        self.layers.push(Layer {
            name: path.to_owned(),
            targets,
        });
        self.name(path, self.layers.len() - 1);
    }

    fn name(&mut self, path: &str, layer: usize) {
        self.names.insert(path.replace('.', "_"), layer);
        self.names.insert(path.to_owned(), layer);
    }

    /// The layer of a path with any prefixes.
    fn find(&self, stem: &str) -> Option<usize> {
        let stem = stem.replace(".processor.", ".");
        let mut rest = stem.as_str();
        loop {
            let underscored = UNDERSCORED.iter().filter_map(|it| rest.strip_prefix(it));
            let mut names = std::iter::once(rest).chain(underscored);
            if let Some(layer) = names.find_map(|name| self.names.get(name)) {
                return Some(*layer);
            }
            let (word, after) = rest.split_once('.')?;
            if !WORDS.contains(&word) {
                return None;
            }
            rest = after;
        }
    }

    /// Whether a key names a whole weight of the model.
    fn is_weight(&self, key: &str) -> bool {
        let stem = key.strip_suffix(".weight").or(key.strip_suffix(".bias"));
        stem.is_some_and(|stem| self.find(stem).is_some() || foreign::is_norm(stem))
    }

    /// What model a key belongs to that names no layer of this one.
    fn family_of(&self, key: &str) -> Option<&'static str> {
        let stem = split(key).map_or_else(|| key.to_owned(), |(stem, _)| stem);
        match self.find(&stem) {
            Some(_) => None,
            None => foreign::family(&stem),
        }
    }
}
