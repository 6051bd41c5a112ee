//! The change of every layer, checked by the shapes and types of its parts.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use kiln_models::StoredDType;
use safetensors::Dtype;

use super::content::{Header, Stored};
use super::error::{LoraFault, Refusal, shown};
use super::names::{Layer, LayerParts, Part};
use super::numbers::{Declared, Scalars};
use super::{MAX_MEMORY_BYTES, MAX_RANK};

/// The change of one layer, or of three that the file stores as one.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) layer: Layer,
    pub(super) kind: Kind,
    pub(super) scale: f32,
    alpha: f32,
}

/// The stored factors of a change.
#[derive(Debug)]
pub(super) enum Kind {
    LowRank {
        down: Matrix,
        up: Matrix,
    },
    Kronecker {
        left: Operand,
        right: Operand,
    },
    /// LoHa: the product of both, value by value.
    Hadamard(Product, Product),
    Dense(Matrix),
}

/// A factor of a Kronecker product.
#[derive(Debug)]
pub(super) enum Operand {
    Whole(Matrix),
    Product(Product),
}

/// `a · b`
#[derive(Debug)]
pub(super) struct Product {
    pub(super) a: Matrix,
    pub(super) b: Matrix,
}

/// A stored matrix.
#[derive(Debug, Clone)]
pub(super) struct Matrix {
    pub(super) key: String,
    pub(super) shape: [usize; 2],
    pub(super) dtype: StoredDType,
    /// Its bytes in the file.
    pub(super) range: Range<u64>,
}

impl Module {
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.layer.targets.iter().map(|it| it.path.as_str())
    }

    /// Rank of the canonical form.
    pub(super) fn rank(&self) -> Option<usize> {
        match &self.kind {
            Kind::LowRank { down, .. } => Some(down.shape[0]),
            Kind::Hadamard(first, second) => {
                Some(first.rank() * second.rank()).filter(|rank| *rank <= MAX_RANK)
            }
            Kind::Kronecker { .. } | Kind::Dense(_) => None,
        }
    }

    /// Rank and alpha of a LoRA.
    pub(super) fn rank_and_alpha(&self) -> Option<(usize, f32)> {
        match &self.kind {
            Kind::LowRank { down, .. } => Some((down.shape[0], self.alpha)),
            _ => None,
        }
    }

    /// Bytes of the canonical form.
    pub(super) fn bytes(&self) -> u64 {
        const F32: u64 = 4;
        let fused = self.layer.targets.len() as u64;
        let (rows, columns) = (d_out(&self.layer) as u64, d_in(&self.layer) as u64);
        match &self.kind {
            Kind::LowRank { down, up } => down.bytes() * fused + up.bytes(),
            Kind::Kronecker { left, right } => left.bytes() + right.bytes() * fused,
            Kind::Hadamard(..) => match self.rank() {
                Some(rank) => F32 * rank as u64 * (columns * fused + rows),
                None => F32 * rows * columns,
            },
            Kind::Dense(matrix) => matrix.bytes(),
        }
    }
}

impl Operand {
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Whole(matrix) => matrix.shape,
            Self::Product(product) => product.shape(),
        }
    }

    fn rank(&self) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product(product) => Some(product.rank()),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Whole(matrix) => matrix.bytes(),
            Self::Product(product) => 4 * product.shape().iter().product::<usize>() as u64,
        }
    }

    fn key(&self) -> &str {
        match self {
            Self::Whole(matrix) => &matrix.key,
            Self::Product(product) => &product.b.key,
        }
    }
}

impl Product {
    pub(super) fn rank(&self) -> usize {
        self.b.shape[0]
    }

    pub(super) fn shape(&self) -> [usize; 2] {
        [self.a.shape[0], self.b.shape[1]]
    }
}

impl Matrix {
    fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn wrong(&self, expected: String) -> LoraFault {
        LoraFault::Shape {
            key: shown(&self.key),
            found: self.shape.to_vec(),
            expected,
        }
    }
}

/// Checks every layer.
///
/// # Errors
/// If a part is missing, is too much, or does not fit its layer.
pub(super) fn plan(
    header: &Header,
    parts: &[LayerParts],
    scalars: &Scalars,
    declared: &Declared,
) -> Result<Vec<Module>, LoraFault> {
    let mut keys: BTreeMap<&str, &str> = BTreeMap::new();
    let mut modules = Vec::new();
    for layer in parts {
        let parts = Parts {
            layer: &layer.layer,
            keys: &layer.keys,
            header,
        };
        // A layer can be there alone and as a third of a fused one.
        let first_key = layer.keys.values().next().map_or("", String::as_str);
        for target in &layer.layer.targets {
            match keys.entry(&target.path) {
                Entry::Vacant(entry) => entry.insert(first_key),
                Entry::Occupied(entry) => return Err(twice(entry.get(), first_key)),
            };
        }
        modules.push(parts.module(scalars, declared)?);
    }
    let bytes = modules.iter().map(Module::bytes).sum();
    if bytes > MAX_MEMORY_BYTES {
        return Err(LoraFault::TooLarge {
            what: "in memory its factors need",
            bytes,
            most: MAX_MEMORY_BYTES,
        });
    }
    Ok(modules)
}

/// The parts of one layer.
struct Parts<'a> {
    layer: &'a Layer,
    keys: &'a BTreeMap<Part, String>,
    header: &'a Header,
}

impl Parts<'_> {
    fn module(&self, scalars: &Scalars, declared: &Declared) -> Result<Module, LoraFault> {
        // A number that is not used need not be finite.
        let scalar = |part| {
            let key = self.keys.get(&part);
            let value = key.and_then(|key| Some((key, *scalars.get(key).first()?)));
            match value {
                Some((_, value)) if value.is_finite() => Ok(Some(value)),
                Some((key, _)) => Err(LoraFault::NotFinite(shown(key))),
                None => Ok(None),
            }
        };
        let name = &self.layer.name;
        let strength =
            |rank| declared.strength(name, rank, scalar(Part::Alpha)?, scalar(Part::Scale)?);
        self.check_reshape(scalars)?;
        let kind = self.kind()?;
        let (alpha, scale) = match &kind {
            Kind::LowRank { down, .. } => {
                let strength = strength(down.shape[0])?;
                (strength.alpha, strength.scale)
            }
            Kind::Hadamard(first, _) => (0.0, strength(first.rank())?.scale),
            // The rank of the second factor counts if both are products.
            Kind::Kronecker { left, right } => match right.rank().or(left.rank()) {
                Some(rank) => (0.0, strength(rank)?.scale),
                None => (
                    0.0,
                    declared.strength_without_rank(name, scalar(Part::Scale)?),
                ),
            },
            Kind::Dense(_) => (0.0, 1.0),
        };
        Ok(Module {
            layer: self.layer.clone(),
            kind,
            scale,
            alpha,
        })
    }

    /// The stored factors of the only kind of change that the layer has.
    fn kind(&self) -> Result<Kind, LoraFault> {
        let first_of = |parts: &[Part]| parts.iter().find_map(|part| self.keys.get(part));
        let kinds = [
            first_of(&[Part::Down, Part::Up]),
            first_of(&[
                Part::Left,
                Part::LeftA,
                Part::LeftB,
                Part::Right,
                Part::RightA,
                Part::RightB,
            ]),
            first_of(&[Part::FirstA, Part::FirstB, Part::SecondA, Part::SecondB]),
            first_of(&[Part::Diff]),
        ];
        let mut found = kinds.iter().flatten();
        if let (Some(first), Some(second)) = (found.next(), found.next()) {
            return Err(twice(first, second));
        }
        match kinds {
            [Some(_), ..] => self.low_rank(),
            [_, Some(_), ..] => self.kronecker(),
            [_, _, Some(_), _] => self.hadamard(),
            [_, _, _, Some(_)] => {
                let matrix = self.required(Part::Diff)?;
                self.check_shape(matrix.shape, &matrix)?;
                Ok(Kind::Dense(matrix))
            }
            [None, None, None, None] => Err(self.incomplete("factors")),
        }
    }

    fn low_rank(&self) -> Result<Kind, LoraFault> {
        let (down, up) = (self.required(Part::Down)?, self.required(Part::Up)?);
        let rank = down.shape[0];
        check_rank(&down, rank)?;
        let (columns, rows) = (d_in(self.layer), d_out(self.layer));
        if down.shape[1] != columns {
            return Err(down.wrong(format!("[rank, {columns}]")));
        }
        if up.shape != [rows, rank] {
            return Err(up.wrong(format!("[{rows}, {rank}]")));
        }
        Ok(Kind::LowRank { down, up })
    }

    fn kronecker(&self) -> Result<Kind, LoraFault> {
        let left = self.operand(Part::Left, Part::LeftA, Part::LeftB)?;
        let right = self.operand(Part::Right, Part::RightA, Part::RightB)?;
        let (a, b) = (left.shape(), right.shape());
        let found = [a[0].checked_mul(b[0]), a[1].checked_mul(b[1])];
        let expected = [d_out(self.layer), d_in(self.layer)];
        if found != expected.map(Some) {
            return Err(LoraFault::Shape {
                key: shown(right.key()),
                found: b.to_vec(),
                expected: format!(
                    "a factor of {expected:?} beside {} of shape {a:?}",
                    shown(left.key())
                ),
            });
        }
        Ok(Kind::Kronecker { left, right })
    }

    fn operand(&self, whole: Part, a: Part, b: Part) -> Result<Operand, LoraFault> {
        let products = self.keys.get(&a).or(self.keys.get(&b));
        match (self.keys.get(&whole), products) {
            (Some(first), Some(second)) => Err(twice(first, second)),
            (Some(_), None) => self.required(whole).map(Operand::Whole),
            (None, Some(_)) => self.product(a, b).map(Operand::Product),
            (None, None) => Err(self.incomplete(name(whole))),
        }
    }

    fn hadamard(&self) -> Result<Kind, LoraFault> {
        let first = self.product(Part::FirstA, Part::FirstB)?;
        let second = self.product(Part::SecondA, Part::SecondB)?;
        self.check_shape(first.shape(), &first.b)?;
        self.check_shape(second.shape(), &second.b)?;
        Ok(Kind::Hadamard(first, second))
    }

    fn product(&self, a: Part, b: Part) -> Result<Product, LoraFault> {
        let (a, b) = (self.required(a)?, self.required(b)?);
        check_rank(&b, b.shape[0])?;
        if a.shape[1] != b.shape[0] {
            return Err(a.wrong(format!("[rows, {}]", b.shape[0])));
        }
        Ok(Product { a, b })
    }

    fn check_shape(&self, found: [usize; 2], of: &Matrix) -> Result<(), LoraFault> {
        let expected = [d_out(self.layer), d_in(self.layer)];
        if found == expected {
            return Ok(());
        }
        Err(LoraFault::Shape {
            key: shown(&of.key),
            found: of.shape.to_vec(),
            expected: format!("a change of {expected:?}"),
        })
    }

    /// Refuses a change of the layer's shape.
    fn check_reshape(&self, scalars: &Scalars) -> Result<(), LoraFault> {
        let Some(key) = self.keys.get(&Part::Reshape) else {
            return Ok(());
        };
        let shape = [d_out(self.layer), d_in(self.layer)];
        if scalars.get(key) == shape.map(|it| it as f32) {
            return Ok(());
        }
        Err(LoraFault::Refused {
            key: shown(key),
            refusal: Refusal::Reshape,
        })
    }

    /// The matrix of a part.
    fn required(&self, part: Part) -> Result<Matrix, LoraFault> {
        match self.keys.get(&part) {
            Some(key) => matrix(key, &self.header.tensors[key]),
            None => Err(self.incomplete(name(part))),
        }
    }

    fn incomplete(&self, missing: &'static str) -> LoraFault {
        let key = self.keys.values().next().map_or("", String::as_str);
        LoraFault::Incomplete {
            key: shown(key),
            missing,
        }
    }
}

/// A stored tensor of two dimensions, not counting those of size 1 at its end.
fn matrix(key: &str, stored: &Stored) -> Result<Matrix, LoraFault> {
    let dtype = match stored.dtype {
        Dtype::F32 => StoredDType::F32,
        Dtype::F16 => StoredDType::F16,
        Dtype::BF16 => StoredDType::Bf16,
        other => {
            return Err(LoraFault::DType {
                key: shown(key),
                dtype: other.to_string(),
            });
        }
    };
    match stored.shape.as_slice() {
        [rows, columns, rest @ ..] if rest.iter().all(|size| *size == 1) => Ok(Matrix {
            key: key.to_owned(),
            shape: [*rows, *columns],
            dtype,
            range: stored.range.clone(),
        }),
        _ => Err(LoraFault::Shape {
            key: shown(key),
            found: stored.shape.clone(),
            expected: "a matrix".to_owned(),
        }),
    }
}

fn check_rank(matrix: &Matrix, rank: usize) -> Result<(), LoraFault> {
    if (1..=MAX_RANK).contains(&rank) {
        return Ok(());
    }
    Err(LoraFault::Rank {
        key: shown(&matrix.key),
        rank,
        most: MAX_RANK,
    })
}

fn twice(first: &str, second: &str) -> LoraFault {
    LoraFault::Twice {
        first: shown(first),
        second: shown(second),
    }
}

/// Inputs of a layer; the thirds of a fused one share them.
pub(super) fn d_in(layer: &Layer) -> usize {
    layer.targets.first().map_or(0, |it| it.d_in)
}

/// Outputs of a layer, of all thirds of a fused one.
fn d_out(layer: &Layer) -> usize {
    layer.targets.iter().map(|it| it.d_out).sum()
}

/// What a message calls a part that is missing.
fn name(part: Part) -> &'static str {
    match part {
        Part::Down => "lora_A (lora_down)",
        Part::Up => "lora_B (lora_up)",
        Part::Left => "lokr_w1",
        Part::LeftA => "lokr_w1_a",
        Part::LeftB => "lokr_w1_b",
        Part::Right => "lokr_w2",
        Part::RightA => "lokr_w2_a",
        Part::RightB => "lokr_w2_b",
        Part::FirstA => "hada_w1_a",
        Part::FirstB => "hada_w1_b",
        Part::SecondA => "hada_w2_a",
        Part::SecondB => "hada_w2_b",
        Part::Diff => "diff",
        Part::Alpha => "alpha",
        Part::Scale => "scale",
        Part::Reshape => "reshape_weight",
    }
}
