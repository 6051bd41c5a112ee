// An index one beyond the end: of a shared variable, and of dynamic shared memory of 256 bytes.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    __shared__ float first[64], second[64];
    first[threadIdx.x + 1] = in[blockIdx.x * 64 + threadIdx.x];
    second[threadIdx.x] = 0;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = first[threadIdx.x + (threadIdx.x == 0)] + second[63 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) faulty_dynamic(const float *in, float *out, int n) {
    extern __shared__ __align__(16) unsigned char memory[];
    float *row = (float *)memory;
    row[threadIdx.x + 1] = in[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = row[64 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float second[2][64];
    float *row = (float *)memory;
    row[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    second[threadIdx.x & 1][threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x] + second[1 - (threadIdx.x & 1)][63 - threadIdx.x];
}
