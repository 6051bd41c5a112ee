// The functions of one PTX instruction each that hand-written kernels wrap. On a device they are inline
// PTX; a kernel's own definitions stand under `#ifndef KILN_HOST_SIM`.
#pragma once

// d += a * b, with the registers of mma.sync.aligned.m16n8k16.row.col.
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

// Lane 8 j + i brings the address of row i of matrix j.
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

// 16 bytes, or zeros where not `valid`; the global address is not read then.
SIM_QUIET inline void cp_async_16(void *shared, const void *global, bool valid, SIM_LINE) {
    sim::here()->runtime->copy_async(sim::here(), shared, global, 16, valid ? 16 : 0, line);
}
SIM_QUIET inline void cp_async_commit() { sim::here()->runtime->copy_commit(sim::here()); }
template <int N> SIM_QUIET inline void cp_async_wait() { sim::here()->runtime->copy_wait(sim::here(), N); }
