// The arithmetic of warpgroup products (wgmma): tiles in shared memory by their descriptors, and sums.
#pragma once
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

namespace sim {

constexpr int GROUP_ROWS = 64, GROUP_DEPTH = 16, MOST_COLUMNS = 256;
// Largest number of products on the same sums that are computed in one pass.
constexpr int MOST_STEPS = 4, MOST_DEPTH = MOST_STEPS * GROUP_DEPTH;

#ifdef __AVX512F__
constexpr int LANES = 16, VECTORS = 4;
#else
constexpr int LANES = 8, VECTORS = 2;
#endif
// The right operand is stored in panels of this many columns, each row-major.
constexpr int PANEL = LANES * VECTORS;
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef uint16_t Chunk __attribute__((vector_size(16)));
typedef uint32_t Wide __attribute__((vector_size(32)));
typedef float WideFloat __attribute__((vector_size(32), aligned(4)));

struct Operands {
    alignas(64) float left[GROUP_ROWS][MOST_DEPTH];
    alignas(64) float right[MOST_DEPTH * MOST_COLUMNS];
};

// A tile given by a descriptor: 128-byte swizzle, offsets in bytes from the block's shared memory.
struct Tile {
    uint32_t base, leading, stride;
    explicit Tile(uint64_t descriptor)
        : base((uint32_t)(descriptor & 0x3fff) << 4), leading((uint32_t)(descriptor >> 16 & 0x3fff) << 4), stride((uint32_t)(descriptor >> 32 & 0x3fff) << 4) {}
    static uint32_t swizzled(uint32_t at) { return at ^ (at >> 3 & 0x70); }
    // The 8 values of row `r` from column 8 * `chunk` of 16; K-major.
    uint32_t by_rows(unsigned r, unsigned chunk) const { return swizzled(base + r / 8 * stride + r % 8 * 128 + chunk * 16); }
    // The 8 values of depth `k` from column 8 * `chunk`; MN-major.
    uint32_t by_depth(unsigned k, unsigned chunk) const { return swizzled(base + chunk / 8 * leading + k / 8 * stride + k % 8 * 128 + chunk % 8 * 16); }
};
// Calls f(offset) for each 16 bytes of a tile with the given number of rows, or of columns if transposed.
template <typename F> void each_chunk(const Tile &tile, bool transposed, unsigned count, F f) {
    if (transposed) {
        for (unsigned k = 0; k < GROUP_DEPTH; k++)
            for (unsigned c = 0; c < count / 8; c++) f(tile.by_depth(k, c));
    } else {
        for (unsigned r = 0; r < count; r++)
            for (unsigned c = 0; c < 2; c++) f(tile.by_rows(r, c));
    }
}

inline float half_to_float(uint16_t bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}
inline float bfloat_to_float(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline Chunk load_chunk(const char *from) {
    Chunk c;
    memcpy(&c, from, 16);
    return c;
}
template <int element> inline void store_floats(float *to, Chunk c) {
    WideFloat f;
    if (element == 1) {
        f = (WideFloat)(__builtin_convertvector(c, Wide) << 16);
    } else {
#ifdef __F16C__
        f = (WideFloat)_mm256_cvtph_ps((__m128i)c);
#else
        for (int i = 0; i < 8; i++) f[i] = half_to_float(c[i]);
#endif
    }
    *(WideFloat *)to = f;
}

template <int element> void read_left(Operands &o, int step, const char *shared, const Tile &tile) {
    for (unsigned r = 0; r < GROUP_ROWS; r++)
        for (unsigned c = 0; c < 2; c++) store_floats<element>(&o.left[r][step * GROUP_DEPTH + c * 8], load_chunk(shared + tile.by_rows(r, c)));
}
// Registers of the 128 threads, in the layout of mma.sync.m16n8k16 for each warp.
template <int element> void read_left(Operands &o, int step, const uint32_t (*a)[4]) {
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < 4; i++) {
            float *to = &o.left[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][step * GROUP_DEPTH + t % 4 * 2 + i / 2 * 8];
            for (int h = 0; h < 2; h++) {
                uint16_t bits = (uint16_t)(a[t][i] >> (16 * h));
                to[h] = element ? bfloat_to_float(bits) : half_to_float(bits);
            }
        }
}
inline float *right_place(Operands &o, int depth, int k, int column) { return o.right + column / PANEL * PANEL * depth + k * PANEL + column % PANEL; }
template <int element> void read_right(Operands &o, int step, int depth, const char *shared, const Tile &tile, bool transposed, int columns) {
    int first = step * GROUP_DEPTH;
    if (transposed) {
        for (int k = 0; k < GROUP_DEPTH; k++)
            for (int n = 0; n < columns; n += 8) store_floats<element>(right_place(o, depth, first + k, n), load_chunk(shared + tile.by_depth((unsigned)k, (unsigned)n / 8)));
    } else {
        // Squares of 8 by 8 are transposed in three rounds.
        for (int n = 0; n < columns; n += 8)
            for (int c = 0; c < 2; c++) {
                Chunk x[8], y[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) x[i] = load_chunk(shared + tile.by_rows((unsigned)(n + i), (unsigned)c));
                auto round = [&](const Chunk *from, Chunk *to) {
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        to[2 * i] = (Chunk)_mm_unpacklo_epi16((__m128i)from[i], (__m128i)from[i + 4]);
                        to[2 * i + 1] = (Chunk)_mm_unpackhi_epi16((__m128i)from[i], (__m128i)from[i + 4]);
                    }
                };
                round(x, y);
                round(y, x);
                round(x, y);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) store_floats<element>(right_place(o, depth, first + c * 8 + i, n), y[i]);
            }
    }
    if (columns % LANES)
        for (int k = 0; k < GROUP_DEPTH; k++) memset(right_place(o, depth, first + k, columns), 0, 32);
}

// Loops over rows and vectors are unrolled so that the sums stay in registers.
template <int vectors> void multiply_panel(const Operands &o, int depth, const float *right, float *sums, int pitch) {
    for (int row = 0; row < GROUP_ROWS; row += 4) {
        Vector s[4][vectors];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) s[i][j] = *(const Vector *)(sums + (row + i) * pitch + j * LANES);
        for (int k = 0; k < depth; k++) {
            Vector b[vectors];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) b[j] = *(const Vector *)(right + k * PANEL + j * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) s[i][j] += o.left[row + i][k] * b[j];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) *(Vector *)(sums + (row + i) * pitch + j * LANES) = s[i][j];
    }
}
// sums[64][pitch] += left[64][depth] * right[depth][columns]; the pitch is a multiple of LANES.
inline void multiply_group(const Operands &o, int depth, float *sums, int columns, int pitch) {
    for (int n = 0; n < columns; n += PANEL) {
        const float *right = o.right + n * depth;
        int left = (columns - n + LANES - 1) / LANES;
        if (left >= VECTORS) multiply_panel<VECTORS>(o, depth, right, sums + n, pitch);
        else if (left == 1) multiply_panel<1>(o, depth, right, sums + n, pitch);
        else if (left == 2) multiply_panel<2>(o, depth, right, sums + n, pitch);
        else multiply_panel<3>(o, depth, right, sums + n, pitch);
    }
}

}  // namespace sim
