// Elementwise ops in f32 arithmetic.
//
// Macros: T (element type), IS_F16, and OP: 0 computes GELU (tanh approximation) of a, 1 silu(a) · b, 2
// a + gate · b, where the gate is the row of an f32 table [rows][dim] that a run of tokens shares. OP 2
// saturates in f16.

constexpr int THREADS = 256;
constexpr int RUNS = 32;
constexpr int VALUES = 16 / sizeof(T);

struct alignas(16) Vector {
    T at[VALUES];
};

struct Info {
    u64 count;   // OP 0 and 1: number of values; OP 2: values per token
    u64 first;   // OP 2: token of block 0
    u64 ends[RUNS], rows[RUNS];  // OP 2: end (token) and table row of each run
};

__device__ inline T computed(float a, float b, float gate) {
#if OP == 0
    return Rounded<T>::of(a * (tanhf((a + a * a * a * 0.044715f) * 0.7978845608028654f) + 1.0f) * 0.5f);
#elif OP == 1
    return Rounded<T>::of(a / (1.0f + expf(-a)) * b);
#else
    const float sum = a + gate * b;
    return Rounded<T>::of(sizeof(T) == 2 && IS_F16 ? fminf(fmaxf(sum, -65504.0f), 65504.0f) : sum);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
elementwise(
    const T *__restrict__ a,
#if OP > 0
    const T *__restrict__ b,
#endif
#if OP == 2
    const float *__restrict__ gate,
#endif
    T *__restrict__ out,
    const __grid_constant__ Info info
) {
#if OP == 2
    // Each block computes one token.
    const u64 token = info.first + blockIdx.x;
    int run = 0;
    while (token >= info.ends[run]) run++;
    gate += info.rows[run] * info.count;
    a += token * info.count;
    b += token * info.count;
    out += token * info.count;
    const u64 begin = threadIdx.x, step = THREADS;
#else
    const u64 begin = (u64)blockIdx.x * THREADS + threadIdx.x, step = (u64)gridDim.x * THREADS;
#endif
    // Rows whose length is not a multiple of 16 bytes are not aligned for vectors.
    const u64 vectors = OP == 2 && info.count % VALUES ? 0 : info.count / VALUES;
    for (u64 i = begin; i < vectors; i += step) {
        const Vector left = ((const Vector *)a)[i];
#if OP > 0
        const Vector right = ((const Vector *)b)[i];
#endif
        Vector result;
#pragma unroll
        for (int j = 0; j < VALUES; j++) {
#if OP == 0
            result.at[j] = computed(to_float(left.at[j]), 0.0f, 0.0f);
#elif OP == 1
            result.at[j] = computed(to_float(left.at[j]), to_float(right.at[j]), 0.0f);
#else
            result.at[j] = computed(to_float(left.at[j]), to_float(right.at[j]), gate[i * VALUES + j]);
#endif
        }
        ((Vector *)out)[i] = result;
    }
    for (u64 i = vectors * VALUES + begin; i < info.count; i += step) {
#if OP == 0
        out[i] = computed(to_float(a[i]), 0.0f, 0.0f);
#elif OP == 1
        out[i] = computed(to_float(a[i]), to_float(b[i]), 0.0f);
#else
        out[i] = computed(to_float(a[i]), to_float(b[i]), gate[i]);
#endif
    }
}
