#!/usr/bin/env bash
# Runs three servers with the demo model behind HAProxy with packaging/haproxy.cfg, kills, ends and restarts them under
# load, and demands that no request is lost that need not be:
#
#     scripts/test-haproxy.sh [ARGUMENTS]
#
# ARGUMENTS are those of test-haproxy.py; `--help` lists them. Needs haproxy 2.6 and Python 3.11. KILN names the binary;
# a development build is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
haproxy -c -q -f packaging/haproxy.cfg
python3 scripts/test-haproxy.py --kiln "$KILN" "$@"
