// Reverses 64 numbers in shared memory: one warp reads what another wrote.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    __shared__ float row[64];
    for (int i = 0; i < n; i++) {
        row[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
        __syncthreads();
        out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
        __syncthreads();
    }
}
