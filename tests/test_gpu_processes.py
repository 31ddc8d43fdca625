"""run_pretraining.py on two GPUs, one process each, against one process: compiled blocks under DDP, over NCCL."""

from __future__ import annotations

import pytest
from machine_gpus import COUNT, see_all
from pretraining_runs import NO_DROPOUT, metrics, run, values, write_model
from product_checks import unavailable

pytestmark = pytest.mark.gpu
COMPILING = 400  # seconds: the first run of a machine takes a minute to compile, more beside other tests
# As narrow as the 2:4 kernels run.
SIZES = {"hidden_size": 128, "intermediate_size": 512}


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    if COUNT < 2:
        pytest.skip("needs two GPUs, and this machine has one")
    reason = unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def losses_of(files, tmp_path_factory):
    """Runs 20 steps, with adapters from step 15 on, and gives the loss of each."""
    folder = tmp_path_factory.mktemp("processes")
    model = write_model(folder / "model.json", **SIZES, **NO_DROPOUT)
    known = {}

    def losses(ranks: int, **flags) -> list[float]:
        key = (ranks, *flags.values())
        if key not in known:
            output = folder / f"{len(known)}"
            settings = {"model_config_file": model, "precision": "bf16"} | flags
            run(files.flags(output, **settings), see_all, ranks=ranks, timeout=COMPILING)
            assert [int(row["step"]) for row in metrics(output)] == list(range(1, 21))
            known[key] = values(output)
        return known[key]

    return losses


SPARSE = {"sparse_backend": "cutlass"}
DENSE = {"sparse_backend": "auto", "pruned_matrix": "none", "add_lora": None, "lazy_lora_fraction": None}


@pytest.mark.parametrize(
    ("model", "communication"),
    [(DENSE, "fp32"), (SPARSE, "fp32"), (SPARSE, "bf16")],
    ids=["dense", "slope", "slope, averaged in bf16"],
)
def test_two_processes_learn_what_one_does(losses_of, model, communication):
    alone = losses_of(1, **model)
    together = losses_of(2, **model, gradient_communication=communication)
    assert alone[-1] < 0.95 * alone[0], "nothing was learnt: there is nothing to compare"
    assert together == pytest.approx(alone, rel=0.01)
