//! Attention, in f32 whatever the type of the tensors: burn 0.21's own attention kernels hold
//! keys, values and weights in f16.

mod kernel;

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{Shape, TensorMetadata};

use super::lanes;
use kernel::{FOUR, SLICE_STRIDE, Tiling};

/// [`FusedOps::packed_attention`](crate::FusedOps::packed_attention): one launch for each sequence.
/// Query, key and value have the same type, and so has the output.
pub(super) fn packed_attention<R: CubeRuntime>(
    query: CubeTensor<R>,
    key: CubeTensor<R>,
    value: CubeTensor<R>,
    lengths: &[usize],
    causal: bool,
) -> CubeTensor<R> {
    let [query, key, value] = [query, key, value].map(into_contiguous);
    let [tokens, heads, head_dim] = query.shape().dims();
    let output = empty_device_contiguous_dtype(
        query.client.clone(),
        query.device.clone(),
        Shape::from([tokens, heads * head_dim]),
        query.dtype,
    );
    let shared_memory = output.client.properties().hardware.max_shared_memory_size;
    let tiling = Tiling::new(head_dim, causal, shared_memory);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut first = 0;
    for &length in lengths.iter().filter(|length| **length > 0) {
        let tiles = length.div_ceil(tiling.queries());
        // SAFETY: a cube reads the keys and values of its sequence, and reads and writes its
        // queries' values; there are none past the last token.
        unsafe {
            kernel::attention::launch_unchecked::<R>(
                &output.client,
                CubeCount::new_2d(tiles as u32, heads as u32),
                CubeDim::new_2d(tiling.units_x as u32, tiling.units_y as u32),
                output.required_address_type(),
                lanes(&output, head_dim),
                query.clone().into_tensor_arg(),
                key.clone().into_tensor_arg(),
                value.clone().into_tensor_arg(),
                output.clone().into_tensor_arg(),
                first,
                length,
                scale,
                tiling,
                output.dtype.into(),
            );
        }
        first += length;
    }
    output
}

impl Tiling {
    /// The largest tiles whose slices, values and weights fit the shared memory of a cube, in
    /// bytes, and whose sums fit a unit's registers.
    fn new(head_dim: usize, causal: bool, shared_memory: usize) -> Self {
        let fours = head_dim.div_ceil(FOUR);
        // A narrow head has too few columns for 16 units.
        let (units_x, units_y) = if fours <= 8 { (8, 16) } else { (16, 8) };
        let most_rows = if fours <= 2 * units_x { 8 } else { 4 };
        // Rows of weights that start in different banks are better, and need more memory.
        [(8, 1), (8, 0), (4, 1), (4, 0)]
            .into_iter()
            .filter(|(rows, _)| *rows <= most_rows)
            .map(|(rows, padding)| {
                Self::of_units(head_dim, causal, [units_x, units_y, rows], padding)
            })
            .find(|tiling| tiling.shared_memory() <= shared_memory)
            .unwrap_or_else(|| Self::of_units(head_dim, causal, [4, 16, 4], 0))
    }

    fn of_units(
        head_dim: usize,
        causal: bool,
        [units_x, units_y, rows]: [usize; 3],
        padding: usize,
    ) -> Self {
        let fours = head_dim.div_ceil(FOUR);
        let keys = FOUR * units_x;
        let slices = (rows * units_y + keys) * SLICE_STRIDE;
        let stage = slices.max(FOUR * fours);
        let value_keys = (1..=units_x)
            .rev()
            .map(|unit| FOUR * unit)
            .find(|value_keys| keys.is_multiple_of(*value_keys) && value_keys * fours <= stage)
            .unwrap_or(FOUR);
        Self {
            head_dim,
            units_x,
            units_y,
            rows,
            weight_stride: units_x + padding,
            stage,
            value_keys,
            causal,
        }
    }

    /// Of a cube, in bytes.
    fn shared_memory(&self) -> usize {
        (self.stage + self.queries() * self.weight_stride) * FOUR * size_of::<f32>()
    }
}
