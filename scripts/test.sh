#!/usr/bin/env bash
# All tests that need no GPU, in .venv (made if it is missing). Arguments go to pytest: scripts/test.sh tests/unit -x
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m pytest "$@"
