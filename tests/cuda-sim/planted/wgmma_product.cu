// out = a * b in tiles of 128 x 64 by two warpgroups: a is m x k and b is n x k, row-major. Four stages of cp.async,
// loaded two steps ahead; the wait for a step's product is in the next step. k is a multiple of 8.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"
#include "wgmma.cuh"

constexpr int BM = 128, BN = 64, BK = 64, STAGES = 4, AHEAD = STAGES - 2, STAGE = (BM + BN) * BK;

struct Shape { int m, n, k; };

template <typename T> __device__ void product(const T *a, const T *b, float *out, const Shape &s) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *shared = (T *)memory;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, group = warp / 4;
    const int first_row = blockIdx.y * BM, first_column = blockIdx.x * BN;
    const int chunk = thread % 8, load_row = thread / 8;
    auto load = [&](int stage, int step) {
        for (int row = load_row; row < BM + BN; row += 32) {
            const int from_row = row < BM ? first_row + row : first_column + row - BM, column = step * BK + chunk * 8;
            const bool valid = from_row < (row < BM ? s.m : s.n) && column < s.k;
            const T *from = (row < BM ? a : b) + (size_t)from_row * s.k + column;
            cp_async_16(shared + stage * STAGE + row * BK + (chunk ^ row % 8) * 8, valid ? from : a, valid);
        }
    };
    float sums[BN / 2];
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    const int steps = (s.k + BK - 1) / BK;
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps) load(step, step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();
        const T *tile = shared + step % STAGES * STAGE;
        const u64 left = wgmma_descriptor(tile + group * 64 * BK, 16, 1024), right = wgmma_descriptor(tile + BM * BK, 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BK / 16; k++) wgmma_ss<T>(sums, left + k * 2, right + k * 2);
        wgmma_commit();
        if (step + AHEAD < steps) load((step + AHEAD) % STAGES, step + AHEAD);
        cp_async_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    for (int i = 0; i < BN / 2; i++) {
        const int row = first_row + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = first_column + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < s.m && column < s.n) out[(size_t)row * s.n + column] = sums[i];
    }
}

extern "C" __global__ void __launch_bounds__(256) product_bf16(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out, const __grid_constant__ Shape s) {
    product<__nv_bfloat16>(a, b, out, s);
}
extern "C" __global__ void __launch_bounds__(256) product_f16(const __half *a, const __half *b, float *out, const __grid_constant__ Shape s) {
    product<__half>(a, b, out, s);
}
