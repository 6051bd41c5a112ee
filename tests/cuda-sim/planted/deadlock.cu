// Waits for a phase that never completes, as one thread does not arrive.
#include <cuda/barrier>

extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    __shared__ cuda::barrier<cuda::thread_scope_block> full;
    if (threadIdx.x == 0) init(&full, 64);
    __syncthreads();
    if (threadIdx.x != 7) full.arrive_and_wait();
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}
