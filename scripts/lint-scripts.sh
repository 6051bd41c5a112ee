#!/usr/bin/env bash
# Lints the files that are run or deployed without being built: shell scripts, Dockerfiles, the
# Kubernetes manifests and the configuration of NATS in them. Needs git, shellcheck and Python 3 with
# venv; the Python packages, which contain kubectl and nats-server, are installed into target/lint at
# the first run.
set -euo pipefail
cd "$(dirname "$0")/.."

target="${CARGO_TARGET_DIR:-target}"
# shellcheck source=scripts/python.sh
. scripts/python.sh
python_packages lint packaging/requirements.txt

git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x
echo "shell scripts: ok"
hadolint packaging/Dockerfile packaging/Dockerfile.cuda
echo "Dockerfiles: ok"
python scripts/deploy/generate.py --check
python scripts/deploy/manifests.py
POD_NAME=kiln-nats-0 nats-server --config packaging/kubernetes/components/nats/nats.conf -t
echo "Kubernetes: ok"
