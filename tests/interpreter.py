"""Runs a file of tests in a process in which Triton interprets its kernels: it chooses that where it is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(name: str) -> None:
    """The tests of the file `name` beside this one, on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton (requirements-test.txt)")
    checks = Path(__file__).resolve().parent / name
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(checks)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
