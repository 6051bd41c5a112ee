# Functions that the other scripts source, with the repository's root as working folder. Sets `target`, the
# build folder, and `KILN`, the binary to test: a development build, unless the environment sets KILN.
# shellcheck shell=bash

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray,nats,otel
    KILN="$target/debug/kiln"
fi

# shellcheck source=scripts/python.sh
. scripts/python.sh

# start_server ARGUMENTS...: starts `kiln serve` on a free port, and waits until it is ready. Sets `server`
# (its URL), `process` (its process id) and `log` (its log file). The server stops when the script exits.
start_server() {
    log="$(mktemp)"
    "$KILN" serve --port 0 "$@" 2> "$log" &
    process=$!
    trap 'kill "$process" 2> /dev/null || true; rm -f "$log"' EXIT
    for _ in $(seq 300); do
        server="$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$log")"
        if [ -n "$server" ] && curl --silent --fail --output /dev/null "$server/health/ready"; then
            return
        fi
        sleep 0.1
    done
    cat "$log" >&2
    exit 1
}
