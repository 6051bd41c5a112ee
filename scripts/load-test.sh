#!/usr/bin/env bash
# Measures `kiln serve` under load, and writes tables in Markdown:
#
#     scripts/load-test.sh [generators | packing] [ARGUMENTS]
#
# `generators` runs the load generators of vLLM-Omni and SGLang and AIPerf, unmodified, from their packages;
# `packing` compares requests per second with several jobs in one step and without. Both, one after the other,
# if none is named. ARGUMENTS are those of benches/load/generators.py and packing.py; `--help` lists them. A short
# try of everything: scripts/load-test.sh --requests 8. docs/performance.md says how to read the tables.
#
# Needs Python 3.11 with venv; the first run installs packages into the build folder (about 1 GB, most of it
# AIPerf's). Environment variables:
#
#     KILN                   the binary; a release build with flex by default
#     RESULTS                the file of results; load-test.md in the build folder by default
#     VLLM_OMNI_BENCHMARKS   folder benchmarks/diffusion of another version of vLLM-Omni; newer ones are only in its
#                            repository
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --release
    KILN="$target/release/kiln"
fi
# shellcheck source=scripts/python.sh
. scripts/python.sh

results="${RESULTS:-$target/load-test.md}"
printf '# kiln serve under load\n\n    scripts/load-test.sh%s\n\n' "${*:+ $*}" > "$results"
parts=(generators packing)
case "${1:-}" in
    generators | packing)
        parts=("$1")
        shift
        ;;
esac
common=(--kiln "$(realpath "$KILN")" --output "$results")

generators() {
    local files="$target/load-files" source
    python_packages load-aiperf benches/load/aiperf.txt
    python_packages load benches/load/requirements.txt
    mkdir -p "$files"
    source="${VLLM_OMNI_BENCHMARKS:-}"
    if [ -z "$source" ]; then
        # The last version with a source distribution; the wheels lack the folder.
        local vllm_omni=0.20.0
        source="$files/vllm_omni-$vllm_omni/benchmarks/diffusion"
        if [ ! -d "$source" ]; then
            python -m pip download --quiet --no-deps --no-binary :all: --dest "$files" "vllm-omni==$vllm_omni"
            tar -xzf "$files/vllm_omni-$vllm_omni.tar.gz" -C "$files" "vllm_omni-$vllm_omni/benchmarks/diffusion"
        fi
    fi
    rm -rf "$files/vllm-omni"
    cp -r "$source" "$files/vllm-omni"
    local sglang=0.5.23
    if ! compgen -G "$files/sglang-$sglang-*.whl" > /dev/null; then
        # The platform does not matter: only two modules in Python are taken out of the wheel.
        python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 \
            --platform manylinux_2_34_x86_64 --dest "$files" "sglang==$sglang"
    fi
    rm -rf "$files/sglang"
    mkdir "$files/sglang"
    python - "$files" "$sglang" << 'END'
import sys, zipfile
from pathlib import Path

files, version = Path(sys.argv[1]), sys.argv[2]
[wheel] = files.glob(f"sglang-{version}-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in ["bench_serving.py", "datasets.py"]:
        text = archive.read(f"sglang/multimodal_gen/benchmarks/{name}")
        (files / "sglang" / name).write_bytes(text)
END
    python benches/load/generators.py "${common[@]}" --files "$files" \
        --aiperf "$(realpath "$target")/load-aiperf/bin/aiperf" "$@"
}

packing() {
    python3 benches/load/packing.py "${common[@]}" "$@"
}

for part in "${parts[@]}"; do
    "$part" "$@"
done
echo "results: $results" >&2
