"""Fine-tuning on 2:4 operands (their stand-ins, tests/emulated_kernels.py) learns what it learns on dense ones."""

import emulated_kernels
import pytest
from finetuning_runs import check_both_backends

from kernels import autotune, backends


@pytest.fixture
def kernels(monkeypatch):
    """Lets the backend `cutlass` run here."""
    library = emulated_kernels.install(monkeypatch)
    monkeypatch.setattr(backends, "refusal", lambda backend, layer, dtype: None)
    monkeypatch.setattr(backends, "loaded", lambda library: None)
    monkeypatch.setattr(autotune, "tune", lambda *shape: autotune.Choice(ratio=1.25))
    yield
    library._destroy()


@pytest.mark.parametrize("adapters", [False, True], ids=["r = 0", "adapters"])
@pytest.mark.parametrize("door", ["run_glue", "run_squad"])
def test_both_backends_learn_the_same(tmp_path, kernels, door, adapters):
    check_both_backends(tmp_path, door, adapters)
