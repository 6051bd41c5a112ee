// c = a * b in tiles of 32 x 32 with mma.sync: a is m x k and b is k x n (`plain`) or n x k (`transposed`), row-
// major. Two stages of cp.async; rows beyond the end are zero; four warps of 16 x 16 each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"

constexpr int TILE = 32, DEPTH = 32, PAD = 8;

template <typename T> __device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <> __device__ void multiply<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
template <> __device__ void multiply<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }

struct Shape { int m, n, k; };

template <typename T> __device__ void load_rows(T (*to)[DEPTH + PAD], const T *from, int row, int rows, int column, int stride) {
    int r = threadIdx.x / 4, c = threadIdx.x % 4 * 8;
    bool valid = row + r < rows;
    cp_async_16(&to[r][c], from + (size_t)(valid ? row + r : 0) * stride + column + c, valid);
}

template <typename T, bool transposed> __device__ void product(const T *a, const T *b, float *c, const Shape &s) {
    extern __shared__ __align__(16) unsigned char memory[];
    T(*left)[TILE][DEPTH + PAD] = (T(*)[TILE][DEPTH + PAD])memory;
    T(*right)[TILE][DEPTH + PAD] = left + 2;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / 2 * 16, warp_n = warp % 2 * 16;
    int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    auto load = [&](int stage, int k) {
        load_rows<T>(left[stage], a, row, s.m, k, s.k);
        if (transposed) load_rows<T>(right[stage], b, column, s.n, k, s.k);
        else load_rows<T>(right[stage], b, k, s.k, column, s.n);
        cp_async_commit();
    };
    float sums[2][4] = {};
    load(0, 0);
    for (int k = 0, stage = 0; k < s.k; k += DEPTH, stage ^= 1) {
        if (k + DEPTH < s.k) load(stage ^ 1, k + DEPTH);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int inner = 0; inner < DEPTH; inner += 16) {
            unsigned x[4], y[4];
            ldmatrix_x4(x, &left[stage][warp_m + lane % 16][inner + lane / 16 * 8]);
            if (transposed) {
                ldmatrix_x4(y, &right[stage][warp_n + lane % 8 + lane / 16 * 8][inner + lane / 8 % 2 * 8]);
            } else {
                unsigned low[2], high[2];
                ldmatrix_x2_trans(low, &right[stage][inner + lane % 16][warp_n]);
                ldmatrix_x2_trans(high, &right[stage][inner + lane % 16][warp_n + 8]);
                y[0] = low[0], y[1] = low[1], y[2] = high[0], y[3] = high[1];
            }
            for (int half = 0; half < 2; half++) {
                const unsigned z[2] = {y[2 * half], y[2 * half + 1]};
                multiply<T>(sums[half], x, z);
            }
        }
        __syncthreads();
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) {
            int m = row + warp_m + lane / 4 + i / 2 * 8, n = column + warp_n + half * 8 + lane % 4 * 2 + i % 2;
            if (m < s.m && n < s.n) c[(size_t)m * s.n + n] = sums[half][i];
        }
}

extern "C" __global__ void __launch_bounds__(128, 2) product_bf16(const __nv_bfloat16 *__restrict__ a, const __nv_bfloat16 *__restrict__ b,
                                                                  float *__restrict__ c, const __grid_constant__ Shape s) {
    product<__nv_bfloat16, true>(a, b, c, s);
}
extern "C" __global__ void __launch_bounds__(128, 2) product_f16(const __half *a, const __half *b, float *c, const __grid_constant__ Shape s) {
    product<__half, false>(a, b, c, s);
}
