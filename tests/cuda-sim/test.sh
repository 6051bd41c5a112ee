#!/usr/bin/env bash
# Tests the stand-in CUDA devices, with one line per case. Each run starts with an empty cache.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/cuda-sim.sh
. "$here/../../scripts/cuda-sim.sh"
SIM_CACHE=$(mktemp -d)
trap 'rm -rf "$SIM_CACHE"' EXIT
export SIM_CACHE
cuda_sim cpu 80
python3 "$here/test.py" "$@"
