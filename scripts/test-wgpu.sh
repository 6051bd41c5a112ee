#!/usr/bin/env bash
# Tests the wgpu backend on Mesa's lavapipe, which computes on the CPU: compares the fused ops with their
# default bodies, and the pipeline with diffusers in the smallest parity cases. Needs lavapipe (Debian:
# mesa-vulkan-drivers); VK_ICD_FILENAMES, if set, selects another Vulkan driver. Arguments are passed to the
# test program.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VK_ICD_FILENAMES:-}" ]; then
    driver=$(find /usr/share/vulkan/icd.d -name 'lvp_icd*.json' 2> /dev/null | head -n 1)
    if [ -z "$driver" ]; then
        echo "lavapipe is not installed: apt-get install mesa-vulkan-drivers, or set VK_ICD_FILENAMES" >&2
        exit 1
    fi
    export VK_ICD_FILENAMES=$driver
fi
# CubeCL reads its settings from the tests' working folder: it autotunes with as few candidates as
# possible, and caches the results for the next run.
folder=$(realpath -m "${CARGO_TARGET_DIR:-target}")/wgpu
mkdir -p "$folder"
printf '[autotune]\nlevel = "minimal"\ncache = { file = "%s" }\n' "$folder" > "$folder/cubecl.toml"

tests=(cargo test --locked -p kiln-wgpu)
"${tests[@]}" --no-run
echo "built after $SECONDS s"
"${tests[@]}" --config "target.'cfg(all())'.runner = ['env', '--chdir=$folder']" -- "$@"
echo "tested after $SECONDS s"
