# Sourced by other scripts, in the repository's root, with `target` set.
# shellcheck shell=bash

# Installs Python packages, if they are not there yet, into an environment under the target folder,
# and puts its programs first in PATH: python_packages NAME REQUIREMENTS
python_packages() {
    local environment="${target:?}/$1"
    if ! cmp --silent "$2" "$environment/requirements.txt"; then
        python3 -m venv --clear "$environment"
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$2"
        cp "$2" "$environment/requirements.txt"
    fi
    PATH="$(realpath "$environment")/bin:$PATH"
}
