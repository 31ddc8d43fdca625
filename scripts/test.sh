#!/usr/bin/env bash
# Lint, format check, shell check and tests, in the environment that the suite itself uses.
# Usage: bash scripts/test.sh [pytest arguments]   (without arguments: everything, on up to 16 cores)
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment requirements.txt requirements-test.txt
cd "$REPOSITORY"

bin="$REPOSITORY/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" --external-sources --source-path=SCRIPTDIR/.. scripts/*.sh .ci/run

processes=$(nproc) # asked first, as nproc goes by OMP_NUM_THREADS
processes=$((processes < 16 ? processes : 16))
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then
    exec "$bin/python" -m pytest "$@"
fi
exec "$bin/python" -m pytest --numprocesses="$processes" --dist=loadfile
