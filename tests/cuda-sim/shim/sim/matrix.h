// Matrix products: the wmma API, and the replacements of CubeCL's functions of inline PTX.
#pragma once

// Tensor cores ignore the low 13 bits of TF32 operands; kernels that load by TMA rely on it.
// SIM_NO_TF32 disables the rounding, for measuring its share of an error.
inline float sim_tf32(float x) {
#ifndef SIM_NO_TF32
    uint32_t u;
    memcpy(&u, &x, 4);
    u &= ~0x1fffu;
    memcpy(&x, &u, 4);
#endif
    return x;
}
template <typename T> inline float sim_operand(T x) { return (float)x; }
template <> inline float sim_operand<float>(float x) { return sim_tf32(x); }

namespace nvcuda { namespace wmma {
struct matrix_a; struct matrix_b; struct accumulator;
struct row_major; struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision { struct tf32; }
template <typename T> struct Storage { typedef T type; };
template <> struct Storage<precision::tf32> { typedef float type; };

// Element i of a lane is element lane * num_elements + i of the matrix, row-major. The layout on devices
// is not specified, so no kernel can depend on it.
template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
    typedef typename Storage<T>::type Element;
    static constexpr int rows = std::is_same<Use, matrix_b>::value ? K : M;
    static constexpr int columns = std::is_same<Use, matrix_a>::value ? K : N;
    static constexpr int num_elements = rows * columns / 32;
    static constexpr bool by_column = std::is_same<Layout, col_major>::value;
    Element x[num_elements];
};
inline float __float_to_tf32(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
#ifndef SIM_NO_TF32
    u = (u + 0x1000) & ~0x1fffu;
#endif
    memcpy(&x, &u, 4);
    return x;
}
template <typename F, typename V> inline void fill_fragment(F &f, V value) {
    for (int i = 0; i < F::num_elements; i++) f.x[i] = typename F::Element(value);
}
template <bool load, typename F, typename T> SIM_QUIET inline void move(F &f, T *memory, unsigned stride, bool by_column, int line) {
    unsigned lane = sim::lane();
    for (int i = 0; i < F::num_elements; i++) {
        unsigned place = lane * F::num_elements + i, row = place / F::columns, column = place % F::columns;
        size_t at = by_column ? (size_t)column * stride + row : (size_t)row * stride + column;
        sim::touch(memory + at, sizeof(T), load ? sim::READ : sim::WRITE, line);
        if constexpr (load) f.x[i] = memory[at];
        else memory[at] = f.x[i];
    }
}
SIM_QUIET inline void together(int line) { sim::here()->runtime->warp(sim::here(), ~0u, sim::FRAGMENT, line, nullptr, nullptr); }
template <typename F, typename T> SIM_QUIET inline void load_matrix_sync(F &f, const T *memory, unsigned stride, SIM_LINE) {
    together(line);
    move<true>(f, memory, stride, F::by_column, line);
    together(line);
}
template <typename F, typename T> SIM_QUIET inline void load_matrix_sync(F &f, const T *memory, unsigned stride, layout_t layout, SIM_LINE) {
    together(line);
    move<true>(f, memory, stride, layout == mem_col_major, line);
    together(line);
}
template <typename F, typename T> SIM_QUIET inline void store_matrix_sync(T *memory, const F &f, unsigned stride, layout_t layout, SIM_LINE) {
    together(line);
    move<false>(const_cast<F &>(f), memory, stride, layout == mem_col_major, line);
    together(line);
}
template <typename D, typename A, typename B, typename C> struct Operands {
    D *d;
    const A *a;
    const B *b;
    const C *c;
    const sim::Runtime *runtime;
};
template <typename D, typename A, typename B, typename C> SIM_QUIET inline void multiply_work(void *const *slots, uint32_t) {
    constexpr int M = D::rows, N = D::columns, K = A::columns;
    typedef Operands<D, A, B, C> Lane;
    float left[M * K], right[K * N], sums[M * N];
    for (int l = 0; l < 32; l++) {
        Lane *lane = (Lane *)slots[l];
        for (int i = 0; i < A::num_elements; i++) left[l * A::num_elements + i] = sim_operand(lane->a->x[i]);
        for (int i = 0; i < B::num_elements; i++) right[l * B::num_elements + i] = sim_operand(lane->b->x[i]);
        for (int i = 0; i < C::num_elements; i++) sums[l * C::num_elements + i] = (float)lane->c->x[i];
    }
    ((Lane *)slots[0])->runtime->multiply(left, right, sums, M, N, K);
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < D::num_elements; i++) ((Lane *)slots[l])->d->x[i] = typename D::Element(sums[l * D::num_elements + i]);
}
template <typename D, typename A, typename B, typename C> SIM_QUIET inline void mma_sync(D &d, const A &a, const B &b, const C &c, SIM_LINE) {
    Operands<D, A, B, C> mine{&d, &a, &b, &c, sim::here()->runtime};
    sim::here()->runtime->warp(sim::here(), ~0u, sim::MATRIX_PRODUCT, line, &mine, multiply_work<D, A, B, C>);
}
}}  // namespace nvcuda::wmma

namespace sim {
template <typename T> constexpr int element_of = std::is_same<T, __half>::value ? 0 : std::is_same<T, __nv_bfloat16>::value ? 1 : 2;
template <typename T, int K> SIM_QUIET inline void mma(const uint32_t *a, const uint32_t *b, const float *c, float *d, SIM_LINE) {
    here()->runtime->mma(here(), element_of<T>, K, a, b, c, d, line);
}
SIM_QUIET inline void ldmatrix(uint32_t *const *registers, int count, bool transposed, const void *row, SIM_LINE) {
    here()->runtime->load_matrix(here(), registers, count, transposed, row, line);
}
SIM_QUIET inline void stmatrix(const uint32_t *const *registers, int count, bool transposed, void *row, SIM_LINE) {
    here()->runtime->store_matrix(here(), registers, count, transposed, row, line);
}
}  // namespace sim
template <typename T> inline uint32_t sim_bits(T x) {
    static_assert(sizeof(T) == 4, "a register has 4 bytes");
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
