"""Features of sentences and pairs: those of transformers' tokenizer, and kept on disk."""

import errno

import numpy as np
import pytest
from transformers import BertTokenizer

from data import features as features_module
from data.features import encode
from data.glue import Example
from data.tokenization import load_tokenizer
from training.errors import UsageError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film is good bad very ##ly . , ? a b c d e f g h".split()
TEXTS = [
    ("The film is good.", None),
    ("a", "b"),
    ("", "the film"),
    ("a b c d e f g h", "a b c"),
    ("a b c", "a b c d e f g h"),
    ("a b c d e f g h", "h g f e d c b a"),
    ("a b c d e f g h the film", "h g f e d c b a"),
    ("a b c d e f g h", "h g f e d c b a the film"),
    ("a b c d e f g h the film is very very good", None),
    ("[SEP] unknown", None),
]
EXAMPLES = [Example(str(n), a, b, None) for n, (a, b) in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.mark.parametrize("max_seq_length", [5, 8, 11, 12, 128])
def test_features_are_those_of_transformers(vocab_file, max_seq_length):
    features = encode(EXAMPLES, load_tokenizer(vocab_file), max_seq_length)
    theirs = BertTokenizer.from_pretrained(str(vocab_file.parent), split_special_tokens=True)
    assert features["lengths"].max() == features["input_ids"].shape[1] <= max_seq_length
    for row, (a, b) in enumerate(TEXTS):
        expected = theirs(a, b, truncation="longest_first", max_length=max_seq_length)
        length = len(expected["input_ids"])
        assert features["lengths"][row] == length
        assert features["input_ids"][row, :length].tolist() == expected["input_ids"]
        assert features["token_type_ids"][row, :length].tolist() == expected["token_type_ids"]
        assert not features["input_ids"][row, length:].any()
        assert not features["token_type_ids"][row, length:].any()
    assert {name: array.dtype for name, array in features.items()} == {
        "input_ids": np.int32,
        "token_type_ids": np.int8,
        "lengths": np.int32,
    }


def test_encoding_leaves_the_tokenizer_as_it_is(vocab_file):
    tokenizer = load_tokenizer(vocab_file)
    encode(EXAMPLES, tokenizer, 5)
    assert tokenizer.truncation is None
    assert len(tokenizer.encode(EXAMPLES[3].sentence1)) == 10


def test_many_examples_are_encoded_in_order(vocab_file, monkeypatch):
    monkeypatch.setattr(features_module, "_CHUNK", 3)
    features = encode(EXAMPLES, load_tokenizer(vocab_file), 128)
    monkeypatch.undo()
    whole = encode(EXAMPLES, load_tokenizer(vocab_file), 128)
    assert all(np.array_equal(features[name], whole[name]) for name in whole)


@pytest.fixture
def counted(monkeypatch):
    """The number of times that text was really encoded, as the length of a list."""
    calls, tokenize = [], features_module._tokenize
    monkeypatch.setattr(features_module, "_tokenize", lambda *args: calls.append(1) or tokenize(*args))
    return calls


def test_the_cache_is_used_for_the_same_text_and_settings_only(tmp_path, vocab_file, counted):
    tokenizer = load_tokenizer(vocab_file)
    first = encode(EXAMPLES, tokenizer, 16, tmp_path / "cache")
    again = encode(EXAMPLES, load_tokenizer(vocab_file), 16, tmp_path / "cache")
    assert len(counted) == 1
    assert all(np.array_equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)
    changes = [
        (EXAMPLES, tokenizer, 15),
        (EXAMPLES[:-1], tokenizer, 16),
        ([EXAMPLES[0]._replace(sentence2=""), *EXAMPLES[1:]], tokenizer, 16),
        (EXAMPLES, load_tokenizer(vocab_file, lowercase=False), 16),
    ]
    for count, change in enumerate(changes, 2):
        encode(*change, tmp_path / "cache")
        assert len(counted) == count
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_sentences_that_only_join_to_the_same_text_are_told_apart(tmp_path, vocab_file, counted):
    tokenizer = load_tokenizer(vocab_file)
    for a, b in (("a b", "c"), ("a", "b c"), ("a b c", None), ("a b c", "None")):
        encode([Example("0", a, b, None)], tokenizer, 16, tmp_path)
    assert len(counted) == 4


def test_without_a_cache_nothing_is_written(tmp_path, vocab_file, counted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(EXAMPLES, load_tokenizer(vocab_file), 16)
    encode(EXAMPLES, load_tokenizer(vocab_file), 16)
    assert len(counted) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw.replace(b"\3", b"\4")]
)
def test_a_damaged_cache_is_built_again(tmp_path, vocab_file, counted, damage):
    tokenizer = load_tokenizer(vocab_file)
    first = encode(EXAMPLES, tokenizer, 16, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        again = encode(EXAMPLES, tokenizer, 16, tmp_path)
        assert all(np.array_equal(first[name], again[name]) for name in first)
    assert len(counted) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, vocab_file):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=r"--cache_dir .*/file: cannot keep encoded examples there \(Not a directory\)"
    ):
        encode(EXAMPLES, load_tokenizer(vocab_file), 16, tmp_path / "file")


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(tmp_path, vocab_file, monkeypatch):
    def fill_the_disk(file, **arrays):
        file.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module.np, "savez", fill_the_disk)
    with pytest.raises(UsageError, match="No space left on device"):
        encode(EXAMPLES, load_tokenizer(vocab_file), 16, tmp_path)
    assert not list(tmp_path.iterdir())
