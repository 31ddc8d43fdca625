"""The vocabulary of a data set: a given one that fits the text, or one built from the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.stages import Stopwatch, claim_outputs, file_sha256, write_atomic
from data.tokenization import BUILDERS, KINDS, SentenceEncoder, load_tokenizer, special_ids
from training.errors import UsageError

_SAMPLE_CHARACTERS = 1 << 17
_MOST_UNKNOWN = 0.1


@dataclass(frozen=True)
class VocabularySettings:
    """Which vocabulary is wanted."""

    tokenizer: str
    """A key of KINDS."""
    lowercase: bool
    given: Path | None
    """The file to take; None: build one."""
    size: int
    """Entries of one that is built."""


class Vocabulary(NamedTuple):
    """The vocabulary's file and its content's hash."""

    path: Path
    sha256: str


def settle_vocabulary(
    output: Path, wanted: VocabularySettings, train_files: Sequence[Path], text_hash: str, overwrite: bool
) -> Vocabulary:
    """Put the vocabulary into `output`, a copy of the given one or one built from `train_files`, unless it is there.

    Args:
        text_hash: changes where the text does.
        overwrite: replace another vocabulary that is in `output`.

    Raises:
        UsageError: another vocabulary is in `output` already.
    """
    path = output / KINDS[wanted.tokenizer]
    record = {"tokenizer": wanted.tokenizer, "lowercase": wanted.lowercase}
    if wanted.given is not None:
        record["given"] = file_sha256(wanted.given)
    else:
        record |= {"vocab_size": wanted.size, "text": text_hash}
    another = path.is_file() and file_sha256(path) != record.get("given")
    claim_outputs(output / "vocab_manifest.json", record, [path] if another else [], overwrite)
    if not path.is_file():
        if wanted.given is not None:
            write_atomic(path, wanted.given.read_text(encoding="utf-8"))
        else:
            watch = Stopwatch("vocabulary")
            entries = BUILDERS[wanted.tokenizer](train_files, wanted.size, wanted.lowercase, path)
            watch.report(sum(file.stat().st_size for file in train_files), f"{entries:,} entries in {path}")
    return Vocabulary(path, file_sha256(path))


def check_vocabulary(vocab_file: Path, text_file: Path, wanted: VocabularySettings) -> None:
    """Refuse a vocabulary that cannot be read, or that does not know the words of the text.

    Args:
        text_file: formatted text, of which the beginning is tried.

    Raises:
        UsageError: what `load_tokenizer` raises, or more than a tenth of the tokens is unknown.
    """
    tokenizer = load_tokenizer(vocab_file, wanted.lowercase, wanted.tokenizer)
    with text_file.open(encoding="utf-8", newline="\n") as file:
        sentences = file.read(_SAMPLE_CHARACTERS).split("\n")
    tokens, _ = SentenceEncoder(tokenizer).encode(sentences)
    unknown = np.mean(tokens == special_ids(tokenizer).unknown) if len(tokens) else 0
    if unknown > _MOST_UNKNOWN:
        raise UsageError(
            f"--vocab_file {vocab_file}: {unknown:.0%} of the tokens in {text_file} are not in it: give one for this "
            "language and case (--cased for cased text)"
        )
