"""kernels/lamb.py without a GPU: its checks in Triton's interpreter, and why it cannot be had."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.build import KernelsUnavailable
from optimization import lamb_kernels

CHECKS = Path(__file__).resolve().parent / "lamb_interpreted.py"


def test_the_kernels_in_tritons_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton (requirements-test.txt)")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(CHECKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_machine_without_a_gpu_or_without_triton_says_so_in_one_line(monkeypatch):
    with pytest.raises(KernelsUnavailable, match="need a CUDA device, and this is cpu$"):
        lamb_kernels(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.lamb", raising=False)
    monkeypatch.delattr(kernels, "lamb", raising=False)
    with pytest.raises(KernelsUnavailable, match=r"^no Triton \(.*\): it comes with every CUDA build of torch"):
        lamb_kernels(torch.device("cuda"))
