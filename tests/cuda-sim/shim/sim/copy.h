// Phase barriers (cuda::barrier) and the copies that complete them; cooperative groups.
#pragma once

namespace sim {
// A copy that is executed at once; its barrier determines when it may be read.
SIM_QUIET inline void copy_now(void *to, const void *from, size_t size, int line) {
    touch(from, size, READ, line);
    touch(to, size, WRITE, line);
    memcpy(to, from, size);
}
// The part of this thread in a copy of the whole block.
SIM_QUIET inline void copy_part(void *to, const void *from, size_t size, int line) {
    size_t count = (size_t)here()->dim.x * here()->dim.y * here()->dim.z, pieces = (size + 15) / 16;
    for (size_t i = here()->index; i < pieces; i += count) {
        size_t at = i * 16, n = size - at < 16 ? size - at : 16;
        copy_now((char *)to + at, (const char *)from + at, n, line);
    }
}
}  // namespace sim

namespace cuda {
enum thread_scope { thread_scope_system, thread_scope_device, thread_scope_block, thread_scope_thread };
// Eight bytes, as on a device, as kernels place barriers in shared memory themselves.
template <thread_scope S> struct barrier {
    typedef unsigned long arrival_token;
    uint64_t expected : 20, pending : 20, phase : 1;
    int64_t bytes : 23;
    SIM_QUIET void start(long count) {
        expected = pending = count;
        bytes = 0;
        phase = 0;
    }
    SIM_QUIET void check() {
        if (pending == 0 && bytes == 0) {
            pending = expected;
            phase ^= 1;
            sim::here()->runtime->phase_completed(sim::here(), this);
        }
    }
    SIM_QUIET arrival_token arrive(long n = 1) {
        arrival_token token = phase;
        pending -= n;
        check();
        return token;
    }
    SIM_QUIET void wait(arrival_token token, SIM_LINE) {
        while (phase == token) sim::here()->runtime->yield(sim::here(), line);
        sim::here()->runtime->phase_seen(sim::here(), this);
    }
    SIM_QUIET void wait_parity(bool parity, SIM_LINE) { wait(parity, line); }
    SIM_QUIET void arrive_and_wait(SIM_LINE) { wait(arrive(), line); }
};
template <thread_scope S> SIM_QUIET inline void init(barrier<S> *b, long count) { b->start(count); }
template <thread_scope S> SIM_QUIET inline void memcpy_async(void *to, const void *from, size_t size, barrier<S> &, SIM_LINE) {
    sim::copy_now(to, from, size, line);
}
template <typename G, thread_scope S> SIM_QUIET inline void memcpy_async(const G &, void *to, const void *from, size_t size, barrier<S> &, SIM_LINE) {
    if (G::whole_block) sim::copy_part(to, from, size, line);
    else sim::copy_now(to, from, size, line);
}
namespace device {
template <thread_scope S> SIM_QUIET inline void barrier_expect_tx(barrier<S> &b, long bytes) { b.bytes += bytes; }
template <thread_scope S> SIM_QUIET inline unsigned long barrier_arrive_tx(barrier<S> &b, long count, long bytes) {
    b.bytes += bytes;
    return b.arrive(count);
}
template <thread_scope S> SIM_QUIET inline void memcpy_async_tx(void *to, const void *from, size_t size, barrier<S> &b, SIM_LINE) {
    sim::copy_now(to, from, size, line);
    b.bytes -= (long)size;
    b.check();
}
template <thread_scope S> SIM_QUIET inline uint64_t *barrier_native_handle(barrier<S> &b) { return (uint64_t *)&b; }
namespace experimental {
inline void fence_proxy_async_shared_cta() {}
inline void cp_async_bulk_commit_group() {}
template <int N> inline void cp_async_bulk_wait_group() {}
template <int N> inline void cp_async_bulk_wait_group_read() {}
}  // namespace experimental
}  // namespace device
}  // namespace cuda

// CubeCL's cp.async: the copies of a thread belong to the barrier that it arrives at with sim_cp_async_arrive.
template <size_t N> SIM_QUIET inline void __cp_async_shared_global(const void *from, void *to, int const &given, SIM_LINE) {
    sim::here()->runtime->copy_async(sim::here(), to, from, N, given < (int)N ? given : N, line);
}
template <size_t N> SIM_QUIET inline void __cp_async_shared_global(const void *from, void *to, SIM_LINE) {
    sim::here()->runtime->copy_async(sim::here(), to, from, N, N, line);
}
template <typename B> SIM_QUIET inline void sim_cp_async_arrive(B &b) {
    // The copies may arrive at any time before the end of the barrier's phase; here they arrive at once.
    sim::here()->runtime->copy_commit(sim::here());
    sim::here()->runtime->copy_wait(sim::here(), 0);
    // This arrival does not count towards the barrier's expected arrivals.
    b.pending++;
    b.arrive();
}

// The 128 bytes of a tensor map, as the driver library writes them.
struct SimMap {
    unsigned long base;
    unsigned magic, rank, type, swizzle, fill;
    unsigned box[5];
    unsigned dims[5];
    unsigned long strides[4];
};
namespace sim {
template <typename B> SIM_QUIET inline void load_box(void *shared, const void *map, const int *at, int rank, B &barrier, int line) {
    static const size_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 1, 1, 1};
    auto *m = (const SimMap *)map;
    size_t element = sizes[m->type], width = m->box[0] * element, rows = 1;
    for (int i = 1; i < rank; i++) rows *= m->box[i];
    unsigned span = m->swizzle == 1 ? 32 : m->swizzle == 2 ? 64 : m->swizzle == 3 ? 128 : 0;
    for (size_t row = 0; row < rows; row++) {
        size_t left = row;
        const char *from = (const char *)m->base;
        bool inside = true;
        for (int i = 1; i < rank; i++) {
            long at_i = at[i] + (long)(left % m->box[i]);
            left /= m->box[i];
            inside &= at_i >= 0 && at_i < (long)m->dims[i];
            from += at_i * (long)m->strides[i - 1];
        }
        for (unsigned x = 0; x < m->box[0]; x++) {
            long at_x = at[0] + (long)x;
            size_t to = row * width + x * element;
            if (span) {
                // Swizzle: pieces of 16 bytes are permuted by the number of their row of 128 bytes.
                size_t piece = to / 16, row_of_128 = to / 128;
                to = (piece ^ (row_of_128 & (span / 16 - 1))) * 16 + to % 16;
            }
            touch((char *)shared + to, element, WRITE | ASYNC_PROXY, line);
            if (inside && at_x >= 0 && at_x < (long)m->dims[0]) {
                touch(from + at_x * (long)element, element, READ, line);
                memcpy((char *)shared + to, from + at_x * (long)element, element);
            } else {
                memset((char *)shared + to, 0, element);
            }
        }
    }
    barrier.bytes -= (long)(width * rows);
    barrier.check();
}
}  // namespace sim
namespace cuda { namespace device { namespace experimental {
template <typename B> inline void cp_async_bulk_tensor_2d_global_to_shared(void *s, const void *m, int a, int b, B &bar, SIM_LINE) { int at[] = {a, b}; sim::load_box(s, m, at, 2, bar, line); }
template <typename B> inline void cp_async_bulk_tensor_3d_global_to_shared(void *s, const void *m, int a, int b, int c, B &bar, SIM_LINE) { int at[] = {a, b, c}; sim::load_box(s, m, at, 3, bar, line); }
template <typename B> inline void cp_async_bulk_tensor_4d_global_to_shared(void *s, const void *m, int a, int b, int c, int d, B &bar, SIM_LINE) { int at[] = {a, b, c, d}; sim::load_box(s, m, at, 4, bar, line); }
}}}  // namespace cuda::device::experimental

namespace cooperative_groups {
struct thread_block {
    static constexpr bool whole_block = true;
    SIM_QUIET void sync(SIM_LINE) const { __syncthreads(line); }
    SIM_QUIET unsigned thread_rank() const { return sim::here()->index; }
};
struct one_thread {
    static constexpr bool whole_block = false;
    void sync() const {}
    unsigned thread_rank() const { return 0; }
};
inline thread_block this_thread_block() { return {}; }
inline one_thread this_thread() { return {}; }
SIM_QUIET inline void wait(const one_thread &) { sim::here()->runtime->copy_wait(sim::here(), 0); }
SIM_QUIET inline void wait(const thread_block &, SIM_LINE) {
    sim::here()->runtime->copy_wait(sim::here(), 0);
    __syncthreads(line);
}
SIM_QUIET inline void sync(const thread_block &, SIM_LINE) { __syncthreads(line); }
SIM_QUIET inline void memcpy_async(const one_thread &, void *to, const void *from, size_t size, SIM_LINE) { sim::copy_now(to, from, size, line); }
SIM_QUIET inline void memcpy_async(const thread_block &, void *to, const void *from, size_t size, SIM_LINE) { sim::copy_part(to, from, size, line); }
// A launch without clusters: each block is its own cluster.
struct cluster_group {
    unsigned block_rank() const { return 0; }
    dim3 block_index() const { return {0, 0, 0}; }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups
