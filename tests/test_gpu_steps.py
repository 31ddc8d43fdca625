"""The fast step of a GPU against the plain one: compiled, as CUDA graphs, without padding."""

from types import SimpleNamespace

import pytest
import torch
from product_checks import unavailable

from configuration import BertConfig
from data.packing import pack_step
from modeling import BertForPreTraining
from sparse_ops import named_layers
from training.assembly import build_model
from training.distributed import World
from training.pretraining import Counts, PretrainingRun
from training.sparsity import SparsityConfig

pytestmark = pytest.mark.gpu
BATCH, LENGTH, PREDICTED = 8, 128, 20
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.05,
}
# Two blocks of BERT-Large and 16,384 tokens: only from some million numbers on does the compiler sum the gradients of
# LayerNorm's weights up in the kernel that computes its input's.
LARGE = SIZES | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 2}
LARGE_BATCH = 128
DENSE, SLOPE = SparsityConfig(), SparsityConfig(pruned_matrix="static-weight")
PLAIN = {"no_compile": True, "cuda_graphs": "False", "unpad": "False"} | {
    "attention": "flash",
    "dense_kernels": "False",
}
FAST = {"no_compile": False, "cuda_graphs": "auto", "unpad": "auto", "attention": "auto", "dense_kernels": "auto"}

COMPILED = FAST | {"attention": "flash", "dense_kernels": "False"}
TOGETHER = {"all": FAST, "all but our kernels": COMPILED}


@pytest.fixture(autouse=True, scope="module")
def kernels():
    reason = unavailable()
    if reason:
        pytest.skip(reason)


def begun(
    sparsity: SparsityConfig, dropout: float = 0.0, sizes: dict = SIZES, batch: int = BATCH, **flags
) -> PretrainingRun:
    """A run without data and logs, ready for `give_step`."""
    run = PretrainingRun.__new__(PretrainingRun)
    run.args = SimpleNamespace(
        optimizer="lamb",
        learning_rate=1e-3,
        weight_decay=0.01,
        lora_weight_decay=1e-4,
        lora_lr_scale=1.0,
        max_grad_norm=1.0,
        precision="bf16",
        double_prune_interval=1,
        sparse_backend="cutlass" if sparsity.sparse and flags.get("precision") != "fp32" else "auto",
        pruned_matrix=sparsity.pruned_matrix,
        checkpoint_activations=False,
        lora_rank=8,
        seed=3,
        global_batch_size=2 * batch,
        local_batch_size=batch,
        max_predictions_per_seq=PREDICTED,
        masked_token_fraction=0.15,
    )
    vars(run.args).update(PLAIN | flags)
    run.config = BertConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    run.world, run.sparsity, run.samples = World(0, 1, 0, torch.device("cuda", 0)), sparsity, 0
    model = build_model(lambda: BertForPreTraining(run.config), sparsity, None, seed=3, mask_init="magnitude")
    run.build_engine(model, LENGTH)
    run.engine.connect()
    return run


def step_of(run: PretrainingRun, seed: int = 0, micro_steps: int = 2) -> tuple[dict[str, torch.Tensor], Counts]:
    """A step of micro-steps whose sequences have random lengths, padded or packed as the run wants it."""
    generator, sequences = torch.Generator().manual_seed(seed), run.args.local_batch_size

    def below(limit: int, *shape: int, least: int = 0) -> torch.Tensor:
        return torch.randint(least, limit, (micro_steps, sequences, *shape), generator=generator)

    lengths = below(LENGTH + 1, least=40)
    attended = (torch.arange(LENGTH) < lengths[..., None]).long()
    predicted = torch.arange(PREDICTED) < lengths[..., None] // 7
    batch = {
        "input_ids": below(1000, LENGTH, least=1) * attended,
        "token_type_ids": below(2, LENGTH) * attended,
        "attention_mask": attended,
        "masked_positions": (1 + torch.arange(PREDICTED)) * predicted,
        "masked_labels": torch.where(predicted, below(1000, PREDICTED), -1),
        "next_sentence_labels": below(2),
    }
    counts = Counts(float(predicted.sum()), float(micro_steps * sequences), float(lengths.sum()))
    if run.pack_multiple is not None:
        padded = {name: tensor.numpy() for name, tensor in batch.items()}
        packed = pack_step(padded, run.pack_multiple, run.args.masked_token_fraction)
        batch = {name: torch.from_numpy(array) for name, array in packed.items()}
    return {name: tensor.pin_memory() for name, tensor in batch.items()}, counts


def gradients_of(
    run: PretrainingRun, seed: int = 0, step: int = 1, micro_steps: int = 2
) -> tuple[tuple[float, float], dict]:
    """Losses and gradients of one step, whose update is left out."""
    taken, optimizer = {}, run.engine.optimizer

    def keep(*_) -> None:
        taken.update({name: p.grad.clone() for name, p in run.engine.model.named_parameters()})

    update, optimizer.step = optimizer.step, keep
    losses = run.losses_of(run.give_step(step, *step_of(run, seed, micro_steps), 0.0))
    optimizer.step = update
    return losses, taken


def assert_same_gradients(found: dict, expected: dict, bound: float, floor: float = 2e-3) -> None:
    """Within `bound` of each gradient's own norm, and `floor` of that of all together."""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is 0, but for rounding
        error, allowed = (found[name] - gradient).norm(), bound * gradient.norm() + floor * whole
        assert error < allowed, f"{name}: {error / gradient.norm():.4f}"


@pytest.mark.parametrize("sparsity", [DENSE, SLOPE], ids=["dense", "slope"])
@pytest.mark.parametrize("what", ["no_compile", "cuda_graphs", "unpad", *TOGETHER])
def test_losses_and_gradients_are_those_of_the_plain_path(sparsity, what):
    """One way alone, and all together; lengths, and so shapes, differ between micro-steps and between steps."""
    plain, fast = begun(sparsity), begun(sparsity, **(TOGETHER[what] if what in TOGETHER else {what: FAST[what]}))
    for seed in (0, 1, 0):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=5e-3)
        assert_same_gradients(found, expected, bound=0.03)
    if what in TOGETHER:
        ours = [module.kernels for module in fast.engine.model.modules() if hasattr(module, "kernels")]
        assert fast.short_attention == any(ours) == (what == "all"), "auto did not choose our kernels where it can"
        assert len(fast.engine.graphs.captured) > 1, "all micro-steps had one shape: the test shows less than it says"


def test_the_embeddings_kernels_change_nothing_but_roundings():
    """All else is the same: losses and gradients with them and without."""
    plain, fast = begun(DENSE, **FAST), begun(DENSE, **FAST)
    assert fast.engine.model.bert.embeddings.kernels
    plain.engine.model.bert.embeddings.kernels = False
    for seed in (0, 1, 0):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=5e-3)
        assert_same_gradients(found, expected, bound=0.03)


@pytest.mark.parametrize("sparsity", [DENSE, SLOPE], ids=["dense", "slope"])
@pytest.mark.parametrize("what", ["cuda_graphs", "all"])
def test_gradients_that_are_written_are_those_of_the_plain_path(sparsity, what):
    """Those of a step's only micro-step, between steps that add them up, in graphs of several shapes."""
    plain, fast = begun(sparsity), begun(sparsity, **(FAST if what == "all" else {what: FAST[what]}))
    for seed, micro_steps in ((0, 1), (1, 1), (0, 2), (0, 1), (1, 2), (1, 1)):
        expected_losses, expected = gradients_of(plain, seed, micro_steps=micro_steps)
        losses, found = gradients_of(fast, seed, micro_steps=micro_steps)
        assert losses == pytest.approx(expected_losses, rel=5e-3)
        assert_same_gradients(found, expected, bound=0.03)


def test_gradients_that_are_written_take_no_memory_of_their_own():
    run = begun(DENSE, **FAST)
    held = []
    for seed in (0, 1, 2):
        gradients_of(run, seed, micro_steps=1)
        held.append(torch.cuda.memory_allocated())
    assert len(run.engine.graphs.captured) > 2, "all batches had one shape: the test shows less than it says"
    assert not any(gradient is not None for gradient in run.engine.graphs.sums)
    of_gradients = sum(p.numel() * p.element_size() for p in run.engine.model.parameters())
    assert max(held) - held[0] < of_gradients / 2
    gradients_of(run, 0)
    assert torch.cuda.memory_allocated() - held[-1] > of_gradients / 2, "the bound above would notice nothing"


@pytest.mark.parametrize("sparsity", [DENSE, SLOPE], ids=["dense", "slope"])
@pytest.mark.parametrize("what", ["no_compile", "cuda_graphs", "all"])
def test_in_fp32_losses_and_gradients_are_those_of_the_plain_path(sparsity, what):
    """Dense products, padded, and nothing that rounding could hide."""
    plain = begun(sparsity, precision="fp32")
    fast = begun(sparsity, precision="fp32", **(FAST if what == "all" else {what: FAST[what]}))
    for seed in (0, 1, 0):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert_same_gradients(found, expected, bound=1e-3, floor=1e-5)


@pytest.mark.parametrize("sparsity", [DENSE, SLOPE], ids=["dense", "slope"])
def test_with_checkpointed_activations_losses_and_gradients_are_those_of_the_plain_path(sparsity):
    """Compiled, but not captured."""
    plain, fast = begun(sparsity), begun(sparsity, **FAST, checkpoint_activations=True)
    for seed in (0, 1, 0):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=5e-3)
        assert_same_gradients(found, expected, bound=0.03)


@pytest.mark.parametrize(
    ("precision", "sparsity", "bounds"),
    [
        ("bf16", DENSE, {"bound": 0.03}),
        ("bf16", SLOPE, {"bound": 0.03}),
        ("fp32", DENSE, {"bound": 1e-3, "floor": 1e-5}),
    ],
    ids=["dense", "slope", "dense in fp32"],
)
def test_at_the_size_of_bert_large_gradients_are_those_of_the_plain_path(precision, sparsity, bounds):
    large = {"sizes": LARGE, "batch": LARGE_BATCH, "precision": precision}
    plain, fast = begun(sparsity, **large), begun(sparsity, **large, **FAST)
    for seed in (0, 1):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=5e-3 if precision == "bf16" else 1e-5)
        assert_same_gradients(found, expected, **bounds)


def give_random_adapters(run: PretrainingRun, rank: int) -> None:
    """R is 0 when adapters join, and so is the gradient of L."""
    run.engine.join_adapters(rank, seed=3)
    generator = torch.Generator("cuda").manual_seed(4)
    for _, layer in named_layers(run.engine.model):
        with torch.no_grad():
            layer.lora_right.normal_(std=0.02, generator=generator)
        layer.refresh(rechoose=False)


def join_of_last_block(run: PretrainingRun):
    return run.engine.model.bert.encoder.layer[-1].attention.self.query.operands.joint


@pytest.mark.parametrize("rank", [8, 64])
def test_with_adapters_gradients_are_those_of_the_plain_path(rank):
    """In the middle of a run, whose graphs without adapters were captured before."""
    plain, fast = begun(SLOPE), begun(SLOPE, **FAST)
    for run in (plain, fast):
        gradients_of(run)
        give_random_adapters(run, rank)
    assert join_of_last_block(plain) is None and join_of_last_block(fast).left_rows is not None
    for seed in (0, 1, 0):
        expected_losses, expected = gradients_of(plain, seed)
        losses, found = gradients_of(fast, seed)
        assert losses == pytest.approx(expected_losses, rel=5e-3)
        assert_same_gradients(found, expected, bound=0.03)


def test_adapters_that_are_there_from_the_start_are_in_the_one_product():
    run = begun(SparsityConfig(pruned_matrix="static-weight", lora_rank=8), **FAST)
    assert join_of_last_block(run).left_rows is not None
    found = gradients_of(run)[1]
    assert all(gradient.any() for name, gradient in found.items() if name.endswith("lora_right"))


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_training_goes_as_on_the_plain_path_through_the_adapters_switch(micro_steps):
    runs = [begun(SLOPE), begun(SLOPE, **FAST)]
    losses = []
    for run in runs:
        found = []
        for step in range(1, 31):
            if step == 20:
                run.engine.join_adapters(8, seed=3)
            taken = run.give_step(step, *step_of(run, step % 3, micro_steps), 4e-3)
            found.append(run.losses_of(taken)[0])
        losses.append(found)
        for _, layer in named_layers(run.engine.model):
            assert layer.lora_right.abs().sum() > 0, "the adapters did not learn"
    plain, fast = losses
    assert plain[-1] < plain[0] - 0.1, "nothing was learnt: there is nothing to compare"
    assert fast == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("way", TOGETHER)
def test_dropout_is_a_function_of_the_step(way):
    """Replays of one graph draw anew with each seed, and the same with the same one."""
    run = begun(SLOPE, dropout=0.1, **TOGETHER[way])
    first, other, again = (gradients_of(run, step=step)[0] for step in (1, 2, 1))
    assert first == again
    assert other != first


def test_a_step_waits_for_nothing():
    """From the second step on the host may not wait for the device, nor ask it for a number."""
    run = begun(SLOPE, **FAST)
    for step in (1, 2):
        run.losses_of(run.give_step(step, *step_of(run), 1e-3))
    batch, counts = step_of(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = run.give_step(3, batch, counts, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.losses_of(taken)[0] > 0
