//! Attention computed in f32 for every dtype of the tensors: burn 0.21's own attention kernels hold
//! keys, values and weights in f16.

mod kernel;

use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{Shape, TensorMetadata};

use super::lanes;
use kernel::{SLICE_STRIDE, Tiling, VEC4};

/// Computes [`FusedOps::packed_attention`](crate::FusedOps::packed_attention) with one launch per
/// sequence. Query, key and value have the same dtype, which the output has too.
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
        // SAFETY: a cube reads the keys and values of its sequence, and reads and writes the rows
        // of its queries; it skips rows past the last token.
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
    /// Chooses the largest tiles whose slices, values and weights fit `shared_memory` bytes per cube,
    /// and whose sums fit a unit's registers.
    fn new(head_dim: usize, causal: bool, shared_memory: usize) -> Self {
        let vec4s = head_dim.div_ceil(VEC4);
        // A narrow head has too few columns for 16 units.
        let (units_x, units_y) = if vec4s <= 8 { (8, 16) } else { (16, 8) };
        let max_rows = if vec4s <= 2 * units_x { 8 } else { 4 };
        // Padding makes rows of weights start in different banks, but needs more memory.
        [(8, 1), (8, 0), (4, 1), (4, 0)]
            .into_iter()
            .filter(|(rows, _)| *rows <= max_rows)
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
        let vec4s = head_dim.div_ceil(VEC4);
        let keys = VEC4 * units_x;
        let slices = (rows * units_y + keys) * SLICE_STRIDE;
        let stage = slices.max(VEC4 * vec4s);
        let value_keys = (1..=units_x)
            .rev()
            .map(|unit| VEC4 * unit)
            .find(|value_keys| keys.is_multiple_of(*value_keys) && value_keys * vec4s <= stage)
            .unwrap_or(VEC4);
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

    /// Shared memory of a cube, in bytes.
    fn shared_memory(&self) -> usize {
        (self.stage + self.queries() * self.weight_stride) * VEC4 * size_of::<f32>()
    }
}
