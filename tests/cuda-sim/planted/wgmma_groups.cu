// Warpgroups of a block of 6 warps.
#include "wgmma_tiles.cuh"

// Warps 1 to 4 are not a warpgroup.
extern "C" __global__ void __launch_bounds__(192) faulty(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 192);
    fill(right, in, 192);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x >= 32 && threadIdx.x < 160) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<0>();
    }
    out[blockIdx.x * 192 + threadIdx.x] = total(sums);
}

// The second warpgroup has only two warps.
extern "C" __global__ void __launch_bounds__(192) faulty_half(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 192);
    fill(right, in, 192);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x >= 128) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<0>();
    }
    out[blockIdx.x * 192 + threadIdx.x] = total(sums);
}

// A warp outside of the warpgroup overwrites a tile.
extern "C" __global__ void __launch_bounds__(192) faulty_overwrite(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 192);
    fill(right, in, 192);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x < 128) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<0>();
    } else {
        left[threadIdx.x] = (T)2.0f;
    }
    out[blockIdx.x * 192 + threadIdx.x] = total(sums);
}

extern "C" __global__ void __launch_bounds__(192) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 192);
    fill(right, in, 192);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x < 128) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<0>();
    }
    __syncthreads();
    if (threadIdx.x >= 128) left[threadIdx.x] = (T)2.0f;
    out[blockIdx.x * 192 + threadIdx.x] = total(sums);
}
