#!/usr/bin/env bash
# Checks what kiln is installed with and needs the binary for: the systemd unit, manual pages and
# completions. Needs systemd-analyze, man, mandoc, zsh and fish.
# KILN names the binary; without it the development build is used.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# The program it starts must be there.
sed "s|/usr/local/bin/kiln|$(realpath "$KILN")|" packaging/kiln.service > "$folder/kiln.service"
systemd-analyze verify "$folder/kiln.service"
# From 0, shut off altogether, to 10, free to do anything.
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
