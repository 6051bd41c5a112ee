// Each lane reads what its neighbour in the warp wrote. A shuffle does not order memory, __syncwarp does.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float row[];
    float mine = in[blockIdx.x * 64 + threadIdx.x];
    row[threadIdx.x] = mine;
    mine += __shfl_xor_sync(0xffffffffu, mine, 1);
    out[blockIdx.x * 64 + threadIdx.x] = mine + row[threadIdx.x ^ 1];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(16) float row[];
    float mine = in[blockIdx.x * 64 + threadIdx.x];
    for (int i = 0; i < n; i++) {
        row[threadIdx.x] = mine;
        __syncwarp();
        mine += row[threadIdx.x ^ 1];
        __syncwarp();
        // The two halves of a warp separately.
        unsigned half = threadIdx.x & 16 ? 0xffff0000u : 0x0000ffffu;
        row[threadIdx.x] = mine;
        __syncwarp(half);
        mine += row[threadIdx.x ^ 8];
        __syncwarp();
    }
    out[blockIdx.x * 64 + threadIdx.x] = mine;
}
