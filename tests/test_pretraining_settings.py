"""Runs of one process: every way to prune, precisions, kinds of data, evaluation, and the loss itself."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from pretraining_runs import (
    MODEL,
    assembled,
    checkpoint,
    dies_after,
    losses,
    metrics,
    run,
    uneven_batch,
    write_model,
)

from data.shards import ShardSet, evaluation_dataset, step_loader
from sparse_ops import SparseLinear
from training.assembly import build_pretraining_model
from training.checkpoint import load_checkpoint, save_checkpoint
from training.distributed import World
from training.pretraining import Counts, PretrainingRun

# --------------------------------------------------------------------------------------------------- every way to prune
KINDS = ["none", "static-weight", "dynamic-weight", "static-input", "dynamic-input", "dynamic-output-grad"]


@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_along_either_dimension(files, tmp_path, kind, reduction_dim):
    lora = "False" if kind == "none" else "lazy"
    run(files.flags(tmp_path, pruned_matrix=kind, reduction_dim=reduction_dim, add_lora=lora, max_steps=2))
    rows = metrics(tmp_path)
    assert [row["adapters"] for row in rows] == ["0", "0" if kind == "none" else "1"]
    assert all(2 < float(row["step_loss"]) < 7 for row in rows)
    assert checkpoint(tmp_path, 2)["sparsity"]["pruned_matrix"] == kind
    assert checkpoint(tmp_path, 2)["sparsity"]["reduction_dim"] == reduction_dim


def test_kinds_differ_and_reversed_spellings_are_the_same(files, tmp_path):
    names = [*KINDS, "weight-static"]
    for name in names:
        run(files.flags(tmp_path / name, pruned_matrix=name, add_lora="False", max_steps=2))
    second_losses = [losses(tmp_path / name)[1][1] for name in names]
    assert second_losses[-1] == second_losses[1]
    assert len(set(second_losses)) == len(KINDS)


SPARSITY = [
    # flags, density of W^R of: block 0's intermediate, block 1's query
    ({}, 1 / 2, 1 / 2),
    ({"sparsity_increment": -1}, 1 / 2, 1 / 2),
    ({"sparsity_increment": "1"}, 1 / 2, 1 / 4),
    ({"sparsity_increment": "0,1,-1"}, 1 / 4, 1 / 2),
    ({"sparsity_increment": "0,1"}, 1 / 4, 1 / 8),
    ({"sparsity_increment": "1", "reduction_dim": False}, 1 / 2, 1 / 4),
    ({"unstructured_masking": True}, 0.4, 0.4),
    ({"unstructured_masking": True, "unstructured_mask_sparsity": 87.5}, 1 / 8, 1 / 8),
    ({"skip_first_block": True}, 1, 1 / 2),
    ({"skip_last_block": True}, 1 / 2, 1),
    ({"skip_attention": True}, 1 / 2, 1),
    ({"mask_init": "random"}, 1 / 2, 1 / 2),
]


@pytest.mark.parametrize(("changes", "first", "second"), SPARSITY, ids=[str(changes) for changes, *_ in SPARSITY])
def test_what_is_pruned_and_by_how_much(files, tmp_path, changes, first, second):
    run(files.flags(tmp_path, max_steps=2, **changes))
    model = build_pretraining_model(checkpoint(tmp_path, 2))
    layers = dict(model.named_modules())
    for name, density in (
        ("bert.encoder.layer.0.intermediate.dense", first),
        ("bert.encoder.layer.1.attention.self.query", second),
    ):
        layer = layers[name]
        kept = layer.values.numel() if isinstance(layer, SparseLinear) else layer.weight.numel()
        assert kept == int(density * layer.in_features * layer.out_features), name
    always_dense = ("bert.pooler.dense", "cls.predictions.transform.dense", "cls.seq_relationship")
    always_dense += tuple(f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value"))
    assert not any(isinstance(layers[name], SparseLinear) for name in always_dense)


def test_random_masks_are_others(files, tmp_path):
    run(files.flags(tmp_path / "random", mask_init="random", max_steps=1, add_lora="False"))
    run(files.flags(tmp_path / "magnitude", max_steps=1, add_lora="False"))
    name = "bert.encoder.layer.1.output.dense.mask_bits"
    masks = [checkpoint(tmp_path / init, 1)["model"][name] for init in ("random", "magnitude")]
    assert not torch.equal(*masks)


# ----------------------------------------------------------------------------------------- precision, data, evaluation
def test_narrow_precisions_stay_near_fp32(files, tmp_path):
    changes = {"max_steps": 3, "model_config_file": files.model_without_dropout}
    for precision in ("fp32", "bf16", "fp16"):
        run(files.flags(tmp_path / precision, precision=precision, **changes))
    wide = [float(loss) for _, loss in losses(tmp_path / "fp32")]
    for precision in ("bf16", "fp16"):
        narrow = [float(loss) for _, loss in losses(tmp_path / precision)]
        assert narrow[0] == pytest.approx(wide[0], rel=0.01) and narrow[0] != wide[0]
        assert narrow[-1] == pytest.approx(wide[-1], rel=0.03)


def test_fp16_on_a_cpu_runs_and_names_the_fast_one(files, tmp_path):
    said = run([*files.flags(tmp_path, max_steps=1), "--fp16"]).stderr
    assert "--precision bf16" in said
    assert checkpoint(tmp_path, 1)["scaler"]["scale"] > 0
    assert checkpoint(tmp_path, 1)["arguments"]["precision"] == "fp16"


def test_the_loss_scale_is_resumed(files, tmp_path):
    flags = files.flags(tmp_path, precision="fp16")
    dies_after(7, flags)
    path = tmp_path / "pretrain_ckpts" / "ckpt_5.pt"
    state = load_checkpoint(path)
    assert state["scaler"]["scale"] == 65536 and state["scaler"]["_growth_tracker"] == 5
    state["scaler"]["scale"] = 1024.0
    save_checkpoint(path, state)
    scaler = assembled(flags).engine.scaler
    assert scaler.get_scale() == 1024 and scaler.state_dict()["_growth_tracker"] == 5


def test_the_command_line_wins_over_the_config_file(files, tmp_path):
    config = {"max_steps": 9, "seed": 5, "fp16": True, "log_prefix": "phase1_log"}
    (tmp_path / "phase.json").write_text(json.dumps(config | {"kfac": False, "kfac_inv_interval": 10}))
    flags = files.flags(tmp_path / "out", config_file=tmp_path / "phase.json", max_steps=2, precision="bf16")
    run(flags)
    assert len(losses(tmp_path / "out", "phase1_log")) == 2
    arguments = checkpoint(tmp_path / "out", 2)["arguments"]
    assert (arguments["max_steps"], arguments["seed"], arguments["precision"]) == (2, 5, "bf16")


def test_learning_happens(files, tmp_path):
    run(files.flags(tmp_path, max_steps=150, learning_rate=1e-2, num_steps_per_checkpoint=1000))
    rows = [float(loss) for _, loss in losses(tmp_path)]
    assert sum(rows[-20:]) / 20 < sum(rows[:5]) / 5 - 0.1


def test_premasked_shards(files, tmp_path):
    run(files.flags(tmp_path, input_dir=files.premasked, max_steps=2))
    assert len(losses(tmp_path)) == 2


def test_a_model_without_next_sentence_prediction(files, tmp_path):
    model = write_model(tmp_path / "model.json", next_sentence=False)
    for folder in (files.single, files.train):  # the labels of pairs are not used
        output = tmp_path / folder.name
        run(files.flags(output, input_dir=folder, model_config_file=model, max_steps=2))
        for row in metrics(output):
            assert float(row["nsp_loss"]) == 0 and float(row["step_loss"]) == float(row["mlm_loss"])
        assert not any("pooler" in n or "seq_relationship" in n for n in checkpoint(output, 2)["model"])


@torch.no_grad()
def test_heldout_loss_and_accuracy_are_those_of_the_saved_model(files, whole_run):
    """Computed here one sample at a time, over every position, from the last checkpoint."""
    model = build_pretraining_model(checkpoint(whole_run, 20))
    dataset = evaluation_dataset(
        ShardSet(files.heldout),
        local_batch_size=1,
        rank=0,
        world_size=1,
        seed=0,  # whatever the run's seed
        masked_token_fraction=0.2,
        max_predictions_per_seq=4,
        vocab_size=MODEL["vocab_size"],
        mask_token_id=4,
    )
    total, correct, count = 0.0, 0, 0
    for batch in step_loader(dataset):
        part = {name: tensor[0] for name, tensor in batch.items()}
        scores, _ = model(part["input_ids"], part["token_type_ids"], part["attention_mask"])
        for position, label in zip(
            part["masked_positions"][0].tolist(), part["masked_labels"][0].tolist(), strict=True
        ):
            if label >= 0:
                total -= scores[0, position].double().log_softmax(0)[label].item()
                correct += int(scores[0, position].argmax() == label)
                count += 1
    assert count > 11  # 11 samples
    row = metrics(whole_run)[-1]
    assert float(row["heldout_mlm_loss"]) == pytest.approx(total / count, rel=1e-5)
    assert float(row["heldout_mlm_accuracy"]) == correct / count


def test_dropout_depends_on_step_micro_step_and_rank(files, tmp_path):
    begun = assembled(files.flags(tmp_path, pruned_matrix="none", add_lora="False"))
    begun.engine.connect()
    begun.engine.step = lambda rate: None
    counts = Counts(masked_tokens=6, sentence_labels=3, tokens=0)

    def losses_of(step: int, rank: int, micro_step: int) -> tuple[float, float]:
        begun.world = dataclasses.replace(begun.world, rank=rank)
        rows = uneven_batch().items()
        batch = {name: tensor[:1].expand(micro_step + 1, *tensor.shape[1:]) for name, tensor in rows}
        return begun.losses_of(begun.give_step(step, batch, counts, rate=0.0))

    first = losses_of(step=1, rank=0, micro_step=0)
    assert losses_of(step=1, rank=0, micro_step=0) == first
    assert losses_of(step=2, rank=0, micro_step=0) != first
    assert losses_of(step=1, rank=1, micro_step=0) != first
    twice = losses_of(step=1, rank=0, micro_step=1)  # the same samples once more
    assert twice[0] != pytest.approx(2 * first[0], rel=1e-6)


@pytest.mark.parametrize("unpad", ["False", "True"])
@pytest.mark.parametrize(
    ("pruned_matrix", "next_sentence", "tokens"),
    [("static-weight", True, [3 * 5]), ("static-weight", False, [3 * 4]), ("dynamic-input", True, [])],
)
def test_products_are_tuned_for_the_tokens_of_the_last_block(
    files, tmp_path, monkeypatch, pruned_matrix, next_sentence, tokens, unpad
):
    """3 sequences, each with 4 tokens to predict and a first one; after those of batches with some padding.

    Without padding that is once for the fullest micro-batch and once for the least full one, the same here.
    """
    told = []
    monkeypatch.setattr("training.engine.select_backends", lambda *given: told.append(given[-1]))
    model = tmp_path / "model.json"
    model.write_text(json.dumps(json.loads(files.model.read_text()) | {"next_sentence": next_sentence}))
    flags = {"model_config_file": model, "pruned_matrix": pruned_matrix, "add_lora": "False", "unpad": unpad}
    assembled(files.flags(tmp_path / "out", **flags))
    (other_tokens,) = told
    assert other_tokens[5 if unpad == "True" else 0 :] == tokens * (2 if unpad == "True" else 1)


def test_the_heads_read_fewer_tokens_where_there_are_fewer():
    run = PretrainingRun.__new__(PretrainingRun)
    run.args = SimpleNamespace(
        local_batch_size=100, global_batch_size=64, max_predictions_per_seq=80, masked_token_fraction=0.15
    )
    run.world, run.config, run.sequence_length = (
        World(0, 1, 0, torch.device("cpu")),
        SimpleNamespace(next_sentence=True),
        512,
    )
    run.pack_multiple = None
    assert run.tokens_read() == [64 * 81]
    run.pack_multiple = 512
    assert run.tokens_read() == [4928 + 64, 2496 + 64]


def test_adapters_have_their_share_of_the_rate_whether_they_join_or_are_there(files, tmp_path):
    run = assembled(files.flags(tmp_path, lora_lr_scale=0.5))
    run.engine.join_adapters(run.args.lora_rank, run.args.seed)
    joined = run.engine
    run.build_engine(joined.model, run.sequence_length)
    for engine in (joined, run.engine):
        scales = {group["name"]: group["lr_scale"] for group in engine.optimizer.param_groups}
        assert scales == {"decay": 1.0, "no_decay": 1.0, "adapters": 0.5}


@pytest.mark.parametrize(("pruned_matrix", "whole"), [("static-weight", False), ("dynamic-output-grad", True)])
def test_an_ablation_that_prunes_by_what_other_tokens_hold_computes_the_whole_last_block(
    files, tmp_path, pruned_matrix, whole
):
    run = assembled(files.flags(tmp_path, pruned_matrix=pruned_matrix, add_lora="False"))
    assert run.engine.model.bert.encoder.whole_last_block == whole


# ------------------------------------------------------------------------------------------------------------ the loss
def test_the_gradient_is_that_of_the_global_means(files, tmp_path):
    """A batch of three micro-steps with 5, 1 and 0 masked tokens and 2, 1 and 0 sentence labels (design decision 7)."""
    flags = files.flags(tmp_path, model_config_file=files.model_without_dropout, pruned_matrix="none", add_lora="False")
    begun = assembled(flags)
    batch = uneven_batch()
    model = begun.engine.model
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    scores, sentence_scores = model(
        flat["input_ids"], flat["token_type_ids"], flat["attention_mask"], flat["masked_positions"]
    )
    mlm = torch.nn.functional.cross_entropy(scores.flatten(0, 1), flat["masked_labels"].flatten(), ignore_index=-1)
    nsp = torch.nn.functional.cross_entropy(sentence_scores, flat["next_sentence_labels"], ignore_index=-1)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(mlm + nsp, list(model.parameters())), strict=True)
    )

    taken = {}
    begun.engine.connect()
    begun.engine.step = lambda rate: taken.update({n: p.grad.clone() for n, p in model.named_parameters()})
    found = begun.losses_of(begun.give_step(1, batch, Counts(masked_tokens=6, sentence_labels=3, tokens=0), 0.0))
    assert found == pytest.approx((mlm.item(), nsp.item()), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(taken[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
