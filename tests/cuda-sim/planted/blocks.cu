// Blocks of one launch that access the same memory.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    out[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
}

// Each block reads what the next one writes.
extern "C" __global__ void __launch_bounds__(64) faulty_read(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = in[i];
    if (blockIdx.x + 1 < gridDim.x && out[i + 64] > 1e30f) out[i] = 0;
}

// No fault: all blocks write the same value; atomic sums; the last block reads the others' writes after a fence.
extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    __shared__ bool last;
    int *counter = (int *)(out + 64 * gridDim.x);
    counter[1] = n;
    out[blockIdx.x * 64 + threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counter, 1) % gridDim.x == gridDim.x - 1;
    __syncthreads();
    if (last) {
        float sum = 0;
        for (int block = 0; block < (int)gridDim.x; block++) sum += out[block * 64 + threadIdx.x];
        out[64 * gridDim.x + 2 + threadIdx.x] = sum;
    }
}
