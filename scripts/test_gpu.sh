#!/usr/bin/env bash
# The tests that need a CUDA device (tests/test_gpu*.py), on this machine's Python (PYTHON, default python3), which must
# have a CUDA build of torch 2.11 or later beside h5py, pytest, tqdm, tensorboard and transformers. Installs nothing;
# the kernels are compiled at first use. With pytest-xdist, `-n 14 --dist load --maxschedchunk 1` is several times as
# fast, and deals its processes out to all GPUs. Tests that hold a time against a bound come last, one after the other.
# Usage: bash scripts/test_gpu.sh [pytest arguments for the others, but -k and -m]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "test_gpu.sh: error: $python has no torch that sees a CUDA device; set PYTHON to one that has" >&2
    exit 2
fi
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2} # in each of several test processes
timed="host_time or speed_of_memory"
failed=0
"$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu*.py "$@" -k "not ($timed)" || failed=1
"$python" -m pytest -p no:cacheprovider -m gpu tests/test_gpu*.py -k "$timed" || failed=1
exit "$failed"
