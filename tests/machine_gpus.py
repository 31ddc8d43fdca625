"""The GPUs of this machine, shared out among the processes that pytest-xdist runs tests in."""

from __future__ import annotations

import os

import torch

COUNT = torch.cuda.device_count()  # asked before any process is given one alone; takes none of a GPU's memory
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


def share_out() -> None:
    """Let this process see one GPU, the next one's process the next; to be called before CUDA is used."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ...
    if worker and COUNT > 1:
        seen = VISIBLE.split(",") if VISIBLE else [str(index) for index in range(COUNT)]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(worker.removeprefix("gw")) % COUNT]


def see_all() -> None:
    """Undo that, in a process that a test has started."""
    if VISIBLE is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE
