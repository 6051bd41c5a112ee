#!/usr/bin/env bash
# Serves Qwen-Image. The variables MODEL, PORT and KILN name the model, the port and the program;
# arguments are passed to `kiln serve`.
set -euo pipefail

MODEL="${MODEL:-Qwen/Qwen-Image}"
PORT="${PORT:-8091}"
KILN="${KILN:-kiln}"

if ! command -v "$KILN" > /dev/null; then
    echo "There is no program $KILN: build it with cargo install --path . and try again," \
        "or set KILN to its path." >&2
    exit 127
fi

# An argument --model overrides the variable.
for argument in "$@"; do
    case "$argument" in
        --model | --model=*) MODEL= ;;
    esac
done

echo "Starting Qwen-Image server..."
echo "Model: ${MODEL:-as given}"
echo "Port: $PORT"
exec "$KILN" serve ${MODEL:+"$MODEL"} --port "$PORT" "$@"
