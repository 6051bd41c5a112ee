// The hazard detector.
//
// Shared memory. Time is counted in synchronisation events. Each thread has the time up to which it has
// seen its whole block (block barrier, phase barrier), and the time up to which it has seen each lane of
// its warp (__syncwarp). Each warp has the time up to which it has seen each warp of its block (named
// barriers: threads that wait see what the others had seen and done on arrival). The last write and the
// last reads of every two bytes are stored with their time and thread; an access that conflicts with one
// that its thread has not seen is a race, whatever the order in which the two ran. Phase barriers
// (cuda::barrier) order all accesses before the phase completed, more than guaranteed, so races may be missed.
//
// Warpgroup products read shared memory from when all threads have issued them until the wait. The last
// product of each warpgroup is stored for every 16 bytes. All threads of the warpgroup must have seen the
// writes that the product reads, and a later fence_async_proxy of the writer.
//
// Global memory. Bounds are those of allocations. The written bytes are recorded for the life of an
// allocation, and for every two bytes the last block that wrote and read them. Two blocks that have both
// executed a __threadfence and then an atomic operation count as ordered.
#include "check.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

namespace sim {

unsigned long allocation_changes = 1;

// ---- shadows of allocations ----------------------------------------------------------------------

namespace {
size_t written_bytes(size_t size) { return size / 8 + 8; }
size_t cell_bytes(size_t size) { return (size / 2 + 1) * sizeof(Shadow::Cell); }
void *lazy(size_t size) { return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); }

uint32_t bits_at(const uint8_t *bits, size_t at, unsigned count) {
    uint32_t word;
    memcpy(&word, bits + at / 8, 4);
    return word >> (at & 7) & ((1u << count) - 1);
}
void set_bits(uint8_t *bits, size_t at, unsigned count) {
    uint32_t word;
    memcpy(&word, bits + at / 8, 4);
    word |= ((1u << count) - 1) << (at & 7);
    memcpy(bits + at / 8, &word, 4);
}
void set_range(uint8_t *bits, size_t at, size_t size) {
    while (size && (at & 7)) set_bits(bits, at++, 1), size--;
    memset(bits + at / 8, 0xff, size / 8);
    at += size / 8 * 8;
    if (size % 8) set_bits(bits, at, size % 8);
}
}  // namespace

void make_shadow(Allocation &a) {
    a.shadow.written = (uint8_t *)lazy(written_bytes(a.size));
    a.shadow.cells = (Shadow::Cell *)lazy(cell_bytes(a.size));
}
void drop_shadow(Allocation &a) {
    if (!a.shadow.written) return;
    munmap(a.shadow.written, written_bytes(a.size));
    munmap(a.shadow.cells, cell_bytes(a.size));
    a.shadow = {};
}
void mark_written(const Allocation &a, size_t offset, size_t size) {
    if (a.shadow.written && offset < a.size) set_range(a.shadow.written, offset, std::min(size, a.size - offset));
}
void copy_written(const Allocation &to, size_t to_offset, const Allocation &from, size_t from_offset, size_t size) {
    if (!to.shadow.written || !from.shadow.written) return;
    for (size_t i = 0; i < size; i++)
        if (bits_at(from.shadow.written, from_offset + i, 1)) set_bits(to.shadow.written, to_offset + i, 1);
}

// ---- reports -------------------------------------------------------------------------------------

namespace {

struct Totals {
    std::mutex lock;
    unsigned long launches = 0, hazards = 0;
    std::set<std::string> reported;
    unsigned long not_shown = 0;
    std::map<std::pair<std::string, uintptr_t>, std::string> lines;
};
Totals &totals() {
    static Totals &t = *new Totals;
    return t;
}
constexpr unsigned MOST_REPORTS = 200;

// The place of an access in 32 bits: a line, or an offset in the kernel's code.
constexpr uint32_t LINE = 1u << 31;

struct Access {
    uint32_t time = 0;
    uint16_t thread = 0;
    uint8_t flags = 0, bytes = 0;
    uint32_t place = 0;
};
constexpr uint8_t PENDING = 128;  // flag: a pending asynchronous copy
struct Cell {
    Access write, read, read_same_warp, read_other_warp;
};

// A write that conflicts with another one: no hazard if both write the same value.
struct SecondWrite {
    const char *kind;
    unsigned thread;
    uint32_t place, other;
    std::string text;
    const char *address;
    size_t size;
    char before[16];
};

constexpr uint32_t SEVERAL = 0x3fffffff, ATOMIC_WRITER = 0x80000000;

}  // namespace

struct Check {
    Launch *launch;
    unsigned hazards = 0;
    int error = 0;

    // The library of the kernel.
    std::string library;
    uintptr_t code = 0, code_end = 0;

    // The block that runs.
    std::vector<Cell> cells;
    std::vector<uint8_t> written;
    size_t dynamic = 0;
    uint32_t clock = 1, began = 1;
    std::vector<uint32_t> seen;
    std::vector<std::array<uint32_t, 32>> seen_lane;
    struct View {
        uint32_t all = 0;
        std::array<uint32_t, 32> warps{};
    };
    std::array<std::array<uint32_t, 32>, 32> seen_warp;  // time up to which all lanes of a warp have seen each warp
    View named[16];                                      // what the threads at a barrier had seen
    std::unordered_map<const void *, uint32_t> phases;
    struct Product {
        int line;
        bool done;
        uint32_t time;  // time of the wait
    };
    std::vector<Product> products;                        // products of the block, from 1
    std::vector<std::array<uint32_t, 8>> product_reads;   // last product of each warpgroup, for each 16 bytes
    std::vector<std::vector<uint32_t>> async_fences;      // times, for each thread
    bool fenced = false;
    uint32_t block_number = 0;

    // The next access: g++ calls the function before the access.
    std::vector<SecondWrite> second_writes;

    std::vector<bool> ordered_blocks;
    Allocation recent[4];
    unsigned recent_next = 0;
    unsigned long looked_up = 0;
};

namespace {

std::string place_text(Check *c, uint32_t place) {
    if (place & LINE) return "line " + std::to_string(place & ~LINE);
    std::string &text = totals().lines[{c->library, place}];
    if (!text.empty()) return text;
    char command[4096];
    snprintf(command, sizeof command, "addr2line -i -e '%s' %#x 2>/dev/null", c->library.c_str(), place);
    text = "code+" + std::to_string(place);
    if (FILE *f = popen(command, "r")) {
        char line[4096];
        // Functions of the shim are inlined into the kernel: finds the first frame outside of them.
        while (fgets(line, sizeof line, f)) {
            const char *colon = strrchr(line, ':');
            if (!colon || strstr(line, "/shim/") || atoi(colon + 1) <= 0) continue;
            text = "line " + std::to_string(atoi(colon + 1));
            break;
        }
        pclose(f);
    }
    return text;
}
uint32_t pack(Check *c, Place p) { return p.code ? (uint32_t)(p.code - c->code) & ~LINE : (uint32_t)p.line | LINE; }

std::string thread_text(const Launch &l, unsigned i) {
    char text[64];
    snprintf(text, sizeof text, "(%u,%u,%u)", i % l.dim.x, i / l.dim.x % l.dim.y, i / l.dim.x / l.dim.y);
    return text;
}

void report(Check *c, Block *b, const char *kind, unsigned thread, uint32_t place, uint32_t other, const std::string &text) {
    Totals &t = totals();
    std::lock_guard<std::mutex> guard(t.lock);
    c->hazards++;
    std::string where = place_text(c, place);
    std::string key = std::string(c->launch->kernel->name) + "|" + kind + "|" + where + (other ? "|" + place_text(c, other) : "");
    if (!t.reported.insert(key).second) return;
    t.hazards++;
    if (t.hazards > MOST_REPORTS) {
        t.not_shown++;
        return;
    }
    char head[400];
    snprintf(head, sizeof head, "cuda-sim: hazard %s in %s at %s: block (%u,%u,%u) thread %s: ", kind, c->launch->kernel->name, where.c_str(), b->block.x,
             b->block.y, b->block.z, thread_text(*c->launch, thread).c_str());
    // The source is beside the library, with the same name.
    std::string source = c->library.substr(c->library.rfind('/') + 1);
    std::string line = head + text + " [" + source.substr(0, source.find('.')) + ".cu]\n";
    fputs(line.c_str(), stderr);
    if (const char *path = getenv("SIM_REPORT")) {
        if (FILE *f = fopen(path, "a")) {
            fputs(line.c_str(), f);
            fclose(f);
        }
    }
}

void settle(Check *c, Block *b) {
    if (c->second_writes.empty()) return;
    for (SecondWrite &w : c->second_writes)
        if (memcmp(w.before, w.address, w.size)) report(c, b, w.kind, w.thread, w.place, w.other, w.text);
    c->second_writes.clear();
}
// Reports a race, unless both accesses write the same value. The value of the second write is known only if
// it is an access of the kernel's own code.
void report_conflict(Check *c, Block *b, const char *kind, unsigned thread, uint32_t place, uint32_t other, const std::string &text, bool both_write,
                     const void *address, size_t size) {
    if (!both_write || (place & LINE) || size > sizeof(SecondWrite::before)) {
        report(c, b, kind, thread, place, other, text);
        return;
    }
    SecondWrite w{kind, thread, place, other, text, (const char *)address, size, {}};
    memcpy(w.before, address, size);
    c->second_writes.push_back(w);
}

std::string size_text(size_t size) { return size == 1 ? "1 byte" : std::to_string(size) + " bytes"; }

// Whether the kernel's synchronisation orders `thread` after that access.
bool comes_after(Check *c, unsigned thread, const Access &a) {
    if (a.flags & PENDING) return false;
    if (a.thread == thread || a.time <= c->seen[thread] || a.time <= c->seen_warp[thread / 32][a.thread / 32]) return true;
    return a.thread / 32 == thread / 32 && a.time <= c->seen_lane[thread][a.thread & 31];
}

// Describes bytes of shared memory, with the name of the variable if there is one.
std::string shared_text(const Check *c, const Block *b, size_t offset) {
    size_t statics = (size_t)(b->statics - b->shared);
    const Kernel &k = *c->launch->kernel;
    for (size_t i = 0; i < k.variable_count; i++) {
        size_t begin = statics + k.variables[i].offset;
        if (offset >= begin && offset < begin + k.variables[i].size)
            return " at byte " + std::to_string(offset - begin) + " of a shared variable of " + std::to_string(k.variables[i].size);
    }
    return " at byte " + std::to_string(offset) + " of dynamic shared memory";
}

struct Conflict {
    Check *check;
    Block *block;
    unsigned thread, flags;
    size_t offset, size;
    uint32_t place;
    bool found = false;

    void with(const Access &a, uint8_t bytes, bool wrote) {
        if (found || a.time <= check->began || !(a.bytes & bytes) || comes_after(check, thread, a)) return;
        if ((a.flags & ATOMIC) && (flags & ATOMIC)) return;
        found = true;
        bool same_warp = a.thread / 32 == thread / 32;
        std::string text = std::string(flags & WRITE ? "writes " : "reads ") + size_text(size) + shared_text(check, block, offset) + ", which ";
        if (a.flags & PENDING) {
            text += "thread " + thread_text(*check->launch, a.thread) + " copies there (" + place_text(check, a.place) + ") and has not waited for";
        } else {
            text += "thread " + thread_text(*check->launch, a.thread) + (wrote ? " wrote" : " read") + " (" + place_text(check, a.place) + ")";
            text += same_warp ? ", a lane of the same warp, with no __syncwarp or __syncthreads between" : " with no barrier between";
        }
        report_conflict(check, block, a.flags & PENDING ? "async-copy" : same_warp ? "warp-race" : "shared-race", thread, place, a.place, text,
                        (flags & WRITE) && wrote && !(a.flags & PENDING), block->shared + offset, size);
    }
};

void shared_bounds(Check *c, Block *b, unsigned thread, size_t offset, size_t size, unsigned flags, uint32_t place) {
    bool inside = offset + size <= c->dynamic;
    size_t statics = (size_t)(b->statics - b->shared);
    const SharedVariable *variables = c->launch->kernel->variables;
    if (!inside)
        for (size_t i = 0; i < c->launch->kernel->variable_count && !inside; i++) {
            size_t begin = statics + variables[i].offset;
            inside = offset >= begin && offset + size <= begin + variables[i].size;
        }
    if (!inside) {
        std::string text = std::string(flags & WRITE ? "writes " : "reads ") + size_text(size) + " at byte " + std::to_string(offset) + " of dynamic shared memory, of which there are " +
                           std::to_string(c->dynamic);
        if (offset >= statics) {
            text = std::string(flags & WRITE ? "writes " : "reads ") + size_text(size) + " of shared memory outside of the shared variables";
            for (size_t i = 0; i < c->launch->kernel->variable_count; i++) {
                size_t end = statics + variables[i].offset + variables[i].size;
                if (offset + size > end && offset < end + 4096)
                    text = std::string(flags & WRITE ? "writes " : "reads ") + size_text(size) + ", " + size_text(offset - std::min(offset, end)) +
                           " beyond the end of a shared variable of " + size_text(variables[i].size);
            }
        }
        report(c, b, "out-of-bounds-shared", thread, place, 0, text);
        abandon(b, 700);
    }
}

// Pending warpgroup products that read the overwritten bytes.
void overwrites_products(Check *c, Block *b, unsigned thread, size_t offset, size_t size, uint32_t place) {
    for (size_t at = offset / 16; at <= (offset + size - 1) / 16; at++)
        for (unsigned group = 0; group < 8; group++) {
            uint32_t number = c->product_reads[at][group];
            if (!number) continue;
            const Check::Product &p = c->products[number];
            bool released = p.done;
            for (unsigned w = group * 4; w < group * 4 + 4 && released && p.time > c->seen[thread]; w++)
                released = w == thread / 32 || p.time <= c->seen_warp[thread / 32][w];
            if (released) continue;
            std::string text = "writes " + size_text(size) + shared_text(c, b, offset) + ", which the product of line " + std::to_string(p.line) + " reads";
            report(c, b, p.done ? "shared-race" : "async-product", thread, place, (uint32_t)p.line | LINE,
                   text + (p.done ? " and has been waited for, with no barrier between" : " and has not been waited for"));
            return;
        }
}

void shared_access(Check *c, Block *b, unsigned thread, size_t offset, size_t size, unsigned flags, uint32_t place) {
    shared_bounds(c, b, thread, offset, size, flags, place);
    if ((flags & WRITE) && c->products.size() > 1) overwrites_products(c, b, thread, offset, size, place);
    // Uninitialised bytes.
    for (size_t i = 0; i < size; i += 16) {
        unsigned n = (unsigned)std::min<size_t>(16, size - i);
        if ((!(flags & WRITE) || (flags & ATOMIC)) && bits_at(c->written.data(), offset + i, n) != (1u << n) - 1)
            report(c, b, "uninitialised-shared", thread, place, 0,
                   "reads " + size_text(size) + shared_text(c, b, offset) + ", not all of which were written in this block");
        if (flags & WRITE) set_bits(c->written.data(), offset + i, n);
    }
    // Races.
    Conflict conflict{c, b, thread, flags, offset, size, place};
    Access mine{c->clock, (uint16_t)thread, (uint8_t)(flags & (WRITE | ATOMIC | ASYNC_PROXY | PENDING)), 3, place};
    for (size_t at = offset & ~(size_t)1; at < offset + size; at += 2) {
        Cell &cell = c->cells[at / 2];
        mine.bytes = (uint8_t)((at >= offset ? 1 : 0) | (at + 1 < offset + size ? 2 : 0));
        conflict.with(cell.write, mine.bytes, true);
        if (flags & WRITE) {
            conflict.with(cell.read, mine.bytes, false);
            conflict.with(cell.read_same_warp, mine.bytes, false);
            conflict.with(cell.read_other_warp, mine.bytes, false);
            if (mine.bytes == 3) cell.read.time = cell.read_same_warp.time = cell.read_other_warp.time = 0;
            cell.write = mine;
        } else {
            if (cell.read.time && cell.read.thread != thread) {
                if (cell.read.thread / 32 == thread / 32) {
                    cell.read_same_warp = cell.read;
                } else {
                    cell.read_other_warp = cell.read;
                    cell.read_same_warp.time = 0;
                }
            }
            if (cell.read.time == c->clock && cell.read.thread == thread) cell.read.bytes |= mine.bytes;
            else cell.read = mine;
        }
    }
}

const Allocation *look_up(Check *c, unsigned long address, size_t size) {
    if (c->looked_up != allocation_changes) {
        for (auto &a : c->recent) a = {};
        c->looked_up = allocation_changes;
    }
    for (auto &a : c->recent)
        if (address >= a.base && address + size <= a.base + a.size) return &a;
    Allocation found;
    if (!allocation_below(address, found) || address + size > found.base + found.size) return nullptr;
    c->recent_next = (c->recent_next + 1) % 4;
    c->recent[c->recent_next] = found;
    return &c->recent[c->recent_next];
}

void global_access(Check *c, Block *b, unsigned thread, unsigned long address, size_t size, unsigned flags, uint32_t place) {
    const char *verb = flags & WRITE ? "writes " : "reads ";
    const Allocation *a = look_up(c, address, size);
    if (!a) {
        if (address >= c->code && address < c->code_end) return;  // the kernel's constants
        if (address >= (unsigned long)b && address < (unsigned long)(b + 1)) return;
        Allocation below;
        std::string text = verb + size_text(size);
        char at[64];
        snprintf(at, sizeof at, " at %#lx", address);
        if (address < 4096) text += " at a null pointer";
        else if (allocation_below(address, below) && address - below.base < below.size + (64 << 20))
            text += address >= below.base + below.size ? ", " + size_text(address - below.base - below.size) + " beyond the end of an allocation of " + size_text(below.size)
                                                       : " across the end of an allocation of " + size_text(below.size);
        else text += std::string(at) + ", which is no memory of the device";
        report(c, b, "out-of-bounds-global", thread, place, 0, text);
        abandon(b, 700);
    }
    if (!a->shadow.written) return;
    size_t offset = address - a->base;
    for (size_t i = 0; i < size; i += 16) {
        unsigned n = (unsigned)std::min<size_t>(16, size - i);
        if ((!(flags & WRITE) || (flags & ATOMIC)) && bits_at(a->shadow.written, offset + i, n) != (1u << n) - 1)
            report(c, b, "uninitialised-global", thread, place, 0,
                   "reads " + size_text(size) + " at byte " + std::to_string(offset) + " of an allocation of " + size_text(a->size) + ", not all of which were ever written");
        if (flags & WRITE) set_bits(a->shadow.written, offset + i, n);
    }
    // Other blocks of this launch.
    if (flags & VOLATILE) flags |= ATOMIC;
    if ((flags & ATOMIC) && c->fenced) c->ordered_blocks[c->block_number] = true;
    uint64_t serial = (uint64_t)c->launch->serial << 32, me = serial | c->block_number;
    bool found = false;
    auto other = [&](uint64_t cell, bool wrote) {
        if (found || (cell >> 32) != c->launch->serial) return;
        uint32_t number = (uint32_t)cell & 0x3fffffff;
        if (number == c->block_number || ((cell & ATOMIC_WRITER) && (flags & ATOMIC))) return;
        if (number != SEVERAL && c->ordered_blocks[number] && c->ordered_blocks[c->block_number]) return;
        found = true;
        const Launch &l = *c->launch;
        std::string text = verb + size_text(size) + " at byte " + std::to_string(offset) + " of an allocation of " + size_text(a->size) + ", which ";
        if (number == SEVERAL) text += "other blocks";
        else {
            char name[64];
            snprintf(name, sizeof name, "block (%u,%u,%u)", number % l.grid.x, number / l.grid.x % l.grid.y, number / l.grid.x / l.grid.y);
            text += name;
        }
        report_conflict(c, b, "block-race", thread, place, 0, text + (wrote ? " wrote" : " read") + " in the same launch", (flags & WRITE) && wrote,
                        (const void *)address, size);
    };
    for (size_t at = offset / 2; at <= (offset + size - 1) / 2; at++) {
        Shadow::Cell &cell = a->shadow.cells[at];
        other(cell.writer, true);
        if (flags & WRITE) {
            other(cell.reader, false);
            cell.writer = me | (flags & ATOMIC ? ATOMIC_WRITER : 0);
        } else if ((cell.reader >> 32) != c->launch->serial) {
            cell.reader = me | (flags & ATOMIC ? ATOMIC_WRITER : 0);
        } else if (((uint32_t)cell.reader & 0x3fffffff) != c->block_number) {
            cell.reader = serial | SEVERAL | (flags & ATOMIC ? (uint32_t)cell.reader & ATOMIC_WRITER : 0);
        }
    }
}

}  // namespace

// ---- launches ------------------------------------------------------------------------------------

Check *begin_launch(Launch &l) {
    auto *c = new Check;
    c->launch = &l;
    c->ordered_blocks.resize((size_t)l.grid.x * l.grid.y * l.grid.z);
    Dl_info info;
    link_map *map = nullptr;
    if (dladdr1((const void *)l.kernel->bind, &info, (void **)&map, RTLD_DL_LINKMAP)) {
        c->library = info.dli_fname;
        c->code = (uintptr_t)info.dli_fbase;
        // The segments of a library are consecutive.
        struct Find {
            uintptr_t base, end;
        } find{c->code, c->code};
        dl_iterate_phdr(
            [](dl_phdr_info *i, size_t, void *data) {
                auto *f = (Find *)data;
                if (i->dlpi_addr != f->base) return 0;
                for (int s = 0; s < i->dlpi_phnum; s++)
                    if (i->dlpi_phdr[s].p_type == PT_LOAD) f->end = std::max<uintptr_t>(f->end, i->dlpi_addr + i->dlpi_phdr[s].p_vaddr + i->dlpi_phdr[s].p_memsz);
                return 1;
            },
            &find);
        c->code_end = find.end;
    }
    return c;
}
unsigned end_launch(Check *c) {
    unsigned hazards = c->hazards;
    totals().launches++;
    delete c;
    return hazards;
}
unsigned long launches_checked() { return totals().launches; }
unsigned long hazards_found() { return totals().hazards; }

void check_end_block(Check *c, Block *b) { settle(c, b); }
void check_begin_block(Check *c, Block *b, size_t shared_bytes) {
    size_t span = (size_t)(b->statics - b->shared) + c->launch->kernel->shared_span + 256;
    c->dynamic = shared_bytes;
    if (c->cells.size() < span / 2 + 1) c->cells.resize(span / 2 + 1);
    c->written.assign(span / 8 + 8, 0);
    size_t threads = (size_t)b->dim.x * b->dim.y * b->dim.z;
    c->began = c->clock++;
    c->seen.assign(threads, c->began);
    std::array<uint32_t, 32> none;
    none.fill(c->began);
    c->seen_lane.assign(threads, none);
    c->phases.clear();
    c->seen_warp.fill(none);
    for (auto &view : c->named) view = {};
    if (c->products.size() != 1) {
        c->products.assign(1, {});
        c->product_reads.assign(span / 16 + 1, {});
    }
    c->async_fences.resize(threads);
    for (auto &times : c->async_fences) times.clear();
    c->fenced = false;
    c->block_number = b->block.x + b->grid.x * (b->block.y + b->grid.y * b->block.z);
}

void check_access(Check *c, Block *b, unsigned thread, const void *address, size_t size, unsigned flags, Place where) {
    settle(c, b);
    const char *p = (const char *)address;
    if (p >= b->stacks && p < b->stacks_end) return;
    uint32_t place = pack(c, where);
    if ((flags & NATURAL) && (unsigned long)p % size) {
        report(c, b, "misaligned", thread, place, 0, std::string(flags & WRITE ? "writes " : "reads ") + size_text(size) + " at an address that is no multiple of that");
        abandon(b, 716);
    }
    size_t span = (size_t)(b->statics - b->shared) + c->launch->kernel->shared_span + 256;
    if (p >= b->shared && p < b->shared + span) shared_access(c, b, thread, (size_t)(p - b->shared), size, flags, place);
    else global_access(c, b, thread, (unsigned long)p, size, flags, place);
}

void check_block_barrier(Check *c) {
    uint32_t now = c->clock++;
    std::fill(c->seen.begin(), c->seen.end(), now);
}
void check_warp_barrier(Check *c, unsigned warp, uint32_t lanes) {
    uint32_t now = c->clock++, seen = 0;
    std::array<uint32_t, 32> all{};
    for (unsigned i = 0; i < 32; i++) {
        if (!(lanes >> i & 1)) continue;
        seen = std::max(seen, c->seen[warp * 32 + i]);
        for (unsigned j = 0; j < 32; j++) all[j] = std::max(all[j], c->seen_lane[warp * 32 + i][j]);
    }
    for (unsigned i = 0; i < 32; i++)
        if (lanes >> i & 1) all[i] = now;
    for (unsigned i = 0; i < 32; i++)
        if (lanes >> i & 1) {
            c->seen[warp * 32 + i] = seen;
            c->seen_lane[warp * 32 + i] = all;
        }
}
void check_named_arrival(Check *c, unsigned number, unsigned warp, uint32_t lanes) {
    Check::View &view = c->named[number];
    for (unsigned i = 0; i < 32; i++)
        if (lanes >> i & 1) view.all = std::max(view.all, c->seen[warp * 32 + i]);
    for (unsigned w = 0; w < 32; w++) view.warps[w] = std::max(view.warps[w], c->seen_warp[warp][w]);
    view.warps[warp] = c->clock++;
}
void check_named_complete(Check *c, unsigned number, uint32_t waiting) {
    const Check::View view = c->named[number];
    c->named[number] = {};
    for (; waiting; waiting &= waiting - 1) {
        auto warp = (unsigned)__builtin_ctz(waiting);
        for (size_t i = warp * 32; i < std::min<size_t>(warp * 32 + 32, c->seen.size()); i++) c->seen[i] = std::max(c->seen[i], view.all);
        for (unsigned w = 0; w < 32; w++) c->seen_warp[warp][w] = std::max(c->seen_warp[warp][w], view.warps[w]);
    }
}
void check_phase_completed(Check *c, const void *barrier) { c->phases[barrier] = c->clock++; }
void check_phase_seen(Check *c, unsigned thread, const void *barrier) {
    auto it = c->phases.find(barrier);
    if (it != c->phases.end()) c->seen[thread] = std::max(c->seen[thread], it->second);
}
void check_async_fence(Check *c, unsigned thread) { c->async_fences[thread].push_back(c->clock++); }

uint32_t check_product_issued(Check *c) { return c->clock++; }
void check_product_done(Check *c, unsigned product) {
    c->products[product].done = true;
    c->products[product].time = c->clock;
}
unsigned check_product_reads(Check *c, Block *b, unsigned group, const std::vector<uint32_t> &offsets, const uint32_t *issued, int line) {
    settle(c, b);
    unsigned first = group * 128;
    uint32_t place = (uint32_t)line | LINE;
    // The time up to which all threads of the warpgroup have seen each warp.
    std::array<uint32_t, 32> seen;
    seen.fill(~0u);
    for (unsigned w = 0; w < 4; w++) {
        auto lanes = c->seen.begin() + first + w * 32;
        uint32_t all = *std::min_element(lanes, lanes + 32);
        for (unsigned other = 0; other < 32; other++) seen[other] = std::min(seen[other], std::max(all, c->seen_warp[first / 32 + w][other]));
    }
    auto number = (uint32_t)c->products.size();
    c->products.push_back({line, false, 0});
    bool found = false;
    // The last write that was checked to be ordered: the next one is mostly by the same thread.
    uint32_t right_time = 0;
    unsigned right_thread = 0;
    for (uint32_t offset : offsets) {
        shared_bounds(c, b, first, offset, 16, READ, place);
        if (!found && bits_at(c->written.data(), offset, 16) != 0xffff) {
            report(c, b, "uninitialised-shared", first, place, 0,
                   "a product reads 16 bytes" + shared_text(c, b, offset) + ", not all of which were written in this block");
            found = true;
        }
        c->product_reads[offset / 16][group] = number;
        for (size_t at = offset / 2; at < offset / 2 + 8 && !found; at++) {
            const Access &w = c->cells[at].write;
            if (w.time <= c->began || (w.thread == right_thread && w.time == right_time && !(w.flags & PENDING))) continue;
            std::string text;
            const char *kind = "shared-race";
            if (w.thread / 128 == group && w.time > issued[w.thread % 128]) {
                kind = "async-product";
                text = "wrote after it had issued the product, which has not been waited for";
            } else if (w.flags & PENDING) {
                kind = "async-copy";
                text = "copies there and has not waited for";
            } else if (w.time > seen[w.thread / 32]) {
                text = "wrote, with no barrier between";
            } else if (!(w.flags & ASYNC_PROXY)) {
                const auto &times = c->async_fences[w.thread];
                auto fence = std::lower_bound(times.begin(), times.end(), w.time);
                if (fence == times.end() || *fence > seen[w.thread / 32]) {
                    kind = "async-proxy";
                    text = "wrote, with no fence_async_proxy of that thread before the barrier";
                }
            }
            if (text.empty()) {
                right_time = w.time;
                right_thread = w.thread;
                continue;
            }
            found = true;
            report(c, b, kind, first, place, w.place,
                   "a product reads 16 bytes" + shared_text(c, b, offset) + ", which thread " + thread_text(*c->launch, w.thread) + " (" + place_text(c, w.place) + ") " + text);
        }
    }
    return number;
}

void check_fence(Check *c, Block *) { c->fenced = true; }

void check_copy_issued(Check *c, Block *b, void *to, const void *from, unsigned size, unsigned given, int line) {
    if (given) check_access(c, b, b->index, from, given, given == size ? NATURAL : READ, {0, line});
    check_access(c, b, b->index, to, size, WRITE | PENDING | NATURAL, {0, line});
}
void check_copy_arrived(Check *c, Block *b, void *to, unsigned size) {
    size_t offset = (size_t)((char *)to - b->shared);
    for (size_t at = offset / 2; at < (offset + size + 1) / 2; at++) {
        Access &a = c->cells[at].write;
        if (a.thread != b->index || !(a.flags & PENDING)) continue;
        a.flags &= (uint8_t)~PENDING;
        a.time = c->clock;
    }
}
void check_report(Check *c, Block *b, const char *kind, unsigned thread, Place place, const std::string &text) {
    report(c, b, kind, thread, pack(c, place), 0, text);
}

}  // namespace sim
