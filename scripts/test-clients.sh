#!/usr/bin/env bash
# Runs curl and the official openai package against `kiln serve` with the demo model. Needs curl,
# jq and Python 3 with venv; the package is installed into target/clients at the first run.
# KILN names the binary; without it the development build is used.
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray
    KILN="$target/debug/kiln"
fi
environment="$target/clients"
if ! "$environment/bin/python" -c 'import openai' 2> /dev/null; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
fi

log="$(mktemp)"
KILN_API_KEY=other-key,test-key "$KILN" serve --port 0 2> "$log" &
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
if [ -z "$server" ]; then
    cat "$log" >&2
    exit 1
fi

bash tests/clients/test_curl.sh "$server" test-key
"$environment/bin/python" tests/clients/test_openai.py "$server" test-key

kill -TERM "$process"
wait "$process"
echo "SIGTERM: exit code 0"
if grep -q 'test-key\|other-key' "$log"; then
    echo "a key is in the log" >&2
    exit 1
fi
