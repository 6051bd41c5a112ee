//! Reads the factors of a change into the canonical form.

use kiln_models::adapter::{Change, Factors, HostMatrix};

use super::content::Content;
use super::error::{LoraFault, shown};
use super::matrix::{
    column_products, columns, hadamard, is_finite, is_zero, kronecker, product, row_products, rows,
};
use super::plan::{Kind, Matrix, Module, Operand, Product};

/// Reads the change of a layer, or of three that the file stores as one, with their paths.
///
/// Factors keep the type that they have in the file. Those that are computed here are f32.
///
/// # Errors
/// If a value is not finite, or the file cannot be read.
pub(super) fn read(content: &Content, module: &Module) -> Result<Vec<(String, Change)>, LoraFault> {
    let get = |matrix: &Matrix| read_matrix(content, matrix);
    let factors = match &module.kind {
        Kind::LowRank { down, up } => Factors::LowRank {
            down: get(down)?,
            up: get(up)?,
        },
        Kind::Kronecker { left, right } => Factors::Kronecker {
            left: read_operand(content, left)?,
            right: read_operand(content, right)?,
        },
        Kind::Hadamard(first, second) => {
            let (first_a, first_b) = read_product(content, first)?;
            let (second_a, second_b) = read_product(content, second)?;
            let factors = if module.rank().is_some() {
                // (a·b)∘(c·d) is the product of a and c, row by row, times that of b and d, column
                // by column.
                Factors::LowRank {
                    down: column_products(&first_b, &second_b),
                    up: row_products(&first_a, &second_a),
                }
            } else {
                let (first, second) = (product(&first_a, &first_b), product(&second_a, &second_b));
                Factors::Dense(hadamard(&first, &second))
            };
            check_computed(&factors, &first.b.key)?;
            factors
        }
        Kind::Dense(matrix) => Factors::Dense(get(matrix)?),
    };
    let changes = split(factors, module.layer.targets.len());
    let changes = changes.into_iter().map(|factors| Change {
        factors,
        scale: module.scale,
    });
    Ok(module.paths().map(str::to_owned).zip(changes).collect())
}

fn read_matrix(content: &Content, matrix: &Matrix) -> Result<HostMatrix, LoraFault> {
    let read = HostMatrix {
        shape: matrix.shape,
        dtype: matrix.dtype.clone(),
        bytes: content.read(matrix.range.clone())?,
    };
    if is_finite(&read) {
        Ok(read)
    } else {
        Err(LoraFault::NotFinite(shown(&matrix.key)))
    }
}

fn read_product(
    content: &Content,
    product: &Product,
) -> Result<(HostMatrix, HostMatrix), LoraFault> {
    Ok((
        read_matrix(content, &product.a)?,
        read_matrix(content, &product.b)?,
    ))
}

fn read_operand(content: &Content, operand: &Operand) -> Result<HostMatrix, LoraFault> {
    match operand {
        Operand::Whole(matrix) => read_matrix(content, matrix),
        Operand::Product(factors) => {
            let (a, b) = read_product(content, factors)?;
            let computed = product(&a, &b);
            if is_finite(&computed) {
                Ok(computed)
            } else {
                Err(LoraFault::NotFinite(shown(&factors.b.key)))
            }
        }
    }
}

/// Products of finite values can overflow.
fn check_computed(factors: &Factors, key: &str) -> Result<(), LoraFault> {
    if factors.matrices().all(is_finite) {
        Ok(())
    } else {
        Err(LoraFault::NotFinite(shown(key)))
    }
}

/// Splits the change of a fused layer into those of its parts, by rows.
fn split(factors: Factors, parts: usize) -> Vec<Factors> {
    if parts == 1 {
        return vec![factors];
    }
    match factors {
        Factors::LowRank { down, up } => split_low_rank(&down, &up, parts),
        Factors::Kronecker { left, right } if left.shape[0].is_multiple_of(parts) => {
            let lefts = split_rows(&left, parts).into_iter();
            lefts
                .map(|left| Factors::Kronecker {
                    left,
                    right: right.clone(),
                })
                .collect()
        }
        Factors::Kronecker { left, right } => {
            let dense = split_rows(&kronecker(&left, &right), parts).into_iter();
            dense.map(Factors::Dense).collect()
        }
        Factors::Dense(matrix) => {
            let dense = split_rows(&matrix, parts).into_iter();
            dense.map(Factors::Dense).collect()
        }
    }
}

/// The parts share `down` and have their rows of `up`. If `up` is block-diagonal, which is how files
/// store three separate LoRAs as one, each part also has only its own rows of `down`.
fn split_low_rank(down: &HostMatrix, up: &HostMatrix, parts: usize) -> Vec<Factors> {
    let ups = split_rows(up, parts);
    let rank = down.shape[0] / parts;
    let own = |part: usize, up: &HostMatrix| columns(up, part * rank, rank);
    let is_diagonal = rank > 0
        && down.shape[0].is_multiple_of(parts)
        && ups.iter().enumerate().all(|(part, up)| {
            let others = (0..parts).filter(|it| *it != part);
            others.into_iter().all(|other| is_zero(&own(other, up)))
        });
    let part_of = |(part, up)| {
        if is_diagonal {
            Factors::LowRank {
                down: rows(down, part * rank, rank),
                up: own(part, &up),
            }
        } else {
            Factors::LowRank {
                down: down.clone(),
                up,
            }
        }
    };
    ups.into_iter().enumerate().map(part_of).collect()
}

fn split_rows(matrix: &HostMatrix, parts: usize) -> Vec<HostMatrix> {
    let count = matrix.shape[0] / parts;
    let part = |part| rows(matrix, part * count, count);
    (0..parts).map(part).collect()
}
