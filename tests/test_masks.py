"""Masks: N:M, unstructured, double pruning, packing. Expected results come from `sparse_reference` or definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sparse_reference import kept_of_every_group, kept_twice

from sparse_ops import (
    double_prune_extra_zeros,
    double_prune_mask,
    nm_mask,
    pack_bits,
    seeded_generator,
    unpack_bits,
    unstructured_mask,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PATTERNS = ((1, 2), (2, 4), (2, 8), (2, 16), (1, 4), (3, 4), (4, 4))
FAST = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def tensors(draw, sides):
    """Of the given sides, float64: normal, or rounded to a few levels, so that groups are full of ties."""
    levels = draw(st.sampled_from([0.0, 1.0, 2.0, math.inf]), label="levels")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20), label="seed"))
    normal = torch.randn(sides, dtype=torch.float64, generator=generator)
    return normal if levels == math.inf else (normal * levels).round()


@FAST
@given(data=st.data(), pattern=st.sampled_from(PATTERNS), dtype=st.sampled_from(DTYPES))
def test_nm_mask_keeps_the_n_largest_of_every_m_the_earlier_of_equals(data, pattern, dtype):
    n, m = pattern
    sides = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), label="sides")
    dim = data.draw(st.integers(-len(sides), len(sides) - 1), label="dim")
    sides[dim] *= m
    scores = data.draw(tensors(sides), label="scores").to(dtype)

    mask = nm_mask(scores, n, m, dim)

    assert mask.dtype == torch.bool and mask.shape == scores.shape
    groups = zip(
        scores.movedim(dim, -1).reshape(-1, m).tolist(), mask.movedim(dim, -1).reshape(-1, m).tolist(), strict=True
    )
    for group, kept in groups:
        assert sum(kept) == n
        for i, j in itertools.product(range(m), repeat=2):
            if kept[i] and not kept[j]:
                assert group[i] > group[j] or (group[i] == group[j] and i < j)


def test_nm_mask_of_literal_groups():
    scores = torch.tensor([[1.0, 9.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert nm_mask(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert nm_mask(scores, 2, 8).int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert nm_mask(scores.t(), 2, 4, dim=0).int().tolist() == [[0], [1], [1], [0], [1], [1], [0], [0]]


@pytest.mark.parametrize("m", [32, 128, 256, 512, 1024])
def test_nm_mask_of_many_doublings(m):
    """A model of many blocks may double M until a group is a whole row of BERT-Large."""
    scores = torch.rand(2, 1024, generator=torch.Generator().manual_seed(m))
    assert torch.equal(nm_mask(scores, 2, m), kept_of_every_group(scores, 2, m, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_infinite_scores_are_the_largest_and_equal(dtype, dim):
    scores = torch.full((8, 8), float("inf"), dtype=dtype)
    scores[::2, 1::2] = float("-inf")
    mask = nm_mask(scores, 2, 4, dim)
    assert torch.equal(mask, kept_of_every_group(scores, 2, 4, dim))


@FAST
@given(data=st.data(), sparsity=st.floats(0, 99.99), dtype=st.sampled_from(DTYPES))
def test_unstructured_mask_keeps_the_stated_count_of_largest(data, sparsity, dtype):
    sides = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), label="sides")
    scores = data.draw(tensors(sides), label="scores").to(dtype)
    mask = unstructured_mask(scores, sparsity)

    assert mask.dtype == torch.bool and mask.shape == scores.shape
    flat, kept = scores.flatten().tolist(), mask.flatten().tolist()
    best_first = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    assert {i for i, keep in enumerate(kept) if keep} == set(best_first[: int((1 - sparsity / 100) * len(flat))])


@pytest.mark.parametrize(("sparsity", "kept"), [(0, 1000), (50, 500), (60, 400), (87.5, 125), (99.95, 0)])
def test_unstructured_mask_counts(sparsity, kept):
    scores = torch.rand(20, 50, generator=torch.Generator().manual_seed(0))
    assert int(unstructured_mask(scores, sparsity).sum()) == kept


@FAST
@given(shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7), seed=st.integers(0, 1 << 20))
def test_packing_round_trip_of_any_shape(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(mask.numel() / 8),)
    assert packed.tolist() == np.packbits(mask.numpy().flatten(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, shape), mask)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_packing_does_not_need_contiguous_memory():
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_bits(mask.t()), pack_bits(mask.t().contiguous()))


@FAST
@given(data=st.data(), pattern=st.sampled_from(PATTERNS), dtype=st.sampled_from(DTYPES), dim=st.sampled_from([0, 1]))
def test_double_pruning_keeps_the_largest_kept_ones(data, pattern, dtype, dim):
    n, m = pattern
    sides = data.draw(st.tuples(st.sampled_from([m, 2 * m]), st.sampled_from([m, 2 * m])), label="sides")
    weight = data.draw(tensors(sides), label="weight").to(dtype)
    mask = kept_of_every_group(weight.abs(), n, m, 1 - dim)
    pruned = weight * mask

    twice = double_prune_mask(pruned, mask, n, m, dim)

    assert twice.dtype == torch.bool and twice.shape == mask.shape
    assert not (twice & ~mask).any(), "W^{R,C} keeps what W^R does not"
    per_group = twice.movedim(dim, -1).reshape(-1, m).sum(-1)
    available = mask.movedim(dim, -1).reshape(-1, m).sum(-1)
    assert torch.equal(per_group, available.clamp(max=n)), "at most n of a group, and n where there are as many"
    assert torch.equal(twice, kept_twice(pruned, mask, n, m, dim))


def test_double_pruning_goes_by_magnitude_and_prefers_a_kept_zero_to_a_pruned_weight():
    weight = torch.tensor([[-5.0], [4.0], [1.0], [0.0]])
    kept = torch.tensor([[True], [True], [True], [False]])
    assert double_prune_mask(weight, kept, 2, 4, 0).flatten().tolist() == [True, True, False, False]
    zeros = torch.tensor([[False], [False], [True], [True]])
    assert double_prune_mask(torch.zeros(4, 1), zeros, 2, 4, 0).flatten().tolist() == [False, False, True, True]


EXTRA_ZEROS = [((1, 2), 0.125), ((2, 4), 0.09375), ((2, 8), 0.0584)]


@pytest.mark.parametrize(("pattern", "share"), EXTRA_ZEROS)
def test_formula_of_the_extra_zeros(pattern, share):
    n, m = pattern
    density = n / m
    summed = sum(math.comb(m, j) * density**j * (1 - density) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))
    assert double_prune_extra_zeros(n, m) == pytest.approx(summed, rel=1e-12)
    assert double_prune_extra_zeros(n, m) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "share"), EXTRA_ZEROS)
def test_measured_extra_zeros_of_a_large_random_matrix(pattern, share, dtype):
    n, m = pattern
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(m)).to(dtype)
    mask = nm_mask(weight.abs(), n, m, dim=1)
    twice = double_prune_mask(torch.where(mask, weight, 0.0), mask, n, m, dim=0)
    assert int(mask.sum()) == weight.numel() * n // m
    extra = int(mask.sum() - twice.sum()) / weight.numel()
    assert extra == pytest.approx(share, rel=0.01)


def test_seeded_draws_depend_on_seed_and_name_alone():
    def draw(seed, name):
        return torch.randn(50, generator=seeded_generator(seed, name))

    expected = draw(3, "layer.0.dense")
    state = torch.random.get_rng_state()
    torch.rand(7)
    draw(3, "layer.1.dense")
    assert torch.equal(draw(3, "layer.0.dense"), expected)
    torch.random.set_rng_state(state)
    draw(5, "x")
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    others = [draw(4, "layer.0.dense"), draw(3, "layer.0.dense2"), draw(30, "layer.0.dense")]
    assert not any(torch.equal(other, expected) for other in others)
