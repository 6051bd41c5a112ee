// The hazard detector: gets every memory access and every synchronisation of a checked kernel.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "blocks.h"

namespace sim {

// Which bytes of an allocation have been written, and by which block of which launch. A shadow beside the
// allocation, backed by memory only where it is used.
struct Shadow {
    struct Cell {
        uint64_t writer, reader;  // launch << 32 | block, for two bytes
    };
    uint8_t *written = nullptr;  // one bit per byte
    Cell *cells = nullptr;
};
struct Allocation {
    unsigned long base = 0;
    size_t size = 0;
    Shadow shadow;
};
void make_shadow(Allocation &);
void drop_shadow(Allocation &);
void mark_written(const Allocation &, size_t offset, size_t size);
void copy_written(const Allocation &to, size_t to_offset, const Allocation &from, size_t from_offset, size_t size);

// Provided by the driver: the allocation with the highest address that is not above `address`.
bool allocation_below(unsigned long address, Allocation &found);
// Incremented by the driver at every allocation and free; invalidates cached lookups.
extern unsigned long allocation_changes;

Check *begin_launch(Launch &);
// Returns the number of hazards in the launch.
unsigned end_launch(Check *);
unsigned long launches_checked(), hazards_found();

void check_begin_block(Check *, Block *, size_t shared_bytes);
void check_end_block(Check *, Block *);
void check_access(Check *, Block *, unsigned thread, const void *address, size_t size, unsigned flags, Place);
void check_block_barrier(Check *);
void check_warp_barrier(Check *, unsigned warp, uint32_t lanes);
// A warp has arrived at a named barrier. If that completes the barrier, the warps of `waiting` have waited for it.
void check_named_arrival(Check *, unsigned number, unsigned warp, uint32_t lanes);
void check_named_complete(Check *, unsigned number, uint32_t waiting);
void check_phase_completed(Check *, const void *barrier);
void check_phase_seen(Check *, unsigned thread, const void *barrier);
void check_fence(Check *, Block *);
void check_copy_issued(Check *, Block *, void *to, const void *from, unsigned size, unsigned given, int line);
void check_copy_arrived(Check *, Block *, void *to, unsigned size);
// Warpgroup products. The thread has issued the product when this returns. From when all threads have issued it
// until the wait, the product reads 16 bytes of shared memory at each of the offsets.
uint32_t check_product_issued(Check *);
unsigned check_product_reads(Check *, Block *, unsigned group, const std::vector<uint32_t> &offsets, const uint32_t *issued, int line);
void check_product_done(Check *, unsigned product);
void check_async_fence(Check *, unsigned thread);
void check_report(Check *, Block *, const char *kind, unsigned thread, Place, const std::string &text);

}  // namespace sim
