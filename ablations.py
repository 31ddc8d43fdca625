"""The ablations of the SLoPe paper: other matrices to prune than the weight, and weights pruned anew in every call.

Each product of a linear layer, Y = X W^T, dW = dY^T X and dX = dY W, reads two matrices; an ablation prunes some of
them, along one of their dimensions, on the fly. `ABLATIONS` is the whole list.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_ops import AdaptedLinear, N, nm_mask
from training.errors import UsageError

# Which matrix of which product an ablation prunes, and along which of its two dimensions (0: tokens of X and dY, or out
# of W; 1: features of X and dY, or in of W). Key: (kind, reduction_dim). What a row does not name stays dense.
ABLATIONS = {
    ("dynamic-weight", True): {"w_forward": 1, "w_backward": 0},
    ("dynamic-weight", False): {"w_forward": 0, "w_backward": 1},
    ("dynamic-input", True): {"x_forward": 1, "x_weight_grad": 0},
    ("dynamic-input", False): {"x_forward": 1},
    ("static-input", True): {"x_forward": 1, "x_weight_grad": 0},
    ("static-input", False): {"x_forward": 1},
    ("dynamic-output-grad", True): {"grad_weight_grad": 0, "grad_input_grad": 1},
    ("dynamic-output-grad", False): {"grad_weight_grad": 1, "grad_input_grad": 1},
}


def magnitude_mask(matrix: Tensor, m: int, dim: int) -> Tensor:
    """The largest N of every M along `dim` of a 2-D matrix; a last group that is short is filled up with zeros."""
    missing = -matrix.shape[dim] % m
    padding = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return nm_mask(F.pad(matrix.abs(), padding, value=-1.0), N, m, dim).narrow(dim, 0, matrix.shape[dim])


def prune(matrix: Tensor, m: int, dim: int | None) -> Tensor:
    """`matrix` with zeros outside its `magnitude_mask`; `dim` None leaves it as it is."""
    return matrix if dim is None else torch.where(magnitude_mask(matrix, m, dim), matrix, 0.0)


class AblationProduct(torch.autograd.Function):
    """Y, dW and dX with one matrix of them pruned, as a row of `ABLATIONS` says. All arguments are 2-D."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, input_mask: Tensor | None, m: int, policy: dict):
        if "x_forward" in policy and input_mask is None:
            input_mask = magnitude_mask(x, m, policy["x_forward"])
        if input_mask is not None:
            x = torch.where(input_mask, x, 0.0)
        ctx.m, ctx.policy = m, policy
        ctx.save_for_backward(x, weight, input_mask)
        return x @ prune(weight, m, policy.get("w_forward")).t()

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, weight, input_mask = ctx.saved_tensors

        def pruned(matrix: Tensor, role: str) -> Tensor:
            return prune(matrix, ctx.m, ctx.policy.get(role))

        grad_weight = pruned(grad_y, "grad_weight_grad").t() @ pruned(x, "x_weight_grad")
        grad_x = pruned(grad_y, "grad_input_grad") @ pruned(weight, "w_backward")
        if input_mask is not None:
            grad_x = torch.where(input_mask, grad_x, 0.0)
        return grad_x, grad_weight, None, None, None


class AblationLinear(AdaptedLinear):
    """The paper's ablations: a dense weight, and one of the matrices pruned in every call (`ABLATIONS`).

    Attributes:
        weight: [out, in], dense.
        input_mask: `static-input` only: one N:M mask over the input features, bool [in], a persistent buffer.
    """

    def __init__(self, linear: nn.Linear, kind: str, m: int, reduction_dim: bool, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features)
        self.kind, self.m, self.policy = kind, m, ABLATIONS[kind, reduction_dim]
        self.weight, self.bias = linear.weight, linear.bias
        mask = None
        if kind == "static-input":
            scores = torch.rand(linear.in_features, generator=generator)
            mask = nm_mask(scores, N, m).to(linear.weight.device)
        self.register_buffer("input_mask", mask)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        x = x.to(dtype)
        y = AblationProduct.apply(
            x.reshape(-1, x.shape[-1]), self.weight.to(dtype), self.input_mask, self.m, self.policy
        )
        return self.finish(y.view(*x.shape[:-1], self.out_features), x, bias)

    def dense_weight(self) -> Tensor:
        """The weight [out, in] of the dense layer that computes the same output.

        Raises:
            UsageError: when the inputs are pruned, which no dense layer does.
        """
        if "x_forward" in self.policy:
            raise UsageError(f"--pruned_matrix {self.kind} prunes inputs: no dense model computes the same")
        return prune(self.weight.detach(), self.m, self.policy.get("w_forward"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind} {N}:{self.m}"
