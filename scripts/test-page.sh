#!/usr/bin/env bash
# Tests the web page of `kiln serve` in headless Chromium, with the demo model. Needs Chromium (Debian's
# package chromium) and Python 3 with venv; the first run installs Python packages into target/page. KILN
# names the binary; a development build is the default. Arguments are names of tests. The
# screenshots in docs/serving.md are created by
#   KILN_SCREENSHOTS=docs scripts/test-page.sh
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh
python_packages page tests/page/requirements.txt
python tests/page/test_page.py "$KILN" "$@"
