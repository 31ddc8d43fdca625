"""Whole training runs on a GPU: a small BERT on 2:4 kernels beside the same one on dense products.

Skipped, with the reason, where there is no Hopper GPU or no way to compile the kernels.
"""

from __future__ import annotations

import copy
import io
import statistics
from types import SimpleNamespace

import pytest
import torch
from product_checks import assert_near, unavailable
from torch import Tensor, nn

from configuration import BertConfig
from kernels.backends import CutlassOperands
from modeling import BertForPreTraining, pretraining_loss_sums
from optimization import build_optimizer, load_optimizer_state, optimizer_state, parameter_groups
from sparse_ops import DenseOperands, named_layers, unpack_bits
from training.assembly import build_model
from training.distributed import World
from training.engine import Engine
from training.sparsity import SparsityConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)


STEPS, JOIN, BATCH, LENGTH, MASKED, VOCAB = 200, 150, 32, 64, 10, 512
ADAPTERS = {"rank": 8, "seed": 0}
BERT = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 512, "max_position_embeddings": LENGTH}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def objective(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    scores = model(ids, torch.zeros_like(ids), None, batch["masked_positions"])
    sums = pretraining_loss_sums(*scores, batch["masked_labels"], batch["next_sentence_labels"])
    loss = sums[0] / (BATCH * MASKED) + sums[1] / BATCH
    return loss, loss


def make_engine(backend: str, interval: int = 1, compiled: bool = False) -> Engine:
    """Compiled, its micro-steps are also captured as CUDA graphs."""
    model = build_model(
        lambda: BertForPreTraining(BertConfig(**BERT)), SparsityConfig(pruned_matrix="static-weight"), seed=0
    )
    flags = {
        "optimizer": "fused-lamb",
        "learning_rate": 0.0,
        "weight_decay": 0.01,
        "lora_weight_decay": 1e-4,
        "lora_lr_scale": 1.0,
    }
    flags |= {"max_grad_norm": 1.0, "precision": "bf16", "double_prune_interval": interval, "sparse_backend": backend}
    flags |= {"cuda_graphs": "auto"}
    world, parts = World(0, 1, 0, torch.device("cuda", 0)), list(model.bert.encoder.layer) if compiled else []
    engine = Engine(
        *(model, world, SimpleNamespace(**flags), BATCH * LENGTH, print, objective),
        compiled=parts,
        obstacle="" if compiled else "a test",
    )
    engine.connect()
    kind = {"cutlass": CutlassOperands, "dense": DenseOperands}[backend]
    layers = named_layers(model)
    assert len(layers) == 9 and all(type(layer.operands) is kind for _, layer in layers)
    return engine


def make_batches(steps: int) -> list[dict[str, Tensor]]:
    """Sequences of words as unequal as a language's, each with two followers: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1.0, VOCAB - 4)
    followers, words = (
        torch.multinomial(frequency, count, replacement=True, generator=generator) + 5
        for count in (VOCAB * 2, steps * BATCH * LENGTH)
    )
    followers, words = followers.view(VOCAB, 2), words.view(steps, BATCH, LENGTH)
    for i in range(1, LENGTH):
        turn = torch.randint(0, 2, (steps, BATCH), generator=generator)
        words[..., i] = followers[words[..., i - 1], turn]
    positions = torch.rand(steps, BATCH, LENGTH, generator=generator).argsort(-1)[..., :MASKED]
    labels = words.gather(-1, positions)
    words = words.scatter(-1, positions, 4)
    sentences = torch.randint(0, 2, (steps, BATCH), generator=generator)
    names = ("input_ids", "masked_positions", "masked_labels", "next_sentence_labels")
    return [dict(zip(names, (part.cuda() for part in step), strict=True))
            for step in zip(words, positions, labels, sentences, strict=True)]  # fmt: skip


def scores_of(engine: Engine, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    with engine.autocast():
        return engine.model(ids, torch.zeros_like(ids), None, batch["masked_positions"])


def train(engine: Engine, batches: list, join: int = 0, parts: int = 1, order: int | None = None) -> list[float]:
    """Losses of all steps.

    Args:
        join: steps before the adapters join; 0 for none.
        parts: micro-steps a step.
        order: seeds a permutation of each batch's sequences.
    """
    generator = torch.Generator().manual_seed(order or 0)
    losses = []
    for step, batch in enumerate(batches):
        if join and step == join:
            engine.join_adapters(**ADAPTERS)
        rows = torch.arange(BATCH) if order is None else torch.randperm(BATCH, generator=generator)
        losses.append(0.0)
        for i, chosen in enumerate(rows.cuda().chunk(parts)):
            part = {name: tensor[chosen] for name, tensor in batch.items()}
            losses[-1] += engine.micro_step(part, i, parts)
        engine.step(1e-2 * min(1.0, (step + 1) / 20))
    return torch.stack(losses).tolist()


def largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def masks_of(engine: Engine) -> list[Tensor]:
    return [layer.mask_bits.clone() for _, layer in named_layers(engine.model)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled and captured"])
def test_training_stays_together_with_dense_training(capsys, compiled):
    batches = make_batches(STEPS)
    sparse, dense = (make_engine(backend, compiled=compiled) for backend in ("cutlass", "dense"))
    masks = [layer.mask_bits.clone() for _, layer in named_layers(sparse.model)]
    losses = train(dense, batches, JOIN)
    # Rounding decides when a run leaves another: one distance says little, and is ten times another at times.
    distances = [largest_difference(train(sparse, batches, JOIN), losses)]
    for order in (1, 2):
        other = make_engine("cutlass", compiled=compiled)
        distances.append(largest_difference(train(other, batches, JOIN, order=order), losses))
    distance = statistics.median(distances)
    others = [{"order": 1}, {"order": 2}]
    others += [] if compiled else [{"parts": 2}, {"parts": 4}]  # each size would be compiled anew
    allowed = [
        largest_difference(train(make_engine("dense", compiled=compiled), batches, JOIN, **how), losses)
        for how in others
    ]
    with capsys.disabled():
        print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps; largest difference to dense products:")
        for name, values in (("cutlass", distances), ("dense in other orders", allowed)):
            print(f"  {name} {', '.join(f'{value:.5f}' for value in values)}", flush=True)
    assert losses[-1] < losses[0] - 2, "the run must learn for its losses to mean something"
    assert distance <= 2 * max(allowed)
    for engine in (sparse, dense):
        for (_, layer), mask in zip(named_layers(engine.model), masks, strict=True):
            assert torch.equal(layer.mask_bits, mask)
            assert layer.lora_right.any(), "the adapters learn"
            assert not layer.dense_weight()[~unpack_bits(mask, layer.stored_shape)].any()


@pytest.mark.parametrize(("writer", "reader"), [("cutlass", "dense"), ("dense", "cutlass")])
def test_checkpoint_of_one_backend_goes_on_in_the_other(writer, reader):
    batches = make_batches(6)
    wrote = make_engine(writer, interval=3)
    train(wrote, batches[:4], join=2)  # the second pruning's choice is that of step 3
    saved = io.BytesIO()
    torch.save(wrote.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True, map_location="cpu")
    read = make_engine(reader, interval=3)
    read.join_adapters(**ADAPTERS)
    read.model.load_state_dict(state["model"])
    read.load_state_dict(state)
    for (_, ours), (_, theirs) in zip(named_layers(read.model), named_layers(wrote.model), strict=True):
        assert torch.equal(ours.second_kept, theirs.second_kept)
        assert torch.equal(ours.mask_bits, theirs.mask_bits)
        assert torch.equal(ours.dense_weight(), theirs.dense_weight())
    with torch.no_grad():
        assert_near(scores_of(read, batches[4]), scores_of(wrote, batches[4]), tolerance=2**-6)  # after two blocks
    assert train(read, batches[4:]) == pytest.approx(train(wrote, batches[4:]), abs=2e-3)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam_is_fused_and_goes_on_from_a_checkpoint(name):
    def trained(steps: int, state: tuple[dict, dict] | None = None) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64, device="cuda")
        optimizer = build_optimizer(name, parameter_groups(model, 0.01, 1e-4), 1e-2)
        assert optimizer.defaults["fused"]
        if state is not None:
            model.load_state_dict(state[0])
            load_optimizer_state(optimizer, state[1])
        for step in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + step) * p.detach()
            optimizer.step()
        return model, optimizer

    whole, _ = trained(2)
    model, optimizer = trained(1)
    state = copy.deepcopy((model.state_dict(), optimizer_state(optimizer)))
    model, optimizer = trained(0, state)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0) * p.detach()
    optimizer.step()
    assert all(map(torch.equal, whole.parameters(), model.parameters()))
