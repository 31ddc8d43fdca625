#!/usr/bin/env bash
# The comparison of docs/results.md by one command: data, five pretraining runs, their fine-tunings, table and picture.
# Usage: bash scripts/reproduce.sh [flags of scripts/reproduce.py; --help lists them]
# Runs on $PYTHON where that is set, an environment that holds what requirements.txt asks for; else on .venv, which it
# makes and fills.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ -z ${PYTHON:-} ]]; then
    prepare_environment requirements.txt
    PYTHON=$VENV_PYTHON
fi
exec "$PYTHON" "$REPOSITORY/scripts/reproduce.py" "$@"
