"""A vocabulary for tests, and files of SQuAD's shape."""

from __future__ import annotations

import json
import string
from pathlib import Path

from data.tokenization import SPECIAL_TOKENS

WORDS = "the eiffel tower was built in paris between 1887 and 1889 by gustave of iron who when where what".split()


def write_vocabulary(path: Path) -> Path:
    """A vocab.txt that has some words, and every other word by its letters."""
    letters = string.ascii_lowercase + string.digits
    continued = [f"##{letter}" for letter in letters]
    path.write_text("\n".join([*SPECIAL_TOKENS, *string.punctuation, *letters, *continued, *WORDS]) + "\n")
    return path


def question(qid: str, context: str, *answers: str, text: str = "When was it built?", **more) -> dict:
    """An entry of `qas`; each answer at the first place in `context` where it occurs."""
    listed = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": qid, "question": text, "answers": listed} | more


def squad_json(*paragraphs: tuple[str, list[dict]], version: str = "1.1") -> dict:
    """A file's content: one article of these contexts and questions."""
    listed = [{"context": context, "qas": questions} for context, questions in paragraphs]
    return {"version": version, "data": [{"title": "Tower", "paragraphs": listed}]}


def write_squad(path: Path, *paragraphs: tuple[str, list[dict]], version: str = "1.1") -> Path:
    path.write_text(json.dumps(squad_json(*paragraphs, version=version)))
    return path
