// Barriers, shuffles, votes and atomics.
#pragma once

SIM_QUIET inline void __syncthreads(SIM_LINE) { sim::here()->runtime->block_barrier(sim::here(), line); }
// bar.sync and bar.arrive: barriers 1 to 15 for `threads` threads in whole warps.
SIM_QUIET inline void barrier_sync(int number, int threads, SIM_LINE) { sim::here()->runtime->named_barrier(sim::here(), sim::NAMED_SYNC, number, threads, line); }
SIM_QUIET inline void barrier_arrive(int number, int threads, SIM_LINE) { sim::here()->runtime->named_barrier(sim::here(), sim::NAMED_ARRIVE, number, threads, line); }
SIM_QUIET inline void __syncwarp(unsigned mask = ~0u, SIM_LINE) { sim::here()->runtime->warp(sim::here(), mask, sim::WARP_BARRIER, line, nullptr, nullptr); }
SIM_QUIET inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    sim::here()->runtime->fence(sim::here());
}
SIM_QUIET inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
SIM_QUIET inline unsigned __activemask() { return ~0u; }

namespace sim {

struct Exchange {
    uint64_t value, result;
    int source;  // the lane whose value this lane takes; its own lane if there is none
};
SIM_QUIET inline void exchange_work(void *const *slots, uint32_t present) {
    for (int i = 0; i < 32; i++)
        if (present >> i & 1) {
            Exchange *mine = (Exchange *)slots[i];
            int from = mine->source;
            mine->result = from >= 0 && from < 32 && (present >> from & 1) ? ((Exchange *)slots[from])->value : mine->value;
        }
}
template <typename T> SIM_QUIET inline T exchange(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle takes at most 8 bytes");
    Exchange mine{0, 0, source};
    memcpy(&mine.value, &value, sizeof(T));
    here()->runtime->warp(here(), mask, SHUFFLE, line, &mine, exchange_work);
    memcpy(&value, &mine.result, sizeof(T));
    return value;
}

struct Vote {
    bool value;
    unsigned all;
};
SIM_QUIET inline void vote_work(void *const *slots, uint32_t present) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++)
        if (present >> i & 1) all |= (unsigned)((Vote *)slots[i])->value << i;
    for (int i = 0; i < 32; i++)
        if (present >> i & 1) ((Vote *)slots[i])->all = all;
}
SIM_QUIET inline unsigned vote(unsigned mask, bool value, int line) {
    Vote mine{value, 0};
    here()->runtime->warp(here(), mask, VOTE, line, &mine, vote_work);
    return mine.all;
}

}  // namespace sim

template <typename T> SIM_QUIET inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIM_LINE) {
    return sim::exchange(mask, v, ((int)sim::lane() & ~(width - 1)) | (source & (width - 1)), line);
}
template <typename T> SIM_QUIET inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, SIM_LINE) {
    int lane = (int)sim::lane(), from = lane ^ bits;
    return sim::exchange(mask, v, from < (lane & ~(width - 1)) + width ? from : lane, line);
}
template <typename T> SIM_QUIET inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIM_LINE) {
    int lane = (int)sim::lane(), from = lane - (int)delta;
    return sim::exchange(mask, v, from >= (lane & ~(width - 1)) ? from : lane, line);
}
template <typename T> SIM_QUIET inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIM_LINE) {
    int lane = (int)sim::lane(), from = lane + (int)delta;
    return sim::exchange(mask, v, from < (lane & ~(width - 1)) + width ? from : lane, line);
}
SIM_QUIET inline unsigned __ballot_sync(unsigned mask, bool p, SIM_LINE) { return sim::vote(mask, p, line); }
SIM_QUIET inline bool __any_sync(unsigned mask, bool p, SIM_LINE) { return sim::vote(mask, p, line) != 0; }
SIM_QUIET inline bool __all_sync(unsigned mask, bool p, SIM_LINE) { return sim::vote(mask, !p, line) == 0; }
// The replacement of CubeCL's inline PTX that elects one lane of a warp.
SIM_QUIET inline unsigned sim_elect() { return sim::lane() == 0; }

#define SIM_REDUCE(name, operation)                                                                   \
    template <typename T> SIM_QUIET inline T __reduce_##name##_sync(unsigned mask, T v, SIM_LINE) {   \
        for (int bits = 16; bits; bits /= 2) {                                                        \
            T other = sim::exchange(mask, v, (int)sim::lane() ^ bits, line);                          \
            v = operation;                                                                            \
        }                                                                                             \
        return v;                                                                                     \
    }
SIM_REDUCE(add, v + other)
SIM_REDUCE(max, other > v ? other : v)
SIM_REDUCE(min, other < v ? other : v)
#undef SIM_REDUCE

// ---- atomics, on global and shared memory -------------------------------------------------------

namespace sim {
template <typename T, typename F> SIM_QUIET inline T atomic(T *p, F change, int line) {
    touch(p, sizeof(T), WRITE | ATOMIC, line);
    typedef std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>> Bits;
    static_assert(sizeof(T) == sizeof(Bits), "atomics take 2, 4 or 8 bytes");
    Bits old_bits = __atomic_load_n((Bits *)p, __ATOMIC_SEQ_CST), new_bits;
    T old;
    do {
        memcpy(&old, &old_bits, sizeof(T));
        T wanted = change(old);
        memcpy(&new_bits, &wanted, sizeof(T));
    } while (!__atomic_compare_exchange_n((Bits *)p, &old_bits, new_bits, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
}  // namespace sim

#define SIM_ATOMIC(name, result)                                                                                \
    template <typename T> SIM_QUIET inline T name(T *p, std::common_type_t<T> v, SIM_LINE) {                    \
        return sim::atomic(p, [=](T old) SIM_QUIET { return T(result); }, line);                                \
    }                                                                                                           \
    template <typename T> SIM_QUIET inline T name##_block(T *p, std::common_type_t<T> v, SIM_LINE) { return name(p, v, line); }
SIM_ATOMIC(atomicAdd, old + v)
SIM_ATOMIC(atomicSub, old - v)
SIM_ATOMIC(atomicAnd, old & v)
SIM_ATOMIC(atomicOr, old | v)
SIM_ATOMIC(atomicXor, old ^ v)
SIM_ATOMIC(atomicMax, old < v ? v : old)
SIM_ATOMIC(atomicMin, v < old ? v : old)
SIM_ATOMIC(atomicExch, ((void)old, v))
SIM_ATOMIC(atomicInc, old >= v ? T(0) : T(old + 1))
SIM_ATOMIC(atomicDec, old == T(0) || old > v ? v : T(old - 1))
#undef SIM_ATOMIC
template <typename T> SIM_QUIET inline T atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> wanted, SIM_LINE) {
    return sim::atomic(p, [=](T old) SIM_QUIET { return !memcmp(&old, &expected, sizeof(T)) ? wanted : old; }, line);
}
