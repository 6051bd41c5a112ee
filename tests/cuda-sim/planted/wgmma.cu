// Warpgroup products of two tiles of 64 x 64, each kernel with one fault.
#include "wgmma_tiles.cuh"

// No fence_async_proxy.
extern "C" __global__ void __launch_bounds__(128) faulty(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// The fence is after the barrier.
extern "C" __global__ void __launch_bounds__(128) faulty_late_fence(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    __syncthreads();
    fence_async_proxy();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// The fence is before the arrival of the copies.
extern "C" __global__ void __launch_bounds__(128) faulty_early_fence(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    for (int i = threadIdx.x; i < TILE / 8; i += 128) {
        cp_async_16(left + 8 * i, in + i % 16 * 4, true);
        cp_async_16(right + 8 * i, in + i % 16 * 4, true);
    }
    cp_async_commit();
    fence_async_proxy();
    cp_async_wait<0>();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// No barrier.
extern "C" __global__ void __launch_bounds__(128) faulty_barrier(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// A tile is overwritten before the wait.
extern "C" __global__ void __launch_bounds__(128) faulty_overwrite(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    left[threadIdx.x] = (T)2.0f;
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// A copy overwrites a tile before the wait.
extern "C" __global__ void __launch_bounds__(128) faulty_prefetch(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    cp_async_16(right + 8 * threadIdx.x, in, true);
    cp_async_commit();
    wgmma_wait<1>();
    cp_async_wait<0>();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// A tile is overwritten after the wait of one warp, but before that of the others.
extern "C" __global__ void __launch_bounds__(128) faulty_overwrite_warp(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    right[threadIdx.x] = (T)2.0f;
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Most of a tile is uninitialised.
extern "C" __global__ void __launch_bounds__(128) faulty_uninitialised(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    if (threadIdx.x < 100) right[threadIdx.x] = (T)1.0f;
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// No wait before the end.
extern "C" __global__ void __launch_bounds__(128) faulty_end(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    out[blockIdx.x * 128 + threadIdx.x] = 1;
}

// No commit before the wait.
extern "C" __global__ void __launch_bounds__(128) faulty_uncommitted(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = 1;
}

// Reads the accumulators before the wait.
extern "C" __global__ void __launch_bounds__(128) faulty_sums(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    float early = sums[0];
    wgmma_wait<0>();
    sums[0] += early;
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Reads the accumulators while one of two products on them is pending.
extern "C" __global__ void __launch_bounds__(128) faulty_sums_group(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<1>();
    float early = sums[0];
    wgmma_wait<0>();
    sums[0] += early;
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Changes the accumulators before the wait.
extern "C" __global__ void __launch_bounds__(128) faulty_sums_write(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    sums[n] = 0;
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// No wgmma_fence after a change of the accumulators.
extern "C" __global__ void __launch_bounds__(128) faulty_fence(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    sums[n] = 0;
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Tiles that begin at an offset of 128 bytes.
extern "C" __global__ void __launch_bounds__(128) faulty_misaligned(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    left += 64;
    right += 64;
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// A tile beyond the end of shared memory.
extern "C" __global__ void __launch_bounds__(128) faulty_bounds(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    right += TILE;
    wgmma_fence();
    multiply(sums, left, right);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// One of the four warps does not issue the product.
extern "C" __global__ void __launch_bounds__(128) faulty_divergent(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x < 96) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
    }
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Some lanes of every warp do not issue the product.
extern "C" __global__ void __launch_bounds__(128) faulty_lanes(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x % 32 < 20) {
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<0>();
    }
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

// Two warps use other tiles.
extern "C" __global__ void __launch_bounds__(128) faulty_branches(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    wgmma_fence();
    if (threadIdx.x < 64) multiply(sums, left, right);
    else multiply(sums, right, left);
    wgmma_commit();
    wgmma_wait<0>();
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}

extern "C" __global__ void __launch_bounds__(128) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *left = (T *)memory, *right = left + TILE;
    float sums[32];
    clear(sums);
    fill(left, in, 128);
    fill(right, in, 128);
    fence_async_proxy();
    __syncthreads();
    for (int i = 0; i < n; i++) {
        // Two commit groups on the same accumulators without a wait in between.
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_fence();
        multiply(sums, left, right);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_wait<0>();
        __syncthreads();
        left[threadIdx.x + i] = (T)2.0f;
        right[127 - threadIdx.x] = (T)1.0f;
        fence_async_proxy();
        __syncthreads();
    }
    out[blockIdx.x * 128 + threadIdx.x] = total(sums);
}
