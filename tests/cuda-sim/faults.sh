#!/usr/bin/env bash
# Makes calls of the driver fail under kiln, on the stand-in devices: faults.sh KILN [WORD], the latter to
# run only the cases that contain it. A picture is either drawn as without the failure, or there is one
# short line, no picture and another exit code.
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
