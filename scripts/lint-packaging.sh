#!/usr/bin/env bash
# Lints the packaging that needs the binary: the systemd unit, manual pages, completions, the arguments in the
# Kubernetes manifests, and the metrics that rules, dashboard and autoscalers name. Needs systemd-analyze, man,
# mandoc, zsh, fish, promtool and Python 3 with venv. KILN names the binary; a development build is the default.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# systemd-analyze requires that the unit's program exists.
sed "s|/usr/local/bin/kiln|$(realpath "$KILN")|" packaging/kiln.service > "$folder/kiln.service"
systemd-analyze verify "$folder/kiln.service"
# The exposure level ranges from 0 (fully sandboxed) to 10 (unrestricted); the threshold is 1.5.
systemd-analyze security --offline=true --threshold=15 "$folder/kiln.service" | tail -n 1

mkdir "$folder/man"
"$KILN" man --output-dir "$folder/man"
for page in "$folder"/man/*.1; do
    warnings="$(MANWIDTH=80 man --warnings -l "$page" 2>&1 > /dev/null)"
    if [ -n "$warnings" ]; then
        echo "$page: $warnings" >&2
        exit 1
    fi
    mandoc -T lint -W error "$page"
done
echo "manual pages: ok"
for shell in bash zsh fish; do
    "$KILN" completions "$shell" > "$folder/completions"
    "$shell" -n "$folder/completions"
done
fish -c "source $folder/completions; complete -C 'kiln gen'" | grep -q '^generate'
echo "completions: ok"

python_packages lint packaging/requirements.txt
python scripts/deploy/monitoring.py "$KILN"
