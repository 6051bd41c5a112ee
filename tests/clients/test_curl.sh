#!/usr/bin/env bash
# Tests a running `kiln serve` with the demo model with curl: test_curl.sh URL KEY
set -euo pipefail
server="$1"
key="$2"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# Sends a request with the API key.
ask() { curl --silent --show-error --header "Authorization: Bearer $key" "$@"; }
json=(--header 'Content-Type: application/json')

# expect WHAT FOUND WANTED
expect() {
    if [ "$2" != "$3" ]; then
        echo "curl: $1 is $2, not $3" >&2
        exit 1
    fi
    echo "curl: $1 ok"
}
# The first four bytes of a file, in hexadecimal.
kind() { head -c 4 "$1" | od -An -tx1 | tr -d ' \n'; }

ask --fail "${json[@]}" "$server/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "a large red circle on a blue background"}],
  "extra_body": {"num_inference_steps": 4, "negative_prompt": " ", "seed": 42}
}' | jq -r '.choices[0].message.content[0].image_url.url' | cut -d, -f2 | base64 -d > "$folder/chat"
expect 'chat' "$(kind "$folder/chat")" 89504e47

ask --fail "${json[@]}" "$server/v1/images/generations" -d '{
  "prompt": "a large red circle on a blue background", "output_format": "jpeg",
  "num_inference_steps": 4, "response_format": "file"
}' --output "$folder/file"
expect 'a file' "$(kind "$folder/file" | head -c 6)" ffd8ff

stream="$(ask --fail --no-buffer "${json[@]}" "$server/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "a square"}], "num_inference_steps": 4, "stream": true
}')"
expect 'the last event' "$(grep '^data:' <<< "$stream" | tail -1)" 'data: [DONE]'
expect 'steps in a stream' "$(grep -c '"stage":"step"' <<< "$stream")" 4

status() { ask --output /dev/null --write-out '%{http_code}' "$@"; }
expect 'live' "$(status "$server/health/live")" 200
expect 'ready' "$(status "$server/health/ready")" 200
expect 'documentation' "$(status "$server/docs")" 200
expect 'openapi' "$(ask --fail "$server/openapi.json" | jq -r .info.title)" kiln
expect 'metrics' "$(ask --fail "$server/metrics" | grep -c '^vllm:num_requests_running ')" 1
expect 'bad JSON' "$(status "${json[@]}" "$server/v1/images/generations" -d '{')" 400
expect 'no content type' "$(status "$server/v1/images/generations" -H 'Content-Type:' -d '{}')" 400
expect 'no key' "$(curl -s -o /dev/null -w '%{http_code}' "$server/v1/models")" 401
expect 'no route' "$(status "$server/v2")" 404
head -c 3000000 /dev/zero | tr '\0' ' ' > "$folder/large"
expect 'a large body' \
    "$(status "${json[@]}" "$server/v1/images/generations" --data-binary "@$folder/large")" 413
