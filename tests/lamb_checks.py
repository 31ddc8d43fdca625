"""What LAMB's kernels must do on any device that runs them, against the definition in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optimization import Lamb

each_setting = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_averaging": False, "max_grad_norm": 0.5},
        {"bias_correction": False, "max_grad_norm": float("inf"), "betas": (0.8, 0.95), "eps": 1e-3},
    ],
    ids=["recipe", "no averaging", "no correction, no clipping"],
)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def definition_only(monkeypatch):
    """The foreach form, which `Lamb` falls back to, would hide kernels that never run."""
    monkeypatch.delattr(Lamb, "_update_foreach")


class Pair:
    """The same parameters twice: in float64 under the definition, in fp32 under the kernels.

    Args:
        groups: of each group, the sizes of its tensors and its own settings.
        settings: of both optimizers.
    """

    def __init__(self, groups: list[tuple[list, dict]], device: str, **settings):
        self.device, self.draws = device, torch.Generator().manual_seed(0)
        made = [self._make(*group) for group in groups]
        self.definition = Lamb([double for double, _ in made], fused=False, **settings)
        self.kernels = Lamb([single for _, single in made], **settings)

    def _make(self, sizes: list, settings: dict) -> tuple[dict, dict]:
        starts = [torch.randn(size, generator=self.draws) for size in sizes]
        return tuple(
            {"params": [nn.Parameter(start.to(self.device, dtype)) for start in starts], **settings}
            for dtype in (torch.float64, torch.float32)
        )

    def join(self, sizes: list, **settings) -> None:
        for optimizer, group in zip((self.definition, self.kernels), self._make(sizes, settings), strict=True):
            optimizer.add_param_group(group)

    def params(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.definition.param_groups, self.kernels.param_groups, strict=True)
        return [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]

    def step(self, scale: float = 1.0, place: Callable[[Tensor], Tensor] = Tensor.clone, without: tuple = ()) -> None:
        """One step of both on new gradients of about norm `scale`; `place` lays out the kernels' gradients."""
        pairs = self.params()
        scale /= sum(double.numel() for double, _ in pairs) ** 0.5
        for index, (double, single) in enumerate(pairs):
            gradient = scale * torch.randn(double.shape, generator=self.draws).to(self.device)
            absent = index in without
            double.grad, single.grad = (None, None) if absent else (gradient.double(), place(gradient))
        before = [None if single.grad is None else single.grad.clone() for _, single in pairs]
        self.definition.step()
        self.kernels.step()
        for gradient, (_, single) in zip(before, pairs, strict=True):
            assert gradient is None or torch.equal(gradient, single.grad)

    def check(self, **tolerance) -> None:
        for double, single in self.params():
            torch.testing.assert_close(single.double(), double, **(tolerance or TOLERANCE))
            assert (double in self.definition.state) == (single in self.kernels.state)
            for key, expected in self.definition.state[double].items():
                actual = self.kernels.state[single][key]
                if key == "step":
                    assert type(actual) is int and actual == expected
                else:
                    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-9)


def misplaced(gradient: Tensor) -> Tensor:
    """As a view into a bucket of gradients: at an address that is a multiple of 4 alone."""
    bucket = torch.zeros(gradient.numel() + 5, device=gradient.device)
    return bucket[1 : 1 + gradient.numel()].view(gradient.shape).copy_(gradient)


def staying() -> Callable[[Tensor], Tensor]:
    """Every gradient where the last one of its shape was, as under a captured backward pass."""
    places: dict[torch.Size, Tensor] = {}
    return lambda gradient: places.setdefault(gradient.shape, torch.empty_like(gradient)).copy_(gradient)


def check_against_definition(device: str, sizes: list, steps: int = 4, **settings) -> None:
    """With and without decay, gradients below and above the clipping norm, aligned and not, rates that change."""
    pair = Pair([(sizes, {"weight_decay": 0.01}), (sizes[:4], {"weight_decay": 0.0})], device, lr=0.05, **settings)
    for number in range(steps):
        for optimizer in (pair.definition, pair.kernels):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        pair.step(scale=(0.3, 7.0)[number % 2], place=(Tensor.clone, misplaced)[number // 2 % 2])
    pair.check()


def check_without_trust_ratio(device: str, sizes: list) -> None:
    """A group beside one that has it."""
    pair = Pair([(sizes, {}), (sizes, {"trust_ratio": False})], device, lr=0.05, weight_decay=0.01)
    for _ in range(3):
        pair.step(scale=5.0)
    pair.check()


def check_groups_that_join_and_gradients_that_lack(device: str) -> None:
    pair = Pair([([(3, 5), 40], {"weight_decay": 0.01}), ([7], {"weight_decay": 0.0})], device, lr=0.05)
    pair.step()
    pair.step(without=(1,))
    pair.join([(4, 6), 9], weight_decay=1e-4, lr=0.02)
    pair.step(without=(0,))
    pair.step()
    pair.check()
    assert [state["step"] for state in pair.kernels.state.values()] == [3, 3, 4, 2, 2]


def check_whatever_moves_is_found(device: str) -> None:
    """Gradients stay where they are; weights, moments and step counts do not, and the old tensors stay alive."""
    pair, place, old = Pair([([5, 40], {"weight_decay": 0.01})], device, lr=0.05), staying(), []
    pair.step(place=place)
    for double, single in pair.params():
        for optimizer, p in ((pair.definition, double), (pair.kernels, single)):
            old.append(dict(optimizer.state[p]))
            optimizer.state[p] = {"step": 1, **{m: old[-1][m].clone() for m in ("exp_avg", "exp_avg_sq")}}
    pair.step(place=place)
    pair.check()
    for optimizer, p in zip((pair.definition, pair.kernels), pair.params()[1], strict=True):
        optimizer.state[p]["step"] = 0
    pair.step(place=place)
    pair.check()
    for _, single in pair.params():
        old.append(single.data)
        single.data = single.data.clone()
    pair.step(place=place)
    pair.check()


def check_zero_norms(device: str) -> None:
    """A tensor of zeros, gradients of zeros with and without decay: no ratio is 0 or a division by 0."""
    pair = Pair([([40, 40], {"weight_decay": 0.01}), ([40], {"weight_decay": 0.0})], device, lr=0.05)
    with torch.no_grad():
        for tensor in pair.params()[0]:
            tensor.zero_()
    pair.step(scale=0.0)
    assert not pair.params()[0][1].any()
    pair.step()
    assert pair.params()[0][1].all()
    pair.check()


def check_not_a_number_reaches_every_weight(device: str) -> None:
    for wrong in (float("nan"), float("inf")):
        pair = Pair([([5, 9], {"weight_decay": 0.01}), ([4], {"weight_decay": 0.0})], device, lr=0.05)

        def spoil(gradient: Tensor, wrong: float = wrong) -> Tensor:
            return torch.cat([torch.tensor([wrong], device=gradient.device), gradient[1:]])

        for double, single in pair.params():
            double.grad, single.grad = torch.ones_like(double), torch.ones_like(single)
        for tensor in pair.params()[0]:
            tensor.grad = spoil(tensor.grad)
        pair.definition.step()
        pair.kernels.step()
        for double, single in pair.params():
            assert torch.equal(single.isnan(), double.isnan())


def check_equal_bits(device: str, sizes: list) -> None:
    results = []
    for _ in range(2):
        pair = Pair([(sizes, {"weight_decay": 0.01})], device, lr=0.05)
        for _ in range(3):
            pair.step(scale=5.0)
        results.append([single.detach().clone() for _, single in pair.params()])
    assert all(map(torch.equal, *results))
