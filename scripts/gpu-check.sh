#!/usr/bin/env bash
# Tests and times kiln on this machine's GPU, with the programs that scripts/gpu-build.sh packed:
#
#     tar -xJf gpu-check.tar.xz && gpu-check/scripts/gpu-check.sh [RESULTS.md]
#
# Needs NVIDIA's driver, NVRTC and the CUDA headers; no Rust and no network. If python3 has torch (and
# diffusers), noise and speed are compared with theirs. Writes one Markdown file (gpu-results.md); the exit
# code is 1 if any part failed. Environment variables and their defaults:
#
#     KILN_BACKEND       cuda; flex is for a trial run on the CPU
#     KILN_DEVICE        0; index of the device
#     KILN_BENCH_MODEL   Qwen/Qwen-Image; model whose shape is timed with random weights, or demo
#     KILN_BENCH_SIZES   "512x512 1024x1024"
#     KILN_BENCH_STEPS   20
#     KILN_BENCH_RUNS    3
#     KILN_OPS_SHAPES    qwen-image; shapes at which the fused ops are timed, or small
#     KILN_PEAK_TFLOPS   dense bf16 TFLOP/s of the GPU, for GPUs that the script does not know
#     KILN_PART_SECONDS  3600; time limit of each part
set -uo pipefail

self=$(realpath "$0")
results=${1:-gpu-results.md}
[[ $results = /* ]] || results=$PWD/$results
cd "$(dirname "$self")/.." || exit
kiln=bin/kiln
backend=${KILN_BACKEND:-cuda}
device=(--backend "$backend" --device "${KILN_DEVICE:-0}")
bench_model=${KILN_BENCH_MODEL:-Qwen/Qwen-Image}
steps=${KILN_BENCH_STEPS:-20}
runs=${KILN_BENCH_RUNS:-3}
shapes=${KILN_OPS_SHAPES:-qwen-image}
limit=${KILN_PART_SECONDS:-3600}
# On a GPU the default bodies are not timed: burn compiles and autotunes their kernels for many minutes.
timed=()
[ "$backend" != cuda ] || timed=(--no-default)
failed=()

# say LINES...: appends lines to the results.
say() {
    printf '%s\n' "$@" >> "$results"
}

# part TITLE COMMAND...: runs a command, and writes its output, duration and exit status to the results.
part() {
    local title=$1 began=$SECONDS code
    shift
    echo "== $title" >&2
    say "" "## $title" "" '```text'
    [ "$1" = "$self" ] || say "\$ $*"
    timeout "$limit" "$@" >> "$results" 2>&1
    code=$?
    say '```' ""
    if [ $code -eq 0 ]; then
        say "Passed in $((SECONDS - began)) s."
    else
        say "**Failed** with exit code $code after $((SECONDS - began)) s."
        failed+=("$title")
        echo "   failed with exit code $code" >&2
    fi
    return $code
}

# has MODULE: whether python3 can import it.
has() {
    python3 -c "import $1" > /dev/null 2>&1
}

# Uses NVRTC from torch's wheels and the headers from triton's if CUDA itself is not installed.
find_cuda() {
    local packages headers compiler
    packages=$(python3 -c 'import torch; print(torch.__path__[0] + "/..")' 2> /dev/null) || return 0
    if [ -z "${CUDA_PATH:-}" ] && [ ! -e /usr/local/cuda/include/crt/mma.h ]; then
        headers=$(find "$packages"/nvidia "$packages"/triton -path '*/include/crt/mma.h' 2> /dev/null | head -n 1)
        [ -z "$headers" ] || export CUDA_PATH="${headers%/include/*}"
    fi
    if ! ldconfig -p 2> /dev/null | grep -q libnvrtc.so; then
        compiler=$(find "$packages"/nvidia -name 'libnvrtc.so*' | head -n 1)
        [ -z "$compiler" ] ||
            export LD_LIBRARY_PATH="${compiler%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
}

# peak_tflops GPU: prints the dense bf16 TFLOP/s of NVIDIA's data sheet.
peak_tflops() {
    case $1 in
        *"H100 PCIe"*) echo 756 ;;
        *H100* | *H200*) echo 989 ;;
        *A100*) echo 312 ;;
        *L40S*) echo 362 ;;
    esac
}

machine() {
    date -u +'date: %Y-%m-%d %H:%M:%S UTC'
    sed 's/^/built from: /' VERSION
    "$kiln" --version
    uname -srm
    echo "CUDA_PATH: ${CUDA_PATH:-not set}"
    if [ "$backend" = cuda ]; then
        nvidia-smi --query-gpu=index,name,driver_version,memory.total,compute_cap --format=csv
    fi
    if has torch; then
        python3 -c 'import torch; print("torch", torch.__version__)'
    fi
    if has diffusers; then
        python3 -c 'import diffusers; print("diffusers", diffusers.__version__)'
    fi
}

# parity_case NAME ARGUMENTS...: compares kiln with diffusers' recorded stages in one case.
parity_case() {
    local name=$1 said
    shift
    if said=$("$kiln" compare --backends "$backend:${KILN_DEVICE:-0}" --dtype f32 \
        --reference "dump:tests/fixtures/cases/$name.safetensors" "$@" 2>&1); then
        echo "$name"
        grep -E '^\| (prompt embeddings|latents, worst step|image before|8-bit values)' <<< "$said"
    else
        echo "$said"
        parity_failed+=("$name")
    fi
}

parity() {
    parity_failed=()
    # shellcheck source=/dev/null
    . tests/cases.sh
    if [ ${#parity_failed[@]} -gt 0 ]; then
        echo "over tolerance: ${parity_failed[*]}"
        return 1
    fi
}

noise() {
    local generator=$1 size=$2
    "$kiln" generate "a cat" "${device[@]}" --dtype f32 --rng "$generator" --seed 5 --steps 1 \
        --size "$size" --output "$scratch/noise.png" --dump "$scratch/noise.safetensors" &&
        python3 scripts/noise_against_torch.py "$scratch/noise.safetensors" 5 "$generator"
}

# ratios KILN.json DIFFUSERS.json: prints the ratio of kiln's time to diffusers', per stage.
ratios() {
    python3 - "$1" "$2" << 'PYTHON'
import json, sys

ours, theirs = (json.load(open(path))["median_seconds"] for path in sys.argv[1:])
print(f"{'stage':8}{'kiln s':>10}{'diffusers s':>13}{'ratio':>8}")
for stage in ("encode", "step", "decode", "total"):
    print(f"{stage:8}{ours[stage]:10.4f}{theirs[stage]:13.4f}{ours[stage] / theirs[stage]:8.2f}")
PYTHON
}

# kept FILE COMMAND...: writes a command's output to a file, and prints it.
kept() {
    local file=$1
    shift
    "$@" > "$file" && cat "$file"
}

# The cache of compiled kernels and autotune results is shared by all parts, so the first process has to
# compile and autotune most kernels.
ops() {
    local dtype=$1 torch_device=cuda
    [ "$backend" = cuda ] || torch_device=cpu
    if has torch; then
        function_part "Fused ops beside torch, $dtype" python3 benches/ops_against_torch.py \
            bin/ops-bench --device "$torch_device" --shapes "$shapes" --dtype "$dtype" --rounds 3 "${timed[@]}"
    else
        function_part "Fused ops, $dtype" bin/ops-bench --shapes "$shapes" --dtype "$dtype" "${timed[@]}"
    fi
}

# Times a process that runs every op once, which mostly compiles and autotunes kernels: with empty caches,
# with cached autotune results, and with cached compiled kernels as well, which exist at the second run.
start_up() {
    local folder=$scratch/start-up kept began program=$PWD/bin/ops-bench
    mkdir "$folder"
    for kept in nothing choices "choices and kernels" "choices and kernels"; do
        printf '[autotune]\ncache = { file = "%s/cache" }\n' "$folder" > "$folder/cubecl.toml"
        [ "$kept" != "choices and kernels" ] ||
            printf '[compilation]\ncache = { file = "%s/cache" }\n' "$folder" >> "$folder/cubecl.toml"
        began=$EPOCHREALTIME
        (cd "$folder" && "$program" --shapes small --dtype f32 "${timed[@]}" > /dev/null) || return
        awk -v began="$began" -v now="$EPOCHREALTIME" -v kept="$kept" \
            'BEGIN { printf "%6.1f s, cached: %s\n", now - began, kept }'
    done
}

bench() {
    local size=$1 ours="$scratch/kiln-$1.json" theirs="$scratch/diffusers-$1.json" shape torch_device
    local options=(--size "$size" --steps "$steps" --runs "$runs")
    function_part "Bench of $bench_model, random weights, $size" kept "$ours" \
        "$kiln" bench --load-format dummy --model "$bench_model" "${device[@]}" "${options[@]}" \
        --json "${peak[@]}" || return
    if ! has diffusers; then
        say "" "diffusers is not installed: no comparison of speed."
        return
    fi
    shape=src/checkpoint/qwen_image
    [ "$bench_model" != demo ] || shape=models/demo
    torch_device=cuda
    [ "$backend" = cuda ] || torch_device=cpu
    function_part "diffusers, random weights, $size" kept "$theirs" \
        python3 benches/diffusers_dummy.py --model "$shape" --device "$torch_device" "${options[@]}" &&
        function_part "kiln beside diffusers, $size" ratios "$ours" "$theirs"
}

# function_part TITLE FUNCTION ARGUMENTS...: runs a function as a part, in a process of its own, so that the
# time limit applies.
function_part() {
    part "$1" "$self" --part "${@:2}"
}
if [ "${1:-}" = --part ]; then
    "${@:2}"
    exit
fi

scratch=$(mktemp -d)
# Starts with an empty cache.
export scratch XDG_CACHE_HOME=$scratch/cache
trap 'rm -rf "$scratch"' EXIT
[ "$backend" != cuda ] || find_cuda
echo "# kiln on $backend" > "$results"
function_part "Machine" machine
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i "${KILN_DEVICE:-0}" 2> /dev/null)
tflops=${KILN_PEAK_TFLOPS:-$(peak_tflops "$gpu")}
peak=()
[ -z "$tflops" ] || peak=(--peak-tflops "$tflops")

part "Backends" "$kiln" backends
[ "$backend" != cuda ] || part "CUDA kernels against f64" bin/kernels-tests --test-threads 1
part "Fused ops against their default bodies" bin/ops-tests --test-threads 1
for dtype in bf16 f32; do
    ops "$dtype"
done
[ "$backend" = flex ] || function_part "Start-up" start_up
function_part "Parity with diffusers, f32" parity

demo=(--prompt "a large red circle on a blue background" --negative-prompt " " --steps 8 --seed 1)
part "Demo model" "$kiln" generate "${device[@]}" "${demo[@]}" --dtype f32 \
    --output "$scratch/demo.png" --dump "$scratch/demo.safetensors"
# On flex, the only reference is the dump of the previous run.
reference=flex
[ "$backend" != flex ] || reference="dump:$scratch/demo.safetensors"
for dtype in f32 bf16; do
    [ "$backend$dtype" != flexbf16 ] || continue
    part "Compare with $reference, $dtype" "$kiln" compare --reference "$reference" \
        --backends "$backend:${KILN_DEVICE:-0}" --dtype "$dtype" "${demo[@]}"
done

if has torch; then
    function_part "Noise of torch's CPU generator" noise cpu 256x128
    if [ "$backend" = cuda ]; then
        # The small case has fewer values than the GPU has threads, the large one has more.
        function_part "Noise of torch's CUDA generator, small" noise cuda 64x64
        function_part "Noise of torch's CUDA generator, large" noise cuda 2048x2048
    fi
else
    say "" "torch is not installed: no comparison of noise."
fi

for size in ${KILN_BENCH_SIZES:-512x512 1024x1024}; do
    bench "$size"
done

say ""
if [ ${#failed[@]} -gt 0 ]; then
    say "Failed: $(printf '%s; ' "${failed[@]}")"
    echo "failed: $(printf '%s; ' "${failed[@]}")written to $results" >&2
    exit 1
fi
say "Everything passed."
echo "everything passed; written to $results" >&2
