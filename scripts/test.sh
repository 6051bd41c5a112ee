#!/usr/bin/env bash
# Runs all tests on the CPU backends. KILN_QWEN_TOKENIZER may name a folder with Qwen's real
# vocabulary (vocab.json, merges.txt, tokenizer_config.json) for the tests that need it.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo test --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray "$@"
