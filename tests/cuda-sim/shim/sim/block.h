// The interface between a kernel compiled for the host and the driver library that runs it.
//
// The driver runs the blocks of a launch one after another on a few host threads. The CUDA
// threads of a kernel with synchronisation are fibers; without synchronisation they are a plain loop.
// Kernels call the driver through `Runtime`, a table of functions, as the two are separate libraries that
// do not see each other's symbols.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 { unsigned x, y, z; };

namespace sim {

// Incremented with every change of this file: kernels of another version are refused.
constexpr unsigned ABI = 3;

// The operations that a thread can wait for.
enum Kind : uint8_t { BLOCK_BARRIER, WARP_BARRIER, SHUFFLE, VOTE, MATRIX_PRODUCT, LOAD_MATRIX, STORE_MATRIX, FRAGMENT, PHASE, PRODUCT_WAIT, NAMED_SYNC, NAMED_ARRIVE };

// Flags of an access to memory.
enum : unsigned {
    READ = 0,
    WRITE = 1,
    ATOMIC = 2,
    VOLATILE = 4,
    NATURAL = 8,       // the address must be a multiple of the size
    ASYNC_PROXY = 16,  // a write that is visible to asynchronous products without a fence
};

// A place in the source: a line, or an address in the code of the kernel.
struct Place {
    uintptr_t code;
    int line;
};

// A warp-wide operation. `slots` has the argument of each lane; `present` is the mask of the lanes.
typedef void Work(void *const *slots, uint32_t present);

// wgmma.mma_async m64 n(2 * count) k16 with float accumulators. The left operand comes from registers if they
// are given, otherwise from shared memory like the right operand.
struct GroupProduct {
    int element;  // __half (0) or __nv_bfloat16 (1)
    const uint32_t *registers;
    uint64_t left, right;  // descriptors
    bool transposed;       // the right operand is MN-major
    float *sums;
    int count;
    bool overwrite;  // ignore the previous accumulators
};
// Set by the shim in an invalid descriptor: not in shared memory, or not a multiple of 16 bytes.
constexpr uint64_t NO_TILE = 1ull << 60;

struct Block;
struct Runtime {
    void (*block_barrier)(Block *, int line);
    // bar.sync (`kind` is NAMED_SYNC) and bar.arrive (NAMED_ARRIVE) at a barrier of `threads` threads.
    void (*named_barrier)(Block *, Kind, int number, int threads, int line);
    // Waits for the lanes of `mask`. The last one calls `work` unless it is null.
    void (*warp)(Block *, unsigned mask, Kind, int line, void *slot, Work *);
    // Runs the other lanes of the warp until they also reach a step, or wait elsewhere.
    void (*step)(Block *);
    // Switches to another thread; called in loops that wait.
    void (*yield)(Block *, int line);

    // cp.async: `given` bytes of `size` come from global memory, the others are zero.
    void (*copy_async)(Block *, void *shared, const void *global, unsigned size, unsigned given, int line);
    void (*copy_commit)(Block *);
    // Waits for all copy groups of this thread but the last `left`.
    void (*copy_wait)(Block *, unsigned left);

    // mma.sync m16n8k`k` on __half (0), __nv_bfloat16 (1) or TF32 (2), with float accumulators.
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

    // The following have an effect in checked kernels only.
    void (*access)(Block *, const void *address, size_t size, unsigned flags, Place);
    // A phase of the barrier at this address is complete; a thread has observed the completion.
    void (*phase_completed)(Block *, const void *barrier);
    void (*phase_seen)(Block *, const void *barrier);
    void (*fence)(Block *);
};

struct Block {
    uint3 thread;    // the current CUDA thread
    unsigned index;  // its number in the block
    bool checked;
    uint3 block, dim, grid;
    char *shared;   // dynamic shared memory
    char *statics;  // shared variables
    const Runtime *runtime;
    char *stacks, *stacks_end;
    unsigned in_flight;  // accumulators of asynchronous products, which are on stacks
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
    unsigned max_threads;  // 0 without launch bounds
    bool fibered, checked;
    const Param *params;
    size_t param_count;
    // Shared variables of the module; `shared_total` is their size on a device.
    const SharedVariable *variables;
    size_t variable_count, shared_span, shared_total;
    void (*bind)(Block *);                 // binds the kernel's functions on this host thread to a block
    void (*body)(Block *, void **params);  // runs the current thread
    void (*loop)(Block *, void **params);  // runs all threads, one after another
};

}  // namespace sim
