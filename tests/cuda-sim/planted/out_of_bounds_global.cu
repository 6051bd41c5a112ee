// Reads one element beyond the end of `in`.
extern "C" __global__ void __launch_bounds__(64) faulty(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    out[i] = in[i] + in[i + 1];
}

extern "C" __global__ void __launch_bounds__(64) faulty_write(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x;
    out[i + 4] = in[i];
}

extern "C" __global__ void __launch_bounds__(64) faulty_null(const float *in, float *out, int n) {
    const float *nothing = n ? nullptr : in;
    out[threadIdx.x] = nothing[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(64) correct(const float *in, float *out, int n) {
    int i = blockIdx.x * 64 + threadIdx.x, last = gridDim.x * 64 - 1;
    out[i] = in[i] + (i < last ? in[i + 1] : 0.0f);
}
