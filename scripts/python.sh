# Sourced by other scripts, in the repository's root, with `target` set.
# shellcheck shell=bash

# python_packages NAME REQUIREMENTS [PACKAGE]: installs Python packages into the virtual environment NAME in the build
# folder, unless they are installed already, and puts its programs first in PATH. PACKAGE is installed without its
# dependencies. Modules are compiled when they are imported, as most never are.
python_packages() {
    local environment="${target:?}/$1"
    if ! cmp --silent "$2" "$environment/requirements.txt"; then
        python3 -m venv --clear "$environment"
        local install=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
        "${install[@]}" -r "$2"
        [ $# -lt 3 ] || "${install[@]}" --no-deps "$3"
        cp "$2" "$environment/requirements.txt"
    fi
    PATH="$(realpath "$environment")/bin:$PATH"
}
