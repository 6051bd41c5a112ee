#!/usr/bin/env bash
# Serves Qwen-Image. MODEL and PORT choose the model and the port, KILN the program; arguments go to
# `kiln serve`.
set -euo pipefail

MODEL="${MODEL:-Qwen/Qwen-Image}"
PORT="${PORT:-8091}"
KILN="${KILN:-kiln}"

if ! command -v "$KILN" > /dev/null; then
    echo "There is no program $KILN: build it with cargo install --path . and try again," \
        "or say in KILN where it is." >&2
    exit 127
fi

# An argument --model counts for more than the variable.
for argument in "$@"; do
    case "$argument" in
        --model | --model=*) MODEL= ;;
    esac
done

echo "Starting Qwen-Image server..."
echo "Model: ${MODEL:-as given}"
echo "Port: $PORT"
exec "$KILN" serve ${MODEL:+"$MODEL"} --port "$PORT" "$@"
