// Asynchronous copies of 16 bytes.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float row[];
    cp_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    out[blockIdx.x * 64 + threadIdx.x] = row[4 * threadIdx.x];
    cp_async_wait<0>();
}

// Waits for one group too few.
extern "C" __global__ void __launch_bounds__(64) faulty_group(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float row[];
    cp_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = row[4 * (63 - threadIdx.x)];
}

// Waits for its own copies, but not for those of other threads.
extern "C" __global__ void __launch_bounds__(64) faulty_barrier(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float row[];
    cp_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
    out[blockIdx.x * 64 + threadIdx.x] = row[4 * (63 - threadIdx.x)];
}

// Two stages; invalid elements are zero, and their addresses are not read.
extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float rows[];
    float sum = 0;
    cp_async_16(rows + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    for (int i = 0; i < n; i++) {
        float *row = rows + 256 * (i & 1), *next = rows + 256 * (1 - (i & 1));
        bool more = i + 1 < n;
        cp_async_16(next + 4 * threadIdx.x, more ? in + 4 * threadIdx.x : nullptr, more);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        sum += row[4 * (63 - threadIdx.x)];
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = sum + rows[256 * (n & 1) + 4 * threadIdx.x + 1];
}
