"""HDF5 shards to optimizer steps: bad folders and files, the order of samples, padding, resuming, both layouts."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from shard_factory import CLS, MASK, PAD, SEP, describe, write_arrays, write_premasked_shard, write_shard

from data.shards import SampleOrder, ShardSet, StepDataset, evaluation_dataset, resolve_mask_token_id
from training.errors import UsageError

VOCAB, LENGTH, PREDICTIONS = 50, 16, 4
OPTIONS = {
    "global_batch_size": 10,
    "local_batch_size": 4,
    "rank": 0,
    "world_size": 1,
    "seed": 42,
    "masked_token_fraction": 0.2,
    "max_predictions_per_seq": PREDICTIONS,
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "steps": 6,
}


@pytest.fixture
def folder(tmp_path):
    """Three unmasked shards of 7, 5 and 9 samples."""
    for number, count in enumerate((7, 5, 9)):
        write_shard(tmp_path / "train" / f"shard_{number:05d}.hdf5", count=count, seed=number)
    return tmp_path / "train"


def stacked(folder, name):
    """The rows of all shards of `folder`, in the order of their files."""
    arrays = []
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            arrays.append(file[name][()])
    return np.concatenate(arrays)


def restored(batch):
    """The original tokens [rows, S] of a batch: the labels put back."""
    ids = batch["input_ids"].flatten(0, 1).clone()
    row, slot = (batch["masked_labels"].flatten(0, 1) >= 0).nonzero(as_tuple=True)
    ids[row, batch["masked_positions"].flatten(0, 1)[row, slot]] = batch["masked_labels"].flatten(0, 1)[row, slot]
    return ids


def is_padding(batch):
    """Rows [K, B] that hold no sample."""
    return batch["attention_mask"].sum(-1) == 1


def global_rows(shards, world_size, step, **changes):
    """One step's rows of all ranks in global order, padding left out: a dict of [G, ...] tensors."""
    ranks = [
        StepDataset(shards, **OPTIONS | changes | {"rank": r, "world_size": world_size}) for r in range(world_size)
    ]
    batches = [dataset[step] for dataset in ranks]
    rows = {name: torch.stack([batch[name] for batch in batches], dim=1).flatten(0, 2) for name in batches[0]}
    real = rows["attention_mask"].sum(-1) > 1
    return {name: tensor[real] for name, tensor in rows.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_describes_a_folder(folder):
    shards = ShardSet(folder)
    assert [path.name for path in shards.files] == [f"shard_{number:05d}.hdf5" for number in range(3)]
    assert shards.counts.tolist() == [7, 5, 9] and shards.offsets.tolist() == [0, 7, 12] and shards.total == 21
    assert (shards.layout, shards.sequence_length, shards.has_next_sentence) == ("unmasked", LENGTH, True)
    assert (shards.vocab_size, shards.mask_token_id) == (VOCAB, MASK)
    assert shards.max_token_id == stacked(folder, "input_ids").max()


def test_foreign_shards_need_no_attributes(tmp_path):
    write_shard(tmp_path / "deep" / "er" / "a.h5", attributes=False)
    shards = ShardSet(tmp_path)
    assert (shards.vocab_size, shards.mask_token_id, shards.max_token_id) == (None, None, None)
    assert shards.total == 8


# --- what wrong input gets


def changed(path, **changes):
    """Write a shard with arrays replaced (None: left out), and no attributes."""
    arrays = write_shard(path, attributes=False) | changes
    write_arrays(path, {name: array for name, array in arrays.items() if array is not None}, {})


def two_files(path, make_second):
    write_shard(path, seed=1)
    make_second(path.with_name("shard_00001.hdf5"))


def with_attribute(path, **attributes):
    arrays = write_shard(path)
    write_arrays(path, arrays, describe(arrays["input_ids"], VOCAB, "unmasked") | attributes)


ROWS = np.arange(8)[:, None]
BAD_FILES = {
    "not HDF5": (lambda path: path.write_bytes(b"plain text, not HDF5" * 99), "no readable HDF5 file"),
    "truncated": (
        lambda path: (write_shard(path, count=500), path.write_bytes(path.read_bytes()[:-5000])),
        "no readable HDF5 file",
    ),
    "empty file": (lambda path: path.write_bytes(b""), "no readable HDF5 file"),
    "foreign keys": (lambda path: write_arrays(path, {"images": ROWS}, {}), "has images"),
    "no labels": (lambda path: changed(path, next_sentence_labels=None), "next_sentence_labels"),
    "no input": (lambda path: changed(path, input_ids=None), "input_ids"),
    "fewer labels": (lambda path: changed(path, next_sentence_labels=np.zeros(7, int)), "next_sentence_labels has 7"),
    "flat input": (lambda path: changed(path, input_ids=np.zeros(8, int)), "input_ids must have 2 dimensions"),
    "scalar input": (lambda path: changed(path, input_ids=np.int64(3)), "input_ids must have 2 dimensions"),
    "four special tokens": (
        lambda path: changed(path, special_token_positions=ROWS + np.arange(4)),
        "special_token_positions must be [N, 3] or [N, 2]",
    ),
    "floats": (lambda path: changed(path, input_ids=np.zeros((8, 16))), "integer array input_ids"),
    "no samples": (
        lambda path: changed(
            path,
            input_ids=np.zeros((0, 16), int),
            special_token_positions=np.zeros((0, 3), int),
            next_sentence_labels=np.zeros(0, int),
        ),
        "no samples",
    ),
    "a hash that is a number": (lambda path: with_attribute(path, vocabulary_sha256=5), "must be text, is 5"),
    "vocabularies of one size": (
        lambda path: (
            with_attribute(path, vocabulary_sha256="a"),
            with_attribute(path.with_name("shard_00001.hdf5"), vocabulary_sha256="b"),
        ),
        "has vocabulary_sha256 a but",
    ),
    "mixed lengths": (lambda path: two_files(path, lambda other: write_shard(other, length=20)), "sequence_length 16"),
    "mixed layouts": (lambda path: two_files(path, write_premasked_shard), "layout unmasked"),
    "mixed pairs": (
        lambda path: two_files(path, lambda other: write_shard(other, next_sentence=False)),
        "has_next_sentence True",
    ),
    "mixed vocabularies": (
        lambda path: two_files(path, lambda other: write_shard(other, vocab_size=60)),
        "vocab_size 50",
    ),
    "newer format": (lambda path: with_attribute(path, format_version=2), "format_version 2"),
    "false count": (lambda path: with_attribute(path, num_samples=9), "num_samples says 9"),
    "attribute of the wrong type": (lambda path: with_attribute(path, vocab_size="many"), "vocab_size must be"),
}


def usage_line(error):
    """The message of a UsageError, which must be one line."""
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    make, says = BAD_FILES[name]
    make(tmp_path / "shard_00000.hdf5")
    with pytest.raises(UsageError) as error:
        ShardSet(tmp_path, flag="--eval_dir")
    line = usage_line(error)
    assert "--eval_dir" in line and "shard_00000.hdf5" in line and says in line


def test_a_premasked_file_without_masks_or_with_other_shapes_is_named(tmp_path):
    path = tmp_path / "shard.hdf5"
    arrays = write_premasked_shard(path)
    for changes, says in (
        ({"input_mask": None}, "input_mask"),
        ({"segment_ids": np.zeros((8, 3), int)}, "segment_ids"),
        ({"masked_lm_ids": np.zeros((8, 2), int)}, "masked_lm_ids"),
    ):
        kept = {name: array for name, array in (arrays | changes).items() if array is not None}
        write_arrays(path, kept, {})
        with pytest.raises(UsageError, match=says) as error:
            ShardSet(tmp_path)
        assert str(path) in usage_line(error)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "deeper" / "notes.txt").write_text("no shard")
    for name in ("missing", "empty"):
        with pytest.raises(UsageError, match="--input_dir") as error:
            ShardSet(tmp_path / name)
        assert str(tmp_path / name) in usage_line(error)


def test_held_out_shards_are_never_read_together_with_the_others(folder):
    write_shard(folder.parent / "heldout" / "shard_00000.hdf5")
    with pytest.raises(UsageError, match="held-out"):
        ShardSet(folder.parent)
    assert ShardSet(folder.parent / "heldout").total == 8


def test_check_accepts_what_fits(folder):
    ShardSet(folder).check(VOCAB, LENGTH, 1)


@pytest.mark.parametrize("attributes", [True, False])
def test_check_refuses_ids_beyond_the_vocabulary(tmp_path, attributes):
    arrays = write_shard(tmp_path / "shard.hdf5", attributes=attributes)
    largest = int(arrays["input_ids"].max())
    with pytest.raises(UsageError) as error:
        ShardSet(tmp_path).check(largest, LENGTH, 4)
    line = usage_line(error)
    assert "shard.hdf5" in line and str(largest) in line and f"vocabulary of {largest}" in line


def test_check_believes_the_attributes_of_every_file(folder):
    for name, value in (("max_token_id", VOCAB), ("vocab_size", VOCAB + 1)):
        path = folder / "shard_00001.hdf5"
        arrays = write_shard(path, count=5)
        for other in folder.glob("*.hdf5"):
            with h5py.File(other, "a") as file:
                file.attrs["vocab_size"] = VOCAB
        write_arrays(path, arrays, {name: value} if name == "max_token_id" else {})
        if name == "vocab_size":
            for other in folder.glob("*.hdf5"):
                with h5py.File(other, "a") as file:
                    file.attrs["vocab_size"] = value
        with pytest.raises(UsageError, match=f"{name} {value}, beyond the model's vocabulary of {VOCAB}"):
            ShardSet(folder).check(VOCAB, LENGTH, 4)


def test_check_refuses_long_sequences_and_many_predictions(tmp_path):
    write_premasked_shard(tmp_path / "shard.hdf5", predictions=5)
    shards = ShardSet(tmp_path)
    shards.check(VOCAB, LENGTH, 5)
    with pytest.raises(UsageError, match="max_position_embeddings 15"):
        shards.check(VOCAB, 15, 5)
    with pytest.raises(UsageError, match="--max_predictions_per_seq 4 is below the 5"):
        shards.check(VOCAB, LENGTH, 4)


def spoiled(arrays, name, index, value):
    """`arrays` with one element replaced."""
    array = arrays[name].astype(np.int64)
    array[index] = value
    return arrays | {name: array}


@pytest.mark.parametrize(
    ("name", "index", "value", "says"),
    [
        ("input_ids", (3, 5), VOCAB, f"token id {VOCAB}, outside the model's vocabulary of {VOCAB}"),
        ("input_ids", (3, 5), -1, "token id -1"),
        ("special_token_positions", (2, 2), LENGTH, f"special_token_positions runs from 0 to {LENGTH}"),
        ("special_token_positions", (2, 1), 0, "must increase"),
        ("next_sentence_labels", 4, 2, "next_sentence_labels runs from 0 to 2"),
        ("next_sentence_labels", 4, -1, "next_sentence_labels runs from -1"),
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_contents_are_checked_as_they_are_loaded(tmp_path, name, index, value, says, where):
    for number in range(2):
        path = tmp_path / f"shard_{number}.hdf5"
        arrays = write_shard(path, seed=number, attributes=False)
        if number == where:
            write_arrays(path, spoiled(arrays, name, index, value), {})
    shards = ShardSet(tmp_path)
    with pytest.raises(UsageError) as error:
        shards.check(VOCAB, LENGTH, 4) if where == 0 else StepDataset(shards, **OPTIONS | {"global_batch_size": 16})[0]
    line = usage_line(error)
    assert says in line and f"shard_{where}.hdf5" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("masked_lm_ids", VOCAB), ("masked_lm_positions", LENGTH), ("input_mask", 2), ("segment_ids", 2)],
)
def test_premasked_contents_are_checked(tmp_path, name, value):
    path = tmp_path / "shard.hdf5"
    arrays = write_premasked_shard(path)
    write_arrays(path, spoiled(arrays, name, (1, 1), value), {})
    with pytest.raises(UsageError, match=f"{value}"):
        ShardSet(tmp_path).load(0, VOCAB)


def test_a_damaged_block_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "shard.hdf5"
    arrays = write_shard(path)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=array.shape, compression="gzip", fletcher32=True)
        offset = file["input_ids"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 20 : offset + 40] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read .*shard.hdf5"):
        ShardSet(tmp_path).check(VOCAB, LENGTH, 4)


def test_a_mask_token_beyond_the_vocabulary_is_refused(folder):
    for mask_token_id in (None, -1, VOCAB):
        with pytest.raises(UsageError, match=r"\[MASK\]"):
            StepDataset(ShardSet(folder), **OPTIONS | {"mask_token_id": mask_token_id})


# --- the batches


def test_a_batch_holds_the_shards_samples(folder):
    batch = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 21, "local_batch_size": 7})[0]
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (3, 7, LENGTH),
        "token_type_ids": (3, 7, LENGTH),
        "attention_mask": (3, 7, LENGTH),
        "masked_positions": (3, 7, PREDICTIONS),
        "masked_labels": (3, 7, PREDICTIONS),
        "next_sentence_labels": (3, 7),
    }
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())
    ids, special, labels = (
        stacked(folder, name) for name in ("input_ids", "special_token_positions", "next_sentence_labels")
    )
    seen = set()
    for row, tokens in enumerate(restored(batch).numpy()):
        (sample,) = np.flatnonzero((ids == tokens).all(axis=1))
        seen.add(int(sample))
        _, middle, last = special[sample]
        position = np.arange(LENGTH)
        micro_step, slot = divmod(row, 7)
        np.testing.assert_array_equal(batch["attention_mask"][micro_step, slot], position <= last)
        np.testing.assert_array_equal(
            batch["token_type_ids"][micro_step, slot], (position > middle) & (position <= last)
        )
        assert batch["next_sentence_labels"][micro_step, slot] == labels[sample]
    assert seen == set(range(21))


def test_special_tokens_and_padding_are_never_masked(folder):
    dataset = StepDataset(
        ShardSet(folder), **OPTIONS | {"masked_token_fraction": 1.0, "max_predictions_per_seq": LENGTH}
    )
    for step in range(6):
        labels = dataset[step]["masked_labels"]
        assert not np.isin(labels, [CLS, SEP, PAD]).any()
        # With every token chosen, each sample gives up all but its three special ones.
        real = ~is_padding(dataset[step])
        assert torch.equal((labels >= 0).sum(-1)[real], dataset[step]["attention_mask"].sum(-1)[real] - 3)


def test_each_epoch_holds_every_sample_once_in_another_order(folder):
    dataset = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 7, "local_batch_size": 7, "steps": 9})
    ids = stacked(folder, "input_ids")
    epochs = []
    for epoch in range(3):
        tokens = np.concatenate([restored(dataset[step]).numpy() for step in range(3 * epoch, 3 * epoch + 3)])
        epochs.append([int(np.flatnonzero((ids == row).all(axis=1))[0]) for row in tokens])
        assert sorted(epochs[-1]) == list(range(21))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Shard by shard, so that two in memory are enough.
    of_shard = np.searchsorted([7, 12], epochs[0], side="right")
    assert np.count_nonzero(np.diff(of_shard)) == 2
    assert any(np.diff(epochs[0])[np.diff(of_shard) == 0] < 0), "shuffled within a shard"
    other_seed = StepDataset(ShardSet(folder), **OPTIONS | {"seed": 43})
    assert not torch.equal(restored(other_seed[0]), restored(StepDataset(ShardSet(folder), **OPTIONS)[0]))


@pytest.mark.parametrize("counts", [[40], [1] * 40])
def test_rows_and_shards_are_ordered_by_seed_and_epoch(counts):
    """One shard of many samples, and many shards of one: either level is shuffled by itself."""

    def order(seed, epoch):
        chosen, ids = [], []
        located = SampleOrder(np.array(counts), seed, shuffle=True).locate(40 * epoch + np.arange(40))
        for of_epoch, shard, places, rows in located:
            assert of_epoch == epoch
            chosen.extend(places)
            ids.extend(rows if len(counts) == 1 else [shard])
        assert sorted(ids) == sorted(chosen) == list(range(40))
        return tuple(np.array(ids)[np.argsort(chosen)].tolist())

    orders = {order(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 6 and tuple(range(40)) not in orders
    assert order(1, 2) == order(1, 2)


def test_shards_of_one_size_have_orders_and_masks_of_their_own(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"shard_{number}.hdf5", count=16, seed=0)
    options = OPTIONS | {"global_batch_size": 16, "local_batch_size": 16}
    shuffled = StepDataset(ShardSet(tmp_path), **options)
    assert not torch.equal(restored(shuffled[0]), restored(shuffled[1]))
    in_order = StepDataset(ShardSet(tmp_path), **options | {"shuffle": False})
    assert torch.equal(restored(in_order[0]), restored(in_order[1]))
    assert not torch.equal(in_order[0]["masked_positions"], in_order[1]["masked_positions"])


def test_a_sample_gets_other_masks_in_the_next_epoch(folder):
    dataset = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 21, "local_batch_size": 21})
    first, second = dataset[0], dataset[1]
    matched = (restored(first)[:, None] == restored(second)[None]).all(-1).nonzero()[:, 1]
    again = second["masked_positions"][0, matched]
    same = (first["masked_positions"][0] == again).all(-1)
    assert same.float().mean() < 0.7
    # One-step datasets that start in the two epochs agree with the long one.
    restart = StepDataset(
        ShardSet(folder), **OPTIONS | {"global_batch_size": 21, "local_batch_size": 21, "start_sample": 21}
    )
    assert_same(restart[0], second)


@pytest.mark.parametrize("global_batch_size", [10, 24, 50])
def test_the_rows_of_all_ranks_are_the_same_for_any_number_of_ranks(folder, global_batch_size):
    shards = ShardSet(folder)
    for step in (0, 3):
        alone = global_rows(shards, 1, step, global_batch_size=global_batch_size)
        assert len(alone["input_ids"]) == global_batch_size
        for world_size in (2, 3):
            assert_same(global_rows(shards, world_size, step, global_batch_size=global_batch_size), alone)
        assert_same(global_rows(shards, 1, step, global_batch_size=global_batch_size, local_batch_size=3), alone)


def test_rows_beyond_the_global_batch_are_padding(folder):
    # 10 rows over 3 ranks x 4 slots: the last rank has two of its four rows.
    batch = StepDataset(ShardSet(folder), **OPTIONS | {"rank": 2, "world_size": 3})[0]
    assert batch["input_ids"].shape[:2] == (1, 4)
    assert is_padding(batch).tolist() == [[False, False, True, True]]
    padding = {name: tensor[0, 2:] for name, tensor in batch.items()}
    assert (padding["attention_mask"][:, 0] == 1).all() and (padding["attention_mask"][:, 1:] == 0).all()
    assert (padding["masked_labels"] == -1).all() and (padding["next_sentence_labels"] == -1).all()
    assert (padding["input_ids"] == PAD).all() and (padding["masked_positions"] == 0).all()


def test_a_resumed_run_goes_on_with_the_same_batches_on_any_number_of_ranks(folder):
    shards = ShardSet(folder)
    for done in (1, 3):
        for world_size in (1, 2):
            for step in range(2):
                resumed = global_rows(shards, world_size, step, start_sample=10 * done)
                assert_same(resumed, global_rows(shards, 1, done + step))


def test_steps_are_pure_functions(folder):
    one, other = StepDataset(ShardSet(folder), **OPTIONS), StepDataset(ShardSet(folder), **OPTIONS)
    for step in (4, 0, 2, 4):
        assert_same(one[step], one[step])
    assert_same(one[5], other[5])
    assert len(one) == 6
    with pytest.raises(IndexError):
        one[6]


def test_masks_stay_the_same_whatever_the_batch(folder):
    """A sample's masks depend on the epoch and the sample, not on how the steps are cut."""
    wide = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 20, "local_batch_size": 20})[0]
    narrow = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 5, "local_batch_size": 5})
    for name in wide:
        assert torch.equal(torch.cat([narrow[step][name][0] for step in range(4)]), wide[name][0])


def test_two_shards_at_most_are_in_memory_and_each_is_read_once_an_epoch(folder, monkeypatch):
    dataset = StepDataset(ShardSet(folder), **OPTIONS | {"global_batch_size": 3, "local_batch_size": 3, "steps": 7})
    loads = []
    load = ShardSet.load
    monkeypatch.setattr(ShardSet, "load", lambda self, index, size: loads.append(index) or load(self, index, size))
    for step in range(7):
        dataset[step]
        assert len(dataset._loaded.values) <= 2
    assert sorted(loads) == [0, 1, 2]


def test_many_rows_are_masked_like_few(tmp_path, monkeypatch):
    write_shard(tmp_path / "shard.hdf5", count=40)
    options = OPTIONS | {"global_batch_size": 40, "local_batch_size": 20}
    whole = StepDataset(ShardSet(tmp_path), **options)[0]
    monkeypatch.setattr("data.shards._TOKENS_AT_ONCE", 7 * LENGTH)
    assert_same(StepDataset(ShardSet(tmp_path), **options)[0], whole)


def test_single_sequences_have_no_second_segment_and_no_label(tmp_path):
    write_shard(tmp_path / "shard.hdf5", next_sentence=False)
    shards = ShardSet(tmp_path)
    assert not shards.has_next_sentence
    batch = StepDataset(shards, **OPTIONS)[0]
    assert (batch["next_sentence_labels"] == -1).all() and (batch["token_type_ids"] == 0).all()
    assert (batch["masked_labels"] >= 0).any() and not np.isin(batch["masked_labels"], [CLS, SEP, PAD]).any()
    assert {tuple(row) for row in restored(batch)[:8].tolist()} == {
        tuple(row) for row in stacked(tmp_path, "input_ids").tolist()
    }


def test_premasked_padding_stands_at_the_end_and_holds_no_prediction(tmp_path):
    """Else it could not be taken out."""
    path = tmp_path / "shard.hdf5"
    arrays = write_premasked_shard(path)
    gap, empty, short = (arrays["input_mask"].copy() for _ in range(3))
    gap[1, 3], empty[2], short[0, 1:] = 0, 0, 0
    for mask, words in ((gap, "ones and then zeros"), (empty, "ones and then zeros"), (short, "before the padding")):
        write_arrays(path, arrays | {"input_mask": mask}, {})
        with pytest.raises(UsageError, match=words):
            ShardSet(tmp_path).load(0, 50)
    padded = arrays["input_mask"].copy()
    padded[:, -1] = 0
    write_arrays(path, arrays | {"input_mask": padded}, {})
    assert ShardSet(tmp_path).load(0, 50)["input_mask"].sum() == padded.sum()


def test_premasked_samples_pass_through(tmp_path):
    arrays = write_premasked_shard(tmp_path / "shard.hdf5", count=6, predictions=3)
    shards = ShardSet(tmp_path)
    assert (shards.layout, shards.predictions) == ("premasked", 3)
    options = OPTIONS | {"global_batch_size": 6, "local_batch_size": 8, "mask_token_id": None, "shuffle": False}
    batch = {name: tensor[0].numpy() for name, tensor in StepDataset(shards, **options | {"steps": 1})[0].items()}
    for name, stored in (
        ("input_ids", "input_ids"),
        ("attention_mask", "input_mask"),
        ("token_type_ids", "segment_ids"),
    ):
        np.testing.assert_array_equal(batch[name][:6], arrays[stored])
    np.testing.assert_array_equal(batch["next_sentence_labels"], [*arrays["next_sentence_labels"], -1, -1])
    used = arrays["masked_lm_positions"] > 0
    np.testing.assert_array_equal(batch["masked_positions"][:6, :3], arrays["masked_lm_positions"])
    np.testing.assert_array_equal(batch["masked_labels"][:6, :3], np.where(used, arrays["masked_lm_ids"], -1))
    # The fourth prediction that the batch has room for, and the two rows beyond the global batch.
    assert (batch["masked_labels"][:, 3] == -1).all() and (batch["masked_positions"][:, 3] == 0).all()
    assert (batch["masked_labels"][6:] == -1).all() and batch["attention_mask"][6:].sum() == 2


def test_premasked_samples_without_labels(tmp_path):
    write_premasked_shard(tmp_path / "shard.hdf5", next_sentence=False, attributes=False)
    batch = StepDataset(ShardSet(tmp_path), **OPTIONS)[0]
    assert (batch["next_sentence_labels"] == -1).all() and (batch["masked_labels"] >= 0).any()


# --- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_samples", [None, 13, 99])
def test_evaluation_sees_each_sample_once_with_fixed_masks(folder, world_size, max_samples):
    shards = ShardSet(folder)
    names = ("seed", "masked_token_fraction", "max_predictions_per_seq", "vocab_size", "mask_token_id")
    options = {name: OPTIONS[name] for name in names} | {"local_batch_size": 4, "max_samples": max_samples}
    count = min(21, max_samples or 21)
    ranks = [evaluation_dataset(shards, rank=r, world_size=world_size, **options) for r in range(world_size)]
    assert {len(dataset) for dataset in ranks} == {-(-count // (4 * world_size))}
    batches = [dataset[step] for step in range(len(ranks[0])) for dataset in ranks]
    real = torch.cat([~is_padding(batch).flatten() for batch in batches])
    tokens = torch.cat([restored(batch) for batch in batches])[real]
    np.testing.assert_array_equal(tokens, stacked(folder, "input_ids")[:count])
    labels = torch.cat([batch["masked_labels"].flatten(0, 1) for batch in batches])
    assert (labels[~real] == -1).all()
    alone = evaluation_dataset(shards, rank=0, world_size=1, **options)
    again = torch.cat([alone[step]["masked_labels"].flatten(0, 1) for step in range(len(alone))])
    assert torch.equal(labels[real], again[: len(labels[real])])


# --- the id of [MASK]


def vocabulary(path, *tokens):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(tokens) + "\n")
    return path


def test_mask_token_id_comes_from_the_model_then_the_shards_then_the_folder(tmp_path):
    folder = tmp_path / "a" / "phase1" / "train"
    write_shard(folder / "shard.hdf5", attributes=False)
    shards = ShardSet(folder)
    with pytest.raises(UsageError, match="vocab_file") as error:
        resolve_mask_token_id(shards, None, folder)
    assert str(folder) in usage_line(error)
    vocabulary(tmp_path / "a" / "vocab.txt", "[PAD]", "[UNK]", "[MASK]", "word")
    assert resolve_mask_token_id(shards, None, folder) == 2
    vocabulary(folder / "vocab.txt", "[PAD]", "[MASK]")
    assert resolve_mask_token_id(shards, None, folder) == 1
    given = vocabulary(tmp_path / "given.txt", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert resolve_mask_token_id(shards, given, folder) == 4
    write_shard(folder / "shard.hdf5")
    assert resolve_mask_token_id(ShardSet(folder), None, folder) == MASK == 4
    assert resolve_mask_token_id(ShardSet(folder), str(given), folder) == 4


def test_a_wrong_vocabulary_is_named(tmp_path):
    write_shard(tmp_path / "data" / "shard.hdf5")
    shards = ShardSet(tmp_path / "data")
    without = vocabulary(tmp_path / "without.txt", "[PAD]", "word")
    other = vocabulary(tmp_path / "other.txt", "[MASK]")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, says in (
        (tmp_path / "missing.txt", "cannot read"),
        (binary, "cannot read"),
        (without, r"no line \[MASK\]"),
        (other, "at 0, the shards in .* say 4"),
    ):
        with pytest.raises(UsageError, match=says) as error:
            resolve_mask_token_id(shards, path, tmp_path / "data")
        assert "vocab_file" in usage_line(error) and str(path) in usage_line(error)


def test_premasked_shards_need_no_mask_token(tmp_path):
    write_premasked_shard(tmp_path / "shard.hdf5", attributes=False)
    assert resolve_mask_token_id(ShardSet(tmp_path), None, tmp_path) is None
