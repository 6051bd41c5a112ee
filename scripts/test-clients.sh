#!/usr/bin/env bash
# Runs curl, the official openai packages, the programs in examples/ and the calls of others against
# `kiln serve` with the demo model. Needs curl, jq and Python 3 with venv; packages are installed into
# target/clients at the first run.
# KILN names the binary; without it the development build is used.
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray
    KILN="$target/debug/kiln"
fi
environment="$target/clients"
clients="$(pwd)/tests/clients"
if ! cmp --silent "$clients/requirements.txt" "$environment/requirements.txt"; then
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$clients/requirements.txt"
    cp "$clients/requirements.txt" "$environment"
fi
node="$environment/node_project"
PATH="$(cd "$environment/bin" && pwd):$PATH"
if ! cmp --silent "$clients/package.json" "$node/package.json"; then
    rm -rf "$node" && mkdir "$node" && cp "$clients/package.json" "$node"
    npm install --prefix "$node" --no-audit --no-fund --silent ||
        { rm -rf "$node" && exit 1; }
fi
echo "clients are installed (after $SECONDS s)"

log="$(mktemp)"
KILN_API_KEY=other-key,test-key "$KILN" serve --port 0 --enable-sdapi 2> "$log" &
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

"$KILN" health --port "${server##*:}"
bash "$clients/test_curl.sh" "$server" test-key
python "$clients/test_openai.py" "$server" test-key
python "$clients/test_programs.py" "$server" test-key
python "$clients/test_readme.py" "$server" test-key "$node"
python "$clients/test_examples.py" "$server" test-key "$(realpath "$KILN")"

kill -TERM "$process"
wait "$process"
echo "SIGTERM: exit code 0 (after $SECONDS s)"
if grep -q 'test-key\|other-key' "$log"; then
    echo "a key is in the log" >&2
    exit 1
fi
