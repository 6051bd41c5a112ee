#!/usr/bin/env bash
# Runs all tests on the CPU backends. Some tests need Qwen's real vocabulary, and are skipped unless
# KILN_QWEN_TOKENIZER names a folder with vocab.json, merges.txt and tokenizer_config.json. Arguments are
# passed to cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo test --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray,nats,otel "$@"
