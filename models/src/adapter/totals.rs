//! What an adapter adds to the work and the memory of a job: sums over its changes.

use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::Add;

use super::{AdapterUse, Change, Factors};

/// Sums over the changes of an adapter, or over all changes of several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub work: TokenWork,
    /// Multiply-adds for each timestep, in the layers that make the modulation table.
    pub timestep: u64,
    /// Values that a timestep adds to the modulation table's row.
    pub modulation: u64,
    /// Whether a layer of the timestep embedding is changed, so that the whole row is another.
    pub changes_timestep: bool,
    /// Values that exist for each token beside the output of the changed layer with the most, of layers
    /// on image and on text tokens.
    pub image_values: u64,
    pub text_values: u64,
}

/// Multiply-adds of changes for each token of the transformer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TokenWork {
    /// For each image token in all blocks, and before and after them.
    pub image: u64,
    pub image_ends: u64,
    /// For each text token in all blocks, and before them.
    pub text: u64,
    pub text_ends: u64,
}

impl Totals {
    pub(super) fn of_changes(changes: &BTreeMap<String, Change>) -> Self {
        let of_change = |(path, change): (&String, &Change)| Self::of_change(path, &change.factors);
        changes.iter().map(of_change).sum()
    }

    /// The sums over the adapters of a job.
    pub(crate) fn of_job(adapters: &[AdapterUse]) -> Self {
        adapters.iter().map(|used| used.adapter.totals).sum()
    }

    fn of_change(path: &str, factors: &Factors) -> Self {
        let (work, [out, _]) = (factors.work(), factors.shape());
        let values = factors.values() as u64;
        let nothing = Self::default();
        let on_image = |work| Self {
            work,
            image_values: values,
            ..nothing
        };
        let on_text = |work| Self {
            work,
            text_values: values,
            ..nothing
        };
        let zero = TokenWork::default();
        let of_block = path.strip_prefix("transformer_blocks.");
        let of_block = of_block.and_then(|rest| rest.split_once('.'));
        let Some((_, name)) = of_block else {
            return match path {
                "txt_in" => on_text(TokenWork {
                    text_ends: work,
                    ..zero
                }),
                "norm_out.linear" => Self {
                    timestep: work,
                    modulation: out as u64,
                    ..nothing
                },
                _ if path.starts_with("time_text_embed.") => Self {
                    timestep: work,
                    changes_timestep: true,
                    ..nothing
                },
                _ => on_image(TokenWork {
                    image_ends: work,
                    ..zero
                }),
            };
        };
        match name {
            "img_mod.1" | "txt_mod.1" => Self {
                timestep: work,
                modulation: out as u64,
                ..nothing
            },
            "attn.to_add_out" => on_text(TokenWork { text: work, ..zero }),
            _ if name.starts_with("attn.add_") || name.starts_with("txt_") => {
                on_text(TokenWork { text: work, ..zero })
            }
            _ => on_image(TokenWork {
                image: work,
                ..zero
            }),
        }
    }
}

impl Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            work: self.work + other.work,
            timestep: self.timestep + other.timestep,
            modulation: self.modulation + other.modulation,
            changes_timestep: self.changes_timestep || other.changes_timestep,
            image_values: self.image_values.max(other.image_values),
            text_values: self.text_values.max(other.text_values),
        }
    }
}

impl Sum for Totals {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

impl Add for TokenWork {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            image: self.image + other.image,
            image_ends: self.image_ends + other.image_ends,
            text: self.text + other.text,
            text_ends: self.text_ends + other.text_ends,
        }
    }
}

impl Factors {
    /// Values that exist for each token while the change is computed, its output among them.
    fn values(&self) -> usize {
        let [out, _] = self.shape();
        match self {
            // Three layers may share their input, and then the product with their lower factors.
            Self::LowRank { down, .. } => 3 * down.shape[0] + out,
            // Products are transposed to a copy.
            Self::Kronecker { left, right } => 2 * (left.shape[1] * right.shape[0] + out),
            Self::Dense(_) => out,
        }
    }

    /// Multiply-adds for each token.
    fn work(&self) -> u64 {
        let [out, wide] = self.shape().map(|side| side as u64);
        match self {
            Self::LowRank { down, .. } => down.shape[0] as u64 * (wide + out),
            Self::Dense(_) => wide * out,
            Self::Kronecker { left, right } => {
                let [a, b] = left.shape.map(|side| side as u64);
                let [c, d] = right.shape.map(|side| side as u64);
                // By the right factor first.
                b * c * (d + a)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Adapter, HostMatrix};
    use super::*;

    fn matrix(rows: usize, columns: usize) -> HostMatrix {
        HostMatrix::from_f32([rows, columns], &vec![0.0; rows * columns])
    }

    fn low_rank(rank: usize, d_in: usize, d_out: usize) -> Factors {
        Factors::LowRank {
            down: matrix(rank, d_in),
            up: matrix(d_out, rank),
        }
    }

    fn totals(changes: Vec<(&str, Factors)>) -> Totals {
        let change = |factors| Change {
            factors,
            scale: 1.0,
        };
        let changes = changes
            .into_iter()
            .map(|(path, factors)| (path.to_owned(), change(factors)));
        let adapter = Adapter::new("a", changes.collect());
        Totals::of_job(&[AdapterUse {
            adapter: Arc::new(adapter),
            scale: 1.0,
        }])
    }

    #[test]
    fn changes_count_for_the_tokens_of_their_stream() {
        let counted = totals(vec![
            ("img_in", low_rank(2, 3, 4)),
            ("txt_in", low_rank(1, 5, 4)),
            ("transformer_blocks.0.attn.to_q", low_rank(2, 4, 4)),
            ("transformer_blocks.11.attn.to_out.0", low_rank(1, 4, 4)),
            (
                "transformer_blocks.0.img_mlp.net.0.proj",
                low_rank(2, 4, 16),
            ),
            ("transformer_blocks.0.attn.add_k_proj", low_rank(3, 4, 4)),
            ("transformer_blocks.0.attn.to_add_out", low_rank(1, 4, 4)),
            ("transformer_blocks.0.txt_mlp.net.2", low_rank(1, 16, 4)),
        ]);
        let expected = Totals {
            work: TokenWork {
                image: 2 * 8 + 8 + 2 * 20,
                image_ends: 2 * 7,
                text: 3 * 8 + 8 + 20,
                text_ends: 9,
            },
            image_values: 16 + 3 * 2,
            text_values: 4 + 3 * 3,
            ..Totals::default()
        };
        assert_eq!(counted, expected);
    }

    #[test]
    fn changes_of_the_modulation_count_for_each_timestep() {
        let modulation = vec![
            ("norm_out.linear", low_rank(1, 4, 8)),
            ("transformer_blocks.0.img_mod.1", low_rank(2, 4, 24)),
            ("transformer_blocks.1.txt_mod.1", low_rank(1, 4, 24)),
        ];
        let expected = Totals {
            timestep: 12 + 2 * 28 + 28,
            modulation: 8 + 24 + 24,
            ..Totals::default()
        };
        assert_eq!(totals(modulation), expected);
        let embedding = "time_text_embed.timestep_embedder.linear_2";
        let counted = totals(vec![(embedding, low_rank(1, 4, 4))]);
        assert!(counted.changes_timestep);
        assert_eq!((counted.timestep, counted.modulation), (8, 0));
    }

    #[test]
    fn kronecker_products_and_whole_changes_count_as_they_are_multiplied() {
        let path = "transformer_blocks.0.attn.to_q";
        let kronecker = Factors::Kronecker {
            left: matrix(2, 3),
            right: matrix(5, 7),
        };
        // [3, 7] by [7, 5], then [2, 3] by [3, 5].
        let counted = totals(vec![(path, kronecker)]);
        assert_eq!(counted.work.image, 3 * 7 * 5 + 2 * 3 * 5);
        assert_eq!(counted.image_values, 2 * (10 + 15));
        let dense = Factors::Dense(matrix(4, 6));
        assert_eq!(totals(vec![(path, dense)]).work.image, 24);
    }
}
