#!/usr/bin/env bash
# Fuzzes the HTTP API with Schemathesis, which generates valid and invalid requests from /openapi.json and
# checks the responses against it. Needs curl and Python 3 with venv; the first run installs Python packages
# into target/schemathesis. KILN names the binary; a development build is the default. Arguments are passed
# to schemathesis.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
python_packages schemathesis tests/fuzz/requirements.txt
# Small limits, so that the time is spent on requests and not on generating images.
jobs="$(mktemp -d)"
start_server --max-steps 2 --max-image-pixels 20000 --max-num-images 2 --api-key fuzz --enable-sdapi --jobs "$jobs"
trap 'kill "$process" 2> /dev/null || true; rm -rf "$log" "$jobs"' EXIT
# positive_data_acceptance is excluded, because the server also rejects what a schema cannot express:
# contradictory fields, a chat without a user message.
schemathesis run "$server/openapi.json" --header "Authorization: Bearer fuzz" \
    --checks all --exclude-checks positive_data_acceptance --continue-on-failure "$@"
if grep -q 'panic at' "$log"; then
    grep 'panic at' "$log" >&2
    exit 1
fi
kill -TERM "$process"
wait "$process"
