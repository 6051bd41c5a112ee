// __half, __nv_bfloat16, pairs of them, and CUDA's functions on numbers. Arithmetic on the short types is done in
// float and rounded, as the devices do for one operation.
#pragma once

struct __half {
    _Float16 v;
    __half() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic<T>::value>> __half(T x) : v((_Float16)(float)x) {}
    explicit __half(_Float16 x) : v(x) {}
    inline explicit __half(const struct __nv_bfloat16 &x);
    operator float() const { return (float)v; }
};
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic<T>::value>> __nv_bfloat16(T x) {
        float f = (float)x;
        uint32_t u;
        memcpy(&u, &f, 4);
        if ((u & 0x7fffffff) > 0x7f800000) bits = 0x7fff;
        else bits = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    inline explicit __nv_bfloat16(const __half &x);
    operator float() const {
        uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};
inline __half::__half(const __nv_bfloat16 &x) : v((_Float16)(float)x) {}
inline __nv_bfloat16::__nv_bfloat16(const __half &x) : __nv_bfloat16((float)x) {}

#define SIM_REAL(T)                                                                     \
    inline T operator+(T a, T b) { return T((float)a + (float)b); }                     \
    inline T operator-(T a, T b) { return T((float)a - (float)b); }                     \
    inline T operator*(T a, T b) { return T((float)a * (float)b); }                     \
    inline T operator/(T a, T b) { return T((float)a / (float)b); }                     \
    inline T operator-(T a) { return T(-(float)a); }                                    \
    inline T &operator+=(T &a, T b) { return a = a + b; }                               \
    inline T &operator-=(T &a, T b) { return a = a - b; }                               \
    inline T &operator*=(T &a, T b) { return a = a * b; }                               \
    inline T &operator/=(T &a, T b) { return a = a / b; }                               \
    inline bool operator<(T a, T b) { return (float)a < (float)b; }                     \
    inline bool operator>(T a, T b) { return (float)a > (float)b; }                     \
    inline bool operator<=(T a, T b) { return (float)a <= (float)b; }                   \
    inline bool operator>=(T a, T b) { return (float)a >= (float)b; }                   \
    inline bool operator==(T a, T b) { return (float)a == (float)b; }                   \
    inline bool operator!=(T a, T b) { return (float)a != (float)b; }                   \
    inline T __hmax(T a, T b) { return a > b || (float)b != (float)b ? a : b; }         \
    inline T __hmin(T a, T b) { return a < b || (float)b != (float)b ? a : b; }         \
    inline T __habs(T a) { return T(fabsf((float)a)); }                                 \
    inline T fma(T a, T b, T c) { return T(fmaf((float)a, (float)b, (float)c)); }       \
    inline T __hfma(T a, T b, T c) { return fma(a, b, c); }                             \
    inline T hexp(T a) { return T(expf((float)a)); }                                    \
    inline T hlog(T a) { return T(logf((float)a)); }                                    \
    inline T hsqrt(T a) { return T(sqrtf((float)a)); }                                  \
    inline T hrsqrt(T a) { return T(1.0f / sqrtf((float)a)); }                          \
    inline T hrcp(T a) { return T(1.0f / (float)a); }                                   \
    inline T hsin(T a) { return T(sinf((float)a)); }                                    \
    inline T hcos(T a) { return T(cosf((float)a)); }                                    \
    inline T htanh(T a) { return T(tanhf((float)a)); }                                  \
    inline T hfloor(T a) { return T(floorf((float)a)); }                                \
    inline T hceil(T a) { return T(ceilf((float)a)); }                                  \
    inline bool __hisnan(T a) { return (float)a != (float)a; }
SIM_REAL(__half)
SIM_REAL(__nv_bfloat16)


inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __half_as_ushort(__half x) { unsigned short u; memcpy(&u, &x, 2); return u; }
inline __half __ushort_as_half(unsigned short u) { __half x; memcpy(&x, &u, 2); return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { __nv_bfloat16 x; x.bits = u; return x; }

template <typename T> struct alignas(4) SimPair {
    T x, y;
    SimPair() = default;
    SimPair(T a, T b) : x(a), y(b) {}
    explicit SimPair(T a) : x(a), y(a) {}
};
typedef SimPair<__half> __half2;
typedef SimPair<__nv_bfloat16> __nv_bfloat162;
template <typename T> inline SimPair<T> operator+(SimPair<T> a, SimPair<T> b) { return {a.x + b.x, a.y + b.y}; }
template <typename T> inline SimPair<T> operator-(SimPair<T> a, SimPair<T> b) { return {a.x - b.x, a.y - b.y}; }
template <typename T> inline SimPair<T> operator*(SimPair<T> a, SimPair<T> b) { return {a.x * b.x, a.y * b.y}; }
template <typename T> inline SimPair<T> operator/(SimPair<T> a, SimPair<T> b) { return {a.x / b.x, a.y / b.y}; }
template <typename T> inline SimPair<T> operator-(SimPair<T> a) { return {-a.x, -a.y}; }
template <typename T> inline SimPair<T> __hmax2(SimPair<T> a, SimPair<T> b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
template <typename T> inline SimPair<T> __hmin2(SimPair<T> a, SimPair<T> b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
template <typename T> inline SimPair<T> fma(SimPair<T> a, SimPair<T> b, SimPair<T> c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)}; }
template <typename T> inline SimPair<T> h2exp(SimPair<T> a) { return {hexp(a.x), hexp(a.y)}; }
template <typename T> inline SimPair<T> h2log(SimPair<T> a) { return {hlog(a.x), hlog(a.y)}; }
template <typename T> inline SimPair<T> h2sqrt(SimPair<T> a) { return {hsqrt(a.x), hsqrt(a.y)}; }
template <typename T> inline SimPair<T> h2rsqrt(SimPair<T> a) { return {hrsqrt(a.x), hrsqrt(a.y)}; }
template <typename T> inline SimPair<T> h2rcp(SimPair<T> a) { return {hrcp(a.x), hrcp(a.y)}; }
template <typename T> inline SimPair<T> h2tanh(SimPair<T> a) { return {htanh(a.x), htanh(a.y)}; }
template <typename T> inline SimPair<T> h2sin(SimPair<T> a) { return {hsin(a.x), hsin(a.y)}; }
template <typename T> inline SimPair<T> h2cos(SimPair<T> a) { return {hcos(a.x), hcos(a.y)}; }
template <typename T> inline SimPair<T> h2floor(SimPair<T> a) { return {hfloor(a.x), hfloor(a.y)}; }
template <typename T> inline SimPair<T> h2ceil(SimPair<T> a) { return {hceil(a.x), hceil(a.y)}; }
template <typename T> inline SimPair<T> __habs2(SimPair<T> a) { return {__habs(a.x), __habs(a.y)}; }

inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16(a), __nv_bfloat16(a)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline float __low2float(__nv_bfloat162 a) { return a.x; }
inline float __high2float(__nv_bfloat162 a) { return a.y; }
template <typename T> inline SimPair<T> __hadd2(SimPair<T> a, SimPair<T> b) { return a + b; }
template <typename T> inline SimPair<T> __hsub2(SimPair<T> a, SimPair<T> b) { return a - b; }
template <typename T> inline SimPair<T> __hmul2(SimPair<T> a, SimPair<T> b) { return a * b; }
template <typename T> inline SimPair<T> __hfma2(SimPair<T> a, SimPair<T> b, SimPair<T> c) { return fma(a, b, c); }
inline __half __hadd(__half a, __half b) { return a + b; }
inline __half __hsub(__half a, __half b) { return a - b; }
inline __half __hmul(__half a, __half b) { return a * b; }
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
inline __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return a - b; }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }

// ---- functions ----------------------------------------------------------------------------------

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// CUDA's max and min ignore a NaN operand, and accept mixed integers.
template <typename A, typename B> inline std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point<T>::value) return fmax((T)a, (T)b);
    else return (T)a > (T)b ? (T)a : (T)b;
}
template <typename A, typename B> inline std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point<T>::value) return fmin((T)a, (T)b);
    else return (T)a < (T)b ? (T)a : (T)b;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= ((x >> i) & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline int __mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
inline long long __mul64hi(long long a, long long b) { return (long long)(((__int128)a * b) >> 64); }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline float __int_as_float(int u) { float x; memcpy(&x, &u, 4); return x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline float __int2float_rn(int x) { return (float)x; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return (unsigned)((((uint64_t)high << 32) | low) >> (by & 31)); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return (unsigned)((((uint64_t)high << 32) | low) << (by & 31) >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = ((uint64_t)b << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = (selector >> (4 * i)) & 15, byte = (unsigned)(both >> (8 * (s & 7))) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
template <typename T> inline T __ldg(const T *p) { return *p; }
template <typename T> inline T __ldcs(const T *p) { return *p; }
template <typename T> inline T __ldcg(const T *p) { return *p; }
template <typename T> inline void __stcs(T *p, T v) { *p = v; }
template <typename T> inline void __stcg(T *p, T v) { *p = v; }
// Addresses in shared memory are host addresses: only PTX, which is not compiled here, needs others.
SIM_QUIET inline size_t __cvta_generic_to_shared(const void *p) { return (size_t)((const char *)p - sim::here()->shared); }
inline unsigned __isGlobal(const void *) { return 1; }
#define __builtin_assume(x) ((void)0)
inline void __trap() { __builtin_trap(); }
