"""`sparsify`, `dense_state_dict` and `sparsity_report` on a toy transformer and on BERT."""

import dataclasses

import pytest
import torch
from sparse_reference import kept_of_every_group, kept_twice
from torch import nn

from ablations import AblationLinear
from configuration import BertConfig
from modeling import BertForPreTraining, encoder_blocks, input_projections
from sparse_ops import (
    AdaptedLinear,
    SparseLinear,
    add_adapters,
    dense_state_dict,
    named_layers,
    sparsify,
    sparsity_report,
)
from training.errors import UsageError
from training.sparsity import KINDS, SparsityConfig

SLOPE = SparsityConfig(pruned_matrix="static-weight")
HIDDEN, WIDE, BLOCKS = 32, 64, 3


# ----------------------------------------------------------------------------------------------------------- models
class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(HIDDEN, HIDDEN), "LayerNorm": nn.LayerNorm(HIDDEN)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(HIDDEN, WIDE)})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDE, HIDDEN), "LayerNorm": nn.LayerNorm(HIDDEN)})

    def forward(self, x):
        projected = (self.attention["self"][name](x) for name in ("query", "key", "value"))
        mixed = nn.functional.scaled_dot_product_attention(*projected)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](mixed))
        return self.output["LayerNorm"](x + self.output["dense"](self.intermediate["dense"](x).relu()))


class ToyTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(50, HIDDEN)
        self.layer = nn.ModuleList(ToyBlock() for _ in range(BLOCKS))
        self.pooler = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 50)

    def forward(self, input_ids):
        x = self.embeddings(input_ids)
        for block in self.layer:
            x = block(x)
        return self.head(self.pooler(x))


def toy_model():
    model = ToyTransformer()
    blocks = [(f"layer.{i}", block) for i, block in enumerate(model.layer)]
    return model, blocks, {f"layer.0.attention.self.{name}" for name in ("query", "key", "value")}


def bert_model():
    config = BertConfig(50, HIDDEN, BLOCKS, 2, WIDE, max_position_embeddings=16)
    model = BertForPreTraining(config).eval()
    with torch.no_grad():  # wider than BERT's 0.02, so that every layer counts in what comes out
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model, encoder_blocks(model), input_projections(model)


BUILDERS = {"toy": (toy_model, "layer"), "bert": (bert_model, "bert.encoder.layer")}
both_models = pytest.mark.parametrize("kind_of_model", BUILDERS)


def build(kind_of_model, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[kind_of_model][0]()


def pruned(kind_of_model, config, **options):
    model, blocks, keep_dense = build(kind_of_model)
    return model, sparsify(model, config, blocks, keep_dense, **options)


def scores(model):
    input_ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        if isinstance(model, ToyTransformer):
            return model(input_ids)
        tokens, sentences = model(input_ids, torch.zeros_like(input_ids), torch.ones_like(input_ids))
        return torch.cat([tokens.flatten(), sentences.flatten()])


ATTENTION = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
FEED_FORWARD = ["intermediate.dense", "output.dense"]
FIRST = ["attention.output.dense", *FEED_FORWARD]  # query, key and value of the first block read the embeddings
WHOLE = [*ATTENTION, *FEED_FORWARD]


@both_models
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [FIRST, WHOLE, WHOLE]),
        ({"skip_first_block": True}, [[], WHOLE, WHOLE]),
        ({"skip_last_block": True}, [FIRST, WHOLE, []]),
        ({"skip_attention": True}, [FEED_FORWARD] * 3),
        ({"skip_first_block": True, "skip_last_block": True, "skip_attention": True}, [[], FEED_FORWARD, []]),
        ({"unstructured_masking": True, "skip_attention": True}, [FEED_FORWARD] * 3),
        ({"pruned_matrix": "static-input", "skip_last_block": True}, [FIRST, WHOLE, []]),
        ({"pruned_matrix": "none"}, [[], [], []]),
    ],
)
def test_which_layers_are_replaced(kind_of_model, flags, expected):
    dense, _, _ = build(kind_of_model)
    model, replaced = pruned(kind_of_model, dataclasses.replace(SLOPE, **flags))
    prefix = BUILDERS[kind_of_model][1]
    names = {f"{prefix}.{block}.{name}" for block, layers in enumerate(expected) for name in layers}
    assert len(replaced) == len(names) and set(replaced) == names
    assert {name for name, _ in named_layers(model, AdaptedLinear)} == names

    kept = dict(model.named_modules())
    for name, module in dense.named_modules():
        if name not in names:
            assert type(kept[name]) is type(module), f"{name} must stay as it is"
    untouched = {name for name in dense.state_dict() if name.rpartition(".")[0] not in names}
    for name in untouched:
        assert torch.equal(model.state_dict()[name], dense.state_dict()[name])


def test_bert_keeps_embeddings_pooler_and_heads_dense():
    model, replaced = pruned("bert", SLOPE)
    assert all(name.startswith("bert.encoder.layer.") for name in replaced)
    heads = [model.bert.pooler.dense, model.cls.predictions.transform.dense, model.cls.predictions.decoder]
    assert all(type(layer) is nn.Linear for layer in [*heads, model.cls.seq_relationship])
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


# ------------------------------------------------------------------------------------------------------------ masks
@both_models
@pytest.mark.parametrize("reduction_dim", [True, False], ids=["in", "out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_gets_the_same_pattern_of_largest_weights(kind_of_model, reduction_dim, dtype):
    model, blocks, keep_dense = build(kind_of_model)
    dense = {name: tensor.clone() for name, tensor in model.to(dtype).state_dict().items()}
    config = dataclasses.replace(SLOPE, reduction_dim=reduction_dim, sparsity_increment=(1, 2))
    for name in sparsify(model, config, blocks, keep_dense):
        layer, weight = model.get_submodule(name), dense[f"{name}.weight"]
        m = {"0": 4, "1": 8, "2": 16}[name.partition("layer.")[2][0]]
        mask = kept_of_every_group(weight.abs(), 2, m, 1 if reduction_dim else 0)
        assert isinstance(layer, SparseLinear) and layer.values.dtype == dtype
        assert torch.equal(layer.mask(), mask) and torch.equal(layer.dense_weight(), weight * mask)
        twice = kept_twice(weight, mask, 2, m, 0 if reduction_dim else 1)
        assert torch.equal(layer.dense_weight(double_pruned=True), weight * twice)
        assert torch.equal(layer.bias, dense[f"{name}.bias"])


@pytest.mark.parametrize("mask_init", ["magnitude", "random"])
def test_unstructured_masks_have_the_stated_count_in_every_matrix(mask_init):
    config = dataclasses.replace(SLOPE, unstructured_masking=True, unstructured_mask_sparsity=87.3)
    dense, _, _ = build("toy")
    model, replaced = pruned("toy", config, mask_init=mask_init)
    for name in replaced:
        layer, magnitudes = model.get_submodule(name), dense.get_submodule(name).weight.detach().abs()
        assert layer.values.numel() == int(layer.mask().sum()) == int((1 - 87.3 / 100) * magnitudes.numel())
        largest = magnitudes[layer.mask()].min() >= magnitudes[~layer.mask()].max()
        assert largest == (mask_init == "magnitude")


@pytest.mark.parametrize("reduction_dim", [True, False], ids=["in", "out"])
def test_random_masks_depend_on_seed_and_name_alone(reduction_dim):
    config = dataclasses.replace(SLOPE, reduction_dim=reduction_dim)

    def masks(seed, model_seed=0, last_first=False):
        model, blocks, keep_dense = build("toy", model_seed)
        blocks = blocks[::-1] if last_first else blocks
        return {
            name: model.get_submodule(name).mask()
            for name in sparsify(model, config, blocks, keep_dense, seed=seed, mask_init="random")
        }

    first = masks(seed=5)
    for mask in first.values():
        groups = mask if reduction_dim else mask.t()
        assert (groups.reshape(-1, 4).sum(-1) == 2).all()
    for same in (masks(seed=5), masks(seed=5, model_seed=1), masks(seed=5, last_first=True)):
        assert all(torch.equal(same[name], mask) for name, mask in first.items())
    assert not any(torch.equal(mask, first[name]) for name, mask in masks(seed=6).items())
    assert not torch.equal(first["layer.1.attention.self.query"], first["layer.1.attention.self.key"])
    by_magnitude, _ = pruned("toy", config)
    assert not any(torch.equal(by_magnitude.get_submodule(name).mask(), mask) for name, mask in first.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "static-weight")])
def test_ablations_replace_the_same_layers(kind):
    config = SparsityConfig(pruned_matrix=kind, reduction_dim=False, sparsity_increment=(2,))
    model, replaced = pruned("toy", config)
    assert replaced == pruned("toy", SLOPE)[1]
    for name in replaced:
        layer = model.get_submodule(name)
        assert type(layer) is AblationLinear and layer.kind == kind
        assert layer.m == (8 if name.startswith("layer.2") else 4)
    if kind == "static-input":
        masks = [model.get_submodule(f"layer.1.attention.self.{name}").input_mask for name in ("query", "key")]
        assert not torch.equal(*masks), "each layer has a mask of its own"


@pytest.mark.parametrize("sizes", [(HIDDEN, WIDE + 4), (HIDDEN + 4, WIDE)], ids=["out", "in"])
@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("kind", ["static-weight", "dynamic-weight", "dynamic-input"])
def test_sizes_that_m_does_not_divide_are_refused(sizes, reduction_dim, kind):
    block = nn.Sequential(nn.Linear(*sizes))
    config = SparsityConfig(pruned_matrix=kind, reduction_dim=reduction_dim, sparsity_increment=(0,))
    with pytest.raises(UsageError, match=rf"^--pruned_matrix {kind}: block\.0 is {sizes[1]} x {sizes[0]}.* 8") as error:
        sparsify(nn.Sequential(block), config, [("block", block)])
    assert "\n" not in str(error.value)
    sparsify(nn.Sequential(block), dataclasses.replace(config, sparsity_increment=()), [("block", block)])
    assert isinstance(block[0], AdaptedLinear), "2:4 divides these sizes"


def test_unstructured_masks_need_no_multiples():
    block = nn.Sequential(nn.Linear(7, 5))
    sparsify(nn.Sequential(block), dataclasses.replace(SLOPE, unstructured_masking=True), [("block", block)])
    assert block[0].values.numel() == 14


def test_something_must_be_left_to_prune():
    config = dataclasses.replace(SLOPE, skip_first_block=True, skip_last_block=True)
    blocks = [("block", nn.Sequential(nn.Linear(8, 8)))]
    with pytest.raises(UsageError, match="--pruned_matrix static-weight: no layer of the model's 1 blocks"):
        sparsify(nn.ModuleDict(dict(blocks)), config, blocks)


def test_sparsity_increment_must_fit_the_model():
    with pytest.raises(UsageError, match="--sparsity_increment 3.*3 blocks"):
        pruned("toy", dataclasses.replace(SLOPE, sparsity_increment=(3,)))


# -------------------------------------------------------------------------------------------- dense model, report
EXPORTABLE = {
    "2:4-in": SLOPE,
    "2:4-out": dataclasses.replace(SLOPE, reduction_dim=False),
    "2:8-rest": dataclasses.replace(SLOPE, sparsity_increment=(1,)),
    "unstructured": dataclasses.replace(SLOPE, unstructured_masking=True),
    "pruned-once": dataclasses.replace(SLOPE, double_prune=False),
    "dynamic-weight-in": SparsityConfig("dynamic-weight"),
    "dynamic-weight-out": SparsityConfig("dynamic-weight", reduction_dim=False),
    "dynamic-output-grad": SparsityConfig("dynamic-output-grad"),
}


@both_models
@pytest.mark.parametrize("config", EXPORTABLE.values(), ids=EXPORTABLE.keys())
@pytest.mark.parametrize("rank", [0, 3])
def test_dense_state_dict_computes_the_same(kind_of_model, config, rank):
    model, replaced = pruned(kind_of_model, config)
    if rank:
        for parameter in add_adapters(model, rank, seed=0):
            nn.init.normal_(parameter, std=0.1)
    dense, _, _ = build(kind_of_model, seed=1)

    dense.load_state_dict(dense_state_dict(model), strict=True)

    torch.testing.assert_close(scores(dense), scores(model), rtol=1e-4, atol=1e-4)
    unpruned, _, _ = build(kind_of_model)
    if config.pruned_matrix != "dynamic-output-grad" or rank:
        assert not torch.allclose(scores(unpruned), scores(model), rtol=1e-2, atol=1e-2), "pruning must show"
    if rank == 0 and config == SLOPE:
        for name in replaced:
            weight = dense.get_submodule(name).weight.detach()
            assert torch.equal(weight, weight * kept_of_every_group(weight.abs(), 2, 4, 1))


@pytest.mark.parametrize("kind", ["dynamic-input", "static-input"])
def test_pruned_inputs_have_no_dense_equivalent(kind):
    model, _ = pruned("toy", SparsityConfig(kind))
    with pytest.raises(UsageError, match=f"--pruned_matrix {kind}"):
        dense_state_dict(model)


@both_models
@pytest.mark.parametrize(
    "config", [SLOPE, *(EXPORTABLE[name] for name in ("2:8-rest", "unstructured", "pruned-once"))], ids=str
)
def test_report_counts_what_the_matrices_hold(kind_of_model, config):
    model, replaced = pruned(kind_of_model, config)
    report = sparsity_report(model)
    once = twice = total = 0
    for name in replaced:
        layer = model.get_submodule(name)
        once += int((layer.dense_weight() != 0).sum())
        twice += int((layer.dense_weight(double_pruned=True) != 0).sum())
        total += layer.in_features * layer.out_features
    assert (report.layers, report.dense_weights) == (len(replaced), total)
    assert report.forward_density == pytest.approx(once / total, rel=1e-12)
    assert report.backward_density == pytest.approx(twice / total, rel=1e-12)
    if not config.double_prune:
        assert report.backward_density == report.forward_density == 0.5
    if config == SLOPE:
        assert report.forward_density == 0.5 and 0.39 < report.backward_density < 0.43


@both_models
def test_a_checkpoint_brings_its_masks_along(kind_of_model):
    """Strictly loaded into a model that was pruned from other weights, and so has other masks."""
    model, replaced = pruned(kind_of_model, SLOPE)
    other, blocks, keep_dense = build(kind_of_model, seed=1)
    sparsify(other, SLOPE, blocks, keep_dense)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(scores(other), scores(model))
    assert all(torch.equal(other.get_submodule(n).mask(), model.get_submodule(n).mask()) for n in replaced)
