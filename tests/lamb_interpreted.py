"""kernels/lamb.py in Triton's interpreter, which runs the kernels on CPU tensors: the same checks as on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/lamb_interpreted.py       # as tests/test_lamb_kernel.py does

In a process of its own, since the interpreter is chosen where Triton is first imported.
"""

import pytest
import torch
from lamb_checks import (
    Pair,
    check_against_definition,
    check_equal_bits,
    check_groups_that_join_and_gradients_that_lack,
    check_not_a_number_reaches_every_weight,
    check_whatever_moves_is_found,
    check_without_trust_ratio,
    check_zero_norms,
    definition_only,  # noqa: F401 - a fixture
    each_setting,
    staying,
)

import optimization
from kernels import lamb
from kernels.build import KernelsUnavailable
from optimization import Lamb

CHUNK, BLOCK = 32, 8
SIZES = [1, BLOCK, (3, 3), CHUNK, CHUNK - 1, CHUNK + 1, 3 * CHUNK + BLOCK + 3, 0]


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> list:
    """`Lamb` steps with the kernels, here; the list has those that were made."""
    made = []

    def lamb_kernels(device):
        made.append(lamb.LambKernels(device, chunk=CHUNK, block=BLOCK))
        return made[-1]

    monkeypatch.setattr(optimization, "lamb_kernels", lamb_kernels)
    monkeypatch.setattr(lamb, "SUMS_BLOCK", 4)
    return made


@each_setting
def test_the_kernels_are_the_definition(settings):
    check_against_definition("cpu", SIZES, **settings)


def test_without_trust_ratio():
    check_without_trust_ratio("cpu", SIZES)


def test_groups_that_join_and_gradients_that_lack():
    check_groups_that_join_and_gradients_that_lack("cpu")


def test_zero_norms():
    check_zero_norms("cpu")


def test_an_eps_of_zero_leaves_the_norm_of_a_partly_filled_block_alone():
    pair = Pair([([BLOCK + 3], {"weight_decay": 0.01})], "cpu", lr=0.05, eps=0.0)
    pair.step()
    pair.check()


def test_not_a_number_reaches_every_weight():
    check_not_a_number_reaches_every_weight("cpu")


def test_equal_inputs_give_equal_bits():
    check_equal_bits("cpu", SIZES)


def test_whatever_moves_is_found():
    check_whatever_moves_is_found("cpu")


def test_rates_from_tensors():
    pair = Pair([([5, 40], {"weight_decay": 0.01})], "cpu", lr=torch.tensor(1.0))
    for rate in (0.05, 0.02):
        optimization.set_learning_rate(pair.definition, rate)
        optimization.set_learning_rate(pair.kernels, rate)
        pair.step()
    pair.check()


def test_nothing_is_sent_twice(monkeypatch, kernels):
    """With gradients that stay where they are and counts that do not matter, a step sends nothing."""
    pair = Pair([([5, 40], {"weight_decay": 0.01})], "cpu", lr=0.05, bias_correction=False)
    place = staying()
    pair.step(place=place)
    monkeypatch.setattr(kernels[0], "_send", None)
    pair.step(place=place)
    pair.check()
    assert len(kernels) == 1


@pytest.mark.parametrize("odd", ["bf16", "strided", "strided gradient"])
def test_what_the_kernels_cannot_take_goes_the_other_way(monkeypatch, odd):
    taken = []
    monkeypatch.setattr(Lamb, "_update_foreach", lambda *arguments: taken.append(arguments), raising=False)
    p = torch.randn(4, 6, dtype=torch.bfloat16 if odd == "bf16" else torch.float32)
    p = torch.nn.Parameter(p.t() if odd == "strided" else p)
    p.grad = torch.ones(6, 4).t() if odd == "strided gradient" else torch.ones_like(p)
    before = p.detach().clone()
    optimizer = Lamb([p, torch.nn.Parameter(torch.ones(3))], 0.1)
    optimizer.step()
    assert len(taken) == 1 and torch.equal(p, before)


def test_why_the_kernels_cannot_run_is_one_line(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    with pytest.raises(KernelsUnavailable, match="Old is too old for Triton"):
        optimization.lamb_kernels(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelsUnavailable, match="needs a C compiler: install gcc, or set CC"):
        optimization.lamb_kernels(torch.device("cuda"))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(lamb.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(KernelsUnavailable, match=r"no Python.h in /nowhere"):
        optimization.lamb_kernels(torch.device("cuda"))
