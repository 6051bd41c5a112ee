#!/usr/bin/env bash
# Tests the stand-in CUDA devices: one line a case. What is compiled is not kept from run to run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/cuda-sim.sh
. "$here/../../scripts/cuda-sim.sh"
SIM_CACHE=$(mktemp -d)
trap 'rm -rf "$SIM_CACHE"' EXIT
export SIM_CACHE
cuda_sim cpu 80
python3 "$here/test.py" "$@"
