// Barriers that not all threads of the block reach.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    if (threadIdx.x < 32) __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}

// Half of a warp is at one barrier, the other half at another.
extern "C" __global__ void __launch_bounds__(64) faulty_in_warp(const float *in, float *out, int n) {
    if (threadIdx.x & 16) __syncthreads();
    else
        __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}

// Some lanes of a warp wait for the warp, the others for the block.
extern "C" __global__ void __launch_bounds__(64) faulty_deadlock(const float *in, float *out, int n) {
    if (threadIdx.x & 1) __syncthreads();
    else
        __syncwarp();
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    for (int i = 0; i < n; i++)
        if (i != 1) __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}
