#!/usr/bin/env bash
# Tests the cuda backend without a GPU, on the stand-in devices of tests/cuda-sim: one runs kernels on the
# CPU, the other compiles them with NVIDIA's compiler and computes nothing. Needs the requirements of
# scripts/cuda-sim.sh, jq and curl. KILN_SEEDS is the number of random orders of blocks and warps to test, 2
# by default.
set -euo pipefail
cd "$(dirname "$0")/.."

part() {
    echo "== cuda: $* (after $SECONDS s)"
}

# shellcheck source=scripts/cuda-sim.sh
. scripts/cuda-sim.sh
part "stand-in devices"
cuda_sim_build
bash tests/cuda-sim/test.sh

part "build"
programs=$(cargo build --locked -p kiln -p kiln-cuda --features ndarray,nats,otel,cuda --bin kiln --test kernels --test ops \
    --message-format json-render-diagnostics | jq -r 'select(.executable) | "\(.target.name) \(.executable)"')
program() {
    awk -v name="$1" '$1 == name { print $2 }' <<< "$programs"
}
kiln=$(program kiln)
kernels=$(program kernels)
ops=$(program ops)

folder=$(realpath -m "${CARGO_TARGET_DIR:-target}")/cuda-test
rm -rf "$folder"
mkdir -p "$folder"
# Caches of CubeCL and kiln start empty in each run; kernels that the stand-in compiled stay cached.
export XDG_CACHE_HOME="$folder/cache"

# on DEVICE CAPABILITY COMMAND...: runs a command in the test folder with that stand-in device.
on() {
    (
        cuda_sim "$1" "$2"
        cd "$folder"
        "${@:3}"
    )
}

part "each CUDA kernel, with the hazard detector"
export KILN_SEEDS=${KILN_SEEDS:-2}
for capability in 75 80 90; do
    SIM_CHECK=1 on cpu $capability "$kernels" --test-threads 1
done
part "CubeCL kernels, with the hazard detector"
for ((seed = 0; seed < KILN_SEEDS; seed++)); do
    SIM_SEED=$seed KILN_CASES=2 SIM_CHECK=1 \
        SIM_CHECK_ONLY='^(rms_norm|layer_norm_modulate|qk_norm_rope|channel_norm|attention)' \
        on cpu 80 "$ops" --test-threads 1 rms_norm layer_norm_modulate qk_norm_rope channel_norm packed_attention
done

part "fused ops, and parity with diffusers"
on cpu 80 "$ops" --test-threads 1

part "flex and cuda side by side"
# compare DTYPE CAPABILITY: compares all stages of a generation on cuda with flex.
compare() {
    local report="$folder/$1-$2.json"
    on cpu "$2" "$kiln" compare --backends flex,cuda --dtype "$1" --steps 20 --seed 1 --negative-prompt "a blue square" \
        --report "$report"
    if [ "$1" = f32 ]; then
        # kiln compare itself has a limit for 8-bit values that round differently.
        jq --exit-status '[.comparisons[].stages[] | select(.name != "image_u8").max_relative] | max <= 2e-5' "$report"
    fi
}
for capability in 75 80 90; do
    compare f32 $capability
    compare f16 $capability
done
for capability in 80 90; do
    compare bf16 $capability
done

part "an adapter, beside flex"
adapter=$PWD/models/demo/lora/stripes.safetensors
for dtype in f32 bf16; do
    on cpu 80 "$kiln" compare --backends flex,cuda --dtype $dtype --steps 4 --seed 1 --negative-prompt "a blue square" \
        --lora "$adapter:0.7"
done

part "two streams on one device, beside flex"
on cpu 80 "$kiln" compare --backends flex,cuda:0+0 --dtype f32 --steps 4 --seed 1 --negative-prompt "a blue square"

part "a kernel that does not compile is not used"
# Uses an empty cache of compiled kernels.
XDG_CACHE_HOME="$folder/empty" SIM_NVRTC_FAIL=channel_norm on cpu 80 "$kiln" compare --backends flex,cuda --dtype f32 --steps 2 --seed 1 \
    2>&1 | tee "$folder/not-used.txt"
grep --quiet "is not used: ChannelNorm" "$folder/not-used.txt"

part "generate and serve"
on cpu 80 "$kiln" generate "a small green circle" --backend cuda --steps 4 --seed 1 --output "$folder/generated.png"
(
    cuda_sim cpu 80
    KILN=$kiln
    # shellcheck source=scripts/common.sh
    . scripts/common.sh
    start_server --backend cuda
    curl --silent --show-error --fail "$server/v1/images/generations" -H 'content-type: application/json' \
        -d '{"prompt": "a small green circle", "num_inference_steps": 4, "seed": 1, "size": "128x128"}' \
        | jq -r '.data[0].b64_json' | base64 --decode > "$folder/served.png"
)
cmp "$folder/generated.png" "$folder/served.png"

part "failing driver calls"
bash tests/cuda-sim/faults.sh "$kiln"

part "NVRTC and ptxas for every architecture"
# The null device computes nothing, so every kernel would fail the comparison with its default body.
export KILN_KERNELS=unchecked
own='^(product_|attention|channels_last|elementwise|rms_norm|layer_norm_modulate|qk_norm_rope|channel_norm)'
for capability in 80 89 90 120; do
    compiled="$cuda_sim_home/ptx-$capability"
    rm -rf "$compiled"
    for dtype in bf16 f16 f32; do
        XDG_CACHE_HOME="$folder/null-$capability" SIM_CACHE="$compiled" on null $capability "$kiln" generate "a small green circle" --backend cuda --dtype $dtype \
            --steps 1 --seed 1 --negative-prompt "a square" --output "$folder/nothing.png"
    done
    suffix=
    if [ $capability -ge 90 ]; then
        suffix=a
    fi
    python3 tests/cuda-sim/ptxas.py "$compiled" "$own" --no-spills --arch "sm_$capability$suffix" \
        --ptxas "$cuda_sim_home/cuda/bin/ptxas"
done
part "done"
