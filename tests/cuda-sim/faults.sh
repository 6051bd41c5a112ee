#!/usr/bin/env bash
# Tests kiln with failing calls of the driver, on the stand-in devices: faults.sh KILN [WORD]; WORD selects
# the cases whose name contains it. kiln either generates the same image as without the failure, or prints
# one short line, writes no image and exits with an error code.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/cuda-sim.sh
. "$here/../../scripts/cuda-sim.sh"
KILN=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export KILN
cuda_sim cpu 75
python3 "$here/faults.py" kept "${2:-}"
cuda_sim null 75
python3 "$here/faults.py" new "${2:-}"
