// A stand-in for NVIDIA's driver library (libcuda.so.1) on machines without a GPU. README.md in this folder
// describes how it is built and which environment variables it reads.
//
// Null device: allocations are host memory that is backed where it is used, copies are executed, and launches
// are checked against the limits of the device and logged, but not executed.
// CPU device: launches run modules that the NVRTC stand-in compiled for the host; see blocks.h.
#include <cuda.h>

#include <dirent.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <regex>
#include <string>
#include <vector>

#include "blocks.h"
#include "check.h"

#define API extern "C" __attribute__((visibility("default"))) CUresult

namespace {

// ---- settings and state --------------------------------------------------------------------------

const char *env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : nullptr;
}

struct Settings {
    int capability = env("SIM_CC") ? atoi(env("SIM_CC")) : 90;
    size_t memory = (size_t)((env("SIM_MEM_GB") ? atof(env("SIM_MEM_GB")) : 80.0) * (1ull << 30));
    size_t copy_max = env("SIM_COPY_MAX") ? strtoull(env("SIM_COPY_MAX"), nullptr, 10) : SIZE_MAX;
    unsigned threads = env("SIM_THREADS") ? (unsigned)atoi(env("SIM_THREADS")) : 2;
    int devices = env("SIM_DEVICES") ? atoi(env("SIM_DEVICES")) : 1;
    int driver_version = env("SIM_DRIVER_VERSION") ? atoi(env("SIM_DRIVER_VERSION")) : 12080;
    std::string dump = env("SIM_DUMP") ? env("SIM_DUMP") : "";
    bool check = env("SIM_CHECK") && atoi(env("SIM_CHECK"));
};
const Settings &settings() {
    static const Settings &s = *new Settings;
    return s;
}

struct Function {
    std::string name;
    unsigned module;
    std::vector<sim::Param> params;
    unsigned max_threads = 0;
    unsigned cluster[3] = {0, 0, 0};
    size_t static_shared = 0;
    int dynamic_limit = 48 * 1024;
    const sim::Kernel *kernel = nullptr;
};
struct Module {
    unsigned id;
    std::map<std::string, Function *> functions;
};

// Guards the state below. Never destroyed, as other threads may call while the process ends.
std::mutex &lock = *new std::mutex;
FILE *logfile = nullptr;
unsigned long sequence = 0;
unsigned next_module = 0, next_stream = 0;
std::map<unsigned long, sim::Allocation> &live = *new std::map<unsigned long, sim::Allocation>;
std::map<unsigned long, size_t> &pinned = *new std::map<unsigned long, size_t>;
size_t live_bytes = 0, live_peak = 0, pinned_bytes = 0, pinned_peak = 0;
unsigned long launches = 0, complaints = 0, copies_in = 0, copies_out = 0, syncs = 0, allocations = 0;
size_t bytes_in = 0, bytes_out = 0;

constexpr int HAZARDS_EXIT_CODE = 99;

long now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

// ---- reports -------------------------------------------------------------------------------------

void report() {
    fprintf(stderr,
            "cuda-sim: %lu launches, %lu complaints, device peak %.1f MiB (now %.1f), pinned peak %.1f MiB, "
            "%lu allocations, in %lu copies %.1f MiB, out %lu copies %.1f MiB, %lu host waits\n",
            launches, complaints, live_peak / 1048576.0, live_bytes / 1048576.0, pinned_peak / 1048576.0, allocations, copies_in,
            bytes_in / 1048576.0, copies_out, bytes_out / 1048576.0, syncs);
    if (settings().check) fprintf(stderr, "cuda-sim: %lu launches checked, %lu hazards\n", sim::launches_checked(), sim::hazards_found());
    // Processor time of each thread that still exists.
    DIR *tasks = env("SIM_LOG") ? opendir("/proc/self/task") : nullptr;
    while (dirent *task = tasks ? readdir(tasks) : nullptr) {
        if (task->d_name[0] == '.') continue;
        std::string base = std::string("/proc/self/task/") + task->d_name;
        unsigned long ns = 0;
        char name[64] = "";
        if (FILE *f = fopen((base + "/schedstat").c_str(), "r")) {
            if (fscanf(f, "%lu", &ns) != 1) ns = 0;
            fclose(f);
        }
        if (FILE *f = fopen((base + "/comm").c_str(), "r")) {
            if (!fgets(name, sizeof name, f)) name[0] = 0;
            fclose(f);
        }
        name[strcspn(name, "\n")] = 0;
        if (ns > 20000000) fprintf(stderr, "cuda-sim: thread %s %s %.3f s\n", task->d_name, name, ns * 1e-9);
    }
    if (tasks) closedir(tasks);
    if (logfile) fflush(logfile);
    // The program may have ignored a failed launch.
    if (settings().check && sim::hazards_found()) {
        fflush(nullptr);
        _exit(HAZARDS_EXIT_CODE);
    }
}

void started() {
    static std::once_flag once;
    std::call_once(once, [] {
        if (env("SIM_LOG") && (logfile = fopen(env("SIM_LOG"), "w"))) {
            static char buffer[1 << 22];
            setvbuf(logfile, buffer, _IOFBF, sizeof buffer);
            fprintf(logfile, "seq,ns,kind,name,module,gx,gy,gz,bx,by,bz,shared,stream,bytes,tid\n");
        }
        atexit(report);
    });
}

void say(const char *kind, const char *name = "", unsigned module = 0, const unsigned *g = nullptr, const unsigned *b = nullptr,
         size_t shared = 0, const void *stream = nullptr, size_t bytes = 0) {
    if (!logfile) return;
    static const unsigned none[3] = {0, 0, 0};
    if (!g) g = none;
    if (!b) b = none;
    fprintf(logfile, "%lu,%ld,%s,%s,%u,%u,%u,%u,%u,%u,%u,%zu,%lu,%zu,%d\n", sequence++, now(), kind, name, module, g[0], g[1], g[2], b[0], b[1],
            b[2], shared, (unsigned long)stream, bytes, gettid());
}

__attribute__((format(printf, 2, 3))) CUresult complain(CUresult code, const char *format, ...) {
    complaints++;
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "cuda-sim: %s\n", text);
    std::replace(text, text + strlen(text), ',', ';');
    say("complaint", text);
    return code;
}

// ---- failures on request -------------------------------------------------------------------------

// SIM_FAIL=CALL:N[+][:CODE],...   the Nth call of that name fails; with + those after it, too
// SIM_FAIL=lost:N[:CODE]          from the Nth launch, copy or wait on, every call fails
struct Failures {
    struct Rule {
        std::string call;
        unsigned long number = 1, calls = 0;
        bool on = false;
        int code = 0;
    };
    std::mutex mutex;
    std::vector<Rule> rules, file_rules;
    std::string file_text;
    int lost = 0;

    static std::vector<Rule> parse(const std::string &text) {
        std::vector<Rule> rules;
        static const std::regex rule(R"(([A-Za-z_0-9]+)(?::(\d+)(\+?))?(?::(\d+))?)");
        for (std::sregex_iterator it(text.begin(), text.end(), rule), end; it != end; ++it) {
            Rule r;
            r.call = (*it)[1];
            if ((*it)[2].matched) r.number = std::stoul((*it)[2]);
            r.on = (*it)[3].length() > 0;
            if ((*it)[4].matched) r.code = std::stoi((*it)[4]);
            rules.push_back(r);
        }
        return rules;
    }
    Failures() {
        if (env("SIM_FAIL")) rules = parse(env("SIM_FAIL"));
    }
    void read_file() {
        const char *path = env("SIM_FAIL_FILE");
        if (!path) return;
        std::string text;
        if (FILE *f = fopen(path, "r")) {
            char buffer[4096];
            text.assign(buffer, fread(buffer, 1, sizeof buffer, f));
            fclose(f);
        }
        // Calls are counted from the first read of a text.
        if (text == file_text) return;
        file_text = text;
        file_rules = parse(text);
    }
    CUresult of(const char *call, CUresult natural, bool device_work) {
        std::lock_guard<std::mutex> guard(mutex);
        read_file();
        CUresult result = CUDA_SUCCESS;
        for (auto *list : {&rules, &file_rules})
            for (Rule &r : *list) {
                bool is_lost = r.call == "lost";
                if (is_lost ? !device_work : r.call != call) continue;
                r.calls++;
                if (r.calls != r.number && !((r.on || is_lost) && r.calls > r.number)) continue;
                if (is_lost) {
                    if (!lost) fprintf(stderr, "cuda-sim: the device is lost\n");
                    lost = r.code ? r.code : CUDA_ERROR_DEVICE_UNAVAILABLE;
                } else {
                    result = r.code ? (CUresult)r.code : natural;
                    fprintf(stderr, "cuda-sim: %s fails on request (call %lu, error %d)\n", call, r.calls, result);
                }
            }
        return lost ? (CUresult)lost : result;
    }
};
CUresult failure(const char *call, CUresult natural, bool device_work) {
    static const bool wanted = env("SIM_FAIL") || env("SIM_FAIL_FILE");
    if (!wanted) return CUDA_SUCCESS;
    static Failures &failures = *new Failures;
    return failures.of(call, natural, device_work);
}
// Every call begins with one of these. A lost device is first noticed at a call with WORK.
#define CALL(name, natural) \
    if (CUresult failed = failure(name, natural, false)) return failed
#define WORK(name, natural) \
    if (CUresult failed = failure(name, natural, true)) return failed

// ---- memory --------------------------------------------------------------------------------------

void *reserve(size_t size) {
    size = (size + 4095) & ~4095ull;
    // Followed by a guard page.
    void *p = mmap(nullptr, size + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    if (mprotect(p, size, PROT_READ | PROT_WRITE)) return nullptr;
    return p;
}
void release(void *p, size_t size) { munmap(p, ((size + 4095) & ~4095ull) + 4096); }

// The allocation that contains these bytes. The caller holds the lock.
const sim::Allocation *allocation_of(unsigned long p, size_t size = 1) {
    auto it = live.upper_bound(p);
    if (it == live.begin()) return nullptr;
    --it;
    return p + size <= it->second.base + it->second.size ? &it->second : nullptr;
}

CUresult allocate(CUdeviceptr *out, size_t size, CUstream stream) {
    std::lock_guard<std::mutex> guard(lock);
    if (size == 0) return CUDA_ERROR_INVALID_VALUE;
    size_t rounded = (size + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1);
    void *p = live_bytes + rounded > settings().memory ? nullptr : reserve(size);
    if (!p) {
        say("oom", "", 0, nullptr, nullptr, 0, stream, size);
        fprintf(stderr, "cuda-sim: out of memory: %.1f MiB asked, %.1f live\n", size / 1048576.0, live_bytes / 1048576.0);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    sim::Allocation a;
    a.base = (unsigned long)p;
    a.size = size;
    if (settings().check) sim::make_shadow(a);
    live[a.base] = a;
    sim::allocation_changes++;
    live_bytes += size;
    live_peak = std::max(live_peak, live_bytes);
    allocations++;
    say("alloc", "", 0, nullptr, nullptr, 0, stream, size);
    *out = (CUdeviceptr)p;
    return CUDA_SUCCESS;
}
CUresult give_back(CUdeviceptr p) {
    std::lock_guard<std::mutex> guard(lock);
    auto it = live.find(p);
    if (it == live.end()) return complain(CUDA_ERROR_INVALID_VALUE, "free of what is not allocated");
    live_bytes -= it->second.size;
    say("free", "", 0, nullptr, nullptr, 0, nullptr, it->second.size);
    release((void *)p, it->second.size);
    sim::drop_shadow(it->second);
    live.erase(it);
    sim::allocation_changes++;
    return CUDA_SUCCESS;
}

// Checks and counts a copy; null pointers stand for host memory.
CUresult copy(CUdeviceptr to, CUdeviceptr from, void *to_host, const void *from_host, size_t size, CUstream stream) {
    std::lock_guard<std::mutex> guard(lock);
    if (to && from) {
        say("dtod", "", 0, nullptr, nullptr, 0, stream, size);
    } else {
        (to ? copies_in : copies_out)++;
        (to ? bytes_in : bytes_out) += size;
        say(to ? "htod" : "dtoh", "", 0, nullptr, nullptr, 0, stream, size);
    }
    const sim::Allocation *target = to ? allocation_of(to, size) : nullptr, *source = from ? allocation_of(from, size) : nullptr;
    if (to && !target) return complain(CUDA_ERROR_INVALID_VALUE, "copy of %zu bytes to what is not allocated", size);
    if (from && !source) return complain(CUDA_ERROR_INVALID_VALUE, "copy of %zu bytes from what is not allocated", size);
    if (target && source) sim::copy_written(*target, to - target->base, *source, from - source->base, size);
    else if (target) sim::mark_written(*target, to - target->base, size);
    if (size <= settings().copy_max) memmove(to ? (void *)to : to_host, from ? (const void *)from : from_host, size);
    return CUDA_SUCCESS;
}

CUresult fill(CUdeviceptr to, const void *value, size_t width, size_t count, CUstream stream) {
    std::lock_guard<std::mutex> guard(lock);
    say("memset", "", 0, nullptr, nullptr, 0, stream, width * count);
    const sim::Allocation *target = allocation_of(to, width * count);
    if (!target) return complain(CUDA_ERROR_INVALID_VALUE, "memset of %zu bytes of what is not allocated", width * count);
    sim::mark_written(*target, to - target->base, width * count);
    for (size_t i = 0; i < count; i++) memcpy((char *)to + i * width, value, width);
    return CUDA_SUCCESS;
}

// ---- the device ----------------------------------------------------------------------------------

size_t max_shared() {
    switch (settings().capability) {
        case 80: case 87: return 166912;
        case 90: case 100: case 103: return 232448;
        case 75: return 65536;
        case 70: return 98304;
        default: return 101376;
    }
}
int processors() {
    switch (settings().capability) {
        case 80: return 108;
        case 89: return 142;
        case 90: return 132;
        case 100: return 148;
        case 120: return 170;
        default: return 80;
    }
}
int threads_per_processor() {
    int cc = settings().capability;
    return cc == 75 ? 1024 : cc == 86 || cc == 89 || cc >= 120 ? 1536 : 2048;
}

// ---- modules -------------------------------------------------------------------------------------

size_t type_size(const std::string &t) { return t == "8" ? 1 : t == "16" ? 2 : t == "32" ? 4 : 8; }

// The limits of a kernel that launches are checked against, from the text of the PTX.
void parse_ptx(const std::string &ptx, Module *module) {
    static const std::regex entry(R"(\.entry\s+([A-Za-z_$][\w$]*)\s*\()");
    static const std::regex param(
        R"(\.param\s+(?:\.align\s+\d+\s+)?\.([busf])(8|16|32|64)((?:\s+\.ptr)?)[^,\[\)]*?\s([\w$]+)(?:\[(\d+)\])?\s*(?=[,\)]|$))");
    for (std::sregex_iterator it(ptx.begin(), ptx.end(), entry), end; it != end; ++it) {
        auto *f = new Function;
        f->name = (*it)[1];
        f->module = module->id;
        size_t open = it->position() + it->length();
        size_t close = ptx.find("\n)", open);
        size_t brace = ptx.find('{', open);
        std::string list = ptx.substr(open, close == std::string::npos ? brace - open : close + 2 - open);
        for (std::sregex_iterator p(list.begin(), list.end(), param); p != end; ++p) {
            size_t n = (*p)[5].matched ? std::stoul((*p)[5]) : 1;
            bool array = (*p)[5].matched;
            f->params.push_back({type_size((*p)[2]) * n, !array && (*p)[2] == "64"});
        }
        size_t from = close == std::string::npos ? open : close;
        std::string head = ptx.substr(from, brace - from);
        std::smatch m;
        auto three = [&](int i) { return m[i].matched ? (unsigned)std::stoul(m[i]) : 1; };
        if (std::regex_search(head, m, std::regex(R"(\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?)")))
            f->max_threads = three(1) * three(2) * three(3);
        if (std::regex_search(head, m, std::regex(R"(\.reqnctapercluster\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?)")))
            for (int i = 0; i < 3; i++) f->cluster[i] = three(i + 1);
        module->functions[f->name] = f;
    }
    size_t shared = 0;
    static const std::regex variable(R"(\.shared\s+\.align\s+(\d+)\s+\.b8\s+[\w$]+\[(\d+)\])");
    for (std::sregex_iterator it(ptx.begin(), ptx.end(), variable), end; it != end; ++it) {
        if (ptx.compare(it->position() > 7 ? it->position() - 7 : 0, 7, ".extern") == 0) continue;
        shared += std::stoul((*it)[2]);
    }
    for (auto &f : module->functions) f.second->static_shared = shared;
}

CUresult load_host_module(const std::string &path, Module *m) {
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return complain(CUDA_ERROR_INVALID_IMAGE, "%s", dlerror());
    auto *kernels = (const sim::Kernel *(*)(size_t *))dlsym(library, "sim_kernels");
    size_t count = 0;
    const sim::Kernel *list = kernels ? kernels(&count) : nullptr;
    for (size_t i = 0; i < count; i++) {
        if (list[i].abi != sim::ABI) return complain(CUDA_ERROR_INVALID_IMAGE, "%s was compiled for another version of the CPU device", path.c_str());
        auto *f = new Function;
        f->kernel = &list[i];
        f->name = list[i].name;
        f->module = m->id;
        f->params.assign(list[i].params, list[i].params + list[i].param_count);
        f->max_threads = list[i].max_threads;
        f->static_shared = list[i].shared_total;
        m->functions[f->name] = f;
    }
    return CUDA_SUCCESS;
}

// ---- launches ------------------------------------------------------------------------------------

CUresult run_on_host(Function *f, const unsigned *g, const unsigned *b, size_t shared, void **params, unsigned serial) {
    sim::Launch launch;
    launch.kernel = f->kernel;
    launch.params = params;
    launch.grid = {g[0], g[1], g[2]};
    launch.dim = {b[0], b[1], b[2]};
    launch.shared = shared;
    launch.serial = serial;
    const char *seed = env("SIM_SEED");
    bool check = settings().check && f->kernel->checked;
    launch.random = seed || check;
    launch.seed = seed ? strtoull(seed, nullptr, 10) : 1;
    if (check) {
        launch.check = sim::begin_launch(launch);
    } else if (settings().check) {
        // The writes of an unchecked kernel are unknown: everything it could write counts as written.
        std::lock_guard<std::mutex> guard(lock);
        for (size_t i = 0; i < f->params.size(); i++)
            if (f->params[i].pointer)
                if (const sim::Allocation *a = allocation_of(*(unsigned long *)params[i])) sim::mark_written(*a, 0, a->size);
    }
    int error = sim::run(launch, settings().threads);
    unsigned hazards = launch.check ? sim::end_launch(launch.check) : 0;
    if (error || hazards) return (CUresult)(error ? error : CUDA_ERROR_LAUNCH_FAILED);
    return CUDA_SUCCESS;
}

CUresult launch(Function *f, const unsigned *g, const unsigned *b, size_t shared, CUstream stream, void **params) {
    std::unique_lock<std::mutex> guard(lock);
    unsigned serial = (unsigned)++launches;
    const char *name = f->name.c_str();
    say("launch", name, f->module, g, b, shared, stream);
    const unsigned long limits[3] = {2147483647, 65535, 65535}, blocks[3] = {1024, 1024, 64};
    for (int i = 0; i < 3; i++) {
        if (g[i] == 0 || g[i] > limits[i]) return complain(CUDA_ERROR_INVALID_VALUE, "%s: grid dimension %d is %u", name, i, g[i]);
        if (b[i] == 0 || b[i] > blocks[i]) return complain(CUDA_ERROR_INVALID_VALUE, "%s: block dimension %d is %u", name, i, b[i]);
        if (f->cluster[i] && g[i] % f->cluster[i])
            return complain(CUDA_ERROR_INVALID_VALUE, "%s: grid dimension %d is no multiple of the cluster", name, i);
    }
    unsigned long count = (unsigned long)b[0] * b[1] * b[2], most = f->max_threads ? f->max_threads : 1024;
    if (count > most) return complain(CUDA_ERROR_INVALID_VALUE, "%s: %lu threads a block, of at most %lu", name, count, most);
    if ((long)shared > f->dynamic_limit)
        return complain(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes of dynamic shared memory, the attribute says %d", name, shared, f->dynamic_limit);
    if (shared + f->static_shared > max_shared())
        return complain(CUDA_ERROR_INVALID_VALUE, "%s: %zu bytes of shared memory, of at most %zu", name, shared + f->static_shared, max_shared());
    for (size_t i = 0; i < f->params.size(); i++) {
        if (!params || !params[i]) return complain(CUDA_ERROR_INVALID_VALUE, "%s: argument %zu is missing", name, i);
        // Kernels may have pointer arguments that they do not use.
        if (f->params[i].pointer && !allocation_of(*(unsigned long *)params[i]))
            complain(CUDA_SUCCESS, "%s: argument %zu is no live allocation: %#lx", name, i, *(unsigned long *)params[i]);
    }
    guard.unlock();
    return f->kernel ? run_on_host(f, g, b, shared, params, serial) : CUDA_SUCCESS;
}

struct Error {
    CUresult code;
    const char *name, *text;
};
#define ERROR(name, text) {name, #name, text}
const Error errors[] = {
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    ERROR(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    ERROR(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    ERROR(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    ERROR(CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

}  // namespace

bool sim::allocation_below(unsigned long address, Allocation &found) {
    std::lock_guard<std::mutex> guard(lock);
    auto it = live.upper_bound(address);
    if (it == live.begin()) return false;
    found = (--it)->second;
    return true;
}

// ---- devices, contexts, errors -------------------------------------------------------------------

API cuInit(unsigned) {
    started();
    CALL("cuInit", CUDA_ERROR_NO_DEVICE);
    return CUDA_SUCCESS;
}
API cuDriverGetVersion(int *version) {
    *version = settings().driver_version;
    return CUDA_SUCCESS;
}
// NVRTC 13 asks for a table of its own and works without it, but it does not check that this function exists.
API cuGetExportTable(const void **table, const CUuuid *) {
    *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}
API cuDeviceGetCount(int *count) {
    CALL("cuDeviceGetCount", CUDA_ERROR_NO_DEVICE);
    *count = settings().devices;
    return CUDA_SUCCESS;
}
API cuDeviceGet(CUdevice *device, int ordinal) {
    CALL("cuDeviceGet", CUDA_ERROR_INVALID_DEVICE);
    if (ordinal < 0 || ordinal >= settings().devices) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}
API cuDeviceGetName(char *name, int length, CUdevice) {
    int cc = settings().capability;
    snprintf(name, length, "Stand-in GPU %d.%d", cc / 10, cc % 10);
    return CUDA_SUCCESS;
}
API cuDeviceTotalMem_v2(size_t *bytes, CUdevice) {
    *bytes = settings().memory;
    return CUDA_SUCCESS;
}
API cuMemGetInfo_v2(size_t *unused, size_t *all) {
    CALL("cuMemGetInfo", CUDA_ERROR_UNKNOWN);
    std::lock_guard<std::mutex> guard(lock);
    *unused = settings().memory - live_bytes;
    *all = settings().memory;
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid, 7 + device, sizeof *uuid);
    return CUDA_SUCCESS;
}
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = settings().capability / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = settings().capability % 10; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = max_shared(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = max_shared() + 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = processors(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = threads_per_processor(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
        case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: *value = 512; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: *value = 1; break;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
        default:
            fprintf(stderr, "cuda-sim: attribute %d of a device is not known, 0\n", attribute);
            *value = 0;
    }
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    started();
    CALL("cuDevicePrimaryCtxRetain", CUDA_ERROR_OUT_OF_MEMORY);
    *context = (CUcontext)(0x1000ul + device);
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
static thread_local CUcontext current = (CUcontext)0x1000;
API cuCtxSetCurrent(CUcontext context) {
    CALL("cuCtxSetCurrent", CUDA_ERROR_INVALID_CONTEXT);
    current = context;
    return CUDA_SUCCESS;
}
API cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}
API cuCtxSynchronize() {
    WORK("cuCtxSynchronize", CUDA_ERROR_LAUNCH_FAILED);
    std::lock_guard<std::mutex> guard(lock);
    syncs++;
    return CUDA_SUCCESS;
}
API cuGetErrorName(CUresult code, const char **name) {
    for (const Error &e : errors)
        if (e.code == code) return *name = e.name, CUDA_SUCCESS;
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(CUresult code, const char **text) {
    for (const Error &e : errors)
        if (e.code == code) return *text = e.text, CUDA_SUCCESS;
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// ---- streams and events --------------------------------------------------------------------------

API cuStreamCreate(CUstream *stream, unsigned) {
    CALL("cuStreamCreate", CUDA_ERROR_OUT_OF_MEMORY);
    std::lock_guard<std::mutex> guard(lock);
    *stream = (CUstream)(unsigned long)(++next_stream);
    say("stream", "", 0, nullptr, nullptr, 0, *stream);
    return CUDA_SUCCESS;
}
API cuStreamDestroy_v2(CUstream) { return CUDA_SUCCESS; }
API cuStreamSynchronize(CUstream stream) {
    WORK("cuStreamSynchronize", CUDA_ERROR_LAUNCH_FAILED);
    std::lock_guard<std::mutex> guard(lock);
    syncs++;
    say("sync", "", 0, nullptr, nullptr, 0, stream);
    return CUDA_SUCCESS;
}
API cuStreamWaitEvent(CUstream stream, CUevent, unsigned) {
    WORK("cuStreamWaitEvent", CUDA_ERROR_INVALID_HANDLE);
    std::lock_guard<std::mutex> guard(lock);
    say("wait_event", "", 0, nullptr, nullptr, 0, stream);
    return CUDA_SUCCESS;
}
API cuEventCreate(CUevent *event, unsigned) {
    CALL("cuEventCreate", CUDA_ERROR_OUT_OF_MEMORY);
    *event = (CUevent)calloc(1, sizeof(long));
    return CUDA_SUCCESS;
}
API cuEventRecord(CUevent event, CUstream stream) {
    WORK("cuEventRecord", CUDA_ERROR_LAUNCH_FAILED);
    std::lock_guard<std::mutex> guard(lock);
    *(long *)event = now();
    say("record", "", 0, nullptr, nullptr, 0, stream);
    return CUDA_SUCCESS;
}
API cuEventSynchronize(CUevent) {
    WORK("cuEventSynchronize", CUDA_ERROR_LAUNCH_FAILED);
    std::lock_guard<std::mutex> guard(lock);
    syncs++;
    say("event_sync");
    return CUDA_SUCCESS;
}
API cuEventQuery(CUevent) {
    WORK("cuEventQuery", CUDA_ERROR_LAUNCH_FAILED);
    return CUDA_SUCCESS;
}
API cuEventDestroy_v2(CUevent event) {
    free(event);
    return CUDA_SUCCESS;
}
API cuEventElapsedTime(float *ms, CUevent from, CUevent to) {
    *ms = (float)(*(long *)to - *(long *)from) * 1e-6f;
    return CUDA_SUCCESS;
}

// ---- memory --------------------------------------------------------------------------------------

API cuMemAlloc_v2(CUdeviceptr *p, size_t size) {
    CALL("cuMemAlloc", CUDA_ERROR_OUT_OF_MEMORY);
    return allocate(p, size, nullptr);
}
API cuMemAllocAsync(CUdeviceptr *p, size_t size, CUstream stream) {
    CALL("cuMemAllocAsync", CUDA_ERROR_OUT_OF_MEMORY);
    return allocate(p, size, stream);
}
API cuMemFree_v2(CUdeviceptr p) {
    CALL("cuMemFree", CUDA_ERROR_INVALID_VALUE);
    return give_back(p);
}
API cuMemFreeAsync(CUdeviceptr p, CUstream) {
    CALL("cuMemFreeAsync", CUDA_ERROR_INVALID_VALUE);
    return give_back(p);
}
API cuMemAllocHost_v2(void **p, size_t size) {
    CALL("cuMemAllocHost", CUDA_ERROR_OUT_OF_MEMORY);
    std::lock_guard<std::mutex> guard(lock);
    *p = reserve(size);
    if (!*p) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned[(unsigned long)*p] = size;
    pinned_bytes += size;
    pinned_peak = std::max(pinned_peak, pinned_bytes);
    say("pinned", "", 0, nullptr, nullptr, 0, nullptr, size);
    return CUDA_SUCCESS;
}
API cuMemFreeHost(void *p) {
    CALL("cuMemFreeHost", CUDA_ERROR_INVALID_VALUE);
    std::lock_guard<std::mutex> guard(lock);
    auto it = pinned.find((unsigned long)p);
    if (it == pinned.end()) return CUDA_ERROR_INVALID_VALUE;
    pinned_bytes -= it->second;
    say("pinned_free", "", 0, nullptr, nullptr, 0, nullptr, it->second);
    release(p, it->second);
    pinned.erase(it);
    return CUDA_SUCCESS;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    WORK("cuMemcpyHtoDAsync", CUDA_ERROR_ILLEGAL_ADDRESS);
    return copy(to, 0, nullptr, from, size, stream);
}
API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    WORK("cuMemcpyHtoD", CUDA_ERROR_ILLEGAL_ADDRESS);
    return copy(to, 0, nullptr, from, size, nullptr);
}
API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    WORK("cuMemcpyDtoHAsync", CUDA_ERROR_ILLEGAL_ADDRESS);
    return copy(0, from, to, nullptr, size, stream);
}
API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    WORK("cuMemcpyDtoH", CUDA_ERROR_ILLEGAL_ADDRESS);
    return copy(0, from, to, nullptr, size, nullptr);
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    WORK("cuMemcpyDtoDAsync", CUDA_ERROR_ILLEGAL_ADDRESS);
    return copy(to, from, nullptr, nullptr, size, stream);
}
API cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *c, CUstream stream) {
    WORK("cuMemcpy2DAsync", CUDA_ERROR_ILLEGAL_ADDRESS);
    bool from_device = c->srcMemoryType == CU_MEMORYTYPE_DEVICE, to_device = c->dstMemoryType == CU_MEMORYTYPE_DEVICE;
    size_t size = c->WidthInBytes * c->Height;
    std::lock_guard<std::mutex> guard(lock);
    (to_device ? copies_in : copies_out)++;
    (to_device ? bytes_in : bytes_out) += size;
    say(to_device ? "htod" : "dtoh", "", 0, nullptr, nullptr, 0, stream, size);
    if (c->Height > 1 && ((c->srcPitch && c->srcPitch < c->WidthInBytes) || (c->dstPitch && c->dstPitch < c->WidthInBytes)))
        return complain(CUDA_ERROR_INVALID_VALUE, "copy with a pitch (%zu, %zu) below the width", c->srcPitch, c->dstPitch);
    const char *from = from_device ? (char *)c->srcDevice : (char *)c->srcHost;
    char *to = to_device ? (char *)c->dstDevice : (char *)c->dstHost;
    from += c->srcY * c->srcPitch + c->srcXInBytes;
    to += c->dstY * c->dstPitch + c->dstXInBytes;
    if (!size) return CUDA_SUCCESS;
    size_t from_span = (c->Height - 1) * c->srcPitch + c->WidthInBytes, to_span = (c->Height - 1) * c->dstPitch + c->WidthInBytes;
    const sim::Allocation *target = to_device ? allocation_of((unsigned long)to, to_span) : nullptr;
    if ((to_device && !target) || (from_device && !allocation_of((unsigned long)from, from_span)))
        return complain(CUDA_ERROR_INVALID_VALUE, "copy of %zu bytes in two dimensions %s what is not allocated", size, to_device ? "to" : "from");
    for (size_t y = 0; y < c->Height; y++) {
        if (target) sim::mark_written(*target, (unsigned long)(to + y * c->dstPitch) - target->base, c->WidthInBytes);
        if (size <= settings().copy_max) memcpy(to + y * c->dstPitch, from + y * c->srcPitch, c->WidthInBytes);
    }
    return CUDA_SUCCESS;
}
API cuMemsetD8Async(CUdeviceptr p, unsigned char value, size_t size, CUstream stream) {
    WORK("cuMemsetD8Async", CUDA_ERROR_ILLEGAL_ADDRESS);
    return fill(p, &value, 1, size, stream);
}
API cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t count, CUstream stream) {
    WORK("cuMemsetD32Async", CUDA_ERROR_ILLEGAL_ADDRESS);
    return fill(p, &value, 4, count, stream);
}

// ---- modules and launches ------------------------------------------------------------------------

API cuModuleLoadData(CUmodule *out, const void *image) {
    CALL("cuModuleLoadData", CUDA_ERROR_INVALID_PTX);
    auto *m = new Module;
    std::lock_guard<std::mutex> guard(lock);
    m->id = ++next_module;
    const char *text = (const char *)image;
    // The NVRTC stand-in returns this instead of PTX.
    static const char mark[] = "//HOSTMODULE ";
    if (!strncmp(text, mark, sizeof mark - 1)) {
        std::string rest = text + sizeof mark - 1;
        if (CUresult error = load_host_module(rest.substr(0, rest.find('\n')), m)) return error;
    } else {
        parse_ptx(text, m);
        if (!settings().dump.empty()) {
            std::string path = settings().dump + "/module" + std::to_string(m->id) + ".ptx";
            if (FILE *f = fopen(path.c_str(), "w")) {
                fputs(text, f);
                fclose(f);
            }
        }
    }
    for (auto &f : m->functions) say("module", f.first.c_str(), m->id, nullptr, nullptr, f.second->static_shared);
    *out = (CUmodule)m;
    return CUDA_SUCCESS;
}
API cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    CALL("cuModuleGetFunction", CUDA_ERROR_NOT_FOUND);
    auto &functions = ((Module *)module)->functions;
    auto it = functions.find(name);
    if (it == functions.end()) return complain(CUDA_ERROR_NOT_FOUND, "no function %s", name);
    *out = (CUfunction)it->second;
    return CUDA_SUCCESS;
}
API cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
    CALL("cuFuncSetAttribute", CUDA_ERROR_INVALID_VALUE);
    auto *function = (Function *)f;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || (size_t)value + function->static_shared > max_shared())
            return complain(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of shared memory wanted", function->name.c_str(), value);
        function->dynamic_limit = value;
    }
    return CUDA_SUCCESS;
}
API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    auto *function = (Function *)f;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->max_threads ? (int)function->max_threads : 1024; break;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = (int)function->static_shared; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->dynamic_limit; break;
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = settings().capability; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;  // not known here: see ptxas.py
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int threads, size_t shared) {
    size_t by_shared = (max_shared() + 1024) / (shared + ((Function *)f)->static_shared + 1024);
    *blocks = std::min<int>({threads_per_processor() / std::max(threads, 1), (int)by_shared, 32});
    return CUDA_SUCCESS;
}
API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,
                   void **params, void **) {
    WORK("cuLaunchKernel", CUDA_ERROR_LAUNCH_FAILED);
    const unsigned g[3] = {gx, gy, gz}, b[3] = {bx, by, bz};
    return launch((Function *)f, g, b, shared, stream, params);
}
API cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                              CUstream stream, void **params) {
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, params, nullptr);
}
API cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, params,
                          extra);
}

// ---- tensor maps ---------------------------------------------------------------------------------

// The map's 128 bytes hold what the CPU device needs to copy a box; shim/sim/copy.h reads them.
struct SimMap {
    unsigned long base;
    unsigned magic, rank, type, swizzle, fill;
    unsigned box[5];
    unsigned dims[5];
    unsigned long strides[4];
};
static_assert(sizeof(SimMap) <= sizeof(CUtensorMap), "fits");

API cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base, const cuuint64_t *dims,
                           const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    CALL("cuTensorMapEncodeTiled", CUDA_ERROR_INVALID_VALUE);
    static const size_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 1, 1, 1};
    size_t element = sizes[type];
    std::lock_guard<std::mutex> guard(lock);
    say("tensor_map", "tiled", rank, nullptr, nullptr, 0, nullptr, (size_t)box[0] * (rank > 1 ? box[1] : 1) * element);
    auto wrong = [&](const char *what, unsigned long value) { return complain(CUDA_ERROR_INVALID_VALUE, "tensor map: %s (%lu)", what, value); };
    if ((unsigned long)map % 64) return wrong("not aligned to 64", (unsigned long)map % 64);
    if ((unsigned long)base % 16) return wrong("base not aligned to 16", (unsigned long)base % 16);
    if (!allocation_of((unsigned long)base)) return wrong("base is no live allocation", (unsigned long)base);
    if (rank < 1 || rank > 5) return wrong("rank", rank);
    for (unsigned i = 0; i < rank; i++) {
        if (!dims[i] || dims[i] > (1ull << 32)) return wrong("dimension", dims[i]);
        if (!box[i] || box[i] > 256) return wrong("box", box[i]);
        if (!steps[i] || steps[i] > 8) return wrong("element stride", steps[i]);
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (1ull << 40))) return wrong("stride", strides[i]);
    }
    if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
        if (box[0] * element % 16) return wrong("inner box bytes not a multiple of 16", box[0] * element);
        size_t most = swizzle == 0 ? SIZE_MAX : swizzle == 1 ? 32 : swizzle == 2 ? 64 : 128;
        if (box[0] * element > most) return wrong("inner box wider than the swizzle", box[0] * element);
    }
    memset(map, 0, sizeof *map);
    auto *sim = (SimMap *)map;
    sim->base = (unsigned long)base;
    sim->magic = 0x51a0;
    sim->rank = rank;
    sim->type = type;
    sim->swizzle = swizzle;
    sim->fill = fill;
    for (unsigned i = 0; i < rank; i++) {
        sim->box[i] = box[i];
        sim->dims[i] = (unsigned)dims[i];
        if (i + 1 < rank && i < 4) sim->strides[i] = strides[i];
    }
    return CUDA_SUCCESS;
}
API cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *, const cuuint64_t *, const cuuint64_t *, const int *,
                            const int *, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    CALL("cuTensorMapEncodeIm2col", CUDA_ERROR_INVALID_VALUE);
    std::lock_guard<std::mutex> guard(lock);
    say("tensor_map", "im2col", rank, nullptr, nullptr, 0, nullptr, (size_t)channels * pixels);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
