#!/usr/bin/env bash
# Schemathesis makes requests from /openapi.json, valid ones and others, and checks the answers
# against it. Needs curl and Python 3 with venv; installs into target/schemathesis at the first run.
# KILN names the binary; without it the development build is used. Arguments go to schemathesis.
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray
    KILN="$target/debug/kiln"
fi
environment="$target/schemathesis"
if [ ! -x "$environment/bin/schemathesis" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check schemathesis==4.32.5
fi

log="$(mktemp)"
# Small limits, so that the time goes into requests and not into pictures.
"$KILN" serve --port 0 --max-steps 2 --max-image-pixels 20000 --max-num-images 2 \
    --api-key fuzz --enable-sdapi 2> "$log" &
process=$!
trap 'kill "$process" 2> /dev/null || true; rm -f "$log"' EXIT
server=
for _ in $(seq 300); do
    server="$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$log")"
    if [ -n "$server" ] && curl --silent --fail --output /dev/null "$server/health/ready"; then
        break
    fi
    sleep 0.1
done
# What a schema cannot say is refused, too: contradictions, a chat without a user message.
"$environment/bin/schemathesis" run "$server/openapi.json" --header "Authorization: Bearer fuzz" \
    --checks all --exclude-checks positive_data_acceptance --continue-on-failure "$@"
if grep -q 'panic at' "$log"; then
    grep 'panic at' "$log" >&2
    exit 1
fi
kill -TERM "$process"
wait "$process"
