"""What kernels/embedding_kernels.py must do on any device that runs it, against float64."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from attention_checks import poisoned_memory
from dense_kernels_checks import assert_near, normal
from torch import Tensor, nn

from kernels.dense_parts import dropout_seed, kept_by_dropout
from kernels.embedding_kernels import CHUNK, SHARES, embed, sums_by_id

PADDING = 0


class Parts:
    """Tables of words, of positions and of types, and LayerNorm's weights."""

    def __init__(self, device, hidden: int, words: int = 61, positions: int = 40, types: int = 2):
        torch.manual_seed(0)
        sizes = (words, PADDING), (positions, None), (types, None)
        self.tables = [nn.Embedding(rows, hidden, padding, device=device) for rows, padding in sizes]
        self.norm = nn.LayerNorm(hidden, eps=1e-12, device=device)
        with torch.no_grad():
            self.norm.weight.normal_(1, 0.1)
            self.norm.bias.normal_(0, 0.1)
        self.weights = [*(table.weight for table in self.tables), self.norm.weight, self.norm.bias]
        self.device = torch.device(device)

    def ids(self, shape: tuple[int, ...], packed: bool) -> list[Tensor | None]:
        """Of words, with a frequent one, positions, None where they are those of padded sequences, and types."""
        generator = torch.Generator().manual_seed(1)
        words, _, types = (torch.randint(table.num_embeddings, shape, generator=generator) for table in self.tables)
        words[torch.rand(shape, generator=generator) < 0.3] = 7
        words.view(-1)[1:2] = PADDING
        positions = torch.randint(self.tables[1].num_embeddings, shape, generator=generator) if packed else None
        return [each if each is None else each.to(self.device) for each in (words, positions, types)]

    def run(self, ids: list[Tensor | None], probability: float, dtype: torch.dtype, grads: list[Tensor] | None = None):
        """The output, and for one or two gradients of it those of all weights."""
        torch.manual_seed(5)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)
        with poisoned_memory():
            with autocast:
                twice = grads is not None and len(grads) == 2
                outputs = embed(*self.tables, self.norm, *ids, probability, twice)
            if grads is None:
                return outputs
            found = torch.autograd.grad(outputs, self.weights, grads)
            outputs = outputs if twice else (outputs,)
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        return outputs[0], list(found)

    def exact(self, ids: list[Tensor | None], probability: float, grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `run`, in float64 by torch's own operations, but for the mask of dropout."""
        words, positions, types = ids
        if positions is None:
            positions = torch.arange(words.shape[-1], device=self.device).expand_as(words)
        leaves = [weight.detach().double().requires_grad_() for weight in self.weights]
        total = (
            F.embedding(words, leaves[0], PADDING) + F.embedding(positions, leaves[1]) + F.embedding(types, leaves[2])
        )
        y = F.layer_norm(total, total.shape[-1:], *leaves[3:], 1e-12)
        if probability:
            torch.manual_seed(5)
            y = y * kept_by_dropout(y.shape, dropout_seed(words), probability) / (1 - probability)
        return y, list(torch.autograd.grad(y, leaves, sum(grad.double() for grad in grads)))

    def grads(self, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
        return [normal(self.device, *shape, self.norm.weight.numel(), seed=seed, dtype=dtype) for seed in range(count)]


def check_embedding(
    device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    hidden: int,
    packed: bool = True,
    probability: float = 0.1,
    count: int = 2,
    **sizes: int,
) -> None:
    """Output, dropout's mask and all gradients; equal bits of two calls.

    Args:
        count: of the output's gradients.
        sizes: rows of the tables.
    """
    parts = Parts(device, hidden, **sizes)
    ids, grads = parts.ids(shape, packed), parts.grads(shape, dtype, count)
    y, found = parts.run(ids, probability, dtype, grads)
    expected, right = parts.exact(ids, probability, grads)
    assert y.dtype == dtype and y.shape == (*shape, hidden)
    assert not y[expected == 0].any()
    assert_near([y], [expected.detach()], dtype)
    assert all(grad.dtype == torch.float32 for grad in found)
    for name, ours, exact in zip(("words", "positions", "types", "weight", "bias"), found, right, strict=True):
        error = (ours - exact).norm() / (exact.norm() + 1e-30)
        assert error < 2e-6, f"{name}: {error:.1e}"
    assert not found[0][PADDING].any() and not found[0][right[0].abs().sum(1) == 0].any()
    again = parts.run(ids, probability, dtype, grads)
    assert torch.equal(again[0], y) and all(map(torch.equal, again[1], found))


def ids_of_runs(lengths: list[int]) -> Tensor:
    """The first ids, skipping 0, each `lengths` times, shuffled: sorted, their runs end at sums of the lengths."""
    ids = torch.repeat_interleave(torch.arange(1, 1 + len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


# Runs by where they begin and end among chunks.
RUNS = {
    "one token": [1],
    "one chunk": [CHUNK],
    "an id for each token": [1] * (2 * CHUNK + 3),
    "runs that end at borders": [CHUNK, 3, CHUNK - 3, 2 * CHUNK, CHUNK - 1, 1],
    "one over a border": [CHUNK - 1, 2, CHUNK - 1],
    "through a whole chunk": [5, 2 * CHUNK, 5],
    "one after the other over borders": [CHUNK + 3, CHUNK, CHUNK - 5, CHUNK + 1, 1],
    "through more chunks than are added up at a time": [3, (SHARES + 2) * CHUNK + 1, 2, 2 * CHUNK],
    "one id": [5 * CHUNK + 1],
}


def check_runs(device, lengths: list[int], padding: int = -1) -> None:
    """Sums of whole numbers, so that they are exact: tokens of each id, and nothing of those that are absent."""
    ids, rows, hidden = ids_of_runs(lengths), 5 + len(lengths), 40
    grad = torch.randint(-8, 9, (len(ids), hidden), generator=torch.Generator().manual_seed(1)).float()
    right = torch.zeros(rows, hidden).index_add_(0, ids, grad)
    if padding >= 0:
        right[padding] = 0
    with poisoned_memory():
        found = sums_by_id(grad.to(device), ids.to(device), rows, padding)
    assert torch.equal(found.cpu(), right)


def check_padding(device) -> None:
    """An id that gives no gradient: at the ends of the sorted places, in a chunk of others, over many."""
    for lengths in ([CHUNK - 3, 2 * CHUNK, 3], [3, 4, 5], [CHUNK + 3, CHUNK, CHUNK]):
        for padding in range(1, 1 + len(lengths)):
            check_runs(device, lengths, padding)


def check_more_ids_than_16_bits_hold(device) -> None:
    rows = 2**15 + 1
    ids = torch.tensor([rows - 1, 5, rows - 1, 2**15 - 1], device=device)
    grad = torch.arange(1.0, 5.0, device=device)[:, None].expand(4, 8).contiguous()
    found = sums_by_id(grad, ids, rows)[:, 3]
    assert (found[rows - 1], found[5], found[2**15 - 1], found.sum()) == (4, 2, 4, 10)


def check_gradients_in_other_layouts(device) -> None:
    parts = Parts(device, 96)
    ids, (grad, skip) = parts.ids((24,), True), parts.grads((24,), torch.bfloat16, 2)
    laid_out = [grad.t().contiguous().t(), skip[:1].expand(24, -1)]
    plain = [grad, skip[:1].expand(24, -1).contiguous()]
    first, second = (parts.run(ids, 0.1, torch.bfloat16, grads)[1] for grads in (laid_out, plain))
    assert all(map(torch.equal, first, second))
    spread = [torch.stack([each, each], -1)[..., 0] for each in ids]
    assert torch.equal(parts.run(spread, 0.1, torch.bfloat16), parts.run(ids, 0.1, torch.bfloat16))
