//! Uploads to `CubeCL` devices in small chunks, from pinned memory if the runtime has it.
//!
//! `CubeCL`'s own upload copies the whole tensor into pageable memory first, and keeps the copy until
//! kernels are launched.

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

/// Bytes of a chunk. `CubeCL` allocates pinned memory in pages many times as large as the request,
/// and keeps them.
const CHUNK: usize = 4 << 20;
/// Largest number of bytes that are queued for the device at once.
const IN_FLIGHT: usize = 64 << 20;

thread_local! {
    /// Bytes queued on this thread's stream since the last flush.
    static QUEUED: Cell<usize> = const { Cell::new(0) };
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
        for first in (0..size).step_by(CHUNK) {
            let length = CHUNK.min(size - first);
            let mut chunk = staging(&server, length, stream);
            fill(first, &mut chunk);
            let target = tensor.handle.clone().offset_start(first as u64);
            let target = target.offset_end((size - first - length) as u64);
            let to = CopyDescriptor::new(target.binding(), [length].into(), [1].into(), 1);
            server.submit(move |server| server.write(vec![(to, chunk)], stream));
            QUEUED.set(QUEUED.get() + length);
            if QUEUED.get() >= IN_FLIGHT {
                QUEUED.set(0);
                // The first flush records an event on the stream, the second one waits for it.
                if let Err(error) = (0..2).try_for_each(|_| client.flush()) {
                    faults::record(&error.to_string());
                }
            }
        }
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }
}

/// Allocates host memory to upload from, pinned if the runtime supports that.
fn staging<S: ComputeServer + 'static>(
    server: &DeviceHandle<S>,
    length: usize,
    stream: StreamId,
) -> Bytes {
    let allocated = server.submit_blocking(move |server| server.staging(&[length], stream).ok());
    // An error means that the device thread failed, which a `FaultWatch` reports.
    let pinned = allocated.ok().flatten().and_then(|mut parts| parts.pop());
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
