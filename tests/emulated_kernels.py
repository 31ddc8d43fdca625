"""The compiled kernels' stand-ins on the CPU, built on kernels/layout.py: for tests of what is around the kernels."""

import torch
from torch import Tensor

from kernels import autotune, backends, build, layout, ops
from sparse_ops import N, double_prune_mask, pack_bits, unpack_bits

VARIANTS = build.SPARSE_GEMM_VARIANTS


def assert_rows_apart(matrix: Tensor) -> None:
    """Its rows are packed, or apart where the kernels can read them."""
    assert matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.stride(0) >= matrix.shape[1]
    assert matrix.data_ptr() % 16 == 0


def launch_sparse_mm(variant, group, x, kept, metadata, bias, adapter_x, adapter_kept, y) -> None:
    """Y = X W^T + (X L) R + bias, summed in float64 and rounded once."""
    assert 0 <= variant < VARIANTS and group >= 1
    columns, out = x.shape[-1], kept.shape[0]
    assert y.is_contiguous() and x.data_ptr() % 16 == 0
    assert kept.shape[1] == columns // 2
    assert_rows_apart(kept)
    if x.dim() == 2:
        assert_rows_apart(x)
    else:
        assert x.is_contiguous()
    x, y = x.reshape(-1, columns), y.view(-1, out)
    tokens = x.shape[0]
    assert tokens >= 1 and y.shape == (tokens, out) and columns % 16 == 0 and out % 8 == 0
    assert x.dtype == kept.dtype == y.dtype != torch.float32
    assert metadata.dtype == torch.int32 and metadata.shape == layout.metadata_shape(out, columns)
    total = x.double() @ layout.expand(kept, metadata, out, columns).double().t()
    if adapter_x is not None:
        assert adapter_x.is_contiguous() and adapter_x.shape[-1] % 16 == 0
        assert_rows_apart(adapter_kept)
        adapter_x = adapter_x.view(-1, adapter_x.shape[-1])
        assert adapter_x.shape == (tokens, 2 * adapter_kept.shape[1]) and adapter_x.dtype == adapter_kept.dtype
        read = adapter_x.unflatten(-1, (-1, 4))[..., :2].flatten(-2)  # positions 0 and 1 of every group of 4
        total += read.double() @ adapter_kept.double().t()
    if bias is not None:
        assert bias.dtype == torch.float32 and bias.is_contiguous()
        total += bias.double()
    y.copy_(total)


def launch_adapter_grads(grad_weight, left_rows, right_rows, grad_left, grad_right) -> None:
    """G^T R^T / r and (G L)^T / r, summed in float64."""
    out, columns = grad_weight.shape
    rank, width = grad_left.shape[1], len(left_rows) // 2
    assert all(x.is_contiguous() for x in (grad_weight, left_rows, grad_left, grad_right))
    assert_rows_apart(right_rows)
    assert grad_weight.dtype == left_rows.dtype == right_rows.dtype and grad_left.dtype == torch.float32
    assert left_rows.shape == (2 * width, columns) and right_rows.shape == (2 * width, out) and width % 16 == 0
    assert grad_left.shape == (columns, rank) and grad_right.shape == (rank, out)
    left, right = (_at_spread_rows(rows).flatten(0, 1)[:rank].double() for rows in (left_rows, right_rows))
    grad_left.copy_((right @ grad_weight.double()).t())
    grad_right.copy_((grad_weight.double() @ left.t()).t() / rank)


def _at_spread_rows(rows) -> Tensor:
    """A view of those that something stands at, in pairs."""
    return rows.unflatten(0, (-1, 4))[:, :2]


def refresh_operands(layers, dtype, rechoose) -> None:
    for layer in layers:
        _refresh(*layer, dtype, rechoose)


def refresh_adapters(layers, dtype) -> None:
    for left, right, left_rows, right_rows, left_kept, right_kept in layers:
        rank = left.shape[1]
        for rows, kept, matrix in ((left_rows, left_kept, left), (right_rows, right_kept, right.t() / rank)):
            assert matrix.dtype == torch.float32 and rows.dtype == kept.dtype == dtype
            assert rows.stride(1) == kept.stride(1) == 1 and rows.shape == (2 * kept.shape[1], len(kept))
            kept.zero_()[:, :rank].copy_(matrix)
            _at_spread_rows(rows.zero_()).copy_(kept.t().unflatten(0, (-1, 2)))


def call_operands(name: str, *arguments) -> None:
    """`slope_<name>` of operands.cu; its arrays and sizes, as there."""
    _FUNCTIONS[name](*arguments)


def _forward_metadata(mask_bits, metadata, out, columns, m) -> None:
    metadata.copy_(layout.fragment_metadata(unpack_bits(mask_bits, (out, columns))))


def _refresh(values, mask_bits, kept, metadata, second_words, kept_backward, out, columns, m, dtype, rechoose) -> None:
    assert values.dtype == torch.float32 and values.is_contiguous()
    assert dtype == kept_backward.dtype and (m == 4 if kept is None else kept.dtype == dtype)
    mask = unpack_bits(mask_bits, (out, columns))
    weight = torch.zeros(out, columns).masked_scatter_(mask, values)
    if rechoose:
        second = double_prune_mask(weight, mask, N, m, dim=0)
        _write_second(second, mask, metadata, second_words)
    second = _second(metadata, second_words, mask)
    if kept is not None:
        kept.copy_(layout.compress(weight.to(dtype), mask)[0])
    kept_backward.copy_(layout.backward_operand(weight.to(dtype), mask, second)[0])


def _write_second(second, mask, metadata, second_words) -> None:
    metadata.copy_(layout.fragment_metadata(second.t(), mask.t()))
    if second_words is not None:
        second_words.copy_(layout.second_kept_words(second))


def _second(metadata, second_words, mask) -> Tensor:
    """What W^{R,C} keeps, bool [out, in]."""
    out, columns = mask.shape
    if second_words is None:
        return layout.metadata_pairs(metadata, columns, out).t() & mask
    nibbles = layout.from_fragment_order(second_words, columns, out)
    return (nibbles.unsqueeze(-1) >> torch.arange(4) & 1).bool().flatten(-2).t()


def _second_bits(metadata, second_words, mask_bits, bits, out, columns, m) -> None:
    mask = unpack_bits(mask_bits, (out, columns))
    bits.copy_(pack_bits(_second(metadata, second_words, mask)[mask]))


def _set_second(bits, mask_bits, metadata, second_words, out, columns, m) -> None:
    mask = unpack_bits(mask_bits, (out, columns))
    kept = unpack_bits(bits, (int(mask.sum()),))
    _write_second(torch.zeros_like(mask).masked_scatter_(mask, kept), mask, metadata, second_words)


def _gather(grad, stride, mask_bits, values, out, columns, m, dtype, accumulate) -> None:
    assert grad.shape == (out, columns) and grad.stride() == (stride, 1) and values.dtype == torch.float32
    gathered = grad[unpack_bits(mask_bits, (out, columns))].float().view(values.shape)
    values.copy_(values + gathered if accumulate else gathered)


_FUNCTIONS = {
    "forward_metadata": _forward_metadata,
    "second_bits": _second_bits,
    "set_second": _set_second,
    "gather": _gather,
}


_STAND_INS = {
    function.__name__: function
    for function in (
        *(launch_sparse_mm, launch_adapter_grads),
        *(refresh_operands, refresh_adapters, call_operands),
    )
}


def install(monkeypatch) -> torch.library.Library:
    """Let the backends and operators run on the CPU, as long as the returned library lives."""
    for module in (ops, backends, autotune):
        for name, stand_in in _STAND_INS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(autotune, "variant_count", lambda: VARIANTS)
    library = torch.library.Library("slope", "IMPL")
    for name, implementation in ops.IMPLEMENTATIONS.items():
        library.impl(name, implementation, "CPU")
    return library
