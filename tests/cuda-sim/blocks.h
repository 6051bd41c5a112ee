// Runs the blocks of one launch of a kernel that was compiled for the host.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "shim/sim/block.h"

namespace sim {

struct Check;

struct Launch {
    const Kernel *kernel;
    void **params;
    uint3 grid, dim;
    size_t shared;
    unsigned serial;  // number of the launch in this process, from 1
    uint64_t seed;
    bool random;  // threads and blocks run in random order
    Check *check = nullptr;

    std::vector<uint32_t> order;  // order of the blocks, if it is random
    std::atomic<unsigned long> next{0};
    std::atomic<int> error{0};  // a CUresult; after an error no further blocks are started
};

// Runs all blocks, and returns the launch's error.
int run(Launch &, unsigned host_threads);

// ---- interface of the hazard detector -----------------------------------------------------------

struct Runner;
const Launch &launch_of(const Block *);
// Ends the block and the launch with an error; called within a thread of the block.
[[noreturn]] void abandon(Block *, int error);
const char *name_of(Kind);

}  // namespace sim
