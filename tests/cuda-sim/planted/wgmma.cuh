// Warpgroup products with 64 columns, as PTX. The CPU device has its own in shim/sim/ptx.h.
typedef unsigned long long u64;
#ifndef KILN_HOST_SIM
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Named barriers: `arrive` does not wait.
__device__ inline void barrier_sync(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ inline void barrier_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ inline u64 wgmma_descriptor(const void *tile, unsigned leading_bytes, unsigned stride_bytes) {
    return (u64)(shared_address(tile) >> 4 & 0x3fff) | (u64)(leading_bytes >> 4 & 0x3fff) << 16 | (u64)(stride_bytes >> 4 & 0x3fff) << 32 | 1ull << 62;
}
#define EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24)
#define PRODUCT(type, add, operands)                                                                     \
    "{.reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " operands ";}"
#define PRODUCTS(T, type)                                                                                                                       \
    template <> __device__ inline void wgmma_ss<T, 32>(float (&d)[32], u64 a, u64 b, int add) {                                                 \
        asm volatile(PRODUCT(type, "%34", "%32, %33, p, 1, 1, 0, 0") : SUMS : "l"(a), "l"(b), "r"(add) : "memory");                             \
    }                                                                                                                                           \
    template <> __device__ inline void wgmma_rs<T, 32>(float (&d)[32], const unsigned (&a)[4], u64 b) {                                         \
        asm volatile(PRODUCT(type, "1", "{%32, %33, %34, %35}, %36, p, 1, 1, 0") : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory"); \
    }                                                                                                                                           \
    template <> __device__ inline void wgmma_rs_t<T, 32>(float (&d)[32], const unsigned (&a)[4], u64 b) {                                       \
        asm volatile(PRODUCT(type, "1", "{%32, %33, %34, %35}, %36, p, 1, 1, 1") : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory"); \
    }
template <typename T, int R> __device__ inline void wgmma_ss(float (&d)[R], u64 a, u64 b, int add = 1);
template <typename T, int R> __device__ inline void wgmma_rs(float (&d)[R], const unsigned (&a)[4], u64 b);
template <typename T, int R> __device__ inline void wgmma_rs_t(float (&d)[R], const unsigned (&a)[4], u64 b);
PRODUCTS(__nv_bfloat16, "bf16")
PRODUCTS(__half, "f16")
#endif
