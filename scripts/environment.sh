# shellcheck shell=bash
# Sourced by the other scripts. Makes .venv with the project and its pinned dependencies, puts it first in PATH and goes
# to the root of the repository. Once made it takes a moment: nothing is installed as long as pyproject.toml, this file
# and the place of the repository stay as they are.
#
#   PYTHON                       interpreter to make .venv with, 3.11 or newer; default: the first one found
#   SPARSE_DS_TORCH_INDEX_URL    package index for torch alone. For a machine without an NVIDIA GPU on which pip would
#                                bring the CUDA build (several GB): the address of torch's CPU builds

set -euo pipefail
CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        if ! is_python_311 "$PYTHON"; then
            echo "error: PYTHON=$PYTHON does not run or is older than Python 3.11; expected 3.11 or newer." >&2
            return 1
        fi
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if is_python_311 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer in PATH. Install one, or name one: PYTHON=/path/to/python $0" >&2
    return 1
}

# Not after an interrupted start, when its Python is gone, or when the repository was moved: the commands in .venv/bin
# hold the path at which it was made.
is_usable() {
    is_python_311 .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 &&
        grep -qF "$PWD/.venv" .venv/bin/activate
}

install_environment() {
    local python torch
    if ! is_usable; then
        python="$(find_python)"
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    # torch first: the other packages then take the build that is there.
    torch="$(sed -nE 's/^ *"(torch==[^"]+)".*/\1/p' pyproject.toml)"
    if [[ -n "${SPARSE_DS_TORCH_INDEX_URL:-}" ]]; then
        .venv/bin/python -m pip install --index-url "$SPARSE_DS_TORCH_INDEX_URL" "$torch"
    else
        if ! nvidia-smi -L >/dev/null 2>&1; then
            echo "No NVIDIA GPU here. Should pip bring CUDA packages, set SPARSE_DS_TORCH_INDEX_URL (see README.md)."
        fi
        .venv/bin/python -m pip install "$torch"
    fi
    .venv/bin/python -m pip install --editable '.[dev]'
}

environment_state="$PWD $(cat pyproject.toml scripts/environment.sh | cksum)"
if [[ "$(cat .venv/.sparse_ds_state 2>/dev/null)" != "$environment_state" ]] || ! is_python_311 .venv/bin/python; then
    echo "Setting up .venv (several minutes the first time)"
    rm -f .venv/.sparse_ds_state
    PIP_DISABLE_PIP_VERSION_CHECK=1 install_environment
    echo "$environment_state" >.venv/.sparse_ds_state
fi
export PATH="$PWD/.venv/bin:$PATH"
