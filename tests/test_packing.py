"""Sequences that lie end to end, without padding, against the padded ones that they come from."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from pretraining_runs import LENGTH, NO_DROPOUT, VOCAB_SIZE, assembled, make_files, run, values, write_model
from shard_factory import write_shard

from configuration import BertConfig
from data.packing import (
    fill_multiple,
    fullest_micro_batch,
    micro_batches,
    pack_examples,
    pack_step,
    prediction_places,
    sequence_lengths,
)
from modeling import Packing
from training.distributed import World
from training.errors import UsageError
from training.execution import unpads
from training.pretraining import Counts, PretrainingRun
from training.sparsity import SparsityConfig

NO_ADAPTERS = {"pruned_matrix": "none", "add_lora": "False"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("data"))


def padded_step() -> dict[str, np.ndarray]:
    """K = 2 micro-steps of B = 3 sequences of at most S = 8 tokens; token i of the step has id i + 1."""
    lengths = np.array([[8, 3, 1], [5, 8, 7]])
    attended = (np.arange(8) < lengths[..., None]).astype(np.int64)
    ids = attended * (1 + np.arange(attended.size).reshape(attended.shape))
    return {
        "input_ids": ids,
        "token_type_ids": ids % 2,
        "attention_mask": attended,
        "masked_positions": np.array([[[1, 7], [2, 0], [0, 0]], [[4, 0], [3, 6], [0, 0]]]),
        "masked_labels": np.array([[[0, 6], [7, -1], [-1, -1]], [[8, -1], [9, 10], [-1, -1]]]),
        "next_sentence_labels": np.array([[0, 1, -1], [1, 1, 0]]),
    }


def packed_step(multiple: int, fraction: float = 0.15) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in pack_step(padded_step(), multiple, fraction).items()}


def test_every_token_keeps_its_neighbours_its_position_and_its_label():
    padded = padded_step()
    packed = packed_step(multiple=16)
    assert packed["tokens"].tolist() == [16, 32]
    assert torch.equal(sequence_lengths(packed), torch.from_numpy(padded["attention_mask"]).sum(-1))
    for k, part in enumerate(micro_batches(packed)):
        assert not {"tokens", "predictions"} & set(part), "sizes stay on the host, and a graph has none there"
        boundaries = part["boundaries"].tolist()
        assert (boundaries[0], boundaries[-1]) == (0, len(part["input_ids"]))
        for b in range(3):
            here, length = slice(*boundaries[b : b + 2]), int(padded["attention_mask"][k, b].sum())
            assert part["input_ids"][here].tolist() == padded["input_ids"][k, b, :length].tolist()
            assert part["token_type_ids"][here].tolist() == padded["token_type_ids"][k, b, :length].tolist()
            assert part["positions"][here].tolist() == list(range(length))
        labels = padded["masked_labels"][k]
        used, count = labels >= 0, int((labels >= 0).sum())
        flat = np.take_along_axis(padded["input_ids"][k], padded["masked_positions"][k], 1)
        assert part["input_ids"][part["masked_positions"]][:count].tolist() == flat[used].tolist()
        assert part["masked_labels"].tolist() == [*labels[used], *[-1] * (len(part["masked_labels"]) - count)]
        assert part["next_sentence_labels"].tolist() == padded["next_sentence_labels"][k].tolist()
        assert not part["input_ids"][boundaries[3] :].any()
        assert all(0 <= length <= 8 for length in torch.tensor(boundaries).diff().tolist()), "longer than any sequence"


def test_examples_are_packed_as_a_micro_step_is():
    step = pack_step(padded_step(), 16, 0.15)
    for k, end in enumerate(step["tokens"].cumsum()):
        examples = {name: array[k] for name, array in padded_step().items() if not name.startswith(("masked", "next"))}
        packed = pack_examples(examples | {"labels": np.arange(3)}, multiple=16)
        for name in ("input_ids", "token_type_ids", "positions"):
            assert packed[name].tolist() == step[name][end - step["tokens"][k] : end].tolist()
        assert packed["boundaries"].tolist() == step["boundaries"][k].tolist()
        assert packed["labels"].tolist() == [0, 1, 2]
        assert packed["attention_mask"].tolist() == examples["attention_mask"].tolist()


def test_predictions_are_filled_up_to_a_number_that_follows_from_the_tokens():
    """In all micro-steps of as many tokens, whatever is masked there, so that they share a CUDA graph."""
    assert [prediction_places(tokens, 0.15, 2560) for tokens in (128, 426, 427, 7680, 16384)] == [
        64,
        64,
        128,
        1152,
        2496,
    ]
    assert prediction_places(16384, 0.15, 2490) == 2490
    generator = np.random.default_rng(0)
    sequences, length, width = 32, 128, 20
    for _ in range(20):
        lengths = generator.integers(60, length + 1, (2, sequences))
        counts = np.minimum((0.15 * (lengths - 3)).astype(int), width)
        used = np.arange(width) < counts[..., None]
        padded = {
            "input_ids": np.ones((2, sequences, length), np.int64),
            "token_type_ids": np.zeros((2, sequences, length), np.int64),
            "attention_mask": (np.arange(length) < lengths[..., None]).astype(np.int64),
            "masked_positions": (1 + np.arange(width)) * used,
            "masked_labels": np.where(used, 7, -1),
            "next_sentence_labels": np.zeros((2, sequences), np.int64),
        }
        packed = pack_step(padded, 128, 0.15)
        expected = [prediction_places(tokens, 0.15, sequences * width) for tokens in packed["tokens"]]
        assert packed["predictions"].tolist() == expected
        assert len(packed["masked_positions"]) == len(packed["masked_labels"]) == sum(expected) < used.size


def test_more_predictions_than_their_share_have_the_padded_number_of_places():
    """As sequences of a few tokens have, and shards that were masked by another rule; of micro-step 1 alone here."""
    padded = padded_step()
    packed = pack_step(padded, 16, 0.15)
    assert packed["predictions"].tolist() == [6, 6]  # fewer than 64
    many = {name: np.tile(array, (1, 64, *[1] * (array.ndim - 2))) for name, array in padded.items()}
    many["masked_labels"][1] = 5
    packed = pack_step(many, 128, 0.15)
    assert packed["tokens"].tolist() == [768, 1280]
    assert packed["predictions"].tolist() == [384, 384]
    many["masked_labels"][0, 30:] = -1
    assert pack_step(many, 128, 0.15)["predictions"].tolist() == [128, 384]
    many["masked_labels"][0] = -1
    many["masked_labels"][0, :64] = 5
    assert pack_step(many, 128, 0.15)["predictions"].tolist() == [128, 384], "as many as there are places for"


def test_what_fills_up_predictions_stands_at_different_places():
    """On a GPU gradients of one place are added up one after the other."""
    many = {name: np.tile(array, (1, 64, *[1] * (array.ndim - 2))) for name, array in padded_step().items()}
    many["masked_labels"][:] = -1
    (part, _) = micro_batches({n: torch.from_numpy(array) for n, array in pack_step(many, 128, 0.15).items()})
    assert len(part["masked_positions"]) == 128 == len(part["masked_positions"].unique())


def test_more_places_for_predictions_than_there_are_tokens():
    padded = padded_step()
    wide = {"masked_positions": [(0, 0), (0, 0), (0, 6)], "masked_labels": [(0, 0), (0, 0), (0, 6)]}
    for name, widths in wide.items():
        padded[name] = np.pad(padded[name], widths, constant_values=-1 if name == "masked_labels" else 0)
    packed = {name: torch.from_numpy(array) for name, array in pack_step(padded, 16, 0.15).items()}
    for part, tokens in zip(micro_batches(packed), (16, 32), strict=True):
        assert len(part["masked_positions"]) == 24
        assert part["masked_positions"].max() < tokens
    full = fullest_micro_batch(part, 8, 16, masked_token_fraction=1.0, max_predictions_per_seq=20)
    assert len(full["masked_positions"]) == 60 and full["masked_positions"].max() < 32


def test_the_fullest_micro_batch_has_the_form_of_all_others_and_no_padding():
    part = next(micro_batches(packed_step(multiple=16)))
    full = fullest_micro_batch(part, 8, 16, masked_token_fraction=0.15, max_predictions_per_seq=2)
    assert list(full) == list(part)
    assert len(full["input_ids"]) == len(full["positions"]) == 32  # 3 sequences of 8, filled up
    assert full["boundaries"].tolist() == [0, 8, 16, 24, 32, 32]
    assert len(full["masked_positions"]) == len(full["masked_labels"]) == 6
    assert len(full["masked_positions"].unique()) == 6
    wide = fullest_micro_batch(part, 8, 16, masked_token_fraction=0.15, max_predictions_per_seq=80)
    assert len(wide["masked_positions"]) == 64, "as any other micro-batch of as many tokens has, not 240"
    assert full["next_sentence_labels"].shape == part["next_sentence_labels"].shape
    assert all(full[name].dtype == part[name].dtype for name in part)


def test_padded_micro_batches_are_views_of_the_step():
    batch = {name: torch.from_numpy(array) for name, array in padded_step().items()}
    parts = list(micro_batches(batch))
    assert len(parts) == 2
    for k, part in enumerate(parts):
        assert all(torch.equal(part[name], tensor[k]) for name, tensor in batch.items())


@pytest.mark.parametrize(
    ("batch", "length", "multiple"), [(8, 64, 128), (64, 128, 128), (65, 128, 256), (256, 512, 2048), (1, 8, 128)]
)
def test_micro_batches_of_one_size_come_in_at_most_64_shapes(batch, length, multiple):
    assert fill_multiple(batch, length) == multiple
    assert -(-batch * length // multiple) <= 64


def test_fewer_shapes_are_larger_steps():
    assert (fill_multiple(256, 128), fill_multiple(256, 128, shapes=16)) == (512, 2048)


def test_scores_are_put_back_into_rows():
    """The last row would reach behind all tokens."""
    boundaries = torch.tensor([0, 50, 98, 120, 128])
    packing = Packing(boundaries.int(), boundaries[:3], torch.zeros(128, dtype=torch.int64), longest=64)
    scores = torch.stack([torch.arange(128.0), -torch.arange(128.0)], -1)
    padded = packing.padded(scores)
    assert padded.shape == (3, 64, 2)
    for row, (begin, end) in zip(padded, boundaries.unfold(0, 2, 1)[:3].tolist(), strict=True):
        assert torch.equal(row[: end - begin], scores[begin:end])


def keep_gradients(model, taken: dict, rate: float) -> None:
    """In place of the optimizer's step."""
    taken.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


MANY = {"global_batch_size": 70, "local_batch_size": 40}  # so that predictions have fewer places than if padded


@pytest.mark.parametrize("next_sentence", [True, False])
@pytest.mark.parametrize(
    ("shards", "flags", "fewer"),
    [
        ("train", {}, False),
        ("train", MANY, True),
        ("train", MANY | {"max_predictions_per_seq": 2 * LENGTH}, True),
        ("premasked", MANY, True),
        ("train", {"global_batch_size": 2}, False),
    ],
)
def test_losses_and_gradients_are_those_of_the_padded_path(files, tmp_path, shards, flags, fewer, next_sentence):
    """A trained step's data, no dropout, fp64 so that nothing but the order of additions may differ."""
    results, model = [], write_model(tmp_path / "model.json", **NO_DROPOUT, next_sentence=next_sentence)
    common = {"model_config_file": model, "input_dir": getattr(files, shards), **NO_ADAPTERS, **flags}
    for unpad in ("False", "True"):
        begun = assembled(files.flags(tmp_path, **common, unpad=unpad))
        begun.engine.connect()
        begun.engine.model.double()
        taken, step = {}, begun.dataset[0]
        begun.engine.step = functools.partial(keep_gradients, begun.engine.model, taken)
        assert ("boundaries" in step) == (unpad == "True")

        class Once:
            wait_seconds = 0.0

            def __next__(self, batch=step):
                return batch

        class Never:
            received = None

        batch, counts = begun.next_batch(Once(), Never())
        losses = begun.losses_of(begun.give_step(1, batch, counts, 0.0))
        results.append((counts, losses, taken, batch["masked_labels"].numel()))
    (padded_counts, padded, padded_gradients, places), (counts, packed, gradients, packed_places) = results
    assert counts == padded_counts
    assert (packed_places < places) == fewer
    assert packed == pytest.approx(padded, rel=1e-6)
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_a_whole_run_without_padding_learns_the_same(files, tmp_path):
    """SLoPe, the adapters' switch and the held-out evaluation included."""
    for unpad in ("False", "True"):
        model = files.model_without_dropout
        run(files.flags(tmp_path / unpad, model_config_file=model, unpad=unpad, eval_dir=files.heldout))
    for column in ("step_loss", "heldout_mlm_loss", "heldout_mlm_accuracy", "tokens_per_second"):
        padded, packed = (values(tmp_path / unpad, column) for unpad in ("False", "True"))
        assert len(packed) == len(padded) > 0
        if column != "tokens_per_second":
            assert packed == pytest.approx(padded, rel=1e-3), column


def test_two_ranks_without_padding_train_as_one_with_it(files, tmp_path):
    """Each has as many tokens and predictions as its own sequences."""
    common = {"model_config_file": files.model_without_dropout, "global_batch_size": 70, "max_steps": 3}
    run(files.flags(tmp_path / "one", **common, local_batch_size=40, unpad="False"))
    run(files.flags(tmp_path / "two", **common, local_batch_size=20, unpad="True"), ranks=2)
    for column in ("mlm_loss", "nsp_loss"):
        one, two = (values(tmp_path / name, column) for name in ("one", "two"))
        assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_scores_are_those_of_the_padded_path_whatever_the_last_block_computes(files, tmp_path, whole):
    begun = assembled(files.flags(tmp_path, unpad="True", **NO_ADAPTERS))
    model = begun.engine.model.eval()
    model.bert.encoder.whole_last_block = whole
    padded = next(micro_batches({name: torch.from_numpy(array) for name, array in padded_step().items()}))
    packed = next(micro_batches(packed_step(multiple=16)))
    expected, scores = (begun.forward(model, part, LENGTH)[2] for part in (padded, packed))
    used = padded["masked_labels"] >= 0
    torch.testing.assert_close(scores[: used.sum()], expected[used])


def test_longer_sequences_to_evaluate_on_count_too(files, tmp_path):
    """What attends is told the longest of what it reads; graphs are captured for those that are trained on."""
    write_shard(tmp_path / "short/shard_0.hdf5", count=20, length=LENGTH - 4, vocab_size=VOCAB_SIZE)
    flags = files.flags(tmp_path, input_dir=tmp_path / "short", eval_dir=files.heldout, unpad="True", **NO_ADAPTERS)
    begun = assembled(flags)
    assert (begun.sequence_length, begun.longest) == (LENGTH - 4, LENGTH)
    told, forward = [], begun.forward
    begun.forward = lambda model, part, longest: (told.append(longest), forward(model, part, longest))[1]
    begun.engine.connect()
    largest = []
    begun.engine.prepare = lambda make, count: largest.append(make())
    begun.give_step(1, begun.dataset[0], Counts(1.0, 1.0, 1.0), 0.0)
    assert largest[0]["boundaries"][:4].tolist() == [0, LENGTH - 4, 2 * (LENGTH - 4), 3 * (LENGTH - 4)]
    assert math.isfinite(begun.evaluate()["heldout_mlm_loss"])
    assert told[0] == LENGTH - 4 and told[-1] == LENGTH and len(set(told)) == 2


def test_sizes_of_micro_batches_stay_on_the_host():
    run = PretrainingRun.__new__(PretrainingRun)
    run.world = World(0, 1, 0, torch.device("meta"))
    elsewhere = {name for name, tensor in run.on_device(packed_step(multiple=16)).items() if tensor.is_meta}
    assert set(packed_step(multiple=16)) - elsewhere == {"tokens", "predictions"}


def test_dropout_and_a_resume_without_padding(files, tmp_path):
    """The position in the data and dropout are functions of the step, as with padding."""
    flags = {"unpad": "True", "num_steps_per_checkpoint": 5}
    run(files.flags(tmp_path / "whole", **flags))
    run(files.flags(tmp_path / "parts", **flags | {"max_steps": 20}))
    assert values(tmp_path / "whole", "step_loss") == values(tmp_path / "parts", "step_loss")


@pytest.fixture
def on_gpu(files, tmp_path, monkeypatch):
    """What `unpads` says of a GPU, by its compute capability, and of flags."""
    flags = assembled(files.flags(tmp_path, **NO_ADAPTERS)).args
    config = BertConfig(**json.loads(files.model.read_text()))

    def ask(unpad: str, precision: str = "bf16", pruned_matrix: str = "none", capability=(9, 0)) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        flags.unpad, flags.precision = unpad, precision
        return unpads(flags, config, SparsityConfig(pruned_matrix), World(0, 1, 0, torch.device("cuda", 0)))

    return ask


def test_unpad_is_for_16_bits_on_gpus_that_have_flash_attention(on_gpu):
    assert on_gpu("auto") and on_gpu("auto", "fp16")
    assert not on_gpu("auto", "fp32") and not on_gpu("auto", capability=(7, 5)) and not on_gpu("False")
    with pytest.raises(UsageError, match="--unpad True.*--precision fp32"):
        on_gpu("True", "fp32")
    with pytest.raises(UsageError, match="compute capability below 8.0"):
        on_gpu("True", capability=(7, 5))


def test_padding_stays_where_an_ablation_would_prune_other_tokens_without(on_gpu):
    """It goes by what the model is pruned by, in any spelling, not by the flag, which a resume may leave out."""
    assert on_gpu("auto", pruned_matrix="static-weight") and on_gpu("auto", pruned_matrix="weight-static")
    assert not on_gpu("auto", pruned_matrix="dynamic-input")
    assert on_gpu("True", pruned_matrix="dynamic-input")
