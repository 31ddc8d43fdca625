"""The 2:4 products on a GPU: each tile against float64, layers against dense operands, and what runs around them.

Every product is held to the rounding of its output and no more, into memory full of NaN that must be written exactly.
Skipped, with the reason, where there is no Hopper GPU or no way to compile the kernels.
"""

from __future__ import annotations

import inspect
import statistics
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense_product_checks import SHAPES as DENSE_SHAPES
from dense_product_checks import check_dense_product
from joint_checks import (
    add_random_adapters,
    assert_joint_is_as_exact_as_apart,
    assert_same,
    each_alone,
    results_of,
    sparse_layers,
    together,
)
from product_checks import (
    HALF_DTYPES,
    IN,
    Poisoned,
    apart,
    assert_as_exact,
    assert_near,
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
    exact_results,
    make_stack,
    new_values,
    on_cutlass,
    on_dense,
    results,
    spread_columns,
    stack_results,
    stack_sample,
    unavailable,
)
from product_checks import make_layer as make_layer_on
from product_checks import normal as normal_on
from torch import Tensor, nn

from kernels import autotune, build, layout, native
from kernels.backends import CutlassOperands, SemiStructuredOperands, refusal, select_backends
from kernels.joint import join
from kernels.ops import sparse_mm
from sparse_ops import DenseOperands, N, SparseLinear, nm_mask
from training.errors import UsageError

pytestmark = pytest.mark.gpu
normal, make_layer = partial(normal_on, "cuda"), partial(make_layer_on, "cuda")
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda dtype: str(dtype)[6:])
every_m = pytest.mark.parametrize("m", [4, 8, 16])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """With dense products that sum in fp32: cuBLAS may else add parts of a sum that it has rounded before."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


# ------------------------------------------------------------------------------------------------------- one product
TOKENS = (1, 7, 129, 5376, 16383)  # 5376 is a whole number of every tile's width
SIZES = [(16, 16), (520, 1040), (768, 1040), (1024, 1024)]  # out, in: rows and columns past the last whole tile too
RANKS = (0, 8, 16, 24, 64)  # a quarter of a stage of adapter columns, half, three quarters, two stages


class Product:
    """Random X [tokens, in], a 2:4 matrix [out, in] and adapters; `expected` is Y in float64."""

    def __init__(self, tokens: int, out: int, columns: int, dtype: torch.dtype):
        self.x = apart("cuda", tokens, columns, seed=1, dtype=dtype)
        weight = normal(out, columns, seed=2, dtype=dtype)
        mask = nm_mask(normal(out, columns, seed=3), N, 4)
        self.kept, self.metadata = layout.compress(weight, mask)
        self.bias = normal(out, seed=4)
        self.adapters = {
            rank: (normal(tokens, rank, seed=5, dtype=dtype), apart("cuda", out, rank, seed=6, dtype=dtype))
            for rank in RANKS
        }
        x, weight = self.x.double(), torch.where(mask, weight, 0).double()
        self.exact, self.magnitude = x @ weight.t(), x.abs() @ weight.abs().t()

    def run(self, variant: int, group: int, rank: int, biased: bool, between: float = 1e3) -> Poisoned:
        """`between` stands in the columns of X L that the product must not read."""
        y = Poisoned("cuda", self.x.shape[0], self.kept.shape[0], dtype=self.x.dtype)
        adapter_x, adapter_kept = self.adapters[rank]
        adapter_x = spread_columns(adapter_x)
        adapter_x.unflatten(-1, (-1, 4))[..., 2:] = between
        adapters = (adapter_x, adapter_kept) if rank else (None, None)
        bias = self.bias if biased else None
        native.launch_sparse_mm(variant, group, self.x, self.kept, self.metadata, bias, *adapters, y.matrix)
        return y

    def expected(self, rank: int, biased: bool) -> tuple[Tensor, Tensor]:
        """Y, and the sum of its terms' magnitudes."""
        left, right = (side.double() for side in self.adapters[rank])
        bias = self.bias.double() if biased else torch.zeros_like(self.bias, dtype=torch.float64)
        exact = self.exact + left @ right.t() + bias
        return exact, self.magnitude + left.abs() @ right.abs().t() + bias.abs()


@half_dtypes
@pytest.mark.parametrize(("out", "columns"), SIZES)
@pytest.mark.parametrize("variant", range(build.SPARSE_GEMM_VARIANTS))
def test_every_tile_computes_the_product(variant, out, columns, dtype):
    for tokens in TOKENS:
        product = Product(tokens, out, columns, dtype)
        for rank, biased in [(rank, biased) for rank in RANKS for biased in (False, True)]:
            expected = product.expected(rank, biased)
            for group in autotune.GROUPS:
                name = f"tile {variant}, group {group}, {tokens} tokens, rank {rank}, bias {biased}"
                product.run(variant, group, rank, biased).check(*expected, name)


def test_every_tile_is_tested():
    assert native.variant_count() == build.SPARSE_GEMM_VARIANTS


@pytest.mark.parametrize("variant", range(build.SPARSE_GEMM_VARIANTS))
def test_nan_between_adapter_columns_is_not_read(variant):
    product = Product(129, 520, 80, torch.bfloat16)
    y = product.run(variant, 1, 16, biased=False, between=float("nan"))
    y.check(*product.expected(16, biased=False), f"tile {variant}")


@pytest.mark.parametrize(
    ("out", "columns", "variant", "reason"),
    [(64, 24, 0, "sizes that the kernel does not take"), (64, 64, 99, "no such tile"), (64, 64, 0, "unaligned")],
)
def test_what_no_tile_can_run_is_an_error(out, columns, variant, reason):
    kept = normal(out, columns // 2, seed=0, dtype=torch.bfloat16)
    metadata = torch.zeros(layout.metadata_shape(out, columns), dtype=torch.int32, device="cuda")
    memory = normal(8 * columns + 1, seed=1, dtype=torch.bfloat16)
    x = (memory[1:] if reason == "unaligned" else memory[:-1]).view(8, columns)
    y = torch.full((8, out), float("nan"), dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match=reason):
        native.launch_sparse_mm(variant, 1, x, kept, metadata, None, None, None, y)
    assert y.isnan().all()


# -------------------------------------------------------------------------------------------------------- whole layers
@half_dtypes
@pytest.mark.parametrize("rank", [0, 4, 16, 64, 80, 144])
@every_m
def test_layer_computes_what_dense_operands_compute(m, rank, dtype):
    check_layer("cuda", m, rank, dtype)
    check_layer("cuda", m, rank, dtype, sizes=(320, 576), kinds=("2d", "3d-transposed", "rows-apart", "unaligned"))


def test_gradients_of_strange_strides_and_inputs_of_another_dtype():
    check_strange_gradients("cuda")


@pytest.mark.parametrize("rank", [0, 8])
def test_no_tokens_give_no_outputs_and_zero_gradients(rank):
    check_no_tokens("cuda", rank)


@every_m
@pytest.mark.parametrize("frozen", [False, True])
def test_operands_are_fresh_after_every_event_and_stay_where_they_are(m, frozen):
    check_events("cuda", m, frozen)


def test_many_layers_are_refreshed_as_each_alone():
    check_many_layers("cuda")


@every_m
def test_a_choice_of_the_second_pruning_stays_and_returns(m):
    check_second_choice("cuda", m)


def test_cusparselt_computes_what_dense_operands_compute():
    dense, sparse = on_dense(make_layer(sizes=(256, 320))), make_layer(sizes=(256, 320))
    reason = refusal("cusparselt", sparse, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    sparse.set_operands(SemiStructuredOperands(sparse, torch.bfloat16))
    for tokens in (128, 129):
        x, grad_y = (normal(tokens, size, seed=size, dtype=torch.bfloat16) for size in (320, 256))
        exact = exact_results(dense, torch.bfloat16, x, grad_y)
        assert_as_exact(results(sparse, x, grad_y), results(dense, x, grad_y), exact, f"{tokens} tokens")


def test_operator_refuses_other_dtypes():
    layer = on_cutlass(make_layer())
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(RuntimeError, match="must be both bfloat16 or both float16"):
            x = normal(8, IN, seed=0, dtype=dtype)
            sparse_mm(x, layer.operands.forward_kept(layer), layer.operands.metadata, None, None, None)


# ---------------------------------------------------------------------------------- compiled, captured, computed again
def test_compiled_stack_is_one_graph_and_reads_refreshed_operands():
    check_compiled("cuda", "inductor")


def test_compiled_stack_takes_any_number_of_tokens():
    check_compiled_for_any_tokens("cuda", "inductor")


def test_checkpointed_stack_computes_the_same():
    check_checkpointed("cuda")


def test_operators_keep_the_rules_of_torch_library():
    check_operators("cuda")


def test_captured_graph_reads_refreshed_operands():
    model, (x, grad_y) = make_stack("cuda"), stack_sample("cuda")
    parameters = list(model.parameters())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            stack_results(model, parameters, x, grad_y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stack_results(model, parameters, x, grad_y)
    for seed in range(2):
        with torch.no_grad():
            x.copy_(normal(*x.shape, seed=seed))
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        assert_near(captured, stack_results(model, parameters, x, grad_y))
        new_values(model)


def test_ddp_averages_the_gradients_of_the_values(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, (x, grad_y) = make_stack("cuda"), stack_sample("cuda")
        wrap = nn.parallel.DistributedDataParallel
        # Operands are buffers, and follow from the values. torch 2.13 renamed the argument.
        name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(wrap).parameters)
        parallel = wrap(model, gradient_as_bucket_view=True, **{name: False})
        parallel(x).backward(grad_y)
        found = [parameter.grad.clone() for parameter in model.parameters()]
        del parallel
    finally:
        dist.destroy_process_group()
    expected = stack_results(model, list(model.parameters()), x, grad_y)[2:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------ joint products
@pytest.mark.parametrize("rank", [0, 4, 16, 24, 64])
@pytest.mark.parametrize("m", [4, 8])
def test_layers_of_one_input_are_one_product(m, rank):
    layers = sparse_layers(m, rank=rank, device="cuda")
    expected = results_of(layers, each_alone)
    assert join(layers, [40])
    for product in (each_alone, together):
        assert_same(results_of(layers, product), expected)
    assert_joint_is_as_exact_as_apart(layers)
    with torch.no_grad():
        for layer in layers:
            layer.values.mul_(torch.linspace(-1, 2, layer.values.numel(), device="cuda").view_as(layer.values))
            layer.refresh(rechoose=True)
    assert_same(results_of(layers, together), results_of([on_dense(layer) for layer in layers], each_alone))


def test_adapters_join_the_one_product():
    layers, others = sparse_layers(device="cuda"), sparse_layers(device="cuda")
    assert join(layers, [40])
    for each in (layers, others):
        for seed, layer in enumerate(each):
            add_random_adapters(layer, 16, seed)
    assert layers[0].operands.joint.left_rows is not None
    for product in (each_alone, together):
        assert_same(results_of(layers, product), results_of(others, each_alone))


# ---------------------------------------------------------------------------------------------------------- host time
def microseconds_on_host(run) -> float:
    """Median over 1,000 calls, with a GPU that is never behind."""
    for _ in range(20):
        run()
    times = []
    for i in range(1000):
        if i % 50 == 0:
            torch.cuda.synchronize()
        began = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1e3


@torch.no_grad()
def test_host_time_of_a_call(capsys):
    plain, adapted = on_cutlass(make_layer(sizes=(128, 128))), on_cutlass(make_layer(rank=16, sizes=(128, 128)))
    x, at = normal(8, 128, seed=1, dtype=torch.bfloat16), plain.operands
    kept = at.forward_kept(plain)
    weight, bias = plain.dense_weight().bfloat16(), plain.bias.bfloat16()
    calls = {
        "slope::sparse_mm": lambda: sparse_mm(x, kept, at.metadata, plain.bias, None, None),
        "SparseLinear on cutlass": lambda: plain(x),
        "the same with adapters": lambda: adapted(x),
        "torch's linear": lambda: F.linear(x, weight, bias),
    }
    # In turn, and the least of five: a processor that was idle is slow at first, whatever it runs.
    rounds = [{name: microseconds_on_host(call) for name, call in calls.items()} for _ in range(5)]
    microseconds = {name: min(times[name] for times in rounds) for name in calls}
    with capsys.disabled():
        print("\nhost time of a call, median of 1,000, us:", {name: round(us, 1) for name, us in microseconds.items()})
    assert microseconds["slope::sparse_mm"] < 20


# ------------------------------------------------------------------------------------------------------------- choice
class Named(nn.Module):
    """One layer, by a name that an error must say."""

    def __init__(self, layer: SparseLinear):
        super().__init__()
        self.the_layer = layer


def by_output() -> SparseLinear:
    linear = nn.Linear(64, 64)
    return SparseLinear(linear, nm_mask(linear.weight.detach().abs(), N, 4, dim=0), 4, reduction_dim=False).cuda()


def unstructured() -> SparseLinear:
    linear = nn.Linear(64, 64)
    return SparseLinear(linear, linear.weight.detach() > 0, None).cuda()


REFUSED = {
    "fp32": (lambda: make_layer(sizes=(64, 64)), torch.float32, "--precision fp32"),
    "by-output": (by_output, torch.bfloat16, "--reduction_dim False"),
    "unstructured": (unstructured, torch.float16, "an unstructured mask"),
    "odd-in": (lambda: make_layer(sizes=(64, 40)), torch.bfloat16, "sizes that are no multiples of 16"),
    "odd-out": (lambda: make_layer(sizes=(40, 64)), torch.bfloat16, "sizes that are no multiples of 16"),
}


@pytest.mark.parametrize(("make", "dtype", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cutlass_cannot_run(make, dtype, reason):
    model, lines = Named(make()), []
    with pytest.raises(UsageError) as refused:
        select_backends(model, "cutlass", dtype, 64, lines.append)
    assert str(refused.value) == f"--sparse_backend cutlass cannot run the_layer: {reason}" and not lines
    select_backends(model, "auto", dtype, 64, lines.append)
    assert type(model.the_layer.operands) is DenseOperands and model.the_layer.operands.dtype == dtype
    assert len(lines) == 1 and lines[0].endswith(f": dense products ({reason})")


@half_dtypes
def test_auto_runs_what_it_measured_and_says_so(dtype):
    model = nn.ModuleList(make_layer(m, seed=seed, sizes=(256, 512)) for m in (4, 8) for seed in (0, 1))
    lines = []
    select_backends(model, "auto", dtype, 2048, lines.append)
    assert [line.split(":")[0] for line in lines] == ["2 sparse layers 512 -> 256, 2"] * 2
    for line, layer in zip(lines, model[::2], strict=True):
        ratios = [float(word[1:]) for word in line.replace("(", " ").split() if word.startswith("x")]
        assert len(ratios) == 3 and line.endswith("against dense at 2048 tokens)")
        step = ratios[-1]
        assert f"{'cutlass' if step > 1 else 'dense products'} (" in line or abs(step - 1) < 0.01
        assert type(layer.operands) is (CutlassOperands if ": cutlass (" in line else DenseOperands)
        assert layer.operands.dtype == dtype


def test_cutlass_asked_for_by_name_runs_whatever_is_faster():
    model, lines = Named(make_layer(sizes=(64, 64))), []
    select_backends(model, "cutlass", torch.bfloat16, 64, lines.append)
    assert type(model.the_layer.operands) is CutlassOperands and ": cutlass (x" in lines[0]


def test_a_measured_choice_is_read_again(monkeypatch):
    arguments = (96, 128, 192, torch.float16, torch.device("cuda", 0))
    first = autotune.tune(*arguments)
    assert first.ratio > 0 and first.group in autotune.GROUPS and 0 <= first.variant < native.variant_count()
    monkeypatch.setattr(autotune, "_measure", lambda *_: pytest.fail("measured again"))
    assert autotune.tune(*arguments) == first
    assert autotune.choice_of(100, 128, 96, torch.float16) == first


# ------------------------------------------------------------------------------------------------------ dense products
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*DENSE_SHAPES, (16384, 1024, (1024, 1024, 1024)), (16384, 1024, (4096,))], ids=str)
def test_gradients_of_dense_weights_are_fp32_sums(shape, dtype):
    """Rounded to 16 bits on their way, they would be off by hundreds of fp32's roundings."""
    assert check_dense_product("cuda", dtype, *shape) < 16
