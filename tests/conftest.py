"""What every test shares: import paths, one thread for arithmetic, and the small pretraining runs."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny matrices are slower on more

import pytest  # noqa: E402
import torch  # noqa: E402
from job_cluster import Cluster  # noqa: E402
from machine_gpus import share_out  # noqa: E402
from optimizer_toys import FusedLAMB  # noqa: E402
from pretraining_runs import TrainingFiles, begin_run, make_files  # noqa: E402

import optimization  # noqa: E402
from training.distributed import World  # noqa: E402

torch.set_num_threads(1)
share_out()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> TrainingFiles:
    """Shards and model configurations of a tiny BERT."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def whole_run(files, tmp_path_factory) -> Path:
    """Output directory of an uninterrupted run of the standard settings: 20 steps, adapters from step 15 on.

    Read-only for tests.
    """
    output = tmp_path_factory.mktemp("whole")
    run = begin_run(files.flags(output, eval_dir=files.heldout, eval_interval=10)).finish()
    assert run.code == 0, run.stderr
    return output


@pytest.fixture
def read(monkeypatch, files):
    """Parse flags of a small benchmarks/pretraining_throughput.py, on the processor; `main` then goes by them."""
    from benchmarks import pretraining_throughput

    alone = World(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(pretraining_throughput, "this_process", lambda: alone)

    def parse(*more: str):
        small = ["--model_config_file", f"{files.model_without_dropout}", "--sample_seconds", "0", "--rounds", "2"]
        monkeypatch.setattr(sys, "argv", ["benchmarks/pretraining_throughput.py", *small, *more])
        return pretraining_throughput.read_flags(alone)

    return parse


@pytest.fixture
def cluster(tmp_path):
    """A copy of the job scripts among stubs."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.clean_up()


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA's apex is installed, as far as its detection can see."""
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    apply = types.ModuleType("apex.multi_tensor_apply")
    optimizers.FusedLAMB = FusedLAMB
    apply.multi_tensor_applier = types.SimpleNamespace(available=True)
    for module in (package, optimizers, apply):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def cuda(monkeypatch):
    """The model lies on a GPU, as far as the choice of the optimizer can see."""
    monkeypatch.setattr(optimization, "_on_cuda", lambda groups: True)
