# Sourced by the other scripts: makes .venv beside the repository's files and installs what is asked for, once.
# Usage: source scripts/environment.sh; prepare_environment REQUIREMENTS_FILE...
# shellcheck shell=bash

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The system's first Python of 3.11 or later; PYTHON names another one.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: needs Python 3.11 or later; set PYTHON to one" >&2
    return 2
}

# Afterwards $VENV_PYTHON runs the environment's Python. A file that did not change since it was installed is skipped.
prepare_environment() {
    local python stamp requirements
    python=$(find_python) || exit 2
    VENV_PYTHON="$REPOSITORY/.venv/bin/python"
    if [ ! -x "$VENV_PYTHON" ]; then
        echo "making $REPOSITORY/.venv with $("$python" --version)"
        "$python" -m venv "$REPOSITORY/.venv"
    fi
    for requirements in "$@"; do
        stamp="$REPOSITORY/.venv/$(basename "$requirements").installed"
        if ! cmp -s "$REPOSITORY/$requirements" "$stamp"; then
            echo "installing $requirements (several minutes the first time)"
            "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check -r "$REPOSITORY/$requirements"
            cp "$REPOSITORY/$requirements" "$stamp"
        fi
    done
    export VENV_PYTHON
}
