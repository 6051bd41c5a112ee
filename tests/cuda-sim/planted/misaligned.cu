// Accesses sixteen bytes at an address that is only a multiple of four.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    float4 v = *(const float4 *)(in + 1 + threadIdx.x);
    out[blockIdx.x * 64 + threadIdx.x] = v.x + v.w;
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    float4 v = *(const float4 *)(in + 4 * (threadIdx.x / 4));
    out[blockIdx.x * 64 + threadIdx.x] = v.x + v.w;
}
