#!/usr/bin/env python3
"""Compiles a CUDA C++ source for the host, for the stand-in driver.

    host_kernel.py SOURCE.cu OUTPUT.so [--checked] [-DNAME=VALUE ...]

Takes sources that CubeCL generated, and hand-written ones that keep inline PTX under
`#ifndef KILN_HOST_SIM`. Lines keep their numbers, so that messages name those of the source.

    SIM_CACHE   folder for the precompiled headers; that of OUTPUT otherwise
    SIM_OPT     level of optimisation, -O1
    SIM_FLAGS   more options of g++
"""
import fcntl
import hashlib
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SHIM = os.path.join(HERE, "shim")


class Unsupported(Exception):
    """A feature that the CPU device does not support."""


def line_of(text, at):
    return text.count("\n", 0, at) + 1


def without_comments(text):
    """Blanks comments and keeps the line numbers."""
    blank = lambda m: m.group(0) if m.group(0)[0] in "\"'" else re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', blank, text, flags=re.S)


def for_the_host(text):
    """Blanks the parts that are not compiled with KILN_HOST_SIM and keeps the line numbers."""
    out, stack = [], []  # [whether the condition is KILN_HOST_SIM, whether lines are kept]
    for line in text.split("\n"):
        if m := re.match(r"\s*#\s*(ifdef|ifndef|if|else|elif|endif)\b(.*)", line):
            word, rest = m.group(1), m.group(2)
            if word in ("ifdef", "ifndef", "if"):
                ours = "KILN_HOST_SIM" in rest
                negated = word == "ifndef" or (word == "if" and "!" in rest)
                stack.append([ours, not negated if ours else True])
            elif word in ("else", "elif") and stack and stack[-1][0]:
                stack[-1][1] = not stack[-1][1]
            elif word == "endif" and stack:
                stack.pop()
            out.append(line)
        else:
            out.append(line if all(kept for _, kept in stack) else "")
    return "\n".join(out)


def end_of_braces(text, start):
    """The position after the closing brace of the first block after `start`."""
    depth, at = 0, text.index("{", start)
    while True:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
        if depth == 0:
            return at


def split_arguments(text):
    parts, depth, last = [], 0, ""
    for c in text:
        if c == "," and depth == 0:
            parts.append(last.strip())
            last = ""
        else:
            depth += {"(": 1, "[": 1, "{": 1, "<": 1, ")": -1, "]": -1, "}": -1, ">": -1}.get(c, 0)
            last += c
    return parts + ([last.strip()] if last.strip() else [])


# ---- sources of CubeCL ----------------------------------------------------------------------------


def mma_function(name, arguments):
    k, types = re.match(r"__mma_m16n8k(\d+)_(.*)", name).groups()
    element = next((t for t in ("__half", "__nv_bfloat16") if types.startswith(t)), "float")
    if not types.startswith((element, "tf32")):
        raise Unsupported(f"{name}: mma on {types}")
    group = lambda letter: [a.split("&")[-1].strip() for a in arguments if f"reg_{letter}_" in a]
    a, b, c, d = (group(x) for x in "abcd")
    bits = lambda registers: ", ".join(f"sim_bits({x})" for x in registers)
    return (
        f"inline void {name}({', '.join(arguments)}) {{ uint32_t a[] = {{{bits(a)}}}, b[] = {{{bits(b)}}}; "
        f"float c[] = {{{', '.join(c)}}}, d[4]; sim::mma<{element}, {k}>(a, b, c, d); "
        + " ".join(f"{x} = d[{i}];" for i, x in enumerate(d))
        + " }"
    )


def rows_function(name, arguments):
    registers = [a.split("&")[-1].strip() for a in arguments[:-1]]
    load = name.startswith("__ldmatrix")
    transposed = "true" if name.endswith("_trans") else "false"
    return (
        f"inline void {name}({', '.join(arguments)}) {{ {'' if load else 'const '}uint32_t *r[] = "
        f"{{{', '.join('&' + x for x in registers)}}}; sim::{'ld' if load else 'st'}matrix(r, {len(registers)}, {transposed}, row_addr); }}"
    )


def replace_ptx_functions(text):
    """Replaces CubeCL's wrappers of single PTX instructions by calls of the shim."""
    head = re.compile(
        r"(?:template <(?:size_t _Copy_size)?>\s*)?inline __device__ void\s+"
        r"(__(?:mma|ldmatrix|stmatrix|cp_async)\w*|tma_load_im2col_\w+)(?:<16>)?\s*\("
    )
    missing = []
    at = 0
    while m := head.search(text, at):
        name, end = m.group(1), end_of_braces(text, m.start())
        parameters = text[m.end() : text.index("{", m.start())].rstrip()[:-1]
        arguments = [re.sub(r"\s+", " ", a) for a in split_arguments(parameters)]
        new = ""
        if name.startswith("__mma_m16n8k"):
            new = mma_function(name, arguments)
        elif name.startswith(("__ldmatrix", "__stmatrix")):
            new = rows_function(name, arguments)
        elif not name.startswith("__cp_async"):
            missing.append(name)
        new += "\n" * text.count("\n", m.start(), end)
        text = text[: m.start()] + new + text[end:]
        at = m.start() + len(new)
    for name in missing:
        if called := re.search(rf"\b{name}\s*\(", text):
            raise Unsupported(f"{name} (line {line_of(text, called.start())})")
    text = re.sub(
        r"\(\[&\]\(\) -> \w+ \{\s*\w+ pred = 0;\s*asm volatile\(.*?\);\s*return pred;\s*\}\(\)\)",
        lambda m: "(sim_elect())" + "\n" * m.group(0).count("\n"),
        text,
        flags=re.S,
    )
    return text.replace("__cp_async_arrive(", "sim_cp_async_arrive(")


def add_steps(text):
    """Inserts `sim::step()`, which runs the lanes of a warp in lockstep. Generated kernels rely on it: their lanes
    read shared memory that other lanes of the warp wrote, without synchronisation."""
    out, last, temporaries = [], None, set()
    for line in text.split("\n"):
        if m := re.search(r"\*(_tmp_\d+) = reinterpret_cast<.*>\(shared_memory_", line):
            temporaries.add(m.group(1))
        if re.search(r"__sync|_sync\(", line) or line.rstrip().endswith("{"):
            last = "start"
        access = None
        m = re.match(r"\s*(\w+)\[", line)
        if re.search(r"^\s*(shared_memory_\d+)\[[^\]]*\](\.\w+)? =", line) or (m and m.group(1) in temporaries):
            access = "write"
        elif re.search(r"shared_memory_\d+\[", line):
            access = "read"
        if access and access != last:
            before = out[-1].rstrip() if out else ";"
            if not before or before.endswith(("{", "}", ";", ">", ")")):
                line = "sim::step(); " + line
            last = access
        out.append(line)
    return "\n".join(out)


# ---- any source ----------------------------------------------------------------------------------


def replace_shared(text):
    """Replaces declarations of shared memory by references to that of the block."""

    def depth(at):
        return text.count("{", 0, at) - text.count("}", 0, at)

    attributes = r"(?:(?:__align__|alignas)\s*\(\s*\w+\s*\)\s*)?"

    def dynamic(m):
        kind, name = m.group(1).strip(), m.group(2)
        if depth(m.start()) == 0:
            return f"#define {name} (({kind} *)sim::dynamic_shared())"
        return f"{kind} *{name} = ({kind} *)sim::dynamic_shared();"

    text = re.sub(rf"extern\s+__shared__\s+{attributes}([\w:\s]+?)\s*{attributes}(\w+)\s*\[\s*\]\s*;", dynamic, text)

    def variable(m):
        if depth(m.start()) == 0:
            raise Unsupported(f"a shared variable outside of a function (line {line_of(text, m.start())})")
        declarators = split_arguments(m.group(1))
        first = re.match(rf"(.*?[\s>&*])(\w+)\s*((?:\[[^\]]*\]\s*)*)$", declarators[0], re.S)
        kind, new = re.sub(r"\s+", " ", first.group(1)).strip(), []
        for number, d in enumerate(declarators):
            name, dims = (first.group(2), first.group(3)) if number == 0 else re.match(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)$", d, re.S).groups()
            dims = re.sub(r"\s+", " ", dims).strip()
            new.append(
                f"struct sim_tag_{name} {{}}; using sim_type_{name} = {kind}{dims}; "
                f"sim_type_{name} &{name} = sim::shared_variable<sim_tag_{name}, sim_type_{name}>();"
            )
        return " ".join(new) + "\n" * m.group(0).count("\n")

    return re.sub(rf"(?:static\s+)?\b__shared__\s+{attributes}([^;=]+);", variable, text)


def entries(text):
    """Converts the kernels to plain functions. Returns their names and launch bounds, and the text."""
    found, at = [], 0
    head = re.compile(r'extern\s+"C"\s+__global__')
    while m := head.search(text, at):
        text = text[: m.start()] + "static" + "\n" * m.group(0).count("\n") + text[m.end() :]
        at = m.start() + len("static")
        bounds, here = "0", at
        while True:
            word = re.compile(r"\s*(\w+)\s*").match(text, here)
            here = word.end()
            if here < len(text) and text[here] == "(":
                end, level = here, 0
                while True:
                    level += {"(": 1, ")": -1}.get(text[end], 0)
                    end += 1
                    if level == 0:
                        break
                if word.group(1) == "__launch_bounds__":
                    bounds = split_arguments(text[here + 1 : end - 1])[0]
                elif word.group(1) == "__cluster_dims__":
                    if any(a != "1" for a in split_arguments(text[here + 1 : end - 1])):
                        raise Unsupported(f"clusters of blocks (line {line_of(text, here)})")
                elif not word.group(1).startswith("__"):
                    found.append((word.group(1), bounds))
                    break
                here = end
    if not found:
        raise Unsupported('a source without extern "C" __global__ functions')
    return found, text


def refuse_unsupported(text):
    features = [
        (r"wgmma\.", "wgmma as inline PTX"),
        (r"__nv_fp[864]|cuda_fp[864]\.h", "8, 6 and 4 bit floats"),
        (r"\bmap_shared_rank\b|mapa\.shared|cluster\.sync|barrier\.cluster|shared::cluster\b", "clusters of blocks"),
        (r"\btex(?:1D|2D|3D|ture)\b", "textures"),
        (r"\basm\b", "inline PTX that is not under #ifndef KILN_HOST_SIM"),
    ]
    for pattern, name in features:
        if m := re.search(pattern, text):
            raise Unsupported(f"{name} (line {line_of(text, m.start())})")


def translate(text):
    plain = for_the_host(without_comments(replace_ptx_functions(text)))
    generated = re.search(r"\bshared_memory_\d+\b", plain) is not None
    refuse_unsupported(plain)
    # Threads without synchronisation need no fibers.
    waits = r"__sync|_sync\s*\(|\bbarrier\b|\bbarrier_|mma_|__mma|ldmatrix|stmatrix|\bsim_elect\b|cooperative_groups|_async|__shared__"
    synchronises = re.search(waits, plain) is not None
    if generated and re.search(r"__mma_m16|wmma::|__shfl", plain):
        plain = add_steps(plain)
    found, plain = entries(replace_shared(plain))
    fibered = "true" if synchronises else "false"
    table = ", ".join(f'sim::entry<&{name}, {fibered}>("{name}", {bounds})' for name, bounds in found)
    return plain + (
        '\nextern "C" SIM_QUIET __attribute__((visibility("default"))) const sim::Kernel *sim_kernels(size_t *count) {'
        f" static const sim::Kernel list[] = {{{table}}}; *count = {len(found)}; return list; }}\n"
    )


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.stdout.write(result.stdout + result.stderr)
        sys.exit(1)


def precompiled(flags, cache):
    """The folder with the shim precompiled for these flags; created by the first process that needs it."""
    key = hashlib.sha256(" ".join(flags).encode())
    for folder, _, names in sorted(os.walk(SHIM)):
        for name in sorted(names):
            with open(os.path.join(folder, name), "rb") as f:
                key.update(name.encode() + f.read())
    folder = os.path.join(cache, "shim-" + key.hexdigest()[:16])
    header = os.path.join(folder, "simcuda.h.gch")
    if not os.path.exists(header):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(header):
                run(["g++", *flags, "-x", "c++-header", os.path.join(SHIM, "simcuda.h"), "-o", header + ".new"])
                os.rename(header + ".new", header)
    return folder


def main():
    source, output = sys.argv[1:3]
    options = sys.argv[3:]
    checked = "--checked" in options
    defines = [o for o in options if o.startswith(("-D", "-U"))]
    flags = ["-std=c++17", os.environ.get("SIM_OPT") or "-O1", "-march=native", "-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti",
             "-fno-math-errno", "-fno-threadsafe-statics", "-fvisibility=hidden", "-fPIC", "-w", "-DKILN_HOST_SIM=1",
             *os.environ.get("SIM_FLAGS", "").split()]  # fmt: skip
    if checked:
        flags += ["-DSIM_CHECKED=1", "-g", "-fsanitize=thread", "-fsanitize=alignment", "--param=tsan-distinguish-volatile=1",
                  "--param=tsan-instrument-func-entry-exit=0"]  # fmt: skip
    with open(source) as f:
        text = f.read()
    try:
        text = translate(text)
    except Unsupported as e:
        print(f"{source}: the CPU device does not support {e}")
        sys.exit(1)
    # The .gch is found before the header, as its folder comes first.
    headers = precompiled(flags, os.environ.get("SIM_CACHE") or os.path.dirname(os.path.abspath(output)))
    temporary = f"{output[:-3]}.{os.getpid()}"
    with open(temporary + ".cpp", "w") as f:
        f.write(f'#line 1 "{os.path.basename(source)}"\n' + text)
    run(["g++", *flags, *defines, "-I", headers, "-I", SHIM, "-include", "simcuda.h", "-c", temporary + ".cpp", "-o", temporary + ".o"])
    # Linked without the sanitizer's option, as that would link its library.
    run(["g++", "-shared", "-Wl,-z,defs", temporary + ".o", "-o", temporary + ".so"])
    os.rename(temporary + ".so", output)
    os.remove(temporary + ".o")
    os.rename(temporary + ".cpp", output[:-3] + ".cpp")


if __name__ == "__main__":
    main()
