// A stand-in for NVIDIA's run-time compiler (libnvrtc.so): forwards to the real one and caches its inputs and
// outputs, or compiles for the host instead (SIM_HOST=1). README.md in this folder describes how it is built
// and which environment variables it reads.
#include <dirent.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <regex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int
typedef struct Program {
    std::string source, log, ptx;
} *Handle;

namespace {

constexpr int COMPILATION = 6, INTERNAL_ERROR = 11;  // values of nvrtcResult

const char *env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : nullptr;
}
bool on(const char *name) { return env(name) && atoi(env(name)); }

void *real(const char *name) {
    static void *library = [] {
        const char *path = env("SIM_REAL_NVRTC");
        void *l = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (!l) fprintf(stderr, "cuda-sim: SIM_REAL_NVRTC: %s\n", path ? dlerror() : "not set");
        return l;
    }();
    return library ? dlsym(library, name) : nullptr;
}

bool read(const std::string &path, std::string &to) {
    FILE *f = fopen(path.c_str(), "rb");
    if (!f) return false;
    to.clear();
    char buffer[65536];
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, f)) > 0) to.append(buffer, n);
    fclose(f);
    return true;
}
// Writes a file atomically, as several processes may write it.
void write(const std::string &path, const std::string &text) {
    std::string temporary = path + "." + std::to_string(getpid());
    if (FILE *f = fopen(temporary.c_str(), "wb")) {
        fwrite(text.data(), 1, text.size(), f);
        fclose(f);
        rename(temporary.c_str(), path.c_str());
    }
}
void append(const std::string &path, const std::string &line) {
    if (FILE *f = fopen(path.c_str(), "a")) {
        fputs(line.c_str(), f);
        fclose(f);
    }
}
uint64_t hash(const std::string &text, uint64_t h = 1469598103934665603ull) {
    for (unsigned char c : text) h = (h ^ c) * 1099511628211ull;
    return h;
}
double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// The folder of host_kernel.py and the shim.
std::string sources() { return env("SIM_SOURCES") ? env("SIM_SOURCES") : SIM_SOURCES; }

std::string folder() {
    static const std::string path = [] {
        std::string p = env("SIM_CACHE") ? env("SIM_CACHE") : ".";
        for (size_t at = 1; at != std::string::npos;) {
            at = p.find('/', at + 1);
            mkdir(p.substr(0, at).c_str(), 0777);
        }
        return p;
    }();
    return path;
}

// Everything except the source that a compiled program depends on.
uint64_t hash_of_tools() {
    static const uint64_t result = [] {
        uint64_t h = hash("tools");
        std::vector<std::string> files = {sources() + "/host_kernel.py"}, folders = {sources() + "/shim"};
        while (!folders.empty()) {
            std::string at = folders.back();
            folders.pop_back();
            DIR *d = opendir(at.c_str());
            while (dirent *e = d ? readdir(d) : nullptr) {
                if (e->d_name[0] == '.') continue;
                (e->d_type == DT_DIR ? folders : files).push_back(at + "/" + e->d_name);
            }
            if (d) closedir(d);
        }
        std::sort(files.begin(), files.end());
        for (auto &f : files) {
            std::string text;
            read(f, text);
            h = hash(text, h);
        }
        // -march=native
        std::string cpu;
        read("/proc/cpuinfo", cpu);
        size_t flags = cpu.find("\nflags"), end = cpu.find('\n', flags + 1);
        if (flags != std::string::npos) h = hash(cpu.substr(flags, end - flags), h);
        for (const char *name : {"SIM_OPT", "SIM_FLAGS"}) h = hash(env(name) ? env(name) : "", h);
        return h;
    }();
    return result;
}

// Adjacent lines that declare CubeCL's variables, in any order.
bool free_declaration(const std::string &line) {
    static const std::regex local(R"(\w+ l_mut_\d+;\n)");
    static const std::regex shared(R"([\w:<>]+ \*shared_memory_\d+ = reinterpret_cast<[\w:<> ]+\*>\(&dynamic_shared_mem\[\d+\]\);\n)");
    return line.size() < 300 && (line.find("l_mut_") != std::string::npos || line.find("shared_memory_") != std::string::npos) &&
           (std::regex_match(line, local) || std::regex_match(line, shared));
}

// CubeCL writes type definitions and variables in an order that differs between processes. For the hash
// they are sorted: the definitions before the first function, each as a whole, and the declarations.
// None of them depends on the order.
std::string normalised(const std::string &source) {
    size_t end = std::min(source.find("__device__"), source.find("__global__"));
    if (end == std::string::npos) return source;
    end = source.rfind('\n', end);
    if (end == std::string::npos) return source;
    std::vector<std::string> pieces;
    std::string all, piece;
    int depth = 0;
    for (size_t i = 0; i <= end; i++) {
        char c = source[i];
        piece += c;
        depth += c == '{' ? 1 : c == '}' ? -1 : 0;
        if (c == '\n' && depth == 0) {
            if (piece != "\n") pieces.push_back(piece);
            // Macros and conditions depend on their position.
            if (piece[0] == '#' && piece.compare(0, 8, "#include")) return source;
            piece.clear();
        }
    }
    if (depth != 0) return source;
    auto flush = [&] {
        std::sort(pieces.begin(), pieces.end());
        for (auto &p : pieces) all += p;
        pieces.clear();
    };
    flush();
    all += piece;
    for (size_t at = end + 1; at < source.size();) {
        size_t next = source.find('\n', at);
        next = next == std::string::npos ? source.size() : next + 1;
        std::string line = source.substr(at, next - at);
        at = next;
        if (line.compare(0, 2, "//") == 0) continue;
        if (free_declaration(line)) {
            pieces.push_back(line);
        } else {
            flush();
            all += line;
        }
    }
    flush();
    return all;
}

std::string quoted(const std::string &text) {
    std::string out = "'";
    for (char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return out + "'";
}

std::string kernel_name(const std::string &source) {
    static const std::regex head(R"(__global__\s+(?:\w+\s+)?(?:__\w+__\s*\([^)]*\)\s*)*(?:void\s+)?(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\s*\()");
    std::smatch m;
    size_t at = source.find("__global__");
    if (at == std::string::npos) return "";
    std::string rest = source.substr(at, 2000);
    return std::regex_search(rest, m, head) ? m[1].str() : "";
}

// Whether the hazard detector is enabled for this kernel.
bool checked(const std::string &source) {
    if (!on("SIM_CHECK")) return false;
    return !env("SIM_CHECK_ONLY") || std::regex_search(kernel_name(source), std::regex(env("SIM_CHECK_ONLY")));
}

int compile_for_host(Handle p, const std::string &base, const std::vector<std::string> &defines, bool check) {
    std::string command = "python3 " + quoted(sources() + "/host_kernel.py") + " " + quoted(base + ".cu") + " " + quoted(base + ".so");
    if (check) command += " --checked";
    for (auto &d : defines) command += " " + quoted(d);
    // The name of the log contains the process id, as another process may compile the same program.
    std::string log = base + ".log." + std::to_string(getpid());
    int result = system((command + " > " + quoted(log) + " 2>&1").c_str()) ? COMPILATION : 0;
    read(log, p->log);
    unlink(log.c_str());
    p->ptx = "//HOSTMODULE " + base + ".so\n";
    return result;
}

int compile_for_device(Handle p, const std::vector<std::string> &options) {
    typedef int (*Create)(void **, const char *, const char *, int, const char *const *, const char *const *);
    typedef int (*Compile)(void *, int, const char *const *);
    typedef int (*Size)(void *, size_t *);
    typedef int (*Text)(void *, char *);
    typedef int (*Destroy)(void **);
    if (!real("nvrtcCreateProgram")) {
        p->log = "SIM_REAL_NVRTC names no NVRTC";
        return INTERNAL_ERROR;
    }
    void *program = nullptr;
    std::vector<const char *> list;
    for (auto &o : options) list.push_back(o.c_str());
    ((Create)real("nvrtcCreateProgram"))(&program, p->source.c_str(), nullptr, 0, nullptr, nullptr);
    int result = ((Compile)real("nvrtcCompileProgram"))(program, (int)list.size(), list.data());
    size_t size = 0;
    ((Size)real("nvrtcGetProgramLogSize"))(program, &size);
    p->log.resize(size);
    ((Text)real("nvrtcGetProgramLog"))(program, &p->log[0]);
    if (!result) {
        ((Size)real("nvrtcGetPTXSize"))(program, &size);
        p->ptx.resize(size);
        ((Text)real("nvrtcGetPTX"))(program, &p->ptx[0]);
    }
    ((Destroy)real("nvrtcDestroyProgram"))(&program);
    for (std::string *text : {&p->log, &p->ptx})
        while (!text->empty() && text->back() == 0) text->pop_back();
    return result;
}

}  // namespace

API nvrtcVersion(int *major, int *minor) {
    *major = 12;
    *minor = 8;
    return 0;
}
extern "C" __attribute__((visibility("default"))) const char *nvrtcGetErrorString(int code) {
    static const char *names[] = {"NVRTC_SUCCESS", "NVRTC_ERROR_OUT_OF_MEMORY", "NVRTC_ERROR_PROGRAM_CREATION_FAILURE", "NVRTC_ERROR_INVALID_INPUT",
                                  "NVRTC_ERROR_INVALID_PROGRAM", "NVRTC_ERROR_INVALID_OPTION", "NVRTC_ERROR_COMPILATION",
                                  "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE", "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
                                  "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION", "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
                                  "NVRTC_ERROR_INTERNAL_ERROR"};
    return code >= 0 && code <= 11 ? names[code] : "NVRTC_ERROR unknown";
}
API nvrtcCreateProgram(Handle *out, const char *source, const char *, int, const char *const *, const char *const *) {
    *out = new Program;
    (*out)->source = source;
    return 0;
}
API nvrtcDestroyProgram(Handle *program) {
    delete *program;
    *program = nullptr;
    return 0;
}
API nvrtcCompileProgram(Handle p, int count, const char *const *given) {
    bool host = on("SIM_HOST"), check = host && checked(p->source);
    if (env("SIM_NVRTC_FAIL") && std::regex_search(p->source, std::regex(env("SIM_NVRTC_FAIL")))) {
        p->log = kernel_name(p->source) + ": fails to compile on request (SIM_NVRTC_FAIL)";
        fprintf(stderr, "cuda-sim: %s\n", p->log.c_str());
        return COMPILATION;
    }
    std::vector<std::string> options(given, given + count), defines;
    std::string key;
    for (auto &o : options) {
        if (env("SIM_ARCH") && o.compare(0, 19, "--gpu-architecture=") == 0) o = "--gpu-architecture=" + std::string(env("SIM_ARCH"));
        bool define = o.compare(0, 2, "-D") == 0;
        if (define) defines.push_back(o);
        // The path of the headers does not matter, nor does the device when compiling for the host.
        bool path = o.compare(0, 2, "-I") == 0 || o.compare(0, 14, "--include-path") == 0;
        if (host ? define : !path) key += o + "\n";
    }
    uint64_t h = hash(key + (host ? check ? "checked host\n" : "host\n" : "device\n"));
    if (host) h ^= hash_of_tools();
    char name[64];
    snprintf(name, sizeof name, "%016lx", hash(normalised(p->source), h));
    std::string base = folder() + "/" + name;
    if (read(base + ".ptx", p->ptx) && (!host || access((base + ".so").c_str(), R_OK) == 0)) {
        append(folder() + "/use.csv", std::string(name) + ",again\n");
        return 0;
    }
    write(base + ".cu", p->source);
    double began = now();
    int result = host ? compile_for_host(p, base, defines, check) : compile_for_device(p, options);
    double took = now() - began;
    if (!p->log.empty()) write(base + ".log", p->log);
    if (!result) write(base + ".ptx", p->ptx);
    char line[300];
    snprintf(line, sizeof line, "%s,%d,%.3f,%zu,%zu,%s,%s\n", name, result, took, p->source.size(), p->ptx.size(), host ? check ? "checked" : "host" : "device",
             kernel_name(p->source).substr(0, 100).c_str());
    append(folder() + "/compile.csv", line);
    if (result) fprintf(stderr, "cuda-sim: %s.cu does not compile, see the .log\n", base.c_str());
    return result;
}
API nvrtcGetPTXSize(Handle p, size_t *size) {
    *size = p->ptx.size() + 1;
    return 0;
}
API nvrtcGetPTX(Handle p, char *to) {
    memcpy(to, p->ptx.c_str(), p->ptx.size() + 1);
    return 0;
}
API nvrtcGetProgramLogSize(Handle p, size_t *size) {
    *size = p->log.size() + 1;
    return 0;
}
API nvrtcGetProgramLog(Handle p, char *to) {
    memcpy(to, p->log.c_str(), p->log.size() + 1);
    return 0;
}
