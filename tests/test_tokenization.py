"""Vocabularies and tokenizers: the same text gives the same ones, and they split text as BERT's own do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_factory import encode, make_corpus

from data.format import format_corpus
from data.tokenization import (
    SPECIAL_TOKENS,
    SentenceEncoder,
    build_bpe_tokenizer,
    build_wordpiece_vocabulary,
    load_tokenizer,
    read_vocabulary,
    vocabulary_sha256,
)
from training.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


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


BUILD = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from data.tokenization import build_wordpiece_vocabulary
build_wordpiece_vocabulary([Path({text!r})], 350, True, Path({output!r}))
"""


def test_the_same_text_gives_the_same_vocabulary_in_every_process(tmp_path, text):
    outputs = [tmp_path / f"{run}.txt" for run in range(2)]
    for seed, output in enumerate(outputs):
        code = BUILD.format(root=str(ROOT), text=str(text / "train" / "part_00000.txt"), output=str(output))
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": str(seed)})
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    tokens = list(read_vocabulary(outputs[0]))
    assert tokens[:5] == list(SPECIAL_TOKENS)
    assert "river" in tokens


def test_a_vocabulary_has_the_size_asked_for_and_frequent_letters_only(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{chr(0x4E00 + i)} abcdefgh{i} ihgfedcba{i}\n" for i in range(3000)), encoding="utf-8")
    assert build_wordpiece_vocabulary([path], 320, True, tmp_path / "vocab.txt") == 320
    tokens = read_vocabulary(tmp_path / "vocab.txt")
    assert len(tokens) == 320
    letters = {token for token in tokens if len(token) == 1}
    assert set("abcdefghi0123456789") <= letters
    assert len(letters) <= 80


def test_held_out_words_are_not_in_the_vocabulary(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", documents=60)
    for path in sorted(corpus.iterdir()):
        path.write_text(path.read_text() + f"unseen{path.stem} unseen{path.stem} again.\n")
    format_corpus(str(corpus), tmp_path / "text", one_sentence_per_line=True, heldout_fraction=0.3)
    encode(tmp_path / "text", tmp_path / "out")
    heldout_words = set((tmp_path / "text" / "heldout" / "part_00000.txt").read_text().split())
    train_words = set((tmp_path / "text" / "train" / "part_00000.txt").read_text().split())
    only_heldout = {word for word in heldout_words - train_words if word.startswith("unseen")}
    assert len(only_heldout) > 5
    assert not only_heldout & read_vocabulary(tmp_path / "out" / "vocab.txt").keys()


@pytest.mark.parametrize("lowercase", [True, False])
def test_tokens_are_those_of_hugging_face(tmp_path, text, lowercase):
    from transformers import BertTokenizer

    path = tmp_path / "vocab.txt"
    build_wordpiece_vocabulary(sorted((text / "train").glob("*.txt")), 300, lowercase, path)
    ours = load_tokenizer(path, lowercase)
    theirs = BertTokenizer(str(path), do_lower_case=lowercase)
    for sentence in ("The RIVER's naïve café!", "old\ttown  1990-2000 \u4e2d\u6587", "unknown: Ω ok", ""):
        assert ours.encode(sentence, "over it").ids == theirs(sentence, "over it")["input_ids"]
        assert ours.encode(sentence, "over it").type_ids == theirs(sentence, "over it")["token_type_ids"]


def test_special_tokens_spelled_out_in_text_are_text(encoded):
    tokenizer = load_tokenizer(encoded / "vocab.txt")
    ids = tokenizer.encode("the [SEP] river [MASK]", add_special_tokens=False).ids
    assert not {tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[MASK]")} & set(ids)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_encoding_word_by_word_gives_what_encoding_whole_sentences_does(tmp_path, text, kind):
    build = {"wordpiece": build_wordpiece_vocabulary, "bpe": build_bpe_tokenizer}[kind]
    files = sorted((text / "train").glob("*.txt"))
    build(files, 330, True, tmp_path / "vocab")
    tokenizer = load_tokenizer(tmp_path / "vocab", True, kind)
    sentences = files[0].read_text().split("\n")[:50] + [
        "It's Ωmega, e.g. [SEP] (\u4e2d\u6587)!",
        "a\x00b \u200b c\u0301",
    ]
    tokens, lengths = SentenceEncoder(tokenizer).encode(sentences)
    ends = np.cumsum(lengths)
    for sentence, end, length in zip(sentences, ends, lengths, strict=True):
        assert tokens[end - length : end].tolist() == tokenizer.encode(sentence, add_special_tokens=False).ids
    assert tokens.dtype == np.int32


VOCABULARY = [*SPECIAL_TOKENS, "the", "river"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([token for token in VOCABULARY if token != "[MASK]"], r"lacks \[MASK\]"),
        ([*VOCABULARY, "the"], "'the' more than once"),
        ([*VOCABULARY, "The"], r"upper-case entries \(The\).*--cased"),
        ([], "is empty"),
        (VOCABULARY, "of the tokens in .* are not in it"),
    ],
)
def test_a_vocabulary_that_does_not_do_is_refused_and_nothing_is_written(tmp_path, text, lines, message):
    path = tmp_path / "given.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=f"--vocab_file .*{message}") as error:
        encode(text, tmp_path / "out", vocab_file=path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_given_vocabulary_is_copied_and_another_one_refused(tmp_path, text, encoded):
    output = encode(text, tmp_path / "out", vocab_file=encoded / "vocab.txt")
    assert (output / "vocab.txt").read_bytes() == (encoded / "vocab.txt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text((encoded / "vocab.txt").read_text() + "one-more\n")
    with pytest.raises(UsageError, match=r"other settings \(given "):
        encode(text, output, vocab_file=other)
    with pytest.raises(UsageError, match="no such file"):
        encode(text, output, vocab_file=tmp_path / "nowhere.txt")


def test_the_hash_of_a_vocabulary_is_that_of_its_entries_in_their_order(tmp_path):
    def sha256(text: str) -> str:
        (tmp_path / "vocab.txt").write_bytes(text.encode())
        return vocabulary_sha256(load_tokenizer(tmp_path / "vocab.txt"))

    entries = [*SPECIAL_TOKENS, "one", "two", "##three"]
    first = sha256("\n".join(entries))
    assert sha256("\r\n".join(entries) + "\r\n\n") == first
    others = [[*entries, "four"], entries[:-1], [*entries[:-2], entries[-1], entries[-2]], [*entries[:-1], "three"]]
    assert len({first, *(sha256("\n".join(other)) for other in others)}) == 5
