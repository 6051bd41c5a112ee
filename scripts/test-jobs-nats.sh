#!/usr/bin/env bash
# Runs servers with the demo model that share jobs in NATS JetStream, kills and restarts them and the NATS servers, and
# demands that every accepted job ends, with the same file as anywhere else:
#
#     scripts/test-jobs-nats.sh [ARGUMENTS]
#
# ARGUMENTS are those of test-jobs-nats.py; `--help` lists them, and `--long` runs every trial. Needs Python 3.11 and
# nats-server; NATS_SERVER names its program. KILN names the binary; a development build is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
python3 scripts/test-jobs-nats.py --kiln "$KILN" "$@"
