#!/usr/bin/env bash
# Uses the page of `kiln serve` with headless Chromium, with the demo model. Needs Chromium
# (Debian's package chromium) and Python 3 with venv; packages are installed into target/page at the
# first run. KILN names the binary; without it the development build is used. Arguments are
# names of tests. The images of the page in docs/serving.md are made by
#   KILN_SCREENSHOTS=docs scripts/test-page.sh
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
python_packages page tests/page/requirements.txt
python tests/page/test_page.py "$KILN" "$@"
