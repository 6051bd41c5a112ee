#!/usr/bin/env bash
# Runs 64 good and bad clients against `kiln serve` for MINUTES (30), on the demo model: soak.sh [MINUTES]
# tests/clients/soak.py says what they do and what is checked. Needs Python 3 and Linux. KILN names the binary; a
# development build is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
start_server --enable-sdapi --max-queue 24
python3 tests/clients/soak.py "$server" "$process" "${1:-30}" || {
    tail -n 20 "$log" >&2
    exit 1
}
if grep -i 'panicked' "$log" >&2; then
    exit 1
fi
kill -TERM "$process"
wait "$process"
echo "SIGTERM: exit code 0"
