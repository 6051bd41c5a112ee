// Writes only half of the row.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    __shared__ float row[64];
    if (threadIdx.x < 32) row[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    __shared__ float row[64];
    row[threadIdx.x] = threadIdx.x < 32 ? in[blockIdx.x * 64 + threadIdx.x] : 0.0f;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}
