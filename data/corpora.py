"""Readers of text corpora: each turns a stretch of a file into documents, holding one document at a time.

A large file is read in stretches that begin where a document begins, so that several processes can share it. A document
of more than 4 MB comes in pieces of about that size, all in the same split.
"""

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.errors import UsageError

_SEARCH_BLOCK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 64 << 20
_LONGEST_DOCUMENT_BYTES = 4 << 20
_KEY_CHARACTERS = 1 << 16
_DETECTION_BYTES = 1 << 16


class Stretch(NamedTuple):
    """Bytes `start` to `end` of a file: whole documents."""

    path: Path
    start: int
    end: int


class Document(NamedTuple):
    """One document."""

    key: str
    """What decides its split: the beginning of its text, so the same text lands in the same split."""
    paragraphs: list[str]
    """Paragraphs, or sentences where the reader's `one_sentence_per_line` says so."""


@dataclass(frozen=True)
class Reader:
    """One way to read a file."""

    read: Callable[[Stretch], Iterator[Document]]
    boundary: re.Pattern[bytes] | None
    """A match ends where a document may begin; None: the file is read whole."""
    one_sentence_per_line: bool = False


# ------------------------------------------------------------------------------------------------------------- readers
def _read_plain(stretch: Stretch) -> Iterator[Document]:
    """Plain text, one document a file. Blank lines end paragraphs, other line ends are spaces."""
    with stretch.path.open("rb") as file:
        key = file.read(_KEY_CHARACTERS).decode("utf-8", errors="ignore")
    lines, size = [], 0
    for line in _lines(stretch):
        lines.append(line)
        size += len(line.encode())
        if size >= _LONGEST_DOCUMENT_BYTES:
            yield Document(key, _paragraphs(lines))
            lines, size = [], 0
    yield Document(key, _paragraphs(lines))


def _read_sentences(stretch: Stretch) -> Iterator[Document]:
    """One sentence a line, blank lines between documents."""
    key, sentences, size = None, [], 0
    for line in _lines(stretch):
        blank = not line.strip()
        if sentences and (blank or size >= _LONGEST_DOCUMENT_BYTES):
            key = key or _key(sentences)
            yield Document(key, sentences)
            sentences, size = [], 0
        if blank:
            key = None
        else:
            sentences.append(" ".join(line.split()))
            size += len(line.encode())
    yield Document(key or _key(sentences), sentences)


def _read_wikiextractor(stretch: Stretch) -> Iterator[Document]:
    """wikiextractor's `<doc id= url= title=>` ... `</doc>`: a line a paragraph, the first one the title (left out)."""
    title, paragraphs, inside = None, [], False
    for line in _lines(stretch):
        text = html.unescape(line).strip()
        if line.startswith("<doc "):
            found = re.search(r'title="(.*)">', line)
            title, paragraphs, inside = html.unescape(found[1]).strip() if found else None, [], True
        elif line.startswith("</doc>"):
            yield _document(paragraphs)
            inside = False
        elif text and inside and not (text == title and not paragraphs):
            paragraphs.append(text)
    if inside:
        raise UsageError(f"{stretch.path} ends inside a <doc>: it is cut off; extract it again")


def _read_json_lines(stretch: Stretch) -> Iterator[Document]:
    """A JSON object a line with the document in `text`, as `wikiextractor --json` and others write it."""
    for line in _lines(stretch):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{stretch.path} holds a line that is no JSON object with a "text": {line[:60]}'
            ) from error
        yield _document([html.unescape(paragraph) for paragraph in text.splitlines() if paragraph.strip()])


def _read_summaries(stretch: Stretch) -> Iterator[Document]:
    """A JSON object of Wikipedia summaries by title; the text is in `extract`."""
    for entry in json.loads(stretch.path.read_text(encoding="utf-8")).values():
        yield _document(entry["extract"].splitlines())


def _read_squad_articles(stretch: Stretch) -> Iterator[Document]:
    """SQuAD's JSON: the paragraphs of an article are one document, the questions are left out."""
    for article in json.loads(stretch.path.read_text(encoding="utf-8"))["data"]:
        yield _document([paragraph["context"] for paragraph in article["paragraphs"]])


READERS: dict[str, Reader] = {
    "plain": Reader(_read_plain, re.compile(rb"\n")),
    "sentences": Reader(_read_sentences, re.compile(rb"\n[ \t\r]*\n"), one_sentence_per_line=True),
    "wikiextractor": Reader(_read_wikiextractor, re.compile(rb"\n(?=<doc )")),
    "json_lines": Reader(_read_json_lines, re.compile(rb"\n")),
    "summaries": Reader(_read_summaries, None),
    "squad_articles": Reader(_read_squad_articles, None),
}

NAMED_FILES: dict[str, tuple[str, str]] = {
    "wiki_summaries": ("summaries_en-us.json", "summaries"),
    "squad": ("train-v1.1.json", "squad_articles"),  # the dev articles stay unseen: they test fine-tuning
    "sotu": ("*.txt", "plain"),
}
"""For each source of a named corpus: the pattern of its files, and their reader."""


def detect_reader(path: Path) -> str:
    """The reader for a file of a user's own, by its content: `wikiextractor`, `json_lines` or `plain`."""
    with path.open("rb") as file:
        beginning = file.read(_DETECTION_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    if beginning.startswith(b"<doc "):
        return "wikiextractor"
    if re.match(rb'\{\s*"', beginning):
        return "json_lines"
    return "plain"


# --------------------------------------------------------------------------------------------------------------- parts
def cut_file(path: Path, boundary: re.Pattern[bytes] | None, target_bytes: int) -> list[Stretch]:
    """Cut a file into stretches of about `target_bytes` that begin where documents begin.

    Args:
        boundary: a match ends where a document may begin; None: one stretch.

    Returns:
        The stretches in order, together the whole file; none for an empty one.
    """
    size = path.stat().st_size
    cuts = [0]
    with path.open("rb") as file:
        while boundary and cuts[-1] + target_bytes < size:
            cut = _find_boundary(file, boundary, cuts[-1] + target_bytes)
            if cut is None or cut >= size:
                break
            cuts.append(cut)
    ends = [*cuts[1:], size]
    return [Stretch(path, start, end) for start, end in zip(cuts, ends, strict=True) if start < end]


def _find_boundary(file, boundary: re.Pattern[bytes], start: int) -> int | None:
    """Where the first boundary at or after byte `start` ends."""
    overlap = 64  # more than any boundary is long, but for a run of blanks, which then is passed over
    file.seek(start)
    position, window = start, b""
    while block := file.read(_SEARCH_BLOCK_BYTES):
        window += block
        if match := boundary.search(window):
            return position + match.end()
        position += max(0, len(window) - overlap)
        window = window[-overlap:]
    return None


def in_split(key: str, fraction: float) -> bool:
    """Whether the document with this key belongs to the share `fraction` of documents: a pure function of the two."""
    digest = hashlib.blake2b(key.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _document(paragraphs: Iterable[str]) -> Document:
    paragraphs = list(paragraphs)
    return Document(_key(paragraphs), paragraphs)


def _key(paragraphs: list[str]) -> str:
    return "\n".join(paragraphs)[:_KEY_CHARACTERS]


def _paragraphs(lines: list[str]) -> list[str]:
    """Join wrapped lines; blank lines end paragraphs."""
    return re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines))


def _lines(stretch: Stretch) -> Iterator[str]:
    """The lines of a stretch, without their ends.

    Raises:
        UsageError: a line too long to hold.
    """
    with stretch.path.open("rb") as file:
        file.seek(stretch.start)
        while file.tell() < stretch.end:
            line = file.readline(_LONGEST_LINE_BYTES)
            if len(line) == _LONGEST_LINE_BYTES:
                raise UsageError(f"{stretch.path} has a line of more than 64 MB: is it text? Break it into lines")
            yield line.decode("utf-8").rstrip("\r\n").removeprefix("\ufeff")
