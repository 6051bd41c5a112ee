// Named barriers between two warpgroups: the producer fills two tiles of 64 x 64, the consumer multiplies them.
#include "wgmma_tiles.cuh"

constexpr int FULL = 1, FREE = 2;

__device__ void fill(T *tiles, const float *in) {
    for (int i = threadIdx.x % 128; i < 2 * TILE; i += 128) tiles[i] = (T)in[i % 64];
}
__device__ void multiply(float (&sums)[32], const T *tiles) {
    wgmma_fence();
    multiply(sums, tiles, tiles + TILE);
    wgmma_commit();
}

// The producer does not arrive.
extern "C" __global__ void __launch_bounds__(256) faulty(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    if (threadIdx.x >= 128) {
        fill(tiles, in);
        fence_async_proxy();
    } else {
        barrier_sync(FULL, 256);
        multiply(sums, tiles);
        wgmma_wait<0>();
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// The consumer does not wait.
extern "C" __global__ void __launch_bounds__(256) faulty_sync(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    if (threadIdx.x >= 128) {
        fill(tiles, in);
        fence_async_proxy();
        barrier_arrive(FULL, 256);
    } else {
        multiply(sums, tiles);
        wgmma_wait<0>();
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// A warp of the producer arrives before it has filled its part.
extern "C" __global__ void __launch_bounds__(256) faulty_publish(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    fill(tiles, in);
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x / 32 == 5) barrier_arrive(FULL, 256);
        fill(tiles, in);
        fence_async_proxy();
        if (threadIdx.x / 32 != 5) barrier_arrive(FULL, 256);
    } else {
        barrier_sync(FULL, 256);
        multiply(sums, tiles);
        wgmma_wait<0>();
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// The fence is after the barrier.
extern "C" __global__ void __launch_bounds__(256) faulty_fence(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    if (threadIdx.x >= 128) {
        fill(tiles, in);
        barrier_arrive(FULL, 256);
        fence_async_proxy();
    } else {
        barrier_sync(FULL, 256);
        multiply(sums, tiles);
        wgmma_wait<0>();
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// The consumer releases the tiles before the product is complete.
extern "C" __global__ void __launch_bounds__(256) faulty_release(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    if (threadIdx.x >= 128) {
        fill(tiles, in);
        fence_async_proxy();
        barrier_arrive(FULL, 256);
        barrier_sync(FREE, 256);
        fill(tiles, in);
    } else {
        barrier_sync(FULL, 256);
        multiply(sums, tiles);
        barrier_arrive(FREE, 256);
        wgmma_wait<0>();
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// Only three of the four warps release the tiles.
extern "C" __global__ void __launch_bounds__(256) faulty_release_warp(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32];
    clear(sums);
    if (threadIdx.x >= 128) {
        fill(tiles, in);
        fence_async_proxy();
        barrier_arrive(FULL, 256);
        barrier_sync(FREE, 224);
        fill(tiles, in);
    } else {
        barrier_sync(FULL, 256);
        multiply(sums, tiles);
        wgmma_wait<0>();
        if (threadIdx.x < 96) barrier_arrive(FREE, 224);
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}

// A thread that only arrives does not see earlier writes of the others.
extern "C" __global__ void __launch_bounds__(256) faulty_arrive(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    float *numbers = (float *)memory;
    numbers[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 128) barrier_arrive(FULL, 256);
    else barrier_sync(FULL, 256);
    out[blockIdx.x * 256 + threadIdx.x] = numbers[threadIdx.x ^ 128];
}

// The warps of the other group do not reach the barrier.
extern "C" __global__ void __launch_bounds__(256) faulty_other(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    float *numbers = (float *)memory;
    numbers[threadIdx.x] = in[threadIdx.x];
    barrier_sync(threadIdx.x < 128 ? FULL : FREE, 128);
    out[blockIdx.x * 256 + threadIdx.x] = numbers[threadIdx.x ^ 128];
}

// Arrives a second time before the barrier is complete.
extern "C" __global__ void __launch_bounds__(256) faulty_twice(const float *in, float *out, int n) {
    if (threadIdx.x < 128) {
        barrier_arrive(FULL, 256);
        barrier_arrive(FULL, 256);
    }
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// Different numbers of threads.
extern "C" __global__ void __launch_bounds__(256) faulty_counts(const float *in, float *out, int n) {
    if (threadIdx.x < 128) barrier_arrive(FULL, 256);
    else barrier_sync(FULL, 128);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// More threads than the block has.
extern "C" __global__ void __launch_bounds__(256) faulty_many(const float *in, float *out, int n) {
    barrier_sync(FULL, 288);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// Fewer threads than arrive.
extern "C" __global__ void __launch_bounds__(256) faulty_few(const float *in, float *out, int n) {
    barrier_sync(FULL, 96);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// A number of threads that is not a multiple of the warp size.
extern "C" __global__ void __launch_bounds__(256) faulty_part(const float *in, float *out, int n) {
    barrier_sync(FULL, 250);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// An invalid barrier number.
extern "C" __global__ void __launch_bounds__(256) faulty_number(const float *in, float *out, int n) {
    barrier_sync(n + 13, 256);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

// Lanes of one warp at different barriers.
extern "C" __global__ void __launch_bounds__(256) faulty_lanes(const float *in, float *out, int n) {
    barrier_sync(1 + threadIdx.x % 2, 256);
    out[blockIdx.x * 256 + threadIdx.x] = 1;
}

extern "C" __global__ void __launch_bounds__(256) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(1024) unsigned char memory[];
    T *tiles = (T *)memory;
    float sums[32], *numbers = (float *)memory;
    clear(sums);
    if (threadIdx.x >= 128) {
        for (int i = 0; i < n; i++) {
            if (i > 0) barrier_sync(FREE, 256);
            fill(tiles, in + i);
            fence_async_proxy();
            barrier_arrive(FULL, 256);
        }
    } else {
        for (int i = 0; i < n; i++) {
            barrier_sync(FULL, 256);
            multiply(sums, tiles);
            wgmma_wait<0>();
            if (i < n - 1) barrier_arrive(FREE, 256);
        }
        // A barrier of the group's own warps.
        barrier_sync(3 + threadIdx.x / 64, 64);
        barrier_sync(15, 128);
        numbers[threadIdx.x] = sums[0];
        barrier_sync(3 + threadIdx.x / 64, 64);
        sums[0] += numbers[threadIdx.x ^ 32];
        // Warps 0 and 1 see the writes of warp 3 through warp 2.
        if (threadIdx.x >= 96) barrier_arrive(5, 64);
        else if (threadIdx.x >= 64) barrier_sync(5, 64), barrier_arrive(6, 96);
        else barrier_sync(6, 96), sums[0] += numbers[96 + threadIdx.x % 32];
    }
    out[blockIdx.x * 256 + threadIdx.x] = total(sums);
}
