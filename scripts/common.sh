# Sourced by the scripts beside it, in the repository's root: sets `target`, and `KILN`, the binary to
# test, which is the development build unless the environment names another.
# shellcheck shell=bash

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray
    KILN="$target/debug/kiln"
fi

# shellcheck source=scripts/python.sh
. scripts/python.sh

# Starts `kiln serve` with these arguments on a free port, and waits until it is ready. Sets `server`,
# its URL, `process` and `log`; it ends with the script.
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
