"""Layers on 2:4 operands, their autograd and their operators without a GPU: emulated_kernels.py computes the products.

The same checks of whole layers run on the kernels themselves in tests/test_gpu_products.py.
"""

import emulated_kernels
import pytest
import torch
import torch.nn.functional as F
from product_checks import (
    IN,
    OUT,
    check_checkpointed,
    check_compiled,
    check_compiled_for_any_tokens,
    check_events,
    check_layer,
    check_many_layers,
    check_no_tokens,
    check_operators,
    check_second_choice,
    check_strange_gradients,
    make_layer,
    make_stack,
    normal,
    on_cutlass,
    spread_columns,
    stack_results,
    stack_sample,
)
from sparse_reference import MaskedDense
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import layout, ops
from sparse_ops import N, nm_mask, pack_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def emulated(monkeypatch):
    library = emulated_kernels.install(monkeypatch)
    yield
    library._destroy()


# ------------------------------------------------------------------------------------------------ layers, and autograd
@pytest.mark.parametrize(
    ("m", "rank", "dtype"), [(4, 0, BF16), (4, 4, BF16), (4, 16, FP16), (8, 16, BF16), (16, 0, BF16)]
)
def test_layer_computes_what_dense_operands_compute(emulated, m, rank, dtype):
    check_layer("cpu", m, rank, dtype)


def test_gradients_of_strange_strides_and_inputs_of_another_dtype(emulated):
    check_strange_gradients("cpu")


@pytest.mark.parametrize("rank", [0, 8])
def test_no_tokens_give_no_outputs_and_zero_gradients(emulated, rank):
    check_no_tokens("cpu", rank)


@pytest.mark.parametrize("m", [4, 16])
@pytest.mark.parametrize("frozen", [False, True])
def test_operands_are_fresh_after_every_event_and_stay_where_they_are(emulated, m, frozen):
    check_events("cpu", m, frozen)


def test_many_layers_are_refreshed_as_each_alone(emulated):
    check_many_layers("cpu")


@pytest.mark.parametrize("m", [4, 8])
def test_a_choice_of_the_second_pruning_stays_and_returns(emulated, m):
    check_second_choice("cpu", m)


def test_checkpointed_stack_computes_the_same(emulated):
    check_checkpointed("cpu")


def test_operands_of_another_dtype_are_refused(emulated):
    layer = on_cutlass(make_layer("cpu"))
    layer.set_operand_dtype(FP16)
    assert layer(normal("cpu", 3, IN, seed=0)).dtype == FP16
    with pytest.raises(RuntimeError, match="must be bfloat16 or float16, not torch.float32"):
        layer.set_operand_dtype(FP32)


def test_values_of_another_dtype_are_refused(emulated):
    with pytest.raises(RuntimeError, match="must be float32, not torch.bfloat16"):
        on_cutlass(make_layer("cpu")).bfloat16()


@pytest.mark.parametrize("rank", [0, 1, 3, 8, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_autograd_is_the_papers_algebra(monkeypatch, rank, bias):
    """In float64, with products that are `layout.expand` and a matrix product."""
    torch.manual_seed(rank)
    weight, x, grad_y = (torch.randn(size, dtype=torch.float64) for size in ((32, 48), (2, 5, 48), (2, 5, 32)))
    mask = nm_mask(torch.rand(32, 48), N, 4)
    second = mask & nm_mask(torch.rand(32, 48), N, 4, dim=0)
    parameters = {"values": weight[mask].view(32, 24), "bias": torch.randn(32, dtype=torch.float64) if bias else None}
    reference = MaskedDense(weight * mask, mask, weight * second, parameters["bias"])
    if rank:
        left, right = (torch.randn(size, dtype=torch.float64) for size in ((48, rank), (rank, 32)))
        reference.left, reference.right = parameters["left"], parameters["right"] = left, right
    parameters = {name: p if p is None else p.requires_grad_() for name, p in parameters.items()}

    def sparse_mm(x, kept, metadata, bias, adapter_x, adapter_kept):
        out, columns = kept.shape[0], x.shape[-1]
        y = x @ layout.expand(kept, metadata, out, columns).t() + (0 if bias is None else bias)
        if adapter_x is not None:  # a 2:4 operand too, with its entries at positions 0 and 1 of every 4
            places = layout.to_fragment_order(torch.full((out, adapter_x.shape[-1] // 4), layout.EMPTY_NIBBLE))
            y += (adapter_x @ layout.expand(adapter_kept, places, out, adapter_x.shape[-1]).t()).view(y.shape)
        return y

    def gather(grad, mask_bits, m):
        assert m == 4 and torch.equal(mask_bits, pack_bits(mask))
        return grad[mask].view(32, 24)

    def adapter_grads(grad, left_rows, right_rows, rank):
        left, right = (rows.unflatten(0, (-1, 4))[:, :2].flatten(0, 1)[:rank] for rows in (left_rows, right_rows))
        return (right @ grad).t(), (grad @ left.t()).t() / rank

    for function in (sparse_mm, gather, adapter_grads):
        monkeypatch.setattr(ops, function.__name__, function)
    operands = (*layout.compress(weight, mask), *layout.backward_operand(weight, mask, second), pack_bits(mask), 4)
    adapters = (None,) * 4
    if rank:
        pad = (0, ops.adapter_width(rank) - rank)
        sides = F.pad(left.detach(), pad), F.pad(right.detach().t() / rank, pad)
        adapters = ops.AdapterOperands(*(spread_columns(side).t() for side in sides), *sides)
    x.requires_grad_()
    given = [parameters.get(name) for name in ("values", "bias", "left", "right")]
    y = ops.SparseProduct.apply(x, *given, *operands, *adapters)
    y.backward(grad_y)

    with torch.no_grad():
        expected = reference.gradients(x.reshape(-1, 48), grad_y.reshape(-1, 32))
        torch.testing.assert_close(y, reference.output(x))
        torch.testing.assert_close(x.grad, expected["x"].view(x.shape))
        torch.testing.assert_close(parameters["values"].grad, expected["weight"][mask].view(32, 24))
        for name in ("bias", "left", "right"):  # summed, or returned, in fp32
            if parameters.get(name) is not None:
                torch.testing.assert_close(parameters[name].grad, expected[name], rtol=1e-5, atol=1e-5)


def test_spread_columns_stand_where_the_product_reads():
    matrix = torch.randn(3, 16)
    expected = torch.zeros(3, 32)
    for c in range(16):
        expected[:, c // 2 * 4 + c % 2] = matrix[:, c]
    assert torch.equal(spread_columns(matrix), expected)


@pytest.mark.parametrize(("rank", "width"), [(1, 16), (16, 16), (17, 32), (80, 80), (129, 144)])
def test_adapters_are_filled_up_to_what_the_kernels_take(rank, width):
    assert ops.adapter_width(rank) == width


@pytest.mark.parametrize("needed", [(), ("x",), ("values",), ("lora_left", "bias"), ("values", "lora_right")])
def test_only_gradients_that_are_needed_are_computed(emulated, monkeypatch, needed):
    calls = []
    for name in ("sparse_mm", "gather", "adapter_grads"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, function=function: calls.append(name) or function(*a))
    layer = on_cutlass(make_layer("cpu", rank=8))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in needed)
    x = normal("cpu", 4, IN, seed=0, dtype=BF16).requires_grad_("x" in needed)
    y = layer(x)
    assert y.requires_grad == bool(needed)
    if needed:
        y.sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert (tensor.grad is not None) == (name in needed), name
    expected = ["sparse_mm"] * (1 + ("x" in needed)) + ["gather"] * ("values" in needed)
    assert calls == expected + ["adapter_grads"] * any(name.startswith("lora") for name in needed)


# ----------------------------------------------------------------------------------------------------------- operators
def test_good_rows_are_read_where_they_are_and_others_are_copied(emulated, monkeypatch):
    read = []

    def launch(variant, group, x, *others):
        read.append(x.data_ptr())
        emulated_kernels.launch_sparse_mm(variant, group, x, *others)

    monkeypatch.setattr(ops, "launch_sparse_mm", launch)
    layer = on_cutlass(make_layer("cpu"))
    memory = normal("cpu", 64 * IN, seed=0, dtype=BF16)
    good = [memory[:IN], memory.view(64, IN), memory.view(4, 16, IN), memory.view(32, -1)[:, :IN],
            memory.as_strided((60, IN), (IN + 8, 1)), memory[8 : 8 + 8 * IN].view(8, IN)]  # fmt: skip
    bad = [memory.view(IN, 64).t(), memory.view(4, 16, IN).transpose(0, 1), memory[:IN].expand(8, IN),
           memory.as_strided((60, IN), (IN + 4, 1)), memory[4 : 4 + 8 * IN].view(8, IN),
           memory.as_strided((8, IN), (8, 1))]  # fmt: skip
    for x in good + bad:
        expected = (x.double() @ layer.dense_weight().bfloat16().double().t() + layer.bias.double()).bfloat16()
        assert torch.equal(layer(x), expected)
        assert (read.pop() == x.data_ptr()) == any(x is one for one in good), (x.shape, x.stride())


def test_gradient_of_any_strides_is_gathered(emulated):
    layer = make_layer("cpu", sizes=(32, 48))
    wide = normal("cpu", 64, 96, seed=0, dtype=BF16)
    for grad in (wide[:32, :48], wide[::2, :48], wide[:32, ::2], wide[:48, :32].t(), wide[:1, :48].expand(32, 48)):
        values = ops.gather(grad, layer.mask_bits, 4)
        assert values.dtype == FP32 and torch.equal(values, grad[layer.mask()].float().view(32, 24))


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_fake_kernels_know_shapes_and_dtypes(place):
    with FakeTensorMode() if place == "fake" else torch.device("meta"):
        metadata = torch.empty(layout.metadata_shape(96, 64), dtype=torch.int32)
        for dtype in (BF16, FP16):
            kept = torch.empty(96, 32, dtype=dtype)
            for shape in ((64,), (7, 64), (0, 64), (2, 3, 64)):
                y = ops.sparse_mm(torch.empty(*shape, dtype=dtype), kept, metadata, None, None, None)
                assert y.shape == (*shape[:-1], 96) and y.dtype == dtype and y.is_contiguous()
            for m in (4, 8, 16):
                bits = torch.empty(96 * 64 // 8, dtype=torch.uint8)
                values = ops.gather(torch.empty(96, 64, dtype=dtype), bits, m)
                assert values.shape == (96, 128 // m) and values.dtype == FP32
            rows = [torch.empty(64, size, dtype=dtype) for size in (64, 96)]
            gradients = ops.adapter_grads(torch.empty(96, 64, dtype=dtype), *rows, 20)
            assert [g.shape for g in gradients] == [(64, 20), (20, 96)] and all(g.dtype == FP32 for g in gradients)


def test_operators_keep_the_rules_of_torch_library(emulated):
    check_operators("cpu")


def test_operator_refuses_other_dtypes(emulated):
    layer = on_cutlass(make_layer("cpu"))
    operands = layer.operands.forward_kept(layer), layer.operands.metadata
    for dtype in (FP32, FP16):
        with pytest.raises(RuntimeError, match="must be both bfloat16 or both float16"):
            ops.sparse_mm(normal("cpu", 8, IN, seed=0, dtype=dtype), *operands, None, None, None)


def test_operators_refuse_adapters_whose_rows_no_kernel_reads(emulated):
    layer, weight = on_cutlass(make_layer("cpu", rank=8)), torch.zeros(OUT, IN, dtype=BF16)
    at = layer.operands
    x = normal("cpu", 8, IN, seed=0, dtype=BF16)
    x_left = x @ at.left_rows.t()

    def columns_apart(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.repeat_interleave(2, 1)[:, ::2]

    for adapters in ((columns_apart(x_left), at.right_kept), (x_left, columns_apart(at.right_kept))):
        with pytest.raises(RuntimeError, match="adapter_x must be contiguous, and so must each row of adapter_kept"):
            ops.sparse_mm(x, at.forward_kept(layer), at.metadata, None, *adapters)
    for rows in ((columns_apart(at.left_rows), at.right_rows), (at.left_rows, columns_apart(at.right_rows))):
        with pytest.raises(RuntimeError, match="left_rows must be contiguous, and so must each row of right_rows"):
            ops.adapter_grads(weight, *rows, 8)


def test_compiled_stack_is_one_graph_and_reads_refreshed_operands(emulated):
    check_compiled("cpu", "aot_eager")


def test_compiled_stack_takes_any_number_of_tokens(emulated):
    check_compiled_for_any_tokens("cpu", "aot_eager")


def test_compiler_sees_one_node_a_product(emulated):
    counts = []

    def count(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators = ("sparse_mm", "gather", "adapter_grads")
        counts.append([sum(name.startswith(f"slope.{operator}") for name in names) for operator in operators])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model = make_stack("cpu")
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    stack_results(compiled, list(model.parameters()), *stack_sample("cpu"))
    assert counts == [[2, 0, 0], [2, 2, 1]]  # forward, backward: two layers, one with adapters
