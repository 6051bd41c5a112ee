#!/usr/bin/env bash
# Uses the page of `kiln serve` with headless Chromium, with the demo model. Needs Chromium
# (Debian's package chromium) and Python 3 with venv; the packages are installed into target/clients
# at the first run. KILN names the binary; without it the development build is used. Arguments are
# names of tests. The README's pictures of the page are made by
#   KILN_SCREENSHOTS=docs scripts/test-page.sh
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
if [ -z "${KILN:-}" ]; then
    cargo build --locked --workspace --exclude kiln-cuda --exclude kiln-wgpu --features ndarray
    KILN="$target/debug/kiln"
fi
environment="$target/clients"
if ! "$environment/bin/python" -c 'import axe_playwright_python, playwright' 2> /dev/null; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check -r tests/page/requirements.txt
fi
"$environment/bin/python" tests/page/test_page.py "$KILN" "$@"
