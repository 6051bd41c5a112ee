//! Uploads to devices of `CubeCL`: from pinned memory where a runtime has it, in small parts.
//!
//! `CubeCL`'s own way in copies a whole tensor into ordinary memory first, and keeps that until kernels
//! are launched.

use std::cell::Cell;

use burn_cubecl::cubecl::server::{ComputeServer, CopyDescriptor};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::stream::OperationStreams;
use burn_fusion::{Fusion, FusionBackend, NoOp, get_client};
use burn_ir::{InitOperationIr, OperationIr};
use burn_tensor::{DType, Shape, Tensor, TensorPrimitive};
use cubecl_common::bytes::Bytes;
use cubecl_common::device::Device;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_common::stream_id::StreamId;

use crate::{Upload, faults};

/// Bytes of a part. `CubeCL` takes pinned memory from pages that are many times as large as what is
/// asked for, and keeps them.
const PART: usize = 4 << 20;
/// Bytes that may wait for the device to take them.
const IN_FLIGHT: usize = 64 << 20;

thread_local! {
    /// Bytes that this thread's queue was given since it was last waited for.
    static GIVEN: Cell<usize> = const { Cell::new(0) };
}

impl<R, F, I, BT> Upload for CubeBackend<R, F, I, BT>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    const IS_IN_PLACE: bool = false;

    fn upload<const D: usize>(
        device: &Self::Device,
        shape: [usize; D],
        dtype: DType,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Tensor<Self, D> {
        let client = R::client(device);
        let shape = Shape::from(shape);
        let size = shape.num_elements() * dtype.size();
        let tensor = empty_device_contiguous_dtype(client.clone(), device.clone(), shape, dtype);
        let server = DeviceHandle::<R::Server>::new(device.to_id());
        let stream = StreamId::current();
        for first in (0..size).step_by(PART) {
            let length = PART.min(size - first);
            let mut part = staging(&server, length, stream);
            fill(first, &mut part);
            let place = tensor.handle.clone().offset_start(first as u64);
            let place = place.offset_end((size - first - length) as u64);
            let to = CopyDescriptor::new(place.binding(), [length].into(), [1].into(), 1);
            server.submit(move |server| server.write(vec![(to, part)], stream));
            GIVEN.set(GIVEN.get() + length);
            if GIVEN.get() >= IN_FLIGHT {
                GIVEN.set(0);
                // The first one marks where the device must have come to, the second one waits for it.
                if let Err(error) = (0..2).try_for_each(|_| client.flush()) {
                    faults::note(&error.to_string());
                }
            }
        }
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }
}

/// Memory to upload from: pinned if the runtime can give some.
fn staging<S: ComputeServer + 'static>(
    server: &DeviceHandle<S>,
    length: usize,
    stream: StreamId,
) -> Bytes {
    let given = server.submit_blocking(move |server| server.staging(&[length], stream).ok());
    // If that thread has failed, a watch has seen it.
    let pinned = given.ok().flatten().and_then(|mut parts| parts.pop());
    pinned.unwrap_or_else(|| Bytes::from_bytes_vec(vec![0; length]))
}

impl<B: FusionBackend + Upload> Upload for Fusion<B> {
    const IS_IN_PLACE: bool = B::IS_IN_PLACE;

    fn upload<const D: usize>(
        device: &Self::Device,
        shape: [usize; D],
        dtype: DType,
        fill: impl FnMut(usize, &mut [u8]),
    ) -> Tensor<Self, D> {
        let tensor = B::upload(device, shape, dtype, fill);
        let client = get_client::<B>(device);
        let handle = B::float_tensor_handle(tensor.into_primitive().tensor());
        let ir = InitOperationIr::create(Shape::from(shape), dtype, || {
            client.register_tensor_handle(handle)
        });
        let mut outputs = client.register(
            OperationStreams::default(),
            OperationIr::Init(ir),
            NoOp::<B>::new(),
        );
        Tensor::from_primitive(TensorPrimitive::Float(outputs.remove(0)))
    }
}
