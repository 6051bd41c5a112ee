// Types, conversions and tensor core instructions that all kernels in this folder use.
//
// The emulator in tests/cuda-sim defines KILN_HOST_SIM, and implements the instructions on the CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned long long u64;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> struct Rounded;
template <> struct Rounded<float> {
    static __device__ float of(float x) { return x; }
};
template <> struct Rounded<__half> {
    static __device__ __half of(float x) { return __float2half_rn(x); }
};
template <> struct Rounded<__nv_bfloat16> {
    static __device__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
};

// Packs two values of a 16-bit type into one register, the first in the low half.
template <typename T> __device__ inline unsigned pack(float first, float second);
template <> __device__ inline unsigned pack<__half>(float first, float second) {
    return (unsigned)__half_as_ushort(__float2half_rn(first)) |
           (unsigned)__half_as_ushort(__float2half_rn(second)) << 16;
}
template <> __device__ inline unsigned pack<__nv_bfloat16>(float first, float second) {
    return (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(first)) |
           (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(second)) << 16;
}

// Writes `first`, and `second` after it if `both`. If `paired`, `to` is 4-byte aligned.
template <typename T>
__device__ inline void store_pair(T *to, float first, float second, bool both, bool paired) {
    if (both && paired && sizeof(T) == 2) {
        *(unsigned *)to = pack<T>(first, second);
    } else {
        to[0] = Rounded<T>::of(first);
        if (both) to[1] = Rounded<T>::of(second);
    }
}
template <>
__device__ inline void store_pair<float>(float *to, float first, float second, bool both, bool) {
    to[0] = first;
    if (both) to[1] = second;
}

// Writes 8 values; `to` is 16-byte aligned.
template <typename T> __device__ inline void store_8(T *to, const float (&values)[8]) {
    uint4 packed;
    packed.x = pack<T>(values[0], values[1]);
    packed.y = pack<T>(values[2], values[3]);
    packed.z = pack<T>(values[4], values[5]);
    packed.w = pack<T>(values[6], values[7]);
    *(uint4 *)to = packed;
}
template <> __device__ inline void store_8<float>(float *to, const float (&values)[8]) {
    *(float4 *)to = make_float4(values[0], values[1], values[2], values[3]);
    *(float4 *)(to + 4) = make_float4(values[4], values[5], values[6], values[7]);
}

#ifndef KILN_HOST_SIM

__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8×8 matrices of 16-bit values; lane 8 j + i provides the address of row i of matrix j.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

// Copies 16 bytes to shared memory asynchronously, or writes zeros if not `valid`.
__device__ inline void cp_async_16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but this thread's last `N` committed groups have arrived.
template <int N> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

// Computes d += a · b on tensor cores: a is 16×16 row-major, b is 16×8 column-major.
template <typename T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
}
template <>
__device__ inline void mma<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_f16(d, a, b);
}
