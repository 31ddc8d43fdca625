"""kernels/lamb.py without a GPU: its checks in Triton's interpreter, and why it cannot be had."""

import sys

import pytest
import torch
from interpreter import run_interpreted

import kernels
from kernels.build import KernelsUnavailable
from optimization import lamb_kernels


def test_the_kernels_in_tritons_interpreter():
    run_interpreted("lamb_interpreted.py")


def test_a_machine_without_a_gpu_or_without_triton_says_so_in_one_line(monkeypatch):
    with pytest.raises(KernelsUnavailable, match="need a CUDA device, and this is cpu$"):
        lamb_kernels(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.lamb", raising=False)
    monkeypatch.delattr(kernels, "lamb", raising=False)
    with pytest.raises(KernelsUnavailable, match=r"^no Triton \(.*\): it comes with every CUDA build of torch"):
        lamb_kernels(torch.device("cuda"))
