// Functions of one PTX instruction each that hand-written kernels call. On a device they are inline PTX; the
// kernel's own definitions are under `#ifndef KILN_HOST_SIM`.
#pragma once

// d += a * b, with the register layout of mma.sync.aligned.m16n8k16.row.col.
SIM_QUIET inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIM_LINE) {
    sim::here()->runtime->mma(sim::here(), 1, 16, a, b, d, d, line);
}
SIM_QUIET inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIM_LINE) {
    sim::here()->runtime->mma(sim::here(), 0, 16, a, b, d, d, line);
}
SIM_QUIET inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16, SIM_LINE) {
    mma_m16n8k16_bf16(d, a, b, line);
}
SIM_QUIET inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half, SIM_LINE) {
    mma_m16n8k16_f16(d, a, b, line);
}

// Lane 8 j + i provides the address of row i of matrix j.
SIM_QUIET inline void ldmatrix_x4(unsigned (&r)[4], const void *shared_row, SIM_LINE) {
    uint32_t *registers[] = {&r[0], &r[1], &r[2], &r[3]};
    sim::ldmatrix(registers, 4, false, shared_row, line);
}
SIM_QUIET inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *shared_row, SIM_LINE) {
    uint32_t *registers[] = {&r[0], &r[1], &r[2], &r[3]};
    sim::ldmatrix(registers, 4, true, shared_row, line);
}
SIM_QUIET inline void ldmatrix_x2(unsigned (&r)[2], const void *shared_row, SIM_LINE) {
    uint32_t *registers[] = {&r[0], &r[1]};
    sim::ldmatrix(registers, 2, false, shared_row, line);
}
SIM_QUIET inline void ldmatrix_x2_trans(unsigned (&r)[2], const void *shared_row, SIM_LINE) {
    uint32_t *registers[] = {&r[0], &r[1]};
    sim::ldmatrix(registers, 2, true, shared_row, line);
}

// Copies 16 bytes; if not `valid`, writes zeros and does not read the global address.
SIM_QUIET inline void cp_async_16(void *shared, const void *global, bool valid, SIM_LINE) {
    sim::here()->runtime->copy_async(sim::here(), shared, global, 16, valid ? 16 : 0, line);
}
SIM_QUIET inline void cp_async_commit() { sim::here()->runtime->copy_commit(sim::here()); }
template <int N> SIM_QUIET inline void cp_async_wait() { sim::here()->runtime->copy_wait(sim::here(), N); }

// ---- products of a warpgroup (compute capability 9.0a) -------------------------------------------

SIM_QUIET inline void wgmma_fence() { sim::here()->runtime->group_fence(sim::here()); }
SIM_QUIET inline void wgmma_commit() { sim::here()->runtime->group_commit(sim::here()); }
template <int N> SIM_QUIET inline void wgmma_wait(SIM_LINE) { sim::here()->runtime->group_wait(sim::here(), N, line); }
SIM_QUIET inline void fence_async_proxy() { sim::here()->runtime->async_fence(sim::here()); }
// The descriptor of a tile in dynamic shared memory, with the 128-byte swizzle.
SIM_QUIET inline unsigned long long wgmma_descriptor(const void *tile, unsigned leading_bytes, unsigned stride_bytes) {
    unsigned long long address = (unsigned long long)((const char *)tile - sim::here()->shared), wrong = 0;
    if (address >= 1 << 18 || address % 16) wrong = sim::NO_TILE;
    return (address >> 4 & 0x3fff) | (unsigned long long)(leading_bytes >> 4 & 0x3fff) << 16 | (unsigned long long)(stride_bytes >> 4 & 0x3fff) << 32 | 1ull << 62 | wrong;
}
namespace sim {
template <typename T, int R> SIM_QUIET inline void group_product(float (&d)[R], const unsigned *registers, unsigned long long a, unsigned long long b, bool transposed, bool overwrite, int line) {
    static_assert(element_of<T> != 2, "products of a warpgroup take __half or __nv_bfloat16");
    static_assert(R % 4 == 0 && R >= 4 && R <= 128, "N is a multiple of 8 up to 256");
    here()->runtime->group_product(here(), {element_of<T>, registers, a, b, transposed, d, R, overwrite}, line);
}
}  // namespace sim
// Without `add` the accumulators are overwritten.
template <typename T, int R> SIM_QUIET inline void wgmma_ss(float (&d)[R], unsigned long long a, unsigned long long b, int add = 1, SIM_LINE) {
    sim::group_product<T>(d, nullptr, a, b, false, !add, line);
}
template <typename T, int R> SIM_QUIET inline void wgmma_rs(float (&d)[R], const unsigned (&a)[4], unsigned long long b, SIM_LINE) {
    sim::group_product<T>(d, a, 0, b, false, false, line);
}
template <typename T, int R> SIM_QUIET inline void wgmma_rs_t(float (&d)[R], const unsigned (&a)[4], unsigned long long b, SIM_LINE) {
    sim::group_product<T>(d, a, 0, b, true, false, line);
}
// On a device they keep the compiler from reordering.
template <int COUNT> inline void keep_in_place(float (&)[COUNT]) {}
template <int COUNT> inline void keep_in_place(unsigned (&)[COUNT][4]) {}
inline void keep_after(float) {}

// 2 to the power of x, to 2 units in the last place, as ex2.approx.ftz: 0 below the normal numbers.
SIM_QUIET inline float exp2_approximate(float x) {
    // The last bits of this sum are the nearest integer.
    float shifted = x + 12582912.0f, part = x - (shifted - 12582912.0f), y = 1.535336188319500e-4f;
#ifdef __FMA__
    auto step = [&](float next) SIM_QUIET { y = __builtin_fmaf(y, part, next); };
#else
    auto step = [&](float next) SIM_QUIET { y = y * part + next; };
#endif
    step(1.339887440266574e-3f);
    step(9.618437357674640e-3f);
    step(5.550332471162809e-2f);
    step(2.402264791363012e-1f);
    step(6.931472028550421e-1f);
    step(1.0f);
    uint32_t bits, whole;
    memcpy(&bits, &y, 4);
    memcpy(&whole, &shifted, 4);
    bits += whole << 23;
    memcpy(&y, &bits, 4);
    y = x < -126.0f ? 0.0f : y;
    y = x >= 128.0f ? __builtin_inff() : y;
    return x == x ? y : x;
}
