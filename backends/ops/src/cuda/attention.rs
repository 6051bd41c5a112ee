//! Attention on tensor cores.

use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{DType, Shape, TensorMetadata};

use super::source::{CudaKernel, Launch, element};
use super::{allocate, has_tensor_cores, has_wgmma, is_aligned, with_contiguous_rows};

/// Largest number of sequences per launch.
const SEQUENCES: usize = 32;

/// A compilation of `attention_mma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionMma {
    pub element: &'static str,
    pub head_dim: usize,
    pub causal: bool,
}

/// Sizes of attention over packed sequences.
#[derive(Debug, Clone)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Token stride and head stride of query, key and value, in values.
    pub strides: [[usize; 2]; 3],
}

impl Attention {
    /// Launch of a kernel whose blocks compute `queries` queries and 1 / `parts` of a head's columns.
    /// `starts` has the first token of each sequence, and the end of the last one.
    fn launch<K>(&self, kernel: K, queries: usize, parts: usize, starts: &[usize]) -> Launch<K> {
        let lengths = starts.windows(2).map(|pair| pair[1] - pair[0]);
        let tiles: usize = lengths.map(|length| length.div_ceil(queries)).sum();
        let mut info = vec![self.heads / self.kv_heads, self.heads * self.head_dim];
        info.extend(self.strides.as_flattened());
        let padding = starts.last().copied().into_iter().cycle();
        info.extend(starts.iter().copied().chain(padding).take(SEQUENCES + 1));
        Launch {
            kernel,
            grid: [tiles as u32, (self.heads * parts) as u32, 1],
            info: info.into_iter().map(|size| size as u64).collect(),
        }
    }
}

impl AttentionMma {
    /// Queries per block.
    const QUERIES: usize = 64;

    /// Whether the kernel supports this head dimension.
    pub fn has_width(head_dim: usize) -> bool {
        head_dim.is_multiple_of(8) && (8..=384).contains(&head_dim)
    }

    /// Head dimension in shared memory, padded for the tensor cores.
    fn depth(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Number of blocks that share the columns of a head.
    fn parts(self) -> usize {
        self.head_dim.div_ceil(128)
    }

    /// Output columns per block.
    fn columns(self) -> usize {
        self.head_dim.div_ceil(self.parts()).next_multiple_of(16)
    }

    /// Keys of a tile.
    fn keys(self) -> usize {
        if self.depth() <= 128 { 64 } else { 32 }
    }

    /// Launch over sequences; `starts` has the first token of each, and the end of the last one.
    pub fn launch(self, sizes: &Attention, starts: &[usize]) -> Launch<Self> {
        sizes.launch(self, Self::QUERIES, self.parts(), starts)
    }
}

impl CudaKernel for AttentionMma {
    const NAME: &'static str = "attention_mma";
    const TEXTS: &'static [&'static str] = &[include_str!("kernels/attention_mma.cu")];

    fn defines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("T", self.element.to_owned()),
            ("D", self.head_dim.to_string()),
            ("DP", self.depth().to_string()),
            ("PARTS", self.parts().to_string()),
            ("DV", self.columns().to_string()),
            ("KEYS", self.keys().to_string()),
            ("CAUSAL", u8::from(self.causal).to_string()),
            ("SEQUENCES", SEQUENCES.to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        128
    }

    fn shared_bytes(&self) -> usize {
        let (row, value_row) = (self.depth() + 8, self.columns() + 8);
        let query_and_key_rows = if self.depth() <= 128 {
            Self::QUERIES.max(self.keys())
        } else {
            Self::QUERIES + self.keys()
        };
        2 * (query_and_key_rows * row + self.keys() * value_row)
    }
}

/// A compilation of `attention_wgmma.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionWgmma {
    pub element: &'static str,
    pub head_dim: usize,
    pub causal: bool,
}

impl AttentionWgmma {
    /// Queries per block, and keys of a tile.
    const ROWS: usize = 128;

    /// Whether the kernel supports this head dimension.
    pub fn has_width(head_dim: usize) -> bool {
        matches!(head_dim, 64 | 128)
    }

    /// Launch over sequences; `starts` has the first token of each, and the end of the last one.
    pub fn launch(self, sizes: &Attention, starts: &[usize]) -> Launch<Self> {
        sizes.launch(self, Self::ROWS, 1, starts)
    }
}

impl CudaKernel for AttentionWgmma {
    const NAME: &'static str = "attention_wgmma";
    const TEXTS: &'static [&'static str] = &[
        include_str!("kernels/wgmma.cuh"),
        include_str!("kernels/attention_wgmma.cu"),
    ];

    fn defines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("T", self.element.to_owned()),
            ("D", self.head_dim.to_string()),
            ("CAUSAL", u8::from(self.causal).to_string()),
            ("SEQUENCES", SEQUENCES.to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        256
    }

    /// Space for one tile of queries, two of keys and two of values.
    fn shared_bytes(&self) -> usize {
        5 * Self::ROWS * self.head_dim * 2
    }
}

/// Computes [`crate::FusedOps::packed_attention`]; `None` unless tensor cores support the dtype and the
/// head dimension.
pub(super) fn packed_attention(
    query: &CubeTensor<CudaRuntime>,
    key: &CubeTensor<CudaRuntime>,
    value: &CubeTensor<CudaRuntime>,
    lengths: &[usize],
    causal: bool,
) -> Option<CubeTensor<CudaRuntime>> {
    let [tokens, heads, head_dim] = query.shape().dims();
    let [_, kv_heads, _] = key.shape().dims();
    let fits = has_tensor_cores(query)
        && matches!(query.dtype, DType::BF16 | DType::F16)
        && query.dtype == key.dtype
        && query.dtype == value.dtype
        && AttentionMma::has_width(head_dim);
    if !fits {
        return None;
    }
    let [query, key, value] = [query, key, value].map(with_contiguous_rows);
    if ![&query, &key, &value].into_iter().all(is_aligned) {
        return None;
    }
    let strides = [&query, &key, &value].map(|x| [x.meta.strides()[0], x.meta.strides()[1]]);
    let sizes = Attention {
        heads,
        kv_heads,
        head_dim,
        strides,
    };
    let element = element(query.dtype)?;
    let out = allocate(&query, Shape::from([tokens, heads * head_dim]), query.dtype);
    let buffers = [&query, &key, &value, &out];
    for starts in starts(lengths) {
        if has_wgmma(&query) && AttentionWgmma::has_width(head_dim) {
            let kernel = AttentionWgmma {
                element,
                head_dim,
                causal,
            };
            kernel.launch(&sizes, &starts).run(&buffers);
        } else {
            let kernel = AttentionMma {
                element,
                head_dim,
                causal,
            };
            kernel.launch(&sizes, &starts).run(&buffers);
        }
    }
    Some(out)
}

/// For each launch, the first token of each of its sequences, and the end of the last one.
fn starts(lengths: &[usize]) -> Vec<Vec<usize>> {
    let mut end = 0;
    let lengths: Vec<usize> = lengths
        .iter()
        .copied()
        .filter(|length| *length > 0)
        .collect();
    let launches = lengths.chunks(SEQUENCES).map(|lengths| {
        let mut starts = vec![end];
        for length in lengths {
            end += length;
            starts.push(end);
        }
        starts
    });
    launches.collect()
}
