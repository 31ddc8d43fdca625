"""SQuAD's questions and answers, v1.1 (Rajpurkar et al., 2016, arXiv:1606.05250) and v2.0 (2018, arXiv:1806.03822)."""

import json
from pathlib import Path
from typing import NamedTuple

from training.errors import UsageError


class Answer(NamedTuple):
    """A stretch of a context: `context[start : start + len(text)] == text`."""

    text: str
    start: int


class Example(NamedTuple):
    """One question."""

    qid: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    """One or more, of several annotators; none when `is_impossible`, and when the file keeps its answers to itself."""
    is_impossible: bool


def read_squad(path: str | Path, version_2: bool = False, need_answers: bool = True) -> list[Example]:
    """All questions of a SQuAD file, in its order.

    Args:
        path: a JSON file as published for SQuAD v1.1 or v2.0.
        version_2: questions may be unanswerable (`is_impossible`, or with no answers where the file lacks that key).
        need_answers: False accepts questions without the key `answers`, to predict them.

    Raises:
        UsageError: names the file, and the question if it is one that is wrong. A file that is not there or not
            SQuAD's JSON, an answer that is not at its place in the context, a question id that occurs twice, a question
            that contradicts `version_2`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a SQuAD JSON file") from error
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON ({error}); give a SQuAD JSON file") from error
    examples = []
    for article in _get(content, "data", list, str(path)):
        for paragraph in _get(article, "paragraphs", list, f"{path}: an entry of data"):
            context = _get(paragraph, "context", str, f"{path}: a paragraph")
            for entry in _get(paragraph, "qas", list, f"{path}: the paragraph that begins {context[:40]!r}"):
                examples.append(_read_question(entry, context, str(path), version_2, need_answers))
    if not examples:
        raise UsageError(f"{path}: holds no questions; give a SQuAD JSON file")
    seen = set()
    for example in examples:
        if example.qid in seen:
            raise UsageError(f"{path}: question {example.qid} occurs twice; question ids must be unique")
        seen.add(example.qid)
    return examples


def _read_question(entry: object, context: str, path: str, version_2: bool, need_answers: bool) -> Example:
    qid = _get(entry, "id", str, f"{path}: a question on {context[:40]!r}")
    where = f"{path}: question {qid}"
    question = _get(entry, "question", str, where)
    is_open = not need_answers and "answers" not in entry
    listed = [] if is_open else _get(entry, "answers", list, where)
    answers = tuple(_read_answer(answer, context, where) for answer in listed)
    is_impossible = not answers and not is_open
    if "is_impossible" in entry and not is_open and _get(entry, "is_impossible", bool, where) != is_impossible:
        raise UsageError(
            f"{where}: is_impossible is {entry['is_impossible']} and it has {len(answers)} answers; one must go"
        )
    if is_impossible and not version_2:
        raise UsageError(f"{where}: has no answer, so this is a v2.0 file: give --version_2_with_negative")
    return Example(qid, question, context, answers, is_impossible)


def _read_answer(entry: object, context: str, where: str) -> Answer:
    text = _get(entry, "text", str, f"{where}: an answer")
    start = _get(entry, "answer_start", int, f"{where}: answer {text!r}")
    if not text or start < 0 or not context.startswith(text, start):
        raise UsageError(f"{where}: answer {text!r} is not at character {start} of its context (answer_start)")
    return Answer(text, start)


def _get(entry: object, key: str, kind: type, where: str):
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise UsageError(f"{where}: has no {key} ({kind.__name__}), which SQuAD's JSON needs there")
    return entry[key]
