"""The paper's ablations against their formulas in float64, masks chosen by `sparse_reference`.

With R a matrix pruned along its features and T one pruned along its tokens, for reduction_dim True:

    dynamic-weight        Y = X (W^R)^T          dW = dY^T X            dX = dY W^C
    dynamic-input         Y = X^R W^T            dW = dY^T (X^R)^T      dX = mask of X^R * (dY W)
    static-input          the same, with one fixed mask over the input features
    dynamic-output-grad   Y = X W^T              dW = (dY^T)^T X        dX = dY^R W

where (X^R)^T means X^R pruned again along tokens.
"""

import pytest
import torch
from sparse_reference import kept_of_every_group, kept_of_short_groups
from torch import nn

from ablations import ABLATIONS, AblationLinear
from sparse_ops import add_adapters, seeded_generator
from training.errors import UsageError
from training.sparsity import KINDS

IN, OUT, TOKENS = 32, 16, 11
ABLATION_KINDS = [kind for kind in KINDS if kind not in ("none", "static-weight")]
every_kind = pytest.mark.parametrize("kind", ABLATION_KINDS)
both_dims = pytest.mark.parametrize("reduction_dim", [True, False], ids=["in", "out"])


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_layer(kind, reduction_dim=True, m=4, bias=True, dtype=torch.float64):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(OUT, IN, seed=0))
    return AblationLinear(linear, kind, m, reduction_dim, seeded_generator(0, "mask"))


def expected_products(kind, reduction_dim, m, x, weight, grad_y, input_mask):
    """Y, dW and dX of 2-D x [T, in] and grad_y [T, out]."""

    def kept(matrix, dim):
        return kept_of_short_groups(matrix, 2, m, dim)

    def pruned(matrix, dim):
        return matrix * kept(matrix, dim)

    if kind == "dynamic-weight":
        along_in, along_out = pruned(weight, 1), pruned(weight, 0)
        first, second = (along_in, along_out) if reduction_dim else (along_out, along_in)
        return x @ first.t(), grad_y.t() @ x, grad_y @ second
    if kind == "dynamic-output-grad":
        for_weight = pruned(grad_y, 0) if reduction_dim else pruned(grad_y, 1)
        return x @ weight.t(), for_weight.t() @ x, pruned(grad_y, 1) @ weight
    mask = kept(x, 1) if kind == "dynamic-input" else input_mask.expand(x.shape)
    x = x * mask
    for_weight = pruned(x, 0) if reduction_dim else x
    return x @ weight.t(), grad_y.t() @ for_weight, mask * (grad_y @ weight)


def run(layer, x, grad_y):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad_y.to(y.dtype))
    return y, layer.weight.grad, x.grad


@every_kind
@both_dims
@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("tokens", [(1,), (3,), (8,), (TOKENS,), (2, 5), (3, 1, 7), ()], ids=str)
def test_products_are_those_of_the_table(kind, reduction_dim, m, tokens):
    layer = make_layer(kind, reduction_dim, m)
    x, grad_y = normal(*tokens, IN, seed=1), normal(*tokens, OUT, seed=2)
    x[..., 4:12] = 0  # groups that are zero: kept zeros let the gradient through
    y, grad_weight, grad_x = run(layer, x, grad_y)

    x_2d, grad_2d = x.reshape(-1, IN), grad_y.reshape(-1, OUT)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    expected = expected_products(kind, reduction_dim, m, x_2d, weight, grad_2d, layer.input_mask)
    exact = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(y, (expected[0] + bias).view(y.shape), **exact)
    torch.testing.assert_close(grad_weight, expected[1], **exact)
    torch.testing.assert_close(grad_x, expected[2].view(x.shape), **exact)
    torch.testing.assert_close(layer.bias.grad, grad_2d.sum(0), **exact)


@both_dims
def test_gradient_reaches_kept_zeros_and_no_pruned_input(reduction_dim):
    layer = make_layer("dynamic-input", reduction_dim)
    _, _, grad_x = run(layer, torch.zeros(3, IN), normal(3, OUT, seed=2))
    kept = torch.tensor([True, True, False, False]).repeat(IN // 4)
    assert (grad_x[:, kept] != 0).all() and not grad_x[:, ~kept].any()


@every_kind
@both_dims
def test_under_autocast(kind, reduction_dim):
    """Every matrix is rounded to bfloat16 first and chosen from then; of what has become equal, the earlier is kept."""

    def nearly_tied(*shape, seed):
        return ((2 * normal(*shape, seed=seed)).round() / 2 + 1e-4 * normal(*shape, seed=seed + 10)).float()

    layer = make_layer(kind, reduction_dim, dtype=torch.float32)
    layer.weight.data.copy_(nearly_tied(OUT, IN, seed=0))
    add_adapters(layer, rank=2, seed=0)
    x, grad_y = nearly_tied(TOKENS, IN, seed=1).requires_grad_(), nearly_tied(TOKENS, OUT, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(grad_y)
    grad_weight, grad_x = layer.weight.grad, x.grad
    assert (y.dtype, grad_weight.dtype, grad_x.dtype) == (torch.bfloat16, torch.float32, torch.float32)

    rounded = (tensor.detach().bfloat16().double() for tensor in (x, layer.weight, grad_y))
    expected = expected_products(kind, reduction_dim, 4, *rounded, layer.input_mask)
    expected = (expected[0] + layer.bias.detach().bfloat16().double(), *expected[1:])
    for actual, right in zip((y, grad_weight, grad_x), expected, strict=True):
        error = (actual.double() - right).square().mean().sqrt()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * right.square().mean().sqrt()


@every_kind
@both_dims
def test_adapters_join_unpruned(kind, reduction_dim):
    layer = make_layer(kind, reduction_dim)
    x, grad_y = normal(2, TOKENS, IN, seed=1), normal(2, TOKENS, OUT, seed=2)
    plain, _, grad_x = run(layer, x, grad_y)
    add_adapters(layer, rank=4, seed=0)
    joined, _, _ = run(layer, x, grad_y)
    assert torch.equal(joined, plain)
    with torch.no_grad():
        layer.lora_right.copy_(normal(4, OUT, seed=3))
    left, right = layer.lora_left.detach(), layer.lora_right.detach()
    adapted, _, adapted_grad_x = run(layer, x, grad_y)
    torch.testing.assert_close(adapted - plain, x @ left @ right / 4, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapted_grad_x - grad_x, grad_y @ right.t() @ left.t() / 4, rtol=1e-9, atol=1e-9)


def test_dynamic_weight_is_chosen_anew_in_every_call():
    layer = make_layer("dynamic-weight", bias=False)
    unit = torch.eye(IN, dtype=torch.float64)
    for seed in (1, 2):
        weight = normal(OUT, IN, seed=seed)
        layer.weight.data.copy_(weight)
        assert torch.equal(layer(unit).t(), weight * kept_of_every_group(weight.abs(), 2, 4, 1))


def test_static_input_mask_is_seeded_fixed_and_stored():
    layer = make_layer("static-input")
    mask = layer.input_mask
    assert mask.shape == (IN,) and mask.view(-1, 4).sum(-1).tolist() == [2] * (IN // 4)
    assert torch.equal(make_layer("static-input").input_mask, mask)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    other = AblationLinear(linear, "static-input", 4, True, seeded_generator(0, "another"))
    assert not torch.equal(other.input_mask, mask)
    x = normal(TOKENS, IN, seed=1)
    expected = layer(x)
    layer(normal(TOKENS, IN, seed=2))
    assert torch.equal(layer(x), expected)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.input_mask, mask) and torch.equal(other(x), expected)


@every_kind
def test_no_mask_of_the_other_kinds_is_stored(kind):
    expected = {"weight", "bias", "input_mask"} if kind == "static-input" else {"weight", "bias"}
    assert set(make_layer(kind).state_dict()) == expected


@every_kind
@both_dims
def test_dense_equivalent(kind, reduction_dim):
    layer = make_layer(kind, reduction_dim)
    if "input" in kind:
        with pytest.raises(UsageError, match=f"--pruned_matrix {kind}"):
            layer.dense_weight()
        return
    x = normal(TOKENS, IN, seed=1)
    dense = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-11, atol=1e-11)


def test_the_table_holds_every_kind():
    assert set(ABLATIONS) == {(kind, reduction_dim) for kind in ABLATION_KINDS for reduction_dim in (True, False)}
