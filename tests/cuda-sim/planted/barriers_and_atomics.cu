// A phase barrier that an asynchronous copy completes, a copy of the whole block, and counters in
// shared memory.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda/barrier>

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    __shared__ alignas(16) float row[64];
    __shared__ alignas(16) float copied[64];
    __shared__ unsigned counts[5];
    __shared__ cuda::barrier<cuda::thread_scope_block> full, empty;
    auto block = cooperative_groups::this_thread_block();
    if (threadIdx.x == 0) {
        init(&full, 64);
        init(&empty, 64);
    }
    if (threadIdx.x < 5) counts[threadIdx.x] = 0;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < n; i++) {
        if (threadIdx.x == 0) {
            cuda::device::memcpy_async_tx(row, in + blockIdx.x * 64, 256, full);
            full.wait(cuda::device::barrier_arrive_tx(full, 1, 256));
        } else {
            full.wait(full.arrive());
        }
        sum += row[63 - threadIdx.x];
        empty.arrive_and_wait();
    }
    cooperative_groups::memcpy_async(block, copied, in + blockIdx.x * 64, 256);
    cooperative_groups::wait(block);
    atomicAdd(&counts[threadIdx.x % 4], 1u);
    atomicMax(&counts[4], threadIdx.x);
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = sum + copied[threadIdx.x ^ 1] + (float)counts[threadIdx.x % 5];
}

// Not all threads wait for the barrier of the copy.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    __shared__ alignas(16) float row[64];
    __shared__ cuda::barrier<cuda::thread_scope_block> full;
    if (threadIdx.x == 0) init(&full, 64);
    __syncthreads();
    if (threadIdx.x == 0) {
        cuda::device::memcpy_async_tx(row, in + blockIdx.x * 64, 256, full);
        cuda::device::barrier_arrive_tx(full, 1, 256);
    } else {
        full.arrive();
    }
    if (threadIdx.x != 40) full.wait(0);
    out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}
