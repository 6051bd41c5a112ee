#!/usr/bin/env bash
# Simulates 1, 8 and 64 replicas behind several routers, and draws the result:
#
#     scripts/scale.sh [CSV [SVG]]
#
# Runs the ignored test of src/engine/tests/scale.rs for many minutes. KILN_SCALE_REQUESTS is the number of requests
# for each replica, 500 by default. Needs Python 3.
set -euo pipefail

csv="$(realpath "${1:-scale.csv}")"
svg="$(realpath "${2:-${csv%.csv}.svg}")"
cd "$(dirname "$0")/.."
KILN_SCALE_CSV="$csv" cargo test --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray,nats,otel --lib -- --ignored --exact engine::tests::scale::all_routers_numbers_and_loads
python3 benches/scale/plot.py "$csv" "$svg"
