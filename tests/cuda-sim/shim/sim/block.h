// What a kernel compiled for the host and the driver library that runs it share.
//
// The driver runs the blocks of a launch one after another on a few host threads. Where a kernel
// synchronises, each of its CUDA threads is a fiber; where it does not, they are a plain loop. What a
// kernel asks of the driver goes through `Runtime`, a table of functions, as the two are separate
// libraries that do not see each other's symbols.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 { unsigned x, y, z; };

namespace sim {

// Raised when anything in this file changes: kernels of another number are refused.
constexpr unsigned ABI = 3;

// What a thread can wait at.
enum Kind : uint8_t { BLOCK_BARRIER, WARP_BARRIER, SHUFFLE, VOTE, MATRIX_PRODUCT, LOAD_MATRIX, STORE_MATRIX, FRAGMENT, PHASE, PRODUCT_WAIT, NAMED_SYNC, NAMED_ARRIVE };

// Flags of an access to memory.
enum : unsigned {
    READ = 0,
    WRITE = 1,
    ATOMIC = 2,
    VOLATILE = 4,
    NATURAL = 8,       // the address has to be a multiple of the size
    ASYNC_PROXY = 16,  // a write that asynchronous products see without a fence
};

// Where in the source: a line, or an address in the code of the kernel.
struct Place {
    uintptr_t code;
    int line;
};

// What the lanes of a warp do together. `slots` are what each lane brought; `present` has their bits.
typedef void Work(void *const *slots, uint32_t present);

// wgmma.mma_async m64 n(2 * count) k16 with sums in float. The left side comes from registers where they are
// given, or else from shared memory as the right side does.
struct GroupProduct {
    int element;  // __half (0) or __nv_bfloat16 (1)
    const uint32_t *registers;
    uint64_t left, right;  // descriptors
    bool transposed;       // the right side is MN-major
    float *sums;
    int count;
    bool overwrite;  // what the sums were does not count
};
// Set by the shim in the descriptor of what cannot be a tile: not in shared memory, or no multiple of 16 bytes.
constexpr uint64_t NO_TILE = 1ull << 60;

struct Block;
struct Runtime {
    void (*block_barrier)(Block *, int line);
    // bar.sync (`kind` is NAMED_SYNC) and bar.arrive (NAMED_ARRIVE) of a barrier that so many threads come to.
    void (*named_barrier)(Block *, Kind, int number, int threads, int line);
    // Waits for the lanes of `mask`. The last of them calls `work`, if there is any.
    void (*warp)(Block *, unsigned mask, Kind, int line, void *slot, Work *);
    // The other lanes of the warp run until they come to a step too, or wait elsewhere.
    void (*step)(Block *);
    // Another thread runs; called in a loop that waits for something.
    void (*yield)(Block *, int line);

    // cp.async: `given` bytes of `size` come from global memory, the others are zero.
    void (*copy_async)(Block *, void *shared, const void *global, unsigned size, unsigned given, int line);
    void (*copy_commit)(Block *);
    // All groups of copies of this thread but the last `left` have arrived.
    void (*copy_wait)(Block *, unsigned left);

    // mma.sync m16n8k`k` on __half (0), __nv_bfloat16 (1) or TF32 (2), with sums in float.
    void (*mma)(Block *, int element, int k, const uint32_t *a, const uint32_t *b, const float *c, float *d, int line);
    void (*load_matrix)(Block *, uint32_t *const *registers, int count, bool transposed, const void *row, int line);
    void (*store_matrix)(Block *, const uint32_t *const *registers, int count, bool transposed, void *row, int line);
    // sums[m][n] += left[m][k] * right[k][n]
    void (*multiply)(const float *left, const float *right, float *sums, int m, int n, int k);

    // wgmma: fence, mma_async, commit_group, wait_group; and fence.proxy.async.
    void (*group_fence)(Block *);
    void (*group_product)(Block *, const GroupProduct &, int line);
    void (*group_commit)(Block *);
    void (*group_wait)(Block *, unsigned left, int line);
    void (*async_fence)(Block *);

    // The following do something in checked kernels only.
    void (*access)(Block *, const void *address, size_t size, unsigned flags, Place);
    // A phase of the barrier at this address is complete; a thread has seen that it is.
    void (*phase_completed)(Block *, const void *barrier);
    void (*phase_seen)(Block *, const void *barrier);
    void (*fence)(Block *);
};

struct Block {
    uint3 thread;    // the CUDA thread that runs now
    unsigned index;  // its number in the block
    bool checked;
    uint3 block, dim, grid;
    char *shared;   // dynamic shared memory
    char *statics;  // shared variables
    const Runtime *runtime;
    char *stacks, *stacks_end;
    unsigned in_flight;  // sums of asynchronous products, which lie on stacks
};

struct Param {
    size_t size;
    bool pointer;
};

struct SharedVariable {
    size_t offset, size;
};

struct Kernel {
    unsigned abi;
    const char *name;
    unsigned max_threads;  // 0 where the kernel does not say
    bool fibered, checked;
    const Param *params;
    size_t param_count;
    // Shared variables of the module; `shared_total` is what they take on a device.
    const SharedVariable *variables;
    size_t variable_count, shared_span, shared_total;
    void (*bind)(Block *);                 // the kernel's functions on this host thread belong to that block
    void (*body)(Block *, void **params);  // the thread that runs now
    void (*loop)(Block *, void **params);  // all threads, one after another
};

}  // namespace sim
