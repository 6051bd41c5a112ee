#!/usr/bin/env python3
"""Assembles compiled kernels with ptxas, and prints registers, spills and instruction counts.

    ptxas.py FOLDER [PATTERN] [--arch sm_90a] [--no-spills] [--ptxas PATH]

FOLDER has .ptx files, such as SIM_CACHE or SIM_DUMP. PATTERN is a regular expression that selects kernels by name.
ptxas is by default that of $CUDA_PATH/bin.
"""
import argparse
import glob
import os
import re
import subprocess
import sys

INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wmma": r"wmma\.mma",
    "wgmma": r"wgmma\.mma",
    "ldmatrix": r"\bldmatrix",
    "cp.async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk",
    "ld.global": r"ld\.global",
    "st.global": r"st\.global",
    "ld.shared": r"ld\.shared",
    "st.shared": r"st\.shared",
    "barrier": r"bar(?:rier)?\.sync",
    "mbarrier": r"mbarrier",
    "shuffle": r"shfl\.sync",
    "fma": r"fma\.rn",
    "exp2": r"ex2\.",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--ptxas", default=os.path.join(os.environ.get("CUDA_PATH", "/usr/local/cuda"), "bin", "ptxas"))
    parser.add_argument("--no-spills", action="store_true", help="exit with code 1 if a kernel spills or does not assemble, or if there is none")
    options = parser.parse_args()
    kernels = faults = 0
    for path in sorted(glob.glob(os.path.join(options.folder, "*.ptx")), key=os.path.getsize):
        with open(path) as f:
            text = f.read()
        names = [n for n in re.findall(r"\.entry\s+([\w$]+)", text) if re.search(options.pattern, n)]
        if not names:
            continue
        result = subprocess.run([options.ptxas, "-arch=" + options.arch, "-v", "-o", os.devnull, path], capture_output=True, text=True)
        if result.returncode:
            print(os.path.basename(path), " ".join(names), "does not assemble:", result.stderr.strip().splitlines()[0])
            faults += 1
            continue
        counts = {name: n for name, pattern in INSTRUCTIONS.items() if (n := len(re.findall(pattern, text)))}
        for name in names:
            # "Compiling entry function 'NAME' ...", its stack and spills, "Used N registers".
            part = result.stderr.partition(f"entry function '{name}'")[2]
            registers = re.search(r"Used (\d+) registers", part)
            stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
            kernels += 1
            faults += stack.group(2) != "0"
            shared = re.search(r"(\d+) bytes smem", part.partition("Compiling entry")[0])
            print(f"{os.path.basename(path)} {name}: {registers.group(1)} registers, {stack.group(1)} bytes of stack, "
                  f"{stack.group(2)} of spills, {shared.group(1) if shared else 0} of shared variables; "
                  + ", ".join(f"{n} {i}" for i, n in counts.items()), flush=True)  # fmt: skip
    if options.no_spills and (faults or not kernels):
        sys.exit(f"{faults} of {kernels} kernels spill or do not assemble")


if __name__ == "__main__":
    main()
