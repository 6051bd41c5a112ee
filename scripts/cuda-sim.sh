#!/usr/bin/env bash
# Stand-in CUDA devices for machines without a GPU: tests/cuda-sim/README.md.
#
#     . scripts/cuda-sim.sh           # defines cuda_sim_build and cuda_sim
#     cuda_sim null 90                # programs started from this shell get a device that computes nothing
#     cuda_sim cpu 80                 # or a device that runs kernels on the CPU
#
#     scripts/cuda-sim.sh cpu 80 COMMAND...    # runs one command with the device
#     scripts/cuda-sim.sh build                # only installs and builds
#
# The second argument is the compute capability times ten. $CARGO_TARGET_DIR/cuda-sim receives NVIDIA's
# packages from PyPI (NVRTC, headers, ptxas), the two libraries, and compiled kernels. Needs g++, binutils
# and Python 3 with pip.
# shellcheck shell=bash

cuda_sim_sources=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests/cuda-sim" && pwd)
cuda_sim_home=${CARGO_TARGET_DIR:-$HOME/.cache/kiln-target}/cuda-sim
cuda_sim_packages=(nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-runtime-cu12==12.8.90 nvidia-cuda-nvcc-cu12==12.8.93)

# Installs NVIDIA's packages into one folder with lib/, include/ and bin/, the layout of a CUDA toolkit.
cuda_sim_install() {
    local cuda="$cuda_sim_home/cuda" wanted="${cuda_sim_packages[*]}" part
    if [ "$(cat "$cuda/packages.txt" 2> /dev/null)" = "$wanted" ]; then
        return 0
    fi
    rm -rf "$cuda" "$cuda_sim_home/packages"
    mkdir -p "$cuda/lib" "$cuda/include" "$cuda/bin" || return
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$cuda_sim_home/packages" "${cuda_sim_packages[@]}" || return
    for part in cuda_nvrtc cuda_runtime cuda_nvcc; do
        cp -r "$cuda_sim_home/packages/nvidia/$part/." "$cuda/" || return
    done
    rm -rf "$cuda_sim_home/packages"
    chmod +x "$cuda/bin/"*
    echo "$wanted" > "$cuda/packages.txt"
}

# cuda_sim_library OUTPUT SOURCES OPTIONS...: builds a library if a source or header has changed.
cuda_sim_library() {
    local output="$cuda_sim_home/lib/$1" sources=() name hash
    for name in $2; do
        sources+=("$cuda_sim_sources/$name")
    done
    shift 2
    hash=$(cat "${sources[@]}" "$cuda_sim_sources"/*.h "$cuda_sim_sources/shim/sim/block.h" /proc/cpuinfo | grep -v -i mhz | sha256sum)
    if [ -e "$output" ] && [ "$(cat "$output.hash" 2> /dev/null)" = "$hash" ]; then
        return 0
    fi
    mkdir -p "$cuda_sim_home/lib" || return
    # Built under another name and renamed, because a running program may have the old library open.
    g++ -O2 -march=native -std=c++17 -Wall -Wextra -fPIC -shared -fvisibility=hidden "${sources[@]}" "$@" -o "$output.new" \
        && mv "$output.new" "$output" && echo "$hash" > "$output.hash"
}

# cuda_sim_build: installs the packages and builds both libraries, if needed.
cuda_sim_build() {
    (
        mkdir -p "$cuda_sim_home" && exec 9> "$cuda_sim_home/lock" && flock 9 || exit
        cuda_sim_install || exit
        cuda_sim_library libcuda.so.1 "driver.cpp blocks.cpp check.cpp" -I "$cuda_sim_home/cuda/include" -ldl -lpthread || exit
        cuda_sim_library libnvrtc.so nvrtc.cpp "-DSIM_SOURCES=\"$cuda_sim_sources\"" -ldl
    )
}

# cuda_sim null|cpu [CAPABILITY]: sets the environment for programs that are started afterwards.
cuda_sim() {
    cuda_sim_build || return
    case "${1:-}" in
        null) unset SIM_HOST ;;
        cpu) export SIM_HOST=1 ;;
        *)
            echo "usage: cuda_sim null|cpu [CAPABILITY]" >&2
            return 2
            ;;
    esac
    export SIM_CC="${2:-90}"
    export SIM_SOURCES="$cuda_sim_sources"
    export SIM_LIBRARIES="$cuda_sim_home/lib"
    export SIM_CACHE="${SIM_CACHE:-$cuda_sim_home/compiled}"
    export SIM_REAL_NVRTC="$cuda_sim_home/cuda/lib/libnvrtc.so.12"
    export CUDA_PATH="$cuda_sim_home/cuda"
    case ":${LD_LIBRARY_PATH:-}:" in
        *":$SIM_LIBRARIES:"*) ;;
        *) export LD_LIBRARY_PATH="$SIM_LIBRARIES:$cuda_sim_home/cuda/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
    esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case "${1:-}" in
        build) cuda_sim_build ;;
        null | cpu)
            cuda_sim "$1" "${2:-90}"
            shift 2
            "$@"
            ;;
        *)
            sed -n '2,/^# shellcheck/s/^# \{0,1\}//p' "$0" | sed '$d'
            exit 2
            ;;
    esac
fi
