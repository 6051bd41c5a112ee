#!/usr/bin/env bash
# Generates images with curl and jq, and writes each to a file.
#
#   PROMPT='a fox that says "hi"' OUTPUT=fox.png ./run_curl_text_to_image.sh
#
# Variables: SERVER, PROMPT, OUTPUT, HEIGHT, WIDTH, STEPS, CFG_SCALE, SEED, NUM_IMAGES,
# NEGATIVE_PROMPT, and API_KEY if the server needs one. With several images out.png becomes
# out-0.png, out-1.png and so on. Exits with code 1 if there is no image.
set -euo pipefail

SERVER="${SERVER:-http://localhost:8091}"
PROMPT="${PROMPT:-a good boy in the ocean}"
OUTPUT="${OUTPUT:-qwen_image_output_$(date +%Y%m%d%H%M%S).png}"

fail() {
    echo "Error: $1" >&2
    exit 1
}

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# jq escapes the prompt.
jq --null-input \
    --arg prompt "$PROMPT" --arg negative "${NEGATIVE_PROMPT:-}" \
    --argjson height "${HEIGHT:-1024}" --argjson width "${WIDTH:-1024}" \
    --argjson steps "${STEPS:-100}" --argjson scale "${CFG_SCALE:-4.0}" \
    --argjson seed "${SEED:-42}" --argjson images "${NUM_IMAGES:-1}" '{
        messages: [{role: "user", content: $prompt}],
        extra_body: ({
            height: $height, width: $width, num_inference_steps: $steps, true_cfg_scale: $scale,
            seed: $seed, num_outputs_per_prompt: $images
        } + if $negative == "" then {} else {negative_prompt: $negative} end)
    }' > "$folder/request" || fail "a variable that should be a number is not"

echo "Generating image..."
echo "Prompt: $PROMPT"
echo "Output: $OUTPUT"

headers=(--header 'Content-Type: application/json')
if [ -n "${API_KEY:-}" ]; then
    # In a file, as other users of the machine can see arguments.
    printf 'Authorization: Bearer %s\n' "$API_KEY" > "$folder/key"
    headers+=(--header "@$folder/key")
fi
status="$(curl --silent --show-error "${headers[@]}" --data-binary "@$folder/request" \
    --output "$folder/answer" --write-out '%{http_code}' "$SERVER/v1/chat/completions")" ||
    fail "no answer from $SERVER"
if [ "$status" != 200 ]; then
    message="$(jq --raw-output '.error.message // .error // .' "$folder/answer" 2> /dev/null)" ||
        message="$(head -c 500 "$folder/answer")"
    fail "$SERVER answers $status: $message"
fi

jq --raw-output '.choices[0].message.content | arrays[] | .image_url.url // empty
        | select(startswith("data:image/")) | split(",")[1]' "$folder/answer" > "$folder/images" ||
    fail "the response is not a chat completion"
count="$(wc -l < "$folder/images")"
if [ "$count" -eq 0 ]; then
    fail "the response has no image: $(head -c 500 "$folder/answer")"
fi

index=0
while IFS= read -r image; do
    file="$OUTPUT"
    if [ "$count" -gt 1 ]; then
        name="${OUTPUT##*/}"
        extension=
        case "$name" in ?*.*) extension=".${name##*.}" ;; esac
        file="${OUTPUT%"$extension"}-$index$extension"
    fi
    base64 --decode <<< "$image" > "$file" || fail "an image cannot be decoded"
    echo "Image saved to: $file ($(du -h "$file" | cut -f1))"
    index=$((index + 1))
done < "$folder/images"
