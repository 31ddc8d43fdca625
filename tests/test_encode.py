"""HDF5 shards of real (small) text: what they hold and say of themselves, whatever the number of processes."""

import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from text_factory import SETTINGS, contents, encode, joined, make_corpus, read_shards

from data.corpora import Stretch
from data.encode import EncodeSettings, is_complete, plan_groups
from data.format import format_corpus
from data.samples import REAL_NEXT
from data.shard_files import ShardSet
from data.tokenization import (
    load_tokenizer,
    special_ids,
    vocabulary_sha256,
)
from training.errors import UsageError


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Formatted text of 120 documents, a fifth of them held out."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = make_corpus(folder / "files")
    format_corpus(str(corpus), folder / "text", one_sentence_per_line=True, heldout_fraction=0.2)
    return folder / "text"


@pytest.fixture(scope="module")
def encoded(text, tmp_path_factory) -> Path:
    return encode(text, tmp_path_factory.mktemp("encoded"))


def test_shards_are_what_the_reader_wants_and_say_so(text, encoded):
    vocab_size = load_tokenizer(encoded / "vocab.txt").get_vocab_size()
    for split in ("train", "heldout"):
        shards = ShardSet(encoded / "phase1" / split)
        shards.check(vocab_size, max_position_embeddings=32, max_predictions_per_seq=5)
        assert (shards.layout, shards.sequence_length, shards.has_next_sentence) == ("unmasked", 32, True)
        assert (shards.vocab_size, shards.mask_token_id) == (vocab_size, 4)
        assert shards.vocabulary_sha256 == vocabulary_sha256(load_tokenizer(encoded / "vocab.txt"))
        for index, header in enumerate(shards.headers):
            arrays = shards.load(index, vocab_size)
            assert header.attributes["num_samples"] == len(arrays["input_ids"]) == len(arrays["next_sentence_labels"])
            assert header.attributes["max_token_id"] == arrays["input_ids"].max()
            assert header.attributes["format_version"] == 1
            assert arrays["next_sentence_labels"].dtype == np.int8
    assert len(ShardSet(encoded / "phase1" / "train").files) >= 6
    assert not list(encoded.rglob("*.tmp"))


def _document_words(text: Path, split: str, tokenizer) -> list[str]:
    """The tokens of each document as one string of ids."""
    documents = "".join(path.read_text() for path in sorted((text / split).glob("*.txt"))).split("\n\n")
    encodings = [
        [i for sentence in document.split("\n") for i in tokenizer.encode(sentence, add_special_tokens=False).ids]
        for document in documents
        if document
    ]
    return [" " + " ".join(map(str, ids)) + " " for ids in encodings]


def test_every_sample_is_text_of_its_split(text, encoded):
    tokenizer = load_tokenizer(encoded / "vocab.txt")
    for split in ("train", "heldout"):
        documents = _document_words(text, split, tokenizer)
        samples = joined(encoded / "phase1" / split)
        found = set()
        for row, (_, middle, last), label in (
            zip(*samples.values(), strict=True)
            if False
            else zip(
                samples["input_ids"], samples["special_token_positions"], samples["next_sentence_labels"], strict=True
            )
        ):
            a, b = (" " + " ".join(map(str, part)) + " " for part in (row[1:middle], row[middle + 1 : last]))
            homes = [{i for i, words in enumerate(documents) if part in words} for part in (a, b)]
            assert homes[0] and homes[1]
            if label == REAL_NEXT:
                assert homes[0] & homes[1]
            found |= homes[0]
        assert len(found) == len(documents)


def test_a_shard_holds_documents_from_all_over_the_corpus(text, encoded):
    tokenizer = load_tokenizer(encoded / "vocab.txt")
    for shard in read_shards(encoded / "phase1" / "train"):
        firsts = [re.match(r"\d+", tokenizer.decode(row[1:8].tolist())) for row in shard["input_ids"]]
        numbers = [int(first[0]) for first in firsts if first]
        assert min(numbers) < 40
        assert max(numbers) > 80


def test_passes_differ(encoded):
    shards = read_shards(encoded / "phase1" / "train")
    half = len(shards) // 2
    for one, other in zip(shards[:half], shards[half:], strict=True):
        assert one["input_ids"].shape != other["input_ids"].shape or (one["input_ids"] != other["input_ids"]).any()


def test_shards_do_not_depend_on_the_number_of_processes(text, encoded, tmp_path):
    output = encode(text, tmp_path / "out", nproc=2)
    assert contents(output) == contents(encoded)


def test_a_stopped_stage_makes_only_what_is_missing(text, encoded, tmp_path):
    output = encode(text, tmp_path / "out", vocab_file=encoded / "vocab.txt")
    whole = contents(output)
    shards = sorted((output / "phase1" / "train").glob("*.hdf5"))
    shards[0].rename(shards[0].with_name(shards[0].name + ".tmp"))
    shards[1].write_bytes(shards[1].read_bytes()[:3000])
    with h5py.File(shards[2], "a") as file:
        del file.attrs["num_samples"]
    assert [is_complete(path) for path in shards] == [False] * 3 + [True] * (len(shards) - 3)
    for path in shards[1:]:
        os.utime(path, (1, 1))
    encode(text, output, vocab_file=encoded / "vocab.txt")
    assert contents(output) == whole
    assert [path.stat().st_mtime > 1 for path in shards] == [True] * 3 + [False] * (len(shards) - 3)


@pytest.mark.parametrize("change", [{"seed": 7}, {"sequence_lengths": (24,)}, {"next_sentence": False}])
def test_other_settings_need_a_word(text, encoded, tmp_path, change):
    given = {"vocab_file": encoded / "vocab.txt"}
    output = encode(text, tmp_path / "out", **given)
    before = contents(output)
    changed = EncodeSettings(**vars(SETTINGS) | change)
    name = "sequence_length" if "sequence_lengths" in change else next(iter(change))
    with pytest.raises(UsageError, match=rf"phase1 was made with other settings \({name} .*--overwrite"):
        encode(text, output, changed, **given)
    assert contents(output) == before
    encode(text, output, changed, overwrite=True, **given)
    assert contents(output) == contents(encode(text, tmp_path / "fresh", changed, **given))
    assert contents(output) != before


def test_several_lengths_and_premasked_shards_stand_side_by_side(text, encoded, tmp_path):
    given = {"vocab_file": encoded / "vocab.txt"}
    both = EncodeSettings(**vars(SETTINGS) | {"sequence_lengths": (32, 48)})
    output = encode(text, tmp_path / "out", both, **given)
    encode(text, output, EncodeSettings(**vars(both) | {"premask": True}), **given)
    folders = {path.name for path in output.iterdir() if path.is_dir()}
    assert folders == {"phase1", "phase2", "phase1_premasked", "phase2_premasked"}
    vocab_size = load_tokenizer(encoded / "vocab.txt").get_vocab_size()
    for folder in sorted(folders):
        shards = ShardSet(output / folder / "train")
        shards.check(vocab_size, max_position_embeddings=48, max_predictions_per_seq=8)
        assert shards.sequence_length == (32 if "1" in folder else 48)
        assert (shards.layout == "premasked") == folder.endswith("premasked")
    masked, plain = (joined(output / folder / "train") for folder in ("phase1_premasked", "phase1"))
    assert masked["masked_lm_positions"].shape[1] == 5
    assert (masked["next_sentence_labels"] == plain["next_sentence_labels"]).all()


def test_single_sequence_shards_are_read_as_such(text, encoded, tmp_path):
    single = EncodeSettings(**vars(SETTINGS) | {"next_sentence": False})
    output = encode(text, tmp_path / "out", single, vocab_file=encoded / "vocab.txt")
    shards = ShardSet(output / "phase1" / "train")
    assert not shards.has_next_sentence
    assert shards.load(0, 400)["special_token_positions"].shape[1] == 2


def test_a_bpe_tokenizer_is_built_and_used(text, tmp_path):
    output = encode(text, tmp_path / "out", EncodeSettings(**vars(SETTINGS) | {"tokenizer": "bpe"}))
    tokenizer = load_tokenizer(output / "tokenizer.json", True, "bpe")
    samples = joined(output / "phase1" / "heldout")
    assert (samples["input_ids"][:, 0] == special_ids(tokenizer).cls).all()
    assert "river" in tokenizer.decode(samples["input_ids"].ravel().tolist())


def test_shards_get_two_documents_at_least():
    stretches = [(Stretch(Path("x"), i * 100, (i + 1) * 100), 1) for i in range(9)]
    groups = plan_groups("train", stretches, 100, SETTINGS)
    assert min(len(group.stretches) for group in groups) >= 2
    assert sorted(s.start for group in groups for s in group.stretches) == [i * 100 for i in range(9)]
    assert len(plan_groups("train", stretches, 100, EncodeSettings(next_sentence=False))) == 9


# ----------------------------------------------------------------------------------------------------------- bad input
def test_text_that_is_not_formatted_is_refused(text, tmp_path):
    for folder in (tmp_path / "nowhere", text / "train"):
        with pytest.raises(UsageError, match=f"--input {folder}: holds no .*run data.format"):
            encode(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_document_makes_no_pairs(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", documents=1)
    format_corpus(str(corpus), tmp_path / "text", one_sentence_per_line=True, heldout_fraction=0)
    with pytest.raises(UsageError, match=r"the train split has one document.*--no_next_sentence"):
        encode(tmp_path / "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    encode(tmp_path / "text", tmp_path / "out", EncodeSettings(**vars(SETTINGS) | {"next_sentence": False}))
    assert not (tmp_path / "out" / "phase1" / "heldout").exists()
