"""From a map-style dataset of steps to an iterator of batches, in worker processes if need be."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from training.errors import UsageError

Batch = dict[str, torch.Tensor]


class StepLoader:
    """Iterates over the steps of a dataset once, in order; `wait_seconds` is what the last one kept the caller waiting.

    The batches do not depend on `num_workers`. Worker processes start with the first batch and end with the last one,
    with `close()`, or with their parent, however it dies. Create and use it in the main thread.
    """

    def __init__(self, dataset: Dataset, num_workers: int, pin_memory: bool, prefetch: int):
        """Prepare to iterate.

        Args:
            dataset: map-style, one step an item.
            num_workers: loader processes; 0 makes the batches in this one, when they are asked for.
            pin_memory: give tensors in page-locked memory, for asynchronous copies to a GPU.
            prefetch: batches that each worker makes ahead. They lie in shared memory (/dev/shm).
        """
        self.wait_seconds = 0.0
        self._batches: Iterator[Batch | UsageError] | None = None
        self._loader = DataLoader(
            _ErrorsAsValues(dataset),
            batch_size=None,
            collate_fn=_pack if num_workers else _as_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if num_workers else None,
            # Starts in milliseconds, and the children need nothing that a fork breaks: they never touch CUDA.
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=partial(_prepare_worker, os.getpid()),
            # The loader draws a seed for its workers, which must not come from torch's global generator.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            UsageError: a shard that cannot be used, also where a worker found it.
        """
        started = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        self.wait_seconds = time.perf_counter() - started
        if isinstance(batch, UsageError):
            self.close()
            raise batch
        return _unpack(*batch) if self._loader.num_workers else batch

    def close(self) -> None:
        """End the iteration and its workers."""
        self._batches = iter(())


def step_loader(dataset: Dataset, num_workers: int = 0, pin_memory: bool = False, prefetch: int = 2) -> StepLoader:
    """Iterate over a `StepDataset` with worker processes; see `StepLoader`."""
    return StepLoader(dataset, num_workers, pin_memory, prefetch)


class _ErrorsAsValues(Dataset):
    """Returns a UsageError instead of raising it, because torch would wrap it into a traceback of many lines."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch | UsageError:
        try:
            return self.dataset[index]
        except UsageError as error:
            return error


def _as_is(batch: Batch | UsageError) -> Batch | UsageError:
    return batch


def _pack(batch: Batch | UsageError) -> tuple[torch.Tensor, dict[str, tuple[int, ...]]] | UsageError:
    """One flat tensor and the shapes in it: every tensor handed between processes costs half a millisecond."""
    if isinstance(batch, UsageError):
        return batch
    return torch.cat([tensor.reshape(-1) for tensor in batch.values()]), {
        name: tuple(tensor.shape) for name, tensor in batch.items()
    }


def _unpack(flat: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> Batch:
    """The batch that `_pack` was given, as views of `flat`."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _prepare_worker(parent: int, worker_id: int) -> None:
    """Tie a worker's life to its parent's alone.

    Launchers and clusters send their stop signals to every process of a job. The parent then saves a checkpoint, for
    which it may need the batch that the worker is making; so only the parent's own SIGTERM, and its death, count.
    """
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":
        # Blocked signals are left for `_end_when_told`, which alone can see who sent them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(parent,), daemon=True).start()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
