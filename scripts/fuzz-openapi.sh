#!/usr/bin/env bash
# Schemathesis makes requests from /openapi.json, valid ones and others, and checks the answers
# against it. Needs curl and Python 3 with venv; installs into target/schemathesis at the first run.
# KILN names the binary; without it the development build is used. Arguments go to schemathesis.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
python_packages schemathesis tests/fuzz/requirements.txt
# Small limits, so that the time goes into requests and not into images.
start_server --max-steps 2 --max-image-pixels 20000 --max-num-images 2 --api-key fuzz --enable-sdapi
# What a schema cannot say is refused, too: contradictions, a chat without a user message.
schemathesis run "$server/openapi.json" --header "Authorization: Bearer fuzz" \
    --checks all --exclude-checks positive_data_acceptance --continue-on-failure "$@"
if grep -q 'panic at' "$log"; then
    grep 'panic at' "$log" >&2
    exit 1
fi
kill -TERM "$process"
wait "$process"
