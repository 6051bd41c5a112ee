// Hopper's asynchronous matrix products (wgmma, compute capability 9.0a): a warpgroup of 4 warps multiplies
// tiles in shared memory.
//
// The emulator in tests/cuda-sim defines KILN_HOST_SIM, and implements the instructions on the CPU.
#ifndef KILN_HOST_SIM

// Orders earlier writes to the products' registers before the products. Required before the first product of
// a batch.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Commits the products since the last commit as a group.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last N groups have completed.
template <int N> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Makes this thread's writes to shared memory visible to products, also to those that other threads issue
// after a barrier.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving uses of the products' registers across this point. Emits no instruction.
template <int COUNT> __device__ inline void keep_in_place(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT> __device__ inline void keep_in_place(unsigned (&a)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT * 4; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
// Keeps the compiler from moving the following wait before the computation of `x`. Has no other effect: `x`
// is never negative, which the compiler cannot know.
__device__ inline void keep_after(float x) {
    asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p nanosleep.u32 0;}" ::"f"(x) : "memory");
}

// Named barriers of `threads` threads (bar.sync and bar.arrive); barrier_arrive does not wait.
__device__ inline void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Computes 2 to the power of x; subnormal results are flushed to 0.
__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Creates the descriptor of a matrix in shared memory with the 128-byte swizzle: rows of 64 values of 16
// bits, starting at a multiple of 1024 bytes, where the 16-byte chunk c of row r is stored at chunk
// c ^ (r & 7). `stride` is the number of bytes between groups of 8 rows, `leading` that between blocks of 64
// columns, which only transposed matrices use. Adding 1 to a descriptor advances it by 16 bytes.
__device__ inline u64 wgmma_descriptor(const void *matrix, unsigned leading, unsigned stride) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(matrix);
    return (u64)1 << 62 | (u64)(stride >> 4) << 32 | (u64)(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

#define LIST_8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define REGISTERS_32 \
    LIST_8(0, 1, 2, 3, 4, 5, 6, 7) ", " LIST_8(8, 9, 10, 11, 12, 13, 14, 15) ", " \
    LIST_8(16, 17, 18, 19, 20, 21, 22, 23) ", " LIST_8(24, 25, 26, 27, 28, 29, 30, 31)
#define REGISTERS_64 \
    REGISTERS_32 ", " LIST_8(32, 33, 34, 35, 36, 37, 38, 39) ", " LIST_8(40, 41, 42, 43, 44, 45, 46, 47) ", " \
    LIST_8(48, 49, 50, 51, 52, 53, 54, 55) ", " LIST_8(56, 57, 58, 59, 60, 61, 62, 63)
#define REGISTERS_96 \
    REGISTERS_64 ", " LIST_8(64, 65, 66, 67, 68, 69, 70, 71) ", " LIST_8(72, 73, 74, 75, 76, 77, 78, 79) ", " \
    LIST_8(80, 81, 82, 83, 84, 85, 86, 87) ", " LIST_8(88, 89, 90, 91, 92, 93, 94, 95)
#define REGISTERS_128 \
    REGISTERS_96 ", " LIST_8(96, 97, 98, 99, 100, 101, 102, 103) ", " LIST_8(104, 105, 106, 107, 108, 109, 110, 111) ", " \
    LIST_8(112, 113, 114, 115, 116, 117, 118, 119) ", " LIST_8(120, 121, 122, 123, 124, 125, 126, 127)
#define FLOATS_8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),               \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_32 FLOATS_8(0), FLOATS_8(8), FLOATS_8(16), FLOATS_8(24)
#define FLOATS_64 FLOATS_32, FLOATS_8(32), FLOATS_8(40), FLOATS_8(48), FLOATS_8(56)
#define FLOATS_96 FLOATS_64, FLOATS_8(64), FLOATS_8(72), FLOATS_8(80), FLOATS_8(88)
#define FLOATS_128 FLOATS_96, FLOATS_8(96), FLOATS_8(104), FLOATS_8(112), FLOATS_8(120)

// One instruction with COUNT registers of d; A, B and ADD are the numbers of the operands after those.
#define WGMMA(TYPE, COLUMNS, COUNT, A, B, ADD, FLAGS, ...)                                                    \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %" #ADD ", 0; "                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                        \
                 " {" REGISTERS_##COUNT "}, " A ", %" #B ", add, 1, 1, " FLAGS ";}"                           \
                 : FLOATS_##COUNT                                                                             \
                 : __VA_ARGS__, "l"(b), "r"(add))
#define WGMMA_SS(COLUMNS, COUNT, A, B, ADD)                                                                   \
    if constexpr (R == COUNT) {                                                                               \
        if constexpr (IsHalf<T>::value)                                                                       \
            WGMMA("f16", COLUMNS, COUNT, "%" #A, B, ADD, "0, 0", "l"(a));                                     \
        else                                                                                                  \
            WGMMA("bf16", COLUMNS, COUNT, "%" #A, B, ADD, "0, 0", "l"(a));                                    \
    }
#define WGMMA_RS_T(COLUMNS, COUNT, A0, A1, A2, A3, B, ADD)                                                    \
    if constexpr (R == COUNT) {                                                                               \
        if constexpr (IsHalf<T>::value)                                                                       \
            WGMMA("f16", COLUMNS, COUNT, "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}", B, ADD, "1",             \
                  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));                                                \
        else                                                                                                  \
            WGMMA("bf16", COLUMNS, COUNT, "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}", B, ADD, "1",            \
                  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));                                                \
    }

template <typename T> struct IsHalf { static constexpr bool value = false; };
template <> struct IsHalf<__half> { static constexpr bool value = true; };

// Computes d += a · bᵀ, or d = a · bᵀ if `add` is 0: a is 64×16 and b is 2 R × 16, both row-major in shared
// memory. Lane l of warp w holds, for j = 0, 1, ..: columns c = 8 j + l % 4 · 2 and c + 1 of row 16 w + l / 4
// in d[4 j], d[4 j + 1], and of row 16 w + l / 4 + 8 in d[4 j + 2], d[4 j + 3].
template <typename T, int R> __device__ inline void wgmma_ss(float (&d)[R], u64 a, u64 b, int add = 1) {
    static_assert(R == 64 || R == 96 || R == 128, "there is no such instruction in this file");
    WGMMA_SS(128, 64, 64, 65, 66)
    WGMMA_SS(192, 96, 96, 97, 98)
    WGMMA_SS(256, 128, 128, 129, 130)
}

// Computes d += a · b: a is 64×16, in registers as in `mma`, and b is 16 × 2 R, row-major in shared memory.
template <typename T, int R> __device__ inline void wgmma_rs_t(float (&d)[R], const unsigned (&a)[4], u64 b) {
    static_assert(R == 32 || R == 64, "there is no such instruction in this file");
    constexpr int add = 1;
    WGMMA_RS_T(64, 32, 32, 33, 34, 35, 36, 37)
    WGMMA_RS_T(128, 64, 64, 65, 66, 67, 68, 69)
}

#endif
