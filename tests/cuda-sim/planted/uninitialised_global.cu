// Adds to uninitialised memory.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    out[i] += in[i];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = 0;
    out[i] += in[i];
}
