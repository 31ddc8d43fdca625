"""What the paper's equations and LAMB say, in plain float64: the sparse tests hold the code against this file.

Nothing here calls the code under test. Masks come from sorting, where the code counts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def kept_of_every_group(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Bool mask of the `n` highest of every `m` neighbours along `dim`; of equals the earlier one."""
    by_group = np.moveaxis(scores.double().numpy(), dim, -1)
    groups = by_group.reshape(*by_group.shape[:-1], by_group.shape[-1] // m, m)
    best_first = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, best_first[..., :n], True, axis=-1)
    return torch.from_numpy(np.moveaxis(mask.reshape(by_group.shape), -1, dim).copy())


def kept_of_short_groups(matrix: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The `n` largest magnitudes of every `m` along `dim` of a matrix whose last group may be shorter than `m`."""
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    lines, marks = (matrix, mask) if dim == 1 else (matrix.t(), mask.t())
    for line, mark in zip(lines.double().tolist(), marks, strict=True):
        for start in range(0, len(line), m):
            group = range(start, min(start + m, len(line)))
            mark[sorted(group, key=lambda i: (-abs(line[i]), i))[:n]] = True
    return mask


def kept_twice(weight: Tensor, mask: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Positions of W^{R,C}: of each group of `m` along `dim`, the at most `n` largest that `mask` keeps."""
    twice = torch.zeros_like(mask)
    lines = (weight, mask, twice) if dim == 1 else (weight.t(), mask.t(), twice.t())
    for line, kept, mark in zip(lines[0].double().tolist(), lines[1].tolist(), lines[2], strict=True):
        for start in range(0, len(line), m):
            candidates = [i for i in range(start, start + m) if kept[i]]
            mark[sorted(candidates, key=lambda i: (-abs(line[i]), i))[:n]] = True
    return twice


@dataclass
class MaskedDense:
    """One SLoPe layer as the paper writes it, on dense float64 matrices with zeros.

    weight is W^R [out, in], twice_pruned W^{R,C} [out, in]; left [in, r] and right [r, out] are the adapters.
    """

    weight: Tensor
    mask: Tensor
    twice_pruned: Tensor
    bias: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def output(self, x: Tensor) -> Tensor:
        y = x @ self.weight.t()
        if self.bias is not None:
            y = y + self.bias
        if self.left is not None:
            y = y + x @ self.left @ self.right / self.left.shape[1]
        return y

    def gradients(self, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
        """Gradients of x and, summed over all tokens, of what the layer has; x [T, in], grad_y [T, out]."""
        found = {"x": grad_y @ self.twice_pruned, "weight": self.mask * (grad_y.t() @ x)}
        if self.bias is not None:
            found["bias"] = grad_y.sum(0)
        if self.left is not None:
            scale = 1 / self.left.shape[1]
            found["x"] = found["x"] + scale * grad_y @ self.right.t() @ self.left.t()
            found["left"] = scale * x.t() @ (grad_y @ self.right.t())
            found["right"] = scale * (x @ self.left).t() @ grad_y
        return found


def stored_values(matrix: Tensor, mask: Tensor, by_input: bool) -> list[list[float]]:
    """The kept entries in the documented order, one list a row of the matrix, or a row of its transpose."""
    rows, marks = (matrix, mask) if by_input else (matrix.t(), mask.t())
    return [
        [value for value, kept in zip(row, mark, strict=True) if kept]
        for row, mark in zip(rows.tolist(), marks.tolist(), strict=True)
    ]


LAMB_LR, LAMB_DECAY, LAMB_BETAS, LAMB_EPS, LAMB_MAX_NORM = 0.02, 0.01, (0.9, 0.999), 1e-6, 1.0


def lamb_steps(states: dict[str, dict], parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """One LAMB step of all parameters in place: clipping by the global norm, bias correction, trust ratio.

    You et al., 2020, arXiv:1904.00962, with the gradient clipping of NVIDIA's FusedLAMB.
    """
    beta1, beta2 = LAMB_BETAS
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    clip = min(1.0, LAMB_MAX_NORM / float(norm))
    for name, parameter in parameters.items():
        gradient = gradients[name] * clip
        state = states.setdefault(name, {"step": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)})
        state["step"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = beta2 * state["v"] + (1 - beta2) * gradient.square()
        m_hat = state["m"] / (1 - beta1 ** state["step"])
        v_hat = state["v"] / (1 - beta2 ** state["step"])
        update = m_hat / (v_hat.sqrt() + LAMB_EPS) + LAMB_DECAY * parameter
        trust_ratio = parameter.norm() / update.norm() if parameter.norm() > 0 and update.norm() > 0 else 1.0
        parameter -= LAMB_LR * trust_ratio * update
