// Blocks, warps and fibers: see blocks.h.
#include "blocks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "check.h"
#include "products.h"

namespace sim {
namespace {

constexpr size_t STACK = 256 << 10;
constexpr int LAUNCH_FAILED = 719;

struct Copy {
    char *to;
    const char *from;
    unsigned group;
    uint8_t size, given;
    enum : uint8_t { AT_ONCE, AT_COMMIT, AT_WAIT } when;
};
constexpr unsigned OPEN_GROUP = ~0u;

struct Fiber {
    void *stack_pointer;
    uint3 thread;
    Kind waits;
    int line, barrier;  // number of a named barrier
    bool done;
    unsigned groups;  // copy groups committed so far
    std::vector<Copy> copies;
    unsigned products, product_groups;  // issued and committed so far
    bool fenced;                        // a wgmma_fence since accumulators were last released
};

// Lanes of a warp that wait for each other.
struct Group {
    unsigned mask, arrived;
    Kind kind;
    int line;
    Work *work;
};
struct Warp {
    uint32_t existing, alive, ready;
    unsigned group_count;
    Group groups[32];
    void *slots[32];
};

// A barrier of barrier_sync and barrier_arrive. Warps arrive as a whole.
constexpr int NAMED_BARRIERS = 16;
struct Named {
    unsigned arrived, threads;
    uint32_t warps, waiting;  // warps that have arrived, and those of them that wait
    int line;                 // line of the last arrival
};
struct NamedCall {
    int number;
    unsigned threads;
};

// Products of a warpgroup of four warps.
constexpr unsigned GROUP_THREADS = 128;
struct Sums {
    float *registers[GROUP_THREADS];  // accumulators of each thread that has issued a product on them
    int count, pitch;
    unsigned pending;  // pending products
    int line;          // line of the last product
    alignas(64) float matrix[GROUP_ROWS * MOST_COLUMNS];
};
struct PendingProduct {
    GroupProduct what;
    int line;
    unsigned group, arrived;
    bool done;
    unsigned number;  // number in the hazard detector
    Sums *sums;
    bool present[GROUP_THREADS];
    uint32_t left[GROUP_THREADS][4], issued[GROUP_THREADS];
};
struct Warpgroup {
    std::vector<PendingProduct *> products;
    std::vector<Sums *> in_flight;
    unsigned retired = 0;  // number of products before the first of these
    unsigned waiting = 0, goal = 0;
};

}  // namespace

struct Runner : Block {
    Launch *launch = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned count = 0, alive = 0, arrived = 0;
    Named named[NAMED_BARRIERS];
    uint32_t ready_warps = 0;
    unsigned long spins = 0;  // yields since the last progress
    uint64_t random_state = 1;
    void *main_stack = nullptr;
    std::vector<char> shared_memory;
    std::vector<Warpgroup> warpgroups;
    std::vector<std::unique_ptr<PendingProduct>> all_products;
    std::vector<std::unique_ptr<Sums>> all_sums;
    std::vector<PendingProduct *> free_products;
    std::vector<Sums *> free_sums;
    std::unique_ptr<Operands> operands;
    std::vector<uint32_t> offsets;
    size_t stacks_size = 0;
    ~Runner() {
        if (stacks) munmap(stacks, stacks_size);
    }
};

namespace {

thread_local Runner *running = nullptr;

uint64_t draw(Runner *r) {
    uint64_t &x = r->random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x * 0x2545f4914f6cdd1dull >> 11;
}
unsigned random_bit(Runner *r, uint32_t bits) {
    unsigned n = (unsigned)(draw(r) % (unsigned)__builtin_popcount(bits));
    while (n--) bits &= bits - 1;
    return (unsigned)__builtin_ctz(bits);
}
// The first set bit above `after`, otherwise the first set bit.
unsigned next_bit(uint32_t bits, unsigned after) {
    uint32_t above = after >= 31 ? 0 : bits & (~0u << (after + 1));
    return (unsigned)__builtin_ctz(above ? above : bits);
}

// Saves the callee-saved registers and switches to another stack.
__attribute__((naked, noinline)) void change(void ** /* rdi: from */, void * /* rsi: to */) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

void go(Runner *r, unsigned to) {
    if (to == r->index) return;
    Fiber *from = &r->fibers[r->index];
    r->index = to;
    r->thread = r->fibers[to].thread;
    change(&from->stack_pointer, r->fibers[to].stack_pointer);
}

[[noreturn]] void stuck(Runner *r);

// The next thread to run: another lane of this warp if there is one.
unsigned pick(Runner *r) {
    if (!r->ready_warps) stuck(r);
    unsigned w = r->index / 32;
    if (r->random_state && r->launch->random) {
        if (!(r->ready_warps >> w & 1) || draw(r) % 4 == 0) w = random_bit(r, r->ready_warps);
        return w * 32 + random_bit(r, r->warps[w].ready);
    }
    if (r->ready_warps >> w & 1) return w * 32 + next_bit(r->warps[w].ready, r->index & 31);
    w = next_bit(r->ready_warps, w);
    return w * 32 + (unsigned)__builtin_ctz(r->warps[w].ready);
}
void set_ready(Runner *r, unsigned warp, uint32_t lanes) {
    r->warps[warp].ready |= lanes;
    if (r->warps[warp].ready) r->ready_warps |= 1u << warp;
}
void clear_ready(Runner *r, unsigned index) {
    Warp &w = r->warps[index / 32];
    w.ready &= ~(1u << (index & 31));
    if (!w.ready) r->ready_warps &= ~(1u << (index / 32));
}
void sleep_now(Runner *r) {
    clear_ready(r, r->index);
    go(r, pick(r));
}
// If several threads can continue, chooses a random one to be the first.
void shuffle_order(Runner *r) {
    if (r->launch->random) go(r, pick(r));
}

[[noreturn]] void fail(Runner *r, const char *kind, unsigned thread, int line, const std::string &text) {
    if (r->launch->check) {
        check_report(r->launch->check, r, kind, thread, {0, line}, text);
    } else {
        fprintf(stderr, "cuda-sim: kernel %s at line %d: %s: %s\n", r->launch->kernel->name, line, kind, text.c_str());
    }
    abandon(r, LAUNCH_FAILED);
}

bool is_named(Kind kind) { return kind == NAMED_SYNC || kind == NAMED_ARRIVE; }

std::string waiting_text(Runner *r) {
    std::map<std::pair<std::string, int>, std::vector<unsigned>> at;
    unsigned finished = 0;
    for (unsigned i = 0; i < r->count; i++) {
        Fiber &f = r->fibers[i];
        if (f.done) finished++;
        else at[{name_of(f.waits) + (is_named(f.waits) ? " of barrier " + std::to_string(f.barrier) : ""), f.line}].push_back(i);
    }
    std::string text;
    for (auto &group : at) {
        uint3 t = r->fibers[group.second[0]].thread;
        char part[200];
        snprintf(part, sizeof part, "%s%zu threads wait at %s in line %d (first: (%u,%u,%u))", text.empty() ? "" : ", ", group.second.size(),
                 group.first.first.c_str(), group.first.second, t.x, t.y, t.z);
        text += part;
    }
    if (finished) text += ", " + std::to_string(finished) + " threads have finished";
    for (int i = 0; i < NAMED_BARRIERS; i++)
        if (r->named[i].arrived) text += "; " + std::to_string(r->named[i].arrived) + " of " + std::to_string(r->named[i].threads) + " threads have come to barrier " + std::to_string(i);
    return text;
}

void stuck_products(Runner *r);
void stuck(Runner *r) {
    stuck_products(r);
    bool barrier = false, named = false;
    unsigned first = 0;
    for (unsigned i = r->count; i-- > 0;)
        if (!r->fibers[i].done && (!named || is_named(r->fibers[i].waits))) {
            first = i;
            barrier |= r->fibers[i].waits == BLOCK_BARRIER;
            named |= is_named(r->fibers[i].waits);
        }
    fail(r, named ? "named-barrier" : barrier ? "divergent-barrier" : "deadlock", first, r->fibers[first].line, "no thread can go on: " + waiting_text(r));
}

// ---- calls of kernels ----------------------------------------------------------------------------

void release_block(Runner *r) {
    if (r->launch->check) {
        if (r->alive < r->count) {
            unsigned waiting = 0;
            while (r->fibers[waiting].done) waiting++;
            check_report(r->launch->check, r, "divergent-barrier", waiting, {0, r->fibers[waiting].line},
                         std::to_string(r->count - r->alive) + " of " + std::to_string(r->count) +
                             " threads have finished, and do not come to __syncthreads");
        }
        for (unsigned w = 0; w < r->warps.size(); w++) {
            int line = 0;
            for (unsigned i = w * 32; i < std::min(w * 32 + 32, r->count); i++) {
                if (r->fibers[i].done) continue;
                if (line && r->fibers[i].line != line) {
                    check_report(r->launch->check, r, "divergent-barrier", i, {0, r->fibers[i].line},
                                 "other lanes of the warp are at the __syncthreads of line " + std::to_string(line));
                    break;
                }
                line = r->fibers[i].line;
            }
        }
        check_block_barrier(r->launch->check);
    }
    r->arrived = 0;
    r->spins = 0;
    for (unsigned w = 0; w < r->warps.size(); w++) set_ready(r, w, r->warps[w].alive);
}

void block_barrier(Block *b, int line) {
    Runner *r = (Runner *)b;
    Fiber &f = r->fibers[r->index];
    f.waits = BLOCK_BARRIER;
    f.line = line;
    if (++r->arrived == r->alive) {
        release_block(r);
        shuffle_order(r);
    } else {
        sleep_now(r);
    }
}

bool all_lanes(Kind kind) { return kind == MATRIX_PRODUCT || kind == LOAD_MATRIX || kind == STORE_MATRIX || kind == FRAGMENT; }

// All lanes of a warp have reached barrier_sync or barrier_arrive. Waiting warps continue when the barrier completes.
void named_arrival(Runner *r, unsigned warp, const Group &group) {
    Check *check = r->launch->check;
    unsigned first = warp * 32 + (unsigned)__builtin_ctz(group.arrived);
    const NamedCall call = *(const NamedCall *)r->warps[warp].slots[first & 31];
    for (unsigned i = 0; i < 32; i++) {
        auto *other = (const NamedCall *)r->warps[warp].slots[i];
        if ((group.arrived >> i & 1) && (other->number != call.number || other->threads != call.threads))
            fail(r, "divergent-warp", warp * 32 + i, group.line, std::string(name_of(group.kind)) + ", where other lanes of the warp have another barrier or number of threads");
    }
    Named &b = r->named[call.number];
    if (b.arrived && b.threads != call.threads)
        fail(r, "named-barrier", first, group.line,
             "barrier " + std::to_string(call.number) + " for " + std::to_string(call.threads) + " threads, which others have come to as one for " + std::to_string(b.threads) + " (line " + std::to_string(b.line) + ")");
    if ((b.warps >> warp & 1) && check)
        check_report(check, r, "named-barrier", first, {0, group.line},
                     "the warp comes to barrier " + std::to_string(call.number) + " again before it is complete: " + std::to_string(b.arrived) + " of " + std::to_string(b.threads) + " threads have come to it");
    b.threads = call.threads;
    b.arrived += 32;
    b.warps |= 1u << warp;
    b.line = group.line;
    if (check) check_named_arrival(check, (unsigned)call.number, warp, group.arrived);
    if (group.kind == NAMED_SYNC) b.waiting |= 1u << warp;
    else set_ready(r, warp, group.arrived);
    if (b.arrived < b.threads) {
        if (group.kind == NAMED_SYNC) clear_ready(r, r->index);
        return;
    }
    if (check) check_named_complete(check, (unsigned)call.number, b.waiting);
    for (uint32_t left = b.waiting; left; left &= left - 1) set_ready(r, (unsigned)__builtin_ctz(left), r->warps[__builtin_ctz(left)].alive);
    b = {};
}

void release_group(Runner *r, unsigned warp, unsigned at) {
    Warp &w = r->warps[warp];
    Group group = w.groups[at];
    w.groups[at] = w.groups[--w.group_count];
    unsigned first = warp * 32 + (unsigned)__builtin_ctz(group.arrived);
    uint32_t finished = group.mask & ~group.arrived;
    if ((finished && r->launch->check) || (all_lanes(group.kind) && group.arrived != ~0u)) {
        char text[200];
        snprintf(text, sizeof text, "%s without the lanes %#x of the warp, which have finished or do not exist", name_of(group.kind),
                 all_lanes(group.kind) ? ~group.arrived : finished);
        if (all_lanes(group.kind)) fail(r, "divergent-warp", first, group.line, text);
        check_report(r->launch->check, r, "divergent-warp", first, {0, group.line}, text);
    }
    if (group.work) group.work(w.slots, group.arrived);
    if (group.kind == WARP_BARRIER && r->launch->check) check_warp_barrier(r->launch->check, warp, group.arrived);
    r->spins = 0;
    if (is_named(group.kind)) named_arrival(r, warp, group);
    else set_ready(r, warp, group.arrived);
}

void warp(Block *b, unsigned mask, Kind kind, int line, void *slot, Work *work) {
    Runner *r = (Runner *)b;
    unsigned number = r->index / 32;
    Warp &w = r->warps[number];
    uint32_t bit = 1u << (r->index & 31);
    mask &= w.existing;
    if (!(mask & bit)) {
        if (r->launch->check)
            check_report(r->launch->check, r, "divergent-warp", r->index, {0, line}, std::string(name_of(kind)) + " with a mask that lacks the lane itself");
        mask |= bit;
    }
    Fiber &f = r->fibers[r->index];
    f.waits = kind;
    f.line = line;
    w.slots[r->index & 31] = slot;
    unsigned at = 0;
    while (at < w.group_count && !(w.groups[at].mask == mask && w.groups[at].kind == kind)) at++;
    if (at == w.group_count) w.groups[w.group_count++] = {mask, 0, kind, line, work};
    Group &group = w.groups[at];
    if (group.line != line && r->launch->check)
        check_report(r->launch->check, r, "divergent-warp", r->index, {0, line},
                     std::string(name_of(kind)) + ", while other lanes of the warp are at that of line " + std::to_string(group.line));
    group.arrived |= bit;
    if (group.arrived == (mask & w.alive)) {
        release_group(r, number, at);
        if (w.ready & bit) shuffle_order(r);
        else go(r, pick(r));
    } else {
        sleep_now(r);
    }
}

void named_barrier(Block *b, Kind kind, int number, int threads, int line) {
    Runner *r = (Runner *)b;
    unsigned most = (r->count + 31) / 32 * 32;
    r->fibers[r->index].barrier = number;
    auto wrong = [&](const std::string &text) {
        fail(r, "named-barrier", r->index, line,
             std::string(name_of(kind)) + " of barrier " + std::to_string(number) + " for " + std::to_string(threads) + " threads: " + text);
    };
    if (number < 1 || number >= NAMED_BARRIERS) wrong("there are barriers 1 to 15, beside 0, which is that of __syncthreads");
    if (threads <= 0 || threads % 32) wrong("the number of threads has to be a multiple of 32");
    if ((unsigned)threads > most) wrong("the block has only " + std::to_string(most));
    if (kind == NAMED_ARRIVE && threads == 32) wrong("nobody could wait for it");
    NamedCall mine{number, (unsigned)threads};
    warp(b, ~0u, kind, line, &mine, nullptr);
}

void step(Block *b) {
    Runner *r = (Runner *)b;
    if (!r->launch->check && r->warps[r->index / 32].ready != 1u << (r->index & 31)) go(r, (r->index & ~31u) + next_bit(r->warps[r->index / 32].ready, r->index & 31));
}

void yield(Block *b, int line) {
    Runner *r = (Runner *)b;
    Fiber &f = r->fibers[r->index];
    f.waits = PHASE;
    f.line = line;
    if (++r->spins > 100000 + 1000ul * r->alive) stuck(r);
    if (r->launch->random) {
        unsigned w = random_bit(r, r->ready_warps);
        go(r, w * 32 + random_bit(r, r->warps[w].ready));
        return;
    }
    // The lanes above, then the next warp.
    unsigned w = r->index / 32, lane = r->index & 31;
    uint32_t above = lane == 31 ? 0 : r->warps[w].ready & (~0u << (lane + 1));
    if (above) {
        go(r, w * 32 + (unsigned)__builtin_ctz(above));
    } else {
        w = next_bit(r->ready_warps, w);
        go(r, w * 32 + (unsigned)__builtin_ctz(r->warps[w].ready));
    }
}

void perform(const Copy &c) {
    if (c.given == 16) memcpy(c.to, c.from, 16);
    else if (c.given) memcpy(c.to, c.from, c.given);
    if (c.given < c.size) memset(c.to + c.given, 0, c.size - c.given);
}
void copy_async(Block *b, void *to, const void *from, unsigned size, unsigned given, int line) {
    Runner *r = (Runner *)b;
    if (r->launch->check) check_copy_issued(r->launch->check, r, to, from, size, given, line);
    if (given) __builtin_prefetch(from);
    auto when = Copy::AT_WAIT;
    if (r->launch->random) when = (decltype(when))(draw(r) % 3);
    // Written in place, as a copy right after writing is slow.
    auto &copies = r->fibers[r->index].copies;
    copies.emplace_back();
    Copy &c = copies.back();
    c.to = (char *)to;
    c.from = (const char *)from;
    c.group = OPEN_GROUP;
    c.size = (uint8_t)size;
    c.given = (uint8_t)given;
    c.when = when;
    if (when == Copy::AT_ONCE) perform(c);
}
void copy_commit(Block *b) {
    Fiber &f = ((Runner *)b)->fibers[b->index];
    for (size_t i = f.copies.size(); i-- > 0 && f.copies[i].group == OPEN_GROUP;) {
        f.copies[i].group = f.groups;
        if (f.copies[i].when == Copy::AT_COMMIT) perform(f.copies[i]);
    }
    f.groups++;
}
void copy_wait(Block *b, unsigned left) {
    Runner *r = (Runner *)b;
    Fiber &f = r->fibers[r->index];
    size_t n = 0;
    while (n < f.copies.size() && f.copies[n].group != OPEN_GROUP && f.copies[n].group + left < f.groups) {
        if (f.copies[n].when == Copy::AT_WAIT) perform(f.copies[n]);
        if (r->launch->check) check_copy_arrived(r->launch->check, r, f.copies[n].to, f.copies[n].size);
        n++;
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + (long)n);
}

void sums_access(Block *b, const char *address, size_t size, unsigned flags, Place place);
void access(Block *b, const void *address, size_t size, unsigned flags, Place place) {
    if (address >= b->stacks && address < b->stacks_end) sums_access(b, (const char *)address, size, flags, place);
    else if (Check *check = launch_of(b).check) check_access(check, b, b->index, address, size, flags, place);
}
void phase_completed(Block *b, const void *barrier) {
    Runner *r = (Runner *)b;
    r->spins = 0;
    if (r->launch->check) check_phase_completed(r->launch->check, barrier);
}
void phase_seen(Block *b, const void *barrier) {
    if (Check *check = launch_of(b).check) check_phase_seen(check, b->index, barrier);
}
void fence(Block *b) {
    if (Check *check = launch_of(b).check) check_fence(check, b);
}

// ---- matrices ------------------------------------------------------------------------------------

void multiply(const float *left, const float *right, float *sums, int m, int n, int k) {
    for (int i = 0; i < m; i++)
        for (int l = 0; l < k; l++)
            for (int j = 0; j < n; j++) sums[i * n + j] += left[i * k + l] * right[l * n + j];
}

float tf32(uint32_t u) {
    static const bool exact = getenv("SIM_NO_TF32") != nullptr;
    if (!exact) u &= ~0x1fffu;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

struct Product {
    const uint32_t *a, *b;
    const float *c;
    float *d;
};
// A is row-major and B column-major, in the registers that PTX defines: each holds two halves or one float.
template <int element, int K> void mma_work(void *const *slots, uint32_t) {
    constexpr int per = element == 2 ? 1 : 2, a_registers = 16 * K / 32 / per, b_registers = 8 * K / 32 / per;
    float left[16][K], right[K][8], sums[16][8];
    auto unpack = [](uint32_t word, int half) {
        if (element == 2) return tf32(word);
        uint16_t bits = (uint16_t)(word >> (16 * half));
        return element == 0 ? half_to_float(bits) : bfloat_to_float(bits);
    };
    for (int l = 0; l < 32; l++) {
        auto *p = (const Product *)slots[l];
        int group = l / 4, in_group = l % 4;
        for (int i = 0; i < a_registers; i++)
            for (int h = 0; h < per; h++) left[group + (i & 1) * 8][in_group * per + h + 4 * per * (i / 2)] = unpack(p->a[i], h);
        for (int i = 0; i < b_registers; i++)
            for (int h = 0; h < per; h++) right[in_group * per + h + 4 * per * i][group] = unpack(p->b[i], h);
        for (int i = 0; i < 4; i++) sums[group + (i / 2) * 8][in_group * 2 + i % 2] = p->c[i];
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) sums[m][n] += left[m][k] * right[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((const Product *)slots[l])->d[i] = sums[l / 4 + (i / 2) * 8][l % 4 * 2 + i % 2];
}
void mma(Block *block, int element, int k, const uint32_t *a, const uint32_t *b, const float *c, float *d, int line) {
    Product mine{a, b, c, d};
    Work *work = nullptr;
    if (k == 16) work = element == 0 ? mma_work<0, 16> : element == 1 ? mma_work<1, 16> : nullptr;
    if (k == 8) work = element == 0 ? mma_work<0, 8> : element == 1 ? mma_work<1, 8> : mma_work<2, 8>;
    if (k == 4 && element == 2) work = mma_work<2, 4>;
    if (!work) fail((Runner *)block, "not-supported", block->index, line, "mma.sync m16n8k" + std::to_string(k));
    warp(block, ~0u, MATRIX_PRODUCT, line, &mine, work);
}

struct Rows {
    Runner *runner;
    uint32_t *const *to;
    const uint32_t *const *from;
    char *row;
    int count, line;
    bool transposed;
};
void report_rows(void *const *slots, unsigned flags) {
    auto *first = (const Rows *)slots[0];
    Runner *r = first->runner;
    if (!r->launch->check) return;
    // The lane that provides a row's address counts as its reader or writer.
    for (int i = 0; i < 8 * first->count; i++)
        check_access(r->launch->check, r, (r->index & ~31u) + (unsigned)i, ((const Rows *)slots[i])->row, 16, flags | NATURAL, {0, first->line});
}
void load_work(void *const *slots, uint32_t) {
    auto *first = (const Rows *)slots[0];
    report_rows(slots, READ);
    for (int j = 0; j < first->count; j++) {
        uint16_t matrix[8][8];
        for (int i = 0; i < 8; i++) memcpy(matrix[i], ((const Rows *)slots[8 * j + i])->row, 16);
        for (int l = 0; l < 32; l++) {
            int i = l / 4, c = l % 4 * 2;
            uint16_t low = first->transposed ? matrix[c][i] : matrix[i][c], high = first->transposed ? matrix[c + 1][i] : matrix[i][c + 1];
            *((const Rows *)slots[l])->to[j] = low | (uint32_t)high << 16;
        }
    }
}
void store_work(void *const *slots, uint32_t) {
    auto *first = (const Rows *)slots[0];
    report_rows(slots, WRITE);
    for (int j = 0; j < first->count; j++) {
        uint16_t matrix[8][8];
        for (int l = 0; l < 32; l++) {
            int i = l / 4, c = l % 4 * 2;
            uint32_t value = *((const Rows *)slots[l])->from[j];
            if (first->transposed) matrix[c][i] = (uint16_t)value, matrix[c + 1][i] = (uint16_t)(value >> 16);
            else matrix[i][c] = (uint16_t)value, matrix[i][c + 1] = (uint16_t)(value >> 16);
        }
        for (int i = 0; i < 8; i++) memcpy(((const Rows *)slots[8 * j + i])->row, matrix[i], 16);
    }
}
void load_matrix(Block *b, uint32_t *const *registers, int count, bool transposed, const void *row, int line) {
    Rows mine{(Runner *)b, registers, nullptr, (char *)row, count, line, transposed};
    warp(b, ~0u, LOAD_MATRIX, line, &mine, load_work);
}
void store_matrix(Block *b, const uint32_t *const *registers, int count, bool transposed, void *row, int line) {
    Rows mine{(Runner *)b, nullptr, registers, (char *)row, count, line, transposed};
    warp(b, ~0u, STORE_MATRIX, line, &mine, store_work);
}

// ---- products of warpgroups -----------------------------------------------------------------------
//
// Each thread records the products that it issues, without waiting. Products are computed when the last thread of
// the warpgroup reaches the wait that needs them, from the contents of shared memory at that time. Accumulators in
// flight are stored as a matrix, and are NaN in the registers until no product on them is pending.

void group_fence(Block *b) {
    Runner *r = (Runner *)b;
    r->fibers[r->index].fenced = true;
}
void async_fence(Block *b) {
    if (Check *check = launch_of(b).check) check_async_fence(check, b->index);
}

std::string missing_text(const PendingProduct &p, unsigned group) {
    std::string text = "a product of a warpgroup, in which " + std::to_string(GROUP_THREADS - p.arrived) + " threads of the warps " + std::to_string(group * 4) + " to " +
                       std::to_string(group * 4 + 3) + " do not take part: of warp";
    for (unsigned w = 0; w < 4; w++)
        if (std::count(p.present + w * 32, p.present + w * 32 + 32, true) < 32) text += " " + std::to_string(group * 4 + w);
    return text;
}
void stuck_products(Runner *r) {
    for (unsigned g = 0; g < r->warpgroups.size(); g++) {
        Warpgroup &group = r->warpgroups[g];
        if (!group.waiting) continue;
        unsigned first = g * GROUP_THREADS;
        while (r->fibers[first].done || r->fibers[first].waits != PRODUCT_WAIT) first++;
        for (PendingProduct *p : group.products)
            if (p->arrived < GROUP_THREADS) fail(r, "divergent-warp", first, p->line, missing_text(*p, g));
        fail(r, "divergent-warp", first, r->fibers[first].line, "wgmma_wait without some threads of the warpgroup: " + waiting_text(r));
    }
}

// Calls f(pair of sums in the matrix, the same pair in the registers) for all sums of a thread.
template <typename F> void each_pair(Sums &s, unsigned thread, F f) {
    float *row = s.matrix + (thread / 32 * 16 + thread % 32 / 4) * (unsigned)s.pitch + thread % 4 * 2, *registers = s.registers[thread];
    for (int j = 0; j < s.count / 4; j++) {
        f(row + 8 * j, registers + 4 * j);
        f(row + 8 * s.pitch + 8 * j, registers + 4 * j + 2);
    }
}

void check_tile(Runner *r, uint64_t descriptor, bool transposed, unsigned count, int line) {
    Tile tile(descriptor);
    // The swizzle pattern has a period of 8 rows.
    if ((descriptor & NO_TILE) || (tile.base & 0x380))
        fail(r, "misaligned", r->index, line, "a tile of a product that does not begin at a multiple of 1024 bytes of shared memory");
    if ((descriptor & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32)) != 1ull << 62)
        fail(r, "not-supported", r->index, line, "a descriptor of another kind than tiles with the 128-byte swizzle");
    // Checked kernels: the hazard detector knows the bounds more exactly.
    size_t end = tile.base % 128 / 16 + (transposed ? 8 : 2) > 8 ? 256 : 128;
    end += tile.base / 128 * 128 + (transposed ? (size_t)(count - 1) / 64 * tile.leading + tile.stride : (size_t)(count - 1) / 8 * tile.stride) + 7 * 128;
    if (!r->launch->check && r->shared + end > r->shared_memory.data() + r->shared_memory.size())
        fail(r, "out-of-bounds-shared", r->index, line, "a tile of a product beyond the end of shared memory");
}

void group_product(Block *b, const GroupProduct &what, int line) {
    Runner *r = (Runner *)b;
    Check *check = r->launch->check;
    unsigned g = r->index / GROUP_THREADS, t = r->index % GROUP_THREADS;
    if (g >= r->warpgroups.size()) fail(r, "divergent-warp", r->index, line, "a product of a warpgroup of which not all four warps exist");
    Warpgroup &group = r->warpgroups[g];
    Fiber &f = r->fibers[r->index];
    unsigned at = f.products++ - group.retired;
    if (at == group.products.size()) {
        check_tile(r, what.right, what.transposed, (unsigned)what.count * 2, line);
        if (!what.registers) check_tile(r, what.left, false, GROUP_ROWS, line);
        if (r->free_products.empty()) {
            r->all_products.emplace_back(new PendingProduct);
            r->free_products.push_back(r->all_products.back().get());
        }
        PendingProduct *p = r->free_products.back();
        r->free_products.pop_back();
        group.products.push_back(p);
        p->what = what;
        p->line = line;
        p->group = f.product_groups;
        p->arrived = 0;
        p->done = false;
        memset(p->present, 0, sizeof p->present);
        p->sums = nullptr;
        for (Sums *s : group.in_flight)
            if (s->registers[t] == what.sums && s->count == what.count) p->sums = s;
        if (!p->sums) {
            if (r->free_sums.empty()) {
                r->all_sums.emplace_back(new Sums);
                r->free_sums.push_back(r->all_sums.back().get());
            }
            p->sums = r->free_sums.back();
            r->free_sums.pop_back();
            memset(p->sums->registers, 0, sizeof p->sums->registers);
            p->sums->count = what.count;
            p->sums->pitch = (what.count * 2 + LANES - 1) / LANES * LANES;
            p->sums->pending = 0;
            group.in_flight.push_back(p->sums);
            r->in_flight++;
        }
        p->sums->pending++;
        p->sums->line = line;
    }
    PendingProduct &p = *group.products[at];
    if (p.line != line || p.group != f.product_groups || p.what.count != what.count || p.what.element != what.element || !p.what.registers != !what.registers ||
        p.what.overwrite != what.overwrite || p.what.left != what.left || p.what.right != what.right || p.what.transposed != what.transposed)
        fail(r, "divergent-warp", r->index, line, "a product of a warpgroup, while other threads of it are at that of line " + std::to_string(p.line) + ", or with other tiles or another group");
    Sums &s = *p.sums;
    if (!s.registers[t]) {
        for (Sums *other : group.in_flight)
            if (other->registers[t] && what.sums < other->registers[t] + other->count && other->registers[t] < what.sums + what.count)
                fail(r, "async-product", r->index, line, "sums of another shape are in flight in the same registers, from line " + std::to_string(other->line));
        if (check && !f.fenced) check_report(check, r, "async-product", r->index, {0, line}, "a product on sums that the thread may have changed, with no wgmma_fence since");
        s.registers[t] = what.sums;
        float nothing;
        memset(&nothing, 0xff, sizeof nothing);
        each_pair(s, t, [&](float *matrix, float *registers) {
            if (!what.overwrite) memcpy(matrix, registers, 8);
            registers[0] = registers[1] = nothing;
        });
    } else if (s.registers[t] != what.sums) {
        fail(r, "divergent-warp", r->index, line, "a product on other sums than those of other threads of the warpgroup");
    }
    if (what.registers) memcpy(p.left[t], what.registers, 16);
    p.present[t] = true;
    if (check) p.issued[t] = check_product_issued(check);
    if (++p.arrived == GROUP_THREADS && check) {
        r->offsets.clear();
        auto add = [&](uint32_t offset) { r->offsets.push_back(offset); };
        if (!what.registers) each_chunk(Tile(what.left), false, GROUP_ROWS, add);
        each_chunk(Tile(what.right), what.transposed, (unsigned)what.count * 2, add);
        p.number = check_product_reads(check, r, g, r->offsets, p.issued, line);
    }
}
void group_commit(Block *b) { ((Runner *)b)->fibers[b->index].product_groups++; }

template <int element> void make_products(Runner *r, PendingProduct *const *list, int steps) {
    Operands &o = *r->operands;
    Sums &s = *list[0]->sums;
    int depth = steps * GROUP_DEPTH, columns = s.count * 2;
    if (list[0]->what.overwrite) memset(s.matrix, 0, sizeof(float) * GROUP_ROWS * (size_t)s.pitch);
    for (int i = 0; i < steps; i++) {
        const GroupProduct &what = list[i]->what;
        if (what.registers) read_left<element>(o, i, list[i]->left);
        else read_left<element>(o, i, r->shared, Tile(what.left));
        read_right<element>(o, i, depth, r->shared, Tile(what.right), what.transposed, columns);
    }
    multiply_group(o, depth, s.matrix, columns, s.pitch);
}
void retire(Runner *r, unsigned g) {
    Warpgroup &group = r->warpgroups[g];
    Check *check = r->launch->check;
    size_t count = 0;
    while (count < group.products.size() && group.products[count]->group < group.goal) count++;
    if (!r->operands) r->operands.reset(new Operands);
    for (size_t i = 0; i < count; i++) {
        // Computed together with the next products on the same sums; other products do not depend on them.
        PendingProduct *list[MOST_STEPS];
        int steps = 0;
        for (size_t j = i; j < count && steps < MOST_STEPS; j++) {
            PendingProduct *p = group.products[j];
            if (p->done || p->sums != group.products[i]->sums) continue;
            if (p->what.element != group.products[i]->what.element || (steps && p->what.overwrite)) break;
            p->done = true;
            list[steps++] = p;
        }
        if (!steps) continue;
        if (list[0]->what.element) make_products<1>(r, list, steps);
        else make_products<0>(r, list, steps);
    }
    for (size_t i = 0; i < count; i++) {
        PendingProduct *p = group.products[i];
        if (check) check_product_done(check, p->number);
        r->free_products.push_back(p);
        if (--p->sums->pending) continue;
        for (unsigned t = 0; t < GROUP_THREADS; t++) {
            each_pair(*p->sums, t, [](float *matrix, float *registers) { memcpy(registers, matrix, 8); });
            r->fibers[g * GROUP_THREADS + t].fenced = false;
        }
        group.in_flight.erase(std::find(group.in_flight.begin(), group.in_flight.end(), p->sums));
        r->free_sums.push_back(p->sums);
        r->in_flight--;
    }
    group.products.erase(group.products.begin(), group.products.begin() + (long)count);
    group.retired += (unsigned)count;
}
void group_wait(Block *b, unsigned left, int line) {
    Runner *r = (Runner *)b;
    Fiber &f = r->fibers[r->index];
    unsigned g = r->index / GROUP_THREADS, goal = f.product_groups > left ? f.product_groups - left : 0;
    if (g >= r->warpgroups.size()) return;
    Warpgroup &group = r->warpgroups[g];
    if (f.products == group.retired || group.products[0]->group >= goal) return;
    f.waits = PRODUCT_WAIT;
    f.line = line;
    if (!group.waiting) group.goal = goal;
    else if (group.goal != goal) fail(r, "divergent-warp", r->index, line, "wgmma_wait for other groups of products than other threads of the warpgroup wait for");
    if (++group.waiting < GROUP_THREADS) {
        sleep_now(r);
        return;
    }
    for (PendingProduct *p : group.products)
        if (p->group < goal && p->arrived < GROUP_THREADS) fail(r, "divergent-warp", r->index, p->line, missing_text(*p, g));
    retire(r, g);
    group.waiting = 0;
    r->spins = 0;
    for (unsigned w = 0; w < 4; w++) set_ready(r, g * 4 + w, ~0u);
    shuffle_order(r);
}
// Called when threads read or write accumulators that are in flight.
void sums_access(Block *b, const char *address, size_t size, unsigned flags, Place place) {
    Runner *r = (Runner *)b;
    unsigned g = r->index / GROUP_THREADS;
    if (!r->launch->check || g >= r->warpgroups.size()) return;
    for (Sums *s : r->warpgroups[g].in_flight) {
        auto begin = (const char *)s->registers[r->index % GROUP_THREADS];
        if (begin && address + size > begin && address < begin + s->count * 4)
            check_report(r->launch->check, r, "async-product", r->index, place,
                         std::string(flags & WRITE ? "writes" : "reads") + " sums of the product of line " + std::to_string(s->line) + ", which has not been waited for");
    }
}
void finish_products(Runner *r) {
    unsigned g = r->index / GROUP_THREADS;
    if (!r->launch->check || g >= r->warpgroups.size()) return;
    Warpgroup &group = r->warpgroups[g];
    if (r->fibers[r->index].products == group.retired) return;
    const PendingProduct &p = *group.products[0];
    bool committed = p.group < r->fibers[r->index].product_groups;
    check_report(r->launch->check, r, "async-product", r->index, {0, p.line},
                 std::string("the thread ends and has not ") + (committed ? "waited for" : "committed") + " this product");
}
void begin_products(Runner *r) {
    for (Warpgroup &group : r->warpgroups) {
        r->free_products.insert(r->free_products.end(), group.products.begin(), group.products.end());
        r->free_sums.insert(r->free_sums.end(), group.in_flight.begin(), group.in_flight.end());
    }
    r->warpgroups.assign(r->count / GROUP_THREADS, {});
    r->in_flight = 0;
}

const Runtime runtime = {block_barrier, named_barrier, warp, step, yield, copy_async, copy_commit, copy_wait, mma, load_matrix, store_matrix, multiply,
                         group_fence, group_product, group_commit, group_wait, async_fence, access, phase_completed, phase_seen, fence};

// ---- running blocks ------------------------------------------------------------------------------

void finish() {
    Runner *r = running;
    Fiber &f = r->fibers[r->index];
    for (Copy &c : f.copies)
        if (c.when == Copy::AT_WAIT || (c.when == Copy::AT_COMMIT && c.group == OPEN_GROUP)) perform(c);
    f.copies.clear();
    finish_products(r);
    f.done = true;
    unsigned number = r->index / 32;
    Warp &w = r->warps[number];
    w.alive &= ~(1u << (r->index & 31));
    clear_ready(r, r->index);
    r->alive--;
    r->spins = 0;
    // The other threads of the warp and of the block no longer wait for this thread.
    for (unsigned i = 0; i < w.group_count;) {
        if (w.groups[i].arrived == (w.groups[i].mask & w.alive)) release_group(r, number, i), i = 0;
        else i++;
    }
    if (r->alive && r->arrived == r->alive) release_block(r);
    void *unused;
    if (r->alive) {
        unsigned to = pick(r);
        r->index = to;
        r->thread = r->fibers[to].thread;
        change(&unused, r->fibers[to].stack_pointer);
    }
    change(&unused, r->main_stack);
}
void enter() {
    Runner *r = running;
    if (r->launch->kernel->fibered) {
        r->launch->kernel->body(r, r->launch->params);
        finish();
    } else {
        r->launch->kernel->loop(r, r->launch->params);
        void *unused;
        change(&unused, r->main_stack);
    }
    __builtin_unreachable();
}

void *fresh_stack(Runner *r, unsigned i) {
    // Stacks begin at different offsets in a page, to avoid conflicts of cache sets.
    void **top = (void **)(r->stacks + (i + 1) * STACK - (i & 63) * 320);
    *--top = nullptr;
    *--top = (void *)enter;
    for (int k = 0; k < 6; k++) *--top = nullptr;
    return top;
}

void run_block(Runner *r, unsigned long number) {
    Launch &l = *r->launch;
    r->block = {(unsigned)(number % l.grid.x), (unsigned)(number / l.grid.x % l.grid.y), (unsigned)(number / l.grid.x / l.grid.y)};
    r->count = r->alive = l.dim.x * l.dim.y * l.dim.z;
    r->arrived = 0;
    r->spins = 0;
    r->index = 0;
    r->random_state = (l.seed * 0x9e3779b97f4a7c15ull + l.serial * 1000003ull + number) | 1;
    for (int i = 0; i < 4; i++) draw(r);
    bool fibers = l.kernel->fibered;
    if (!fibers && !l.check) {
        l.kernel->loop(r, l.params);
        return;
    }
    unsigned stacks = fibers ? r->count : 1;
    r->fibers.resize(stacks);
    r->warps.resize((r->count + 31) / 32);
    r->ready_warps = 0;
    for (unsigned w = 0; w < r->warps.size(); w++) {
        unsigned lanes = std::min(32u, r->count - w * 32);
        r->warps[w].existing = r->warps[w].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
        r->warps[w].ready = 0;
        r->warps[w].group_count = 0;
        set_ready(r, w, r->warps[w].alive);
    }
    for (unsigned i = 0; i < stacks; i++) {
        Fiber &f = r->fibers[i];
        f.done = false;
        f.thread = {i % l.dim.x, i / l.dim.x % l.dim.y, i / l.dim.x / l.dim.y};
        f.groups = 0;
        f.copies.clear();
        f.products = f.product_groups = 0;
        f.fenced = false;
        f.stack_pointer = fresh_stack(r, i);
    }
    begin_products(r);
    for (Named &b : r->named) b = {};
    if (l.check) check_begin_block(l.check, r, l.shared);
    if (fibers && l.random) r->index = pick(r);
    r->thread = r->fibers[r->index].thread;
    change(&r->main_stack, r->fibers[r->index].stack_pointer);
    if (!l.check) return;
    check_end_block(l.check, r);
    for (int i = 0; i < NAMED_BARRIERS && !l.error; i++) {
        const Named &b = r->named[i];
        if (b.arrived)
            check_report(l.check, r, "named-barrier", (unsigned)__builtin_ctz(b.warps) * 32, {0, b.line},
                         "the block ends with " + std::to_string(b.arrived) + " of " + std::to_string(b.threads) + " threads at barrier " + std::to_string(i) + ", for which nobody waits");
    }
}

void work(Runner *r, Launch *l) {
    running = r;
    r->launch = l;
    r->checked = l->check != nullptr;
    r->dim = l->dim;
    r->grid = l->grid;
    r->runtime = &runtime;
    size_t needed = STACK * (l->kernel->fibered ? (size_t)l->dim.x * l->dim.y * l->dim.z : l->check ? 1 : 0);
    if (needed > r->stacks_size) {
        if (r->stacks) munmap(r->stacks, r->stacks_size);
        r->stacks = (char *)mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        r->stacks_size = needed;
        r->stacks_end = r->stacks + needed;
    }
    // NaN, so that reads of uninitialised values are visible.
    size_t dynamic = (l->shared + 127) / 128 * 128;
    r->shared_memory.assign(dynamic + l->kernel->shared_span + 2048, (char)0xff);
    r->shared = (char *)(((size_t)r->shared_memory.data() + 1023) / 1024 * 1024);
    r->statics = r->shared + dynamic;
    l->kernel->bind(r);
    unsigned long blocks = (unsigned long)l->grid.x * l->grid.y * l->grid.z, chunk = blocks > 64 ? 8 : 1;
    for (unsigned long i; !l->error && (i = l->next.fetch_add(chunk)) < blocks;)
        for (unsigned long j = i; !l->error && j < std::min(i + chunk, blocks); j++) run_block(r, l->random ? l->order[j] : j);
}

// Host threads that wait for launches.
struct Helpers {
    std::mutex lock;
    std::condition_variable begin, end;
    Launch *launch = nullptr;
    unsigned long turn = 0;
    unsigned count = 0, busy = 0;

    void add() {
        count++;
        unsigned long seen = turn;
        std::thread([this, seen]() mutable {
            Runner runner{};
            for (;;) {
                std::unique_lock<std::mutex> guard(lock);
                begin.wait(guard, [&] { return turn != seen; });
                seen = turn;
                Launch *l = launch;
                guard.unlock();
                work(&runner, l);
                guard.lock();
                if (--busy == 0) end.notify_all();
            }
        }).detach();
    }
};

}  // namespace

const Launch &launch_of(const Block *b) { return *((const Runner *)b)->launch; }

void abandon(Block *b, int error) {
    Runner *r = (Runner *)b;
    r->launch->error = error;
    void *unused;
    change(&unused, r->main_stack);
    __builtin_unreachable();
}

const char *name_of(Kind kind) {
    static const char *names[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote", "a matrix product", "ldmatrix", "stmatrix",
                                  "a load or store of a fragment", "the phase of a barrier", "wgmma_wait", "barrier_sync", "barrier_arrive"};
    return names[kind];
}

int run(Launch &l, unsigned host_threads) {
    // One launch at a time; never destroyed, as the host threads use them until the process ends.
    static std::mutex &one = *new std::mutex;
    static Helpers &helpers = *new Helpers;
    static Runner &own = *new Runner{};
    std::lock_guard<std::mutex> guard(one);
    unsigned long blocks = (unsigned long)l.grid.x * l.grid.y * l.grid.z;
    if (l.random) {
        l.order.resize(blocks);
        for (unsigned long i = 0; i < blocks; i++) l.order[i] = (uint32_t)i;
        uint64_t x = (l.seed * 0x9e3779b97f4a7c15ull + l.serial) | 1;
        for (unsigned long i = blocks; i > 1; i--) {
            x = x * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(l.order[i - 1], l.order[(x >> 33) % i]);
        }
    }
    // One host thread for checked kernels, so that a seed gives the same order each time.
    if (l.check || blocks == 1 || host_threads < 2) {
        work(&own, &l);
        return l.error;
    }
    std::unique_lock<std::mutex> hold(helpers.lock);
    while (helpers.count + 1 < host_threads) helpers.add();
    helpers.launch = &l;
    helpers.busy = helpers.count;
    helpers.turn++;
    helpers.begin.notify_all();
    hold.unlock();
    work(&own, &l);
    hold.lock();
    helpers.end.wait(hold, [&] { return helpers.busy == 0; });
    return l.error;
}

}  // namespace sim
