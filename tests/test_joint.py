"""kernels/joint.py: query, key and value as one product, on stand-ins for the kernels, and where that cannot be."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dense_product_checks import SHAPES, check_dense_product
from emulated_kernels import install
from joint_checks import (
    DTYPE,
    IN,
    OUTS,
    add_random_adapters,
    assert_joint_is_as_exact_as_apart,
    assert_same,
    each_alone,
    inputs_of,
    results_of,
    sparse_layers,
    together,
)
from product_checks import kept_for_backward, make_layer, normal, on_cutlass, on_dense
from torch import Tensor, nn

from configuration import BertConfig
from kernels import autotune, joint
from kernels.backends import CutlassOperands
from kernels.joint import join, products
from kernels.ops import AdapterOperands, adapter_width
from modeling import BertForPreTraining, Packing, pretraining_loss_sums
from sparse_ops import AdaptedLinear, add_adapters, named_layers
from training.assembly import build_model
from training.sparsity import SparsityConfig


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-ins; what was tuned."""
    tuned, library = [], install(monkeypatch)
    monkeypatch.setattr(autotune, "tune", lambda *product: tuned.append(product))
    monkeypatch.setattr(autotune, "choice_of", lambda *_: autotune.Choice(0, 1, 1.0))
    monkeypatch.setattr("kernels.ops.choice_of", autotune.choice_of)
    yield tuned
    del library


@pytest.fixture
def counted(monkeypatch):
    """What the joint products call, in order."""
    calls = []
    for name in ("sparse_mm", "gather", "adapter_grads"):
        plain = getattr(joint, name)
        monkeypatch.setattr(joint, name, lambda *given, name=name, plain=plain: calls.append(name) or plain(*given))
    return calls


@pytest.mark.parametrize("rank", [0, 4, 24])
@pytest.mark.parametrize("m", [4, 8])
def test_joined_products_and_gradients_are_those_of_the_layers(m, rank, kernels, counted):
    layers = sparse_layers(m, rank=rank)
    expected = results_of(layers, each_alone)
    assert join(layers, [40, 20])
    sizes = ((sum(OUTS), IN), (IN, sum(OUTS)))
    assert kernels == [(n, *size, DTYPE, torch.device("cpu")) for n in (40, 20) for size in sizes]
    assert_same(results_of(layers, each_alone), expected)  # a layer alone runs on its slices
    assert not counted
    assert_same(results_of(layers, together), expected)
    assert counted == ["sparse_mm"] * 2 + ["gather"] * 3 + ["adapter_grads"] * (3 if rank else 0), (
        "one product forward, one of the input gradient"
    )
    assert_joint_is_as_exact_as_apart(layers)


@pytest.mark.parametrize(
    "make",
    [sparse_layers, lambda: sparse_layers(rank=4), lambda: [nn.Linear(IN, out) for out in OUTS]],
    ids=["2:4", "adapters", "dense"],
)
def test_compiled_it_is_one_graph_and_the_same(make):
    layers = make()
    join(layers, [40])
    expected = results_of(layers, together)
    torch.compiler.reset()
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    assert_same(results_of(layers, compiled), expected)


def test_joint_operands_follow_values_masks_and_the_second_choice():
    layers = sparse_layers()
    join(layers, [40])
    earlier = layers[2].second_kept
    with torch.no_grad():
        for layer in layers:
            layer.values.mul_(torch.linspace(-1, 2, layer.values.numel()).view_as(layer.values))
    for rechoose in (False, True):
        with torch.no_grad():
            CutlassOperands.refresh_all(layers, rechoose)
        assert_same(results_of(layers, together), results_of(layers, each_alone))
    other = make_layer("cpu", 4, seed=9, sizes=(OUTS[1], IN))
    layers[1].load_state_dict(other.state_dict())
    assert_same(
        results_of(layers, together)[:1], results_of([layers[0], on_cutlass(other, DTYPE), layers[2]], each_alone)[:1]
    )
    assert not torch.equal(layers[2].second_kept, earlier)
    layers[2].set_second_kept(earlier)
    assert torch.equal(layers[2].second_kept, earlier)
    assert_same(results_of(layers, together), results_of(layers, each_alone))


@pytest.mark.parametrize("rank", [0, 4])
def test_no_rounded_copy_of_trained_values_is_kept(rank):
    layers = sparse_layers(rank=rank)
    x, _ = inputs_of(layers)
    shapes = {(out, IN // 2) for out in (*OUTS, sum(OUTS))}
    for product in (each_alone, together):
        kept = kept_for_backward(lambda product=product: product(x, layers))
        assert kept and not shapes & {tuple(tensor.shape) for tensor in kept}
        join(layers, [40])
    modules = [layers[0].operands.joint, *(layer.operands for layer in layers)]
    held = [each for module in modules for each in (*vars(module).values(), *module.buffers())]
    assert not shapes & {tuple(each.shape) for each in held if isinstance(each, Tensor)}


def test_frozen_layers_keep_rounded_values_and_join_only_their_like():
    layers, frozen = sparse_layers(), sparse_layers(make=frozen_on_cutlass)
    assert not join([frozen[0], layers[1], layers[2]], [40]) and not join([layers[0], *frozen[1:]], [40])
    expected = results_of(layers, each_alone)[:2]
    assert join(frozen, [40])
    joint_kept = frozen[0].operands.joint.kept
    assert joint_kept.shape == (sum(OUTS), IN // 2)
    assert all(layer.operands.kept.data_ptr() in range(*reach_of(joint_kept)) for layer in frozen)
    for layer in frozen:
        layer.values.requires_grad_()  # so that both give the same results
    assert_same(results_of(frozen, together)[:2], expected)


def frozen_on_cutlass(layer, dtype):
    layer.values.requires_grad_(False)
    return on_cutlass(layer, dtype)


def reach_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def test_inputs_in_fp32_are_rounded():
    layers = sparse_layers()
    join(layers, [40])
    x, _ = inputs_of(layers)
    assert_same([together(x.float(), layers)], [together(x, layers)])


def assert_apart(layers) -> None:
    with torch.autocast("cpu", DTYPE):
        outputs, _ = products(normal("cpu", 3, IN, seed=7, dtype=DTYPE), layers)
    assert [output.shape for output in outputs] == [(3, layer.out_features) for layer in layers]


def assert_joint(layers, expected: list[Tensor]) -> None:
    """One product, whose results are those that the layers had, and still have, apart."""
    with torch.autocast("cpu", DTYPE):
        outputs, _ = products(normal("cpu", 3, IN, seed=7, dtype=DTYPE), layers)
    assert [output.shape for output in outputs] == [(3, sum(OUTS))]
    for product in (each_alone, together):
        assert_same(results_of(layers, product), expected)


def test_adapters_that_join_are_in_the_one_product_as_soon_as_every_layer_has_some():
    layers, others = sparse_layers(), sparse_layers()
    join(layers, [40])
    for i, (layer, other) in enumerate(zip(layers, others, strict=True)):
        add_random_adapters(layer, 4, seed=i)
        add_random_adapters(other, 4, seed=i)
        if i < 2:
            assert_apart(layers)
            assert_same(results_of(layers, together), results_of(layers, each_alone))
    assert_joint(layers, results_of(others, each_alone))


def test_adapters_may_have_ranks_of_their_own():
    layers, others = sparse_layers(), sparse_layers()
    join(layers, [40])
    for i, rank in enumerate((4, 24, 17)):
        add_random_adapters(layers[i], rank, seed=i)
        add_random_adapters(others[i], rank, seed=i)
    assert_joint(layers, results_of(others, each_alone))


def test_adapters_of_all_layers_in_one_refresh():
    layers, others = sparse_layers(), sparse_layers()
    join(layers, [40])
    for each in (layers, others):
        for i, layer in enumerate(each):
            AdaptedLinear.add_adapters(layer, 4, torch.Generator().manual_seed(i))  # without its refresh
            layer.lora_right.data.copy_(normal("cpu", 4, layer.out_features, seed=i))
        with torch.no_grad():
            CutlassOperands.refresh_all(each, rechoose=False)
    assert_joint(layers, results_of(others, each_alone))


def test_operands_that_were_moved_are_joint_no_more():
    layers = sparse_layers(rank=4)
    join(layers, [40])
    with pytest.raises(RuntimeError, match="joint 2:4 operands were moved or converted"):
        layers[1]._apply(torch.clone)


def test_adapters_operands_stay_where_they_are_with_zeros_around_the_blocks():
    layers = sparse_layers(rank=4)
    join(layers, [40])
    operands = layers[0].operands.joint
    names, width = AdapterOperands._fields, adapter_width(4)
    places = [getattr(operands, name).data_ptr() for name in names]
    for seed in range(2):
        for layer in layers:
            for i, side in enumerate((layer.lora_left, layer.lora_right)):
                side.data.copy_(normal("cpu", *side.shape, seed=10 * seed + i))
        with torch.no_grad():
            CutlassOperands.refresh_all(layers, rechoose=True)
        assert_same(results_of(layers, together), results_of(layers, each_alone))
    assert [getattr(operands, name).data_ptr() for name in names] == places
    assert [getattr(operands, name).shape for name in names] == [
        *((6 * width, IN), (6 * width, sum(OUTS))),
        *((IN, 3 * width), (sum(OUTS), 3 * width)),
    ]
    for name in names:
        pieces = [getattr(layer.operands, name) for layer in layers]
        whole = getattr(operands, name)
        assert all(piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for piece in pieces)
        assert whole.count_nonzero() == sum(piece.count_nonzero() for piece in pieces) > 0


def test_dense_layers_are_one_product():
    layers = [nn.Linear(IN, out) for out in OUTS]
    assert not join(layers, [40])
    assert_same(results_of(layers, together), results_of(layers, each_alone))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: sparse_layers(make=on_dense),
        lambda: [*sparse_layers(rank=4)[:2], sparse_layers()[2]],
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 8, sizes=(256, IN)), DTYPE)],
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 4, sizes=(256, IN)), torch.float16)],
        lambda: [*sparse_layers()[:2], on_cutlass(make_layer("cpu", 4, sizes=(320, IN)), DTYPE)],
        lambda: [*sparse_layers()[:2], nn.Linear(IN, 256)],
    ],
    ids=["dense operands", "adapters of some", "another M", "another dtype", "no whole metadata", "a dense layer"],
)
def test_what_cannot_be_joined_runs_apart(layers, kernels):
    made = layers()
    assert not join(made, [40]) and not kernels
    assert_apart(made)


def test_a_layer_that_another_backend_runs_leaves_the_others_apart():
    layers = sparse_layers(rank=4)
    join(layers, [40])
    on_dense(layers[1], DTYPE)
    assert_apart(layers)
    assert_same(results_of(layers, together), results_of(layers, each_alone))


# ------------------------------------------------------------------------------------------------------- a whole model
CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.05,
)
LENGTHS = (20, 9, 32, 3)


def plain_attention(heads: list[Tensor], bias: Tensor, boundaries: Tensor, dropout_p: float, longest: int) -> Tensor:
    """What kernels/short_attention.py computes, sequence by sequence in torch's own operations."""
    assert longest == int(boundaries.diff().max()), "what chooses the kernels is not the packing's"
    together = heads[0] if len(heads) == 1 else torch.stack(heads, 1)  # [T, 3, A, D]
    together = together + bias.view(together.shape[1:]).to(together.dtype)
    ends = boundaries.tolist()
    parts = [together[begin:end].permute(1, 2, 0, 3) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    return torch.cat([F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])


def small_model(rank: int) -> BertForPreTraining:
    sparsity = SparsityConfig(pruned_matrix="static-weight")
    model = build_model(lambda: BertForPreTraining(CONFIG), sparsity, None, seed=1, mask_init="magnitude")
    for _, layer in named_layers(model):
        on_cutlass(layer, DTYPE)
    if rank:
        random_adapters(model, rank)
    return model


def random_adapters(model: BertForPreTraining, rank: int) -> None:
    add_adapters(model, rank, seed=1)
    for seed, (_, layer) in enumerate(named_layers(model)):
        with torch.no_grad():
            layer.lora_right.copy_(0.3 * normal("cpu", *layer.lora_right.shape, seed=seed))
        layer.refresh(rechoose=False)


def join_attention(model: BertForPreTraining) -> None:
    joined = [join(block.attention.self.projections(), [sum(LENGTHS)]) for block in model.bert.encoder.layer]
    assert joined == [False, True], "the first block's projections read the embeddings, and are dense"


def gradients_of(model: BertForPreTraining) -> dict[str, Tensor]:
    model.zero_grad()
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    packing = Packing(boundaries, boundaries[:-1], positions, max(LENGTHS), short=True)
    ids = torch.randint(1, CONFIG.vocab_size, positions.shape, generator=torch.Generator().manual_seed(0))
    labels = ids.view(-1)[boundaries[:-1, None].long() + torch.arange(2)]
    with torch.autocast("cpu", DTYPE):
        scores = model(ids, torch.zeros_like(ids), packing, boundaries[:-1, None].long() + torch.arange(2))
        sums = pretraining_loss_sums(*scores, labels, torch.zeros(len(LENGTHS), dtype=torch.int64))
    sum(sums).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is 0, but for rounding
            assert (found[name] - gradient).norm() < 0.03 * gradient.norm() + 1e-3 * whole, name


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_a_models_gradients_with_adapters_are_the_same_joint_and_apart(when, monkeypatch, counted):
    monkeypatch.setitem(sys.modules, "kernels.short_attention", SimpleNamespace(short_attention=plain_attention))
    apart, model = small_model(rank=4), small_model(rank=0 if when == "in the middle" else 4)
    join_attention(model)
    if when == "in the middle":
        gradients_of(model)
        counted.clear()
        random_adapters(model, 4)
    expected = gradients_of(apart)
    assert not counted, "nothing is joined where nobody asks for it"
    assert_same_gradients(gradients_of(model), expected)
    assert counted.count("sparse_mm") == 2 and counted.count("adapter_grads") == 3


# ------------------------------------------------------------------------------------------------------ dense products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact_input", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_products_without_biases_are_autocasts(shape, exact_input, dtype):
    check_dense_product("cpu", dtype, *shape, exact_input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_alone_is_not_copied_to_lie_beside_others(dtype, monkeypatch):
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("copied"))
    layer, x = nn.Linear(8, 4), torch.randn(3, 8, dtype=dtype)
    assert joint.without_bias(layer, x)[0].shape == (3, 4)
