#!/usr/bin/env bash
# Builds the programs that scripts/gpu-check.sh runs, and packs them for a machine with an NVIDIA GPU:
#
#     scripts/gpu-build.sh [FOLDER]                 # target/gpu-check, and target/gpu-check.tar.xz
#
# Needs Rust, python3 and xz, but neither CUDA nor a GPU. KILN_BACKEND=flex builds for the CPU instead, for
# a trial run; KILN_PROFILE=dev builds faster and runs slower.
set -euo pipefail
cd "$(dirname "$0")/.."

backend=${KILN_BACKEND:-cuda}
profile=${KILN_PROFILE:-release}
folder=$(realpath -m "${1:-target/gpu-check}")

case $backend in
    cuda)
        tests=(-p kiln-cuda --test ops)
        bench=(-p kiln-cuda --bench ops)
        ;;
    flex)
        tests=(-p kiln-ops --features kiln-ops/flex --test properties)
        bench=(-p kiln-ops --features kiln-ops/flex --bench flex)
        ;;
    *)
        echo "KILN_BACKEND must be cuda or flex, not $backend" >&2
        exit 2
        ;;
esac

# built COMMAND...: runs a cargo command and prints the path of the program that it built.
built() {
    "$@" --locked --profile "$profile" --message-format json-render-diagnostics |
        python3 -c '
import json, sys
paths = [json.loads(line).get("executable") for line in sys.stdin]
print([path for path in paths if path][-1])'
}

rm -rf "$folder"
mkdir -p "$folder"/{bin,scripts,benches,tests,src/checkpoint,models}
cp "$(built cargo build --bin kiln --features "$backend")" "$folder/bin/kiln"
cp "$(built cargo test --no-run "${tests[@]}")" "$folder/bin/ops-tests"
cp "$(built cargo bench --no-run "${bench[@]}")" "$folder/bin/ops-bench"
[ "$backend" != cuda ] || cp "$(built cargo test --no-run -p kiln-cuda --test kernels)" "$folder/bin/kernels-tests"
strip "$folder"/bin/*

cp scripts/gpu-check.sh scripts/noise_against_torch.py "$folder/scripts/"
cp benches/diffusers_dummy.py benches/ops_against_torch.py "$folder/benches/"
cp -r src/checkpoint/qwen_image "$folder/src/checkpoint/"
cp -r tests/fixtures "$folder/tests/"
(cd models && find demo -name '*.json' -exec cp --parents {} "$folder/models/" \;)
{
    git describe --always --dirty
    rustc --version
    echo "$backend, profile $profile"
} > "$folder/VERSION"

# Writes each parity case as a call of a shell function: its name, then its arguments. `kiln compare`
# generates one image, so cases with several are left out.
python3 - > "$folder/tests/cases.sh" << 'PYTHON'
import json, shlex

for case in json.load(open("tests/fixtures/cases.json")):
    if case["num_images"] != 1:
        continue
    model = case["checkpoint"]
    arguments = [case["name"], "--model", model if model == "demo" else f"tests/fixtures/checkpoints/{model}"]
    arguments += ["--prompt", case["prompt"]]
    if case["negative_prompt"] is not None:
        arguments += ["--negative-prompt", case["negative_prompt"]]
    for option in ("true_cfg_scale", "height", "width", "num_inference_steps", "seed"):
        arguments += ["--" + option.replace("_", "-"), str(case[option])]
    if case["vae_tile"]:
        size, stride = case["vae_tile"]
        arguments += ["--vae-use-tiling", "--vae-tile-size", str(size), "--vae-tile-stride", str(stride)]
    print("parity_case", shlex.join(arguments))
PYTHON

tar -cJf "$folder.tar.xz" -C "$(dirname "$folder")" "$(basename "$folder")"
du -h "$folder"/bin/* "$folder.tar.xz"
