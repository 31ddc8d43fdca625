#!/usr/bin/env bash
# The tests that need a CUDA device (tests/test_gpu*.py), on this machine's Python (PYTHON, default python3), which must
# have a CUDA build of torch 2.11 or later beside h5py, pytest, tqdm and tensorboard. Installs nothing; the kernels are
# compiled at first use.
# Usage: bash scripts/test_gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "test_gpu.sh: error: $python sees no CUDA device" >&2
    exit 2
fi
exec "$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu*.py "$@"
