#!/usr/bin/env bash
# Tests `kiln serve` with clients, on the demo model: curl, the official openai packages, the programs in
# examples/, the servers of Open WebUI and LiteLLM, and requests as other programs send them; webhooks with the
# library of Standard Webhooks; the cache that kiln shares with huggingface_hub; and 45 seconds of the soak test. Needs curl, jq and Python 3.11 with venv; the first
# run installs packages into target/clients and target/servers. KILN names the binary; a development build is the
# default.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
clients="$(pwd)/tests/clients"
# First, so that its programs come last in PATH.
python_packages servers "$clients/servers.txt" open-webui==0.12.4
python_packages clients "$clients/requirements.txt"
node="$target/clients/node_project"
if ! cmp --silent "$clients/package.json" "$node/package.json"; then
    rm -rf "$node" && mkdir "$node" && cp "$clients/package.json" "$node"
    npm install --prefix "$node" --no-audit --no-fund --silent ||
        { rm -rf "$node" && exit 1; }
fi
echo "clients are installed (after $SECONDS s)"

jobs="$(mktemp -d)"
KILN_API_KEY=other-key,test-key start_server --enable-sdapi --jobs "$jobs"
trap 'kill "$process" 2> /dev/null || true; rm -rf "$log" "$jobs"' EXIT
"$KILN" health --port "${server##*:}"
bash "$clients/test_curl.sh" "$server" test-key
python "$clients/test_openai.py" "$server" test-key "$(realpath "$KILN")"
python "$clients/test_programs.py" "$server" test-key
python "$clients/test_open_webui.py" "$server" test-key "$(command -v open-webui)"
python "$clients/test_litellm.py" "$server" test-key "$(command -v litellm)"
python "$clients/test_docs.py" "$server" test-key "$node"
python "$clients/test_examples.py" "$server" test-key "$(realpath "$KILN")"

python "$clients/test_webhooks.py" "$(realpath "$KILN")"

python "$clients/test_hub_cache.py" "$(realpath "$KILN")"

kill -TERM "$process"
wait "$process"
echo "SIGTERM: exit code 0 (after $SECONDS s)"
if grep -q 'test-key\|other-key' "$log"; then
    echo "the log contains an API key" >&2
    exit 1
fi

python "$clients/test_soak.py" "$(realpath "$KILN")"
KILN="$(realpath "$KILN")" bash scripts/soak.sh 0.75
echo "clients: done (after $SECONDS s)"
