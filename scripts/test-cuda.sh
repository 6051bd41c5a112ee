#!/usr/bin/env bash
# Tests the cuda backend without a GPU, on the stand-in devices of tests/cuda-sim: one that runs kernels
# on the CPU, and one that computes nothing, behind NVIDIA's own compiler. Needs what scripts/cuda-sim.sh
# installs, jq and curl. KILN_SEEDS is the number of orders that blocks and warps are tried in.
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
programs=$(cargo build --locked -p kiln -p kiln-cuda --features ndarray,cuda --bin kiln --test kernels --test ops \
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
# What the stand-in compiled stays from run to run; what CubeCL and kiln keep does not.
export XDG_CACHE_HOME="$folder/cache"

# on DEVICE CAPABILITY COMMAND...: runs a command in the test folder with that device.
on() {
    (
        cuda_sim "$1" "$2"
        cd "$folder"
        "${@:3}"
    )
}

part "every kernel by itself, with the hazard detector"
export KILN_SEEDS=${KILN_SEEDS:-2}
for capability in 75 80 90; do
    SIM_CHECK=1 on cpu $capability "$kernels" --test-threads 1
done
part "kernels of CubeCL, with the hazard detector"
for ((seed = 0; seed < KILN_SEEDS; seed++)); do
    SIM_SEED=$seed KILN_CASES=2 SIM_CHECK=1 \
        SIM_CHECK_ONLY='^(rms_norm|layer_norm_modulate|qk_norm_rope|channel_norm|attention)' \
        on cpu 80 "$ops" --test-threads 1 rms_norm layer_norm_modulate qk_norm_rope channel_norm packed_attention
done

part "fused ops, and parity with diffusers"
on cpu 80 "$ops" --test-threads 1

part "flex and cuda side by side"
# compare DTYPE CAPABILITY
compare() {
    local report="$folder/$1-$2.json"
    on cpu "$2" "$kiln" compare --backends flex,cuda --dtype "$1" --steps 20 --seed 1 --negative-prompt "a blue square" \
        --report "$report"
    if [ "$1" = f32 ]; then
        # 8-bit values that round to a neighbour are counted by compare itself.
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

part "a kernel that does not work is not used"
# With no compiled kernels kept.
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

part "failing calls of the driver"
bash tests/cuda-sim/faults.sh "$kiln"

part "NVRTC and ptxas for every architecture"
# On a device that computes nothing, no kernel computes what it should.
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
