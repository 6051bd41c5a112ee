// Shuffles that some lanes of their mask do not execute.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    float v = in[blockIdx.x * 64 + threadIdx.x];
    if ((threadIdx.x & 31) >= 20) return;
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    out[blockIdx.x * 64 + threadIdx.x] = v;
}

// Two different shuffles at the same time.
extern "C" __global__ void __launch_bounds__(64) faulty_branches(const float *in, float *out, int n) {
    float v = in[blockIdx.x * 64 + threadIdx.x];
    if (threadIdx.x & 1) v += __shfl_xor_sync(0xffffffffu, v, 2);
    else
        v += __shfl_xor_sync(0xffffffffu, v, 4);
    out[blockIdx.x * 64 + threadIdx.x] = v;
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    float v = in[blockIdx.x * 64 + threadIdx.x];
    // The mask has only the participating lanes.
    if ((threadIdx.x & 31) < 16) v += __shfl_xor_sync(0x0000ffffu, v, 1);
    for (int bits = 16; bits; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
    if (__any_sync(0xffffffffu, v < -1e30f)) v = 0;
    out[blockIdx.x * 64 + threadIdx.x] = v;
}
