// Tiles of 64 x 64 in shared memory, and their product in 32 accumulators per thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"
#include "wgmma.cuh"
typedef __nv_bfloat16 T;

constexpr int TILE = 64 * 64;

__device__ void fill(T *tile, const float *in, int threads) {
    for (int i = threadIdx.x; i < TILE; i += threads) tile[i] = (T)in[i % 64];
}
__device__ void clear(float (&sums)[32]) {
    for (int i = 0; i < 32; i++) sums[i] = 0;
}
__device__ void multiply(float (&sums)[32], const T *left, const T *right) {
    wgmma_ss<T>(sums, wgmma_descriptor(left, 16, 1024), wgmma_descriptor(right, 16, 1024));
}
__device__ float total(const float (&sums)[32]) {
    float sum = 0;
    for (int i = 0; i < 32; i++) sum += sums[i];
    return sum;
}
