// out += a * b with 64 rows and a depth of 64, by one warpgroup. Compiled with COLUMNS, and with HALF for __half. a is 64 x 64, and b
// COLUMNS x 64 or, `transposed`, 64 x COLUMNS, row-major.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"
#include "wgmma.cuh"
#if HALF
typedef __half T;
#else
typedef __nv_bfloat16 T;
#endif

constexpr int ROWS = 64, DEPTH = 64;

// Value `column` of row `row` of a tile of rows of 128 bytes.
__device__ int place(int row, int column) { return row * 64 + (column / 8 ^ row % 8) * 8 + column % 8; }

__device__ void load(T *left, T *right, const T *a, const T *b, bool transposed) {
    for (int i = threadIdx.x; i < ROWS * DEPTH; i += 128) left[place(i / DEPTH, i % DEPTH)] = a[i];
    for (int i = threadIdx.x; i < COLUMNS * DEPTH; i += 128) {
        // Blocks of 64 columns are consecutive.
        if (transposed) right[i % COLUMNS / 64 * DEPTH * 64 + place(i / COLUMNS, i % COLUMNS % 64)] = b[i];
        else right[place(i / DEPTH, i % DEPTH)] = b[i];
    }
    fence_async_proxy();
    __syncthreads();
}
__device__ int out_place(int i) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return (warp * 16 + lane / 4 + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2;
}
// The register layout of mma.
__device__ void fragment(unsigned (&r)[4], const T *a, int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < 4; i++) r[i] = *(const unsigned *)(a + (warp * 16 + lane / 4 + i % 2 * 8) * DEPTH + k + lane % 4 * 2 + i / 2 * 8);
}

extern "C" __global__ void __launch_bounds__(128) both_shared(const T *a, const T *b, float *out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + ROWS * DEPTH;
    load(left, right, a, b, false);
    float sums[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = out[out_place(i)];
    wgmma_fence();
    for (int k = 0; k < DEPTH; k += 16) {
        wgmma_ss<T>(sums, wgmma_descriptor(left + k, 16, 1024), wgmma_descriptor(right + k, 16, 1024));
        wgmma_commit();
    }
    wgmma_wait<1>();
    wgmma_wait<0>();
    for (int i = 0; i < COLUMNS / 2; i++) out[out_place(i)] = sums[i];
}
// The second product overwrites the accumulators: their values and the first product are ignored.
extern "C" __global__ void __launch_bounds__(128) overwritten(const T *a, const T *b, float *out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + ROWS * DEPTH;
    load(left, right, a, b, false);
    float sums[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = out[out_place(i)];
    wgmma_fence();
    wgmma_ss<T>(sums, wgmma_descriptor(left, 16, 1024), wgmma_descriptor(right, 16, 1024));
    for (int k = 0; k < DEPTH; k += 16)
        wgmma_ss<T>(sums, wgmma_descriptor(left + k, 16, 1024), wgmma_descriptor(right + k, 16, 1024), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < COLUMNS / 2; i++) out[out_place(i)] = sums[i];
}
// Alternating products on two accumulators in flight.
extern "C" __global__ void __launch_bounds__(128) registers(const T *a, const T *b, float *out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + ROWS * DEPTH;
    load(left, right, a, b, false);
    float sums[2][COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; i++) sums[0][i] = out[out_place(i)], sums[1][i] = 0;
    unsigned r[4][4];
    for (int k = 0; k < 4; k++) fragment(r[k], a, k * 16);
    wgmma_fence();
    for (int k = 0; k < 4; k++) wgmma_rs<T>(sums[k % 2], r[k], wgmma_descriptor(right + k * 16, 16, 1024));
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < COLUMNS / 2; i++) out[out_place(i)] = sums[0][i] + sums[1][i];
}
extern "C" __global__ void __launch_bounds__(128) transposed(const T *a, const T *b, float *out) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + ROWS * DEPTH;
    load(left, right, a, b, true);
    float sums[COLUMNS / 2];
    for (int i = 0; i < COLUMNS / 2; i++) sums[i] = out[out_place(i)];
    unsigned r[4][4];
    for (int k = 0; k < 4; k++) fragment(r[k], a, k * 16);
    const u64 tile = wgmma_descriptor(right, DEPTH * 128, 1024);
    wgmma_fence();
    for (int k = 0; k < 4; k++) wgmma_rs_t<T>(sums, r[k], tile + k * (2 * 1024 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < COLUMNS / 2; i++) out[out_place(i)] = sums[i];
}
