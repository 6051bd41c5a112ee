// The functions that g++ calls for each access to memory under -fsanitize=thread. The sanitizer's
// library is not linked: accesses are passed to the driver's hazard detector.
#pragma once

namespace sim {
__attribute__((no_sanitize_thread)) inline void hook(const void *address, size_t size, unsigned flags, void *code) {
    Block *b = bound;
    if (!b) return;  // while the library is loaded
    // Locals whose address is taken, unless they can be the accumulators of an asynchronous product.
    if (!b->in_flight && (const char *)address >= b->stacks && (const char *)address < b->stacks_end) return;
    b->runtime->access(b, address, size, flags, {(uintptr_t)code - 1, 0});
}
}  // namespace sim

#define SIM_HOOK(name, size, flags)                                                                                          \
    extern "C" __attribute__((no_sanitize_thread, used, noinline)) inline void name(void *address) {                         \
        sim::hook(address, size, flags, __builtin_return_address(0));                                                        \
    }
#define SIM_HOOKS(size, natural)                                                                                             \
    SIM_HOOK(__tsan_read##size, size, sim::READ | natural)                                                                   \
    SIM_HOOK(__tsan_write##size, size, sim::WRITE | natural)                                                                 \
    SIM_HOOK(__tsan_unaligned_read##size, size, sim::READ)                                                                   \
    SIM_HOOK(__tsan_unaligned_write##size, size, sim::WRITE)                                                                 \
    SIM_HOOK(__tsan_volatile_read##size, size, sim::READ | sim::VOLATILE)                                                    \
    SIM_HOOK(__tsan_volatile_write##size, size, sim::WRITE | sim::VOLATILE)                                                  \
    SIM_HOOK(__tsan_unaligned_volatile_read##size, size, sim::READ | sim::VOLATILE)                                          \
    SIM_HOOK(__tsan_unaligned_volatile_write##size, size, sim::WRITE | sim::VOLATILE)
SIM_HOOKS(1, 0)
SIM_HOOKS(2, sim::NATURAL)
SIM_HOOKS(4, sim::NATURAL)
SIM_HOOKS(8, sim::NATURAL)
SIM_HOOKS(16, sim::NATURAL)

extern "C" {
__attribute__((no_sanitize_thread, used, noinline)) inline void __tsan_read_range(void *address, size_t size) {
    sim::hook(address, size, sim::READ, __builtin_return_address(0));
}
__attribute__((no_sanitize_thread, used, noinline)) inline void __tsan_write_range(void *address, size_t size) {
    sim::hook(address, size, sim::WRITE, __builtin_return_address(0));
}
__attribute__((no_sanitize_thread, used)) inline void __tsan_init() {}
__attribute__((no_sanitize_thread, used)) inline void __tsan_func_entry(void *) {}
__attribute__((no_sanitize_thread, used)) inline void __tsan_func_exit() {}
__attribute__((no_sanitize_thread, used)) inline void __tsan_vptr_update(void **, void *) {}

// -fsanitize=alignment calls this for a pointer that is not aligned for its type, before the access is split
// into smaller ones. The layout of the data is that of g++.
struct sim_mismatch {
    const char *file;
    uint32_t line, column;
    const void *type;
    unsigned char alignment_bits, access;
};
__attribute__((no_sanitize_thread, used, noinline)) inline void __ubsan_handle_type_mismatch_v1(sim_mismatch *what, void *address) {
    sim::Block *b = sim::bound;
    if (b) b->runtime->access(b, address, (size_t)1 << what->alignment_bits, sim::NATURAL, {0, (int)what->line});
}
}
