"""Write data that package registries hold as GLUE's own TSV files, for the scripts that read GLUE.

STS-B is the real one. The two others are of a GLUE task's shape and are named after it and after their data, never as
the task itself:

    SST-2-shaped  Rotten Tomatoes: a sentence of a film review; is it of a fresh (1) or a rotten (0) review?
    QNLI-shaped   SQuAD v1.1: a question and a sentence of its paragraph; does it hold the answer (entailment)?

Written are OUTPUT/STS-B/{train,dev,test}.tsv, OUTPUT/SST-2-shaped/{train,dev}.tsv, OUTPUT/QNLI-shaped/{train,dev}.tsv.
The same sources give the same files, byte for byte.
"""

import bz2
import csv
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.fetch import fetch_source
from data.glue import TASKS, get_task, labels_array, read_examples
from data.sentences import split_sentences
from data.stages import check_folders, write_atomic
from training.errors import UsageError

Rows = Iterable[tuple[object, ...]]

_DEV_PERCENT = 10
_SENTIMENT = {"rotten": 0, "fresh": 1}
_WORD = re.compile(r"\w+")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _one_line(text: str) -> str:
    """A cell of a TSV file holds no tab and no line feed."""
    return " ".join(text.split())


def _write_tsv(path: Path, header: tuple[str, ...], rows: Rows) -> None:
    write_atomic(path, "".join("\t".join(map(str, row)) + "\n" for row in (header, *rows)))


# --------------------------------------------------------------------------------------------------------------- STS-B
def write_stsb(source: Path, folder: Path) -> None:
    """STS-B's `sts-*.csv` as GLUE has them: the same pairs in the same order, the test scores left out."""
    for split in ("train", "dev", "test"):
        lines = (source / f"sts-{split}.csv").read_text(encoding="utf-8").split("\n")
        rows = [_stsb_row(index, line.split("\t")) for index, line in enumerate(filter(None, lines))]
        header = ("genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
        width = len(header) if split == "test" else len(header) + 1
        _write_tsv(folder / f"{split}.tsv", ("index", *header)[:width], (row[:width] for row in rows))


def _stsb_row(index: int, cells: list[str]) -> tuple[object, ...]:
    genre, filename, year, old_index, score, sentence1, sentence2, *sources = cells
    source1, source2 = sources or ("none", "none")
    return index, genre, filename, year, old_index, source1, source2, sentence1, sentence2, score


# -------------------------------------------------------------------------------------------------------- SST-2-shaped
def write_sentiment(source: Path, folder: Path) -> None:
    """Fresh and rotten review sentences, each once; a tenth of the films is the dev split, with all their reviews."""
    rows = {"train": [], "dev": []}
    for text, label, film in _reviews(source / "rotten_tomatoes_corpus_full.csv.bz2"):
        rows["dev" if _hash(film) % 100 < _DEV_PERCENT else "train"].append((text, label))
    for split, pairs in rows.items():
        _write_tsv(folder / f"{split}.tsv", ("sentence", "label"), pairs)


def _reviews(path: Path) -> Iterator[tuple[str, int, str]]:
    """Text, label and film of each review that did not occur before, whatever its case and white space."""
    # A film that the corpus has twice under two names brings the same reviews twice, so it stays in one split too.
    seen = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = _one_line(row["text"])
            if row["category"] in _SENTIMENT and text and text.casefold() not in seen:
                seen.add(text.casefold())
                yield text, _SENTIMENT[row["category"]], row["movie_name"]


# --------------------------------------------------------------------------------------------------------- QNLI-shaped
def write_answerability(source: Path, folder: Path) -> None:
    """One row for each question of SQuAD: half of them, by a hash, with the sentence that holds the answer, the others
    with the sentence of the same paragraph that shares most words with the question and does not hold it.

    Left out are questions whose answer runs over the end of a sentence.
    """
    for split in ("train", "dev"):
        articles = json.loads((source / f"{split}-v1.1.json").read_text(encoding="utf-8"))["data"]
        paragraphs = (paragraph for article in articles for paragraph in article["paragraphs"])
        rows = (row for paragraph in paragraphs for row in _question_rows(paragraph))
        numbered = ((index, *row) for index, row in enumerate(rows))
        _write_tsv(folder / f"{split}.tsv", ("index", "question", "sentence", "label"), numbered)


def _question_rows(paragraph: dict) -> Iterator[tuple[str, str, str]]:
    context = paragraph["context"]
    sentences = split_sentences(context)
    # Splitting changes nothing but white space, so a letter is found again by the number of letters before it.
    ends = list(accumulate(len(_letters(sentence)) for sentence in sentences))
    for question in paragraph["qas"]:
        spans = [_sentences_of(answer, context, ends) for answer in question["answers"]]
        if any(first != last for first, last in spans):
            continue
        holders = [first for first, _ in spans]
        texts = [answer["text"].casefold() for answer in question["answers"]]
        others = [
            sentence
            for place, sentence in enumerate(sentences)
            if place not in holders and not any(text in sentence.casefold() for text in texts)
        ]
        asked = _one_line(question["question"])
        if others and _hash(question["id"]) % 2:
            yield asked, _closest(asked, others), "not_entailment"
        else:
            yield asked, sentences[holders[0]], "entailment"


def _closest(question: str, sentences: list[str]) -> str:
    """The first of those sentences that share most words with the question."""
    words = set(_WORD.findall(question.casefold()))
    return max(sentences, key=lambda sentence: len(words.intersection(_WORD.findall(sentence.casefold()))))


def _letters(text: str) -> str:
    return "".join(text.split())


def _sentences_of(answer: dict, context: str, ends: list[int]) -> tuple[int, int]:
    """The sentences in which an answer begins and ends, by number; `ends` counts the letters up to each one's end."""
    before = len(_letters(context[: answer["answer_start"]]))
    return bisect_right(ends, before), bisect_right(ends, before + len(_letters(answer["text"])) - 1)


# ---------------------------------------------------------------------------------------------------------------- main
class Preparation(NamedTuple):
    """How a task's files are made."""

    source: str
    """A key of `data.fetch.SOURCES`."""
    write: Callable[[Path, Path], None]
    """Takes the folder of the source and the folder to write."""


PREPARATIONS: dict[str, Preparation] = {
    "STS-B": Preparation("stsb", write_stsb),
    "SST-2-shaped": Preparation("rotten_tomatoes", write_sentiment),
    "QNLI-shaped": Preparation("squad", write_answerability),
}


def describe(name: str, folder: Path) -> str:
    """Rows and labels of a prepared task, as its readers see them."""
    task = TASKS[name]
    parts = []
    for split in ("train", *task.dev_splits):
        labels = labels_array(task, read_examples(task, folder, split))
        if task.regression:
            parts.append(f"{split} {len(labels):,} rows, mean score {labels.mean():.2f}")
        else:
            shares = np.bincount(labels, minlength=task.num_labels) / len(labels)
            balance = ", ".join(f"{share:.1%} {word}" for share, word in zip(shares, task.labels, strict=True))
            parts.append(f"{split} {len(labels):,} rows ({balance})")
    return f"{name}: {'; '.join(parts)}"


def main() -> None:
    from training.flags import Parser

    parser = Parser(prog="data.prepare_glue", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(PREPARATIONS), help=f"of {', '.join(PREPARATIONS)}")
    parser.add_argument("--output", type=Path, help="folder to put each task into, in a folder of its own")
    parser.add_argument("--download_dir", type=Path, help="folder of the sources; by default OUTPUT/download")
    args = parser.parse_args()
    if args.output is None:
        raise UsageError("--output: must be given")
    names = [get_task(name, "names").name for name in args.names]
    for name in names:
        if name not in PREPARATIONS:
            raise UsageError(f"{name}: no package holds it, take it from GLUE; there are {', '.join(PREPARATIONS)}")
    download_dir = args.download_dir or args.output / "download"
    check_folders("--output", *(args.output / name for name in names))
    sources = [download_dir / PREPARATIONS[name].source for name in names]
    check_folders("--download_dir" if args.download_dir else "--output", *sources)
    for name in names:
        source, write = PREPARATIONS[name]
        write(fetch_source(source, download_dir), args.output / name)
        print(describe(name, args.output / name), flush=True)


if __name__ == "__main__":
    from training.flags import run_door

    run_door(main)
