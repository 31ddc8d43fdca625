"""A small model with every kind of parameter, and NVIDIA's apex as its users see it."""

import math

import torch
from torch import nn

from optimization import (
    build_optimizer,
    optimizer_state,
    parameter_groups,
)


class Toy(nn.Module):
    """What BERT and SparseLinear have: 1-D and 2-D values, biases, a LayerNorm, a tied weight, adapters."""

    def __init__(self, adapters: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embeddings = nn.Embedding(7, 4)
        self.layer = nn.Module()
        self.layer.values = nn.Parameter(torch.randn(4, 2, generator=generator))
        self.layer.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.unstructured = nn.Module()
        self.unstructured.values = nn.Parameter(torch.randn(5, generator=generator))
        self.LayerNorm = nn.LayerNorm(4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embeddings.weight
        with torch.no_grad():
            self.embeddings.weight.copy_(torch.randn(7, 4, generator=generator))
            self.decoder.bias.copy_(torch.randn(7, generator=generator))
        if adapters:
            self.add_adapters()

    def add_adapters(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layer.lora_left = nn.Parameter(torch.randn(4, 2, generator=generator))
        self.layer.lora_right = nn.Parameter(torch.zeros(2, 4))


def put_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    for index, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def build(name: str, model: nn.Module, lr: float = 0.05, **kwargs) -> torch.optim.Optimizer:
    return build_optimizer(name, parameter_groups(model, 0.01, 1e-4), lr, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, scale: float = 1.0) -> None:
    for seed in seeds:
        put_gradients(model, seed, scale)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def entries(optimizer: torch.optim.Optimizer) -> list[tuple[str, dict]]:
    return list(optimizer_state(optimizer)["state"].items())


class FusedLAMB(torch.optim.Optimizer):
    """apex's optimizer as a user of it sees it: one `step` a group, moments alone in the parameters' state."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        total = math.sqrt(sum(float((p.grad**2).sum()) for group in self.param_groups for p in group["params"]))
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                p.grad /= max(1.0, total / self.defaults["max_grad_norm"])
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].mul_(0.999).add_(0.001 * p.grad**2)
                m = state["exp_avg"] / (1 - 0.9 ** group["step"])
                v = state["exp_avg_sq"] / (1 - 0.999 ** group["step"])
                p.grad.copy_(m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p)
                adaptive = group["weight_decay"] != 0 and p.norm() > 0 and p.grad.norm() > 0
                p -= group["lr"] * (p.norm() / p.grad.norm() if adaptive else 1.0) * p.grad
