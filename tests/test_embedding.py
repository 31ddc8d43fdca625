"""kernels/embedding.py: torch's gradients, in a fixed order, with torch's settings left as they are."""

import pytest
import torch
import torch._inductor.config
from torch import nn

from kernels.embedding import FEW_ROWS, lookup, rows_of


@pytest.mark.parametrize("ids_shape", [(200,), (8, 25)], ids=str)
@pytest.mark.parametrize(("rows", "padding"), [(FEW_ROWS, None), (FEW_ROWS + 1, None), (50, 0), (2, 0)])
def test_rows_and_gradients_are_torchs(rows, padding, ids_shape):
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, 24, padding_idx=padding)
    ids, grad = torch.randint(rows, ids_shape), torch.randn(*ids_shape, 24)
    found, expected = lookup(embedding, ids), embedding(ids)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(out, embedding.weight, grad)[0] for out in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert padding is None or not ours[padding].any()


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_settings_stay_as_they_are(before, monkeypatch):
    seen = []
    plain = torch.ops.aten.embedding_dense_backward
    monkeypatch.setattr(
        torch.ops.aten,
        "embedding_dense_backward",
        lambda *given: seen.append(torch.are_deterministic_algorithms_enabled()) or plain(*given),
    )
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch._inductor.config.deterministic = True
    try:
        lookup(nn.Embedding(50, 8), torch.arange(50)).sum().backward()
        now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert (seen, now) == ([True], before)
        assert torch.utils.deterministic.fill_uninitialized_memory and torch._inductor.config.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch._inductor.config.deterministic = False


@pytest.mark.parametrize("shape", [(30, 8), (3, 10, 8)], ids=str)
def test_rows_at_places_and_their_gradients_are_torchs(shape):
    """Places in any order, one of them twice."""
    torch.manual_seed(0)
    x, places, grad = torch.randn(shape, requires_grad=True), torch.tensor([29, 0, 7, 7, 12]), torch.randn(5, 8)
    found, expected = rows_of(x, places), x.flatten(0, -2)[places]
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (found, expected))
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, theirs)
