// The kernel's side: the current thread, shared variables, and the description that the driver reads.
#pragma once

// Functions of the shim whose accesses are not checked. They report accesses on behalf of the kernel.
#ifdef SIM_CHECKED
#define SIM_QUIET __attribute__((no_sanitize_thread))
#else
#define SIM_QUIET
#endif

// The line of the caller: the last parameter of every function that a report may name.
#define SIM_LINE int line = __builtin_LINE()

namespace sim {

inline thread_local Block *bound = nullptr;
SIM_QUIET inline Block *here() { return bound; }
SIM_QUIET inline uint3 thread_index() { return bound->thread; }
SIM_QUIET inline uint3 block_index() { return bound->block; }
SIM_QUIET inline uint3 block_dim() { return bound->dim; }
SIM_QUIET inline uint3 grid_dim() { return bound->grid; }
SIM_QUIET inline char *dynamic_shared() { return bound->shared; }
SIM_QUIET inline unsigned lane() { return bound->index & 31; }

SIM_QUIET inline void touch(const void *address, size_t size, unsigned flags, int line) {
#ifdef SIM_CHECKED
    bound->runtime->access(bound, address, size, flags, {0, line});
#endif
}

// Runs the lanes of a warp in lockstep where a generated kernel relies on it without synchronisation.
SIM_QUIET inline void step() { bound->runtime->step(bound); }

// ---- shared variables ---------------------------------------------------------------------------

constexpr size_t MOST_VARIABLES = 256;
// On the host they are apart from each other, so that an index out of bounds hits no variable.
constexpr size_t GAP = 64;
inline SharedVariable variables[MOST_VARIABLES];
inline size_t variable_count = 0, shared_span = 0, shared_total = 0;

SIM_QUIET inline size_t reserve(size_t size) {
    if (variable_count == MOST_VARIABLES) __builtin_trap();
    shared_span += GAP;
    size_t offset = shared_span;
    variables[variable_count++] = {offset, size};
    shared_span += (size + 127) / 128 * 128;
    shared_total += (size + 15) / 16 * 16;
    return offset;
}
template <typename Tag, typename T> struct Variable {
    static inline const size_t offset = reserve(sizeof(T));
};
// The variable of type T of a `__shared__` declaration; each declaration has its own type `Tag`.
template <typename Tag, typename T> SIM_QUIET inline T &shared_variable() { return *(T *)(bound->statics + Variable<Tag, T>::offset); }

// ---- the description ----------------------------------------------------------------------------

SIM_QUIET inline void bind(Block *block) { bound = block; }

template <auto function, typename F> struct EntryOf;
template <auto function, typename... A> struct EntryOf<function, void (*)(A...)> {
    static inline const Param params[] = {{sizeof(A), std::is_pointer<A>::value}..., {0, false}};
    static constexpr size_t param_count = sizeof...(A);
    template <size_t... I> SIM_QUIET static inline void call(void **p, std::index_sequence<I...>) {
        function(*(std::remove_const_t<A> *)p[I]...);
    }
    SIM_QUIET static void body(Block *, void **p) { call(p, std::index_sequence_for<A...>()); }
    SIM_QUIET static void loop(Block *b, void **p) {
        unsigned index = 0;
        for (unsigned z = 0; z < b->dim.z; z++)
            for (unsigned y = 0; y < b->dim.y; y++)
                for (unsigned x = 0; x < b->dim.x; x++) {
                    b->thread = {x, y, z};
                    b->index = index++;
                    call(p, std::index_sequence_for<A...>());
                }
    }
};
#ifdef SIM_CHECKED
constexpr bool checked = true;
#else
constexpr bool checked = false;
#endif
template <auto function, bool fibered> SIM_QUIET inline Kernel entry(const char *name, unsigned max_threads) {
    typedef EntryOf<function, decltype(function)> Entry;
    return {ABI, name, max_threads, fibered, checked, Entry::params, Entry::param_count, variables, variable_count, shared_span,
            shared_total, bind, fibered ? Entry::body : nullptr, fibered ? nullptr : Entry::loop};
}

}  // namespace sim

#define threadIdx (sim::thread_index())
#define blockIdx (sim::block_index())
#define blockDim (sim::block_dim())
#define gridDim (sim::grid_dim())
