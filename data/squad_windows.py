"""SQuAD's questions as a model reads them: through windows, `[CLS] question [SEP] part of the context [SEP]`.

A context longer than the model's sequence is read through overlapping windows, each behind the question (Devlin et al.,
2019, arXiv:1810.04805, and the code published with it). From the scores of the windows' tokens back to text:
`data.squad_answers`.
"""

import fcntl
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.squad import Answer, Example, read_squad
from data.stages import atomic_path, file_sha256, fingerprint
from data.tokenization import SpecialIds, special_ids
from training.errors import UsageError

CACHE_VERSION = 1
"""To be raised with every change of what `encode` makes of the same input."""

SPECIAL_TOKENS_OF_A_WINDOW = 3  # [CLS] and two [SEP]
_TEXTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Features:
    """The windows of all questions, N in all, those of a question one after another. Positions count from [CLS] = 0.

    Position p of window i, in the context, stands for the characters from begin to end, not included, of
    `token_chars[first_tokens[i] + p - context_begins[i]]`.
    """

    input_ids: np.ndarray
    """[T] int32, the windows without padding, one after another."""
    lengths: np.ndarray
    """[N] int32, tokens of each window; their sum is T."""
    examples: np.ndarray
    """[N] int32, the number of the question, ascending."""
    context_begins: np.ndarray
    """[N] int32, position of the first context token; the context ends before position length - 1, that of [SEP]."""
    own_begins: np.ndarray
    """[N] int32, see `own_ends`."""
    own_ends: np.ndarray
    """[N] int32: of all windows that hold a token, the one where it has most context on its weaker side owns it (the
    published code's "max context"); window i owns positions own_begins[i] up to, not including, own_ends[i]."""
    start_positions: np.ndarray
    """[N] int32, position of the first token of the first answer; 0, [CLS], when the window does not hold it all."""
    end_positions: np.ndarray
    """[N] int32, position of the answer's last token; 0 as above."""
    first_tokens: np.ndarray
    """[N] int32, row in `token_chars` of the window's first context token."""
    token_chars: np.ndarray
    """[C, 2] int32, begin and end of each token of all distinct contexts, in characters of its context."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def row_begins(self) -> np.ndarray:
        """[N] int64, where each window begins in `input_ids`."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def batch(self, rows: Sequence[int] | np.ndarray, length: int | None = None) -> dict[str, np.ndarray]:
        """The windows `rows` as a model reads them, B windows padded to their longest, or to L = `length` not below it.

        Returns:
            input_ids, token_type_ids (1 on the context and the [SEP] after it) and attention_mask (1 on real tokens),
            [B, L] int64, 0 on padding; start_positions and end_positions, [B] int64.
        """
        rows = np.asarray(rows, np.int64)
        lengths = self.lengths[rows, None]
        position = np.arange(int(lengths.max()) if length is None else length)
        real = position < lengths
        input_ids = np.zeros(real.shape, np.int64)
        input_ids[real] = self.input_ids[(self.row_begins[rows, None] + position)[real]]
        return {
            "input_ids": input_ids,
            "token_type_ids": (real & (position >= self.context_begins[rows, None])).astype(np.int64),
            "attention_mask": real.astype(np.int64),
            "start_positions": self.start_positions[rows].astype(np.int64),
            "end_positions": self.end_positions[rows].astype(np.int64),
        }


class _Texts(NamedTuple):
    """Tokens of many texts, one text after another."""

    ids: np.ndarray
    chars: np.ndarray
    """[tokens, 2], begin and end of each token in its text."""
    begins: np.ndarray
    """Where each text begins in `ids`."""
    lengths: np.ndarray


class _Part(NamedTuple):
    """What each window holds of a question or of a context."""

    texts: _Texts
    begins: np.ndarray
    """Where it begins in `texts.ids`."""
    sizes: np.ndarray


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    show_progress: bool = False,
) -> Features:
    """Cut the examples into windows.

    Args:
        tokenizer: of `data.tokenization.load_tokenizer`.
        max_seq_length: most tokens of a window, the question and the special tokens included.
        doc_stride: tokens of the context from the begin of one window to that of the next.
        max_query_length: most tokens of a question; the rest of it is cut off.

    Raises:
        UsageError: a question leaves no room for its context, or a context has no token.
    """
    questions = _tokenize([example.question for example in examples], tokenizer, "questions", show_progress)
    numbers = {}
    for example in examples:
        numbers.setdefault(example.context, len(numbers))
    contexts = _tokenize(list(numbers), tokenizer, "contexts", show_progress)
    context_of = np.array([numbers[example.context] for example in examples])

    query_lengths = np.minimum(questions.lengths, max_query_length)
    context_lengths = contexts.lengths[context_of]
    room = max_seq_length - SPECIAL_TOKENS_OF_A_WINDOW - query_lengths
    _check_room(examples, room, context_lengths, max_seq_length)
    rows, begins = _cut(context_lengths, room, np.minimum(room, doc_stride))
    sizes = np.minimum(room[rows], context_lengths[rows] - begins)
    first_tokens = contexts.begins[context_of[rows]] + begins
    query_lengths = query_lengths[rows]
    question_part = _Part(questions, questions.begins[rows], query_lengths)
    context_part = _Part(contexts, first_tokens, sizes)

    in_window = query_lengths + 2 - begins  # from the place of a token in its context to its position in the window
    own_begins, own_ends = _owned(rows, begins, sizes)
    first, last = (tokens[rows] for tokens in _answer_tokens(examples, contexts, context_of))
    holds_answer = (begins <= first) & (first <= last) & (last < begins + sizes)
    arrays = {
        "input_ids": _assemble(special_ids(tokenizer), question_part, context_part),
        "lengths": query_lengths + sizes + SPECIAL_TOKENS_OF_A_WINDOW,
        "examples": rows,
        "context_begins": begins + in_window,
        "own_begins": own_begins + in_window,
        "own_ends": own_ends + in_window,
        "start_positions": np.where(holds_answer, first + in_window, 0),
        "end_positions": np.where(holds_answer, last + in_window, 0),
        "first_tokens": first_tokens,
        "token_chars": contexts.chars,
    }
    return Features(**{name: array.astype(np.int32, copy=False) for name, array in arrays.items()})


def _check_room(
    examples: Sequence[Example], room: np.ndarray, context_lengths: np.ndarray, max_seq_length: int
) -> None:
    if (room < 1).any():
        qid = examples[int((room < 1).argmax())].qid
        raise UsageError(f"--max_seq_length {max_seq_length}: leaves no room for the context beside question {qid}")
    if (context_lengths == 0).any():
        raise UsageError(f"question {examples[int((context_lengths == 0).argmax())].qid}: its context has no words")


def _assemble(ids: SpecialIds, question: _Part, context: _Part) -> np.ndarray:
    """The tokens of all windows, one window after another."""
    lengths = question.sizes + context.sizes + SPECIAL_TOKENS_OF_A_WINDOW
    row_begins = np.cumsum(lengths) - lengths
    input_ids = np.full(lengths.sum(), ids.sep, np.int32)
    input_ids[row_begins] = ids.cls
    for part, target in ((question, row_begins + 1), (context, row_begins + question.sizes + 2)):
        input_ids[_ranges(target, part.sizes)] = part.texts.ids[_ranges(part.begins, part.sizes)]
    return input_ids


def _tokenize(texts: list[str], tokenizer: Tokenizer, what: str, show_progress: bool) -> _Texts:
    ids, chars = [], []
    with tqdm(total=len(texts), desc=f"tokenizing {what}", unit="text", delay=2, disable=not show_progress) as bar:
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            encodings = tokenizer.encode_batch(texts[begin : begin + _TEXTS_AT_ONCE], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
            chars += [np.array(encoding.offsets, np.int32).reshape(-1, 2) for encoding in encodings]
            bar.update(len(encodings))
    lengths = np.array([len(text) for text in ids])
    return _Texts(np.concatenate(ids), np.concatenate(chars), np.cumsum(lengths) - lengths, lengths)


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers begins[i], ..., begins[i] + sizes[i] - 1 for each i, one range after another."""
    return np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def _cut(lengths: np.ndarray, room: np.ndarray, stride: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each window its example, and the token of the context that it begins with.

    A window begins every `stride` tokens, until one reaches the context's end.
    """
    counts = 1 + -(-np.maximum(lengths - room, 0) // stride)
    rows = np.repeat(np.arange(len(lengths)), counts)
    return rows, _ranges(np.zeros_like(counts), counts) * stride[rows]


def _owned(rows: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretch of the context, [begin, end), that each window owns.

    A token's score in a window is min(tokens before it, tokens after it) + size / 100, compared here in whole
    hundredths; of equals the earlier window owns it. Over the windows in order a token's score rises, then falls, so
    neighbours decide; and from some token on the later of two neighbours is the better one: bisection finds it.
    """
    ends = begins + sizes
    followed = np.flatnonzero(rows[1:] == rows[:-1])

    def score(window: np.ndarray, token: np.ndarray) -> np.ndarray:
        return 100 * np.minimum(token - begins[window], ends[window] - 1 - token) + sizes[window]

    low, high = begins[followed + 1], ends[followed]
    while (low < high).any():
        middle = (low + high) // 2
        later_is_better = score(followed + 1, middle) > score(followed, middle)
        low = np.where(later_is_better, low, np.minimum(middle + 1, high))
        high = np.where(later_is_better, middle, high)
    own_begins, own_ends = begins.copy(), ends.copy()
    own_begins[followed + 1] = own_ends[followed] = high
    return own_begins, own_ends


def _answer_tokens(
    examples: Sequence[Example], contexts: _Texts, context_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last context token that share a character with the first answer; 0 and -1 without an answer."""
    first_answers = [example.answers[0] if example.answers else Answer("", 0) for example in examples]
    begin = np.array([answer.start for answer in first_answers])
    end = begin + np.array([len(answer.text) for answer in first_answers])
    # Characters counted over all contexts, so that one search serves all.
    longest = int(max(contexts.chars.max(), end.max())) + 1
    offsets = np.repeat(np.arange(len(contexts.lengths)) * longest, contexts.lengths)
    first = np.searchsorted(contexts.chars[:, 1] + offsets, context_of * longest + begin, side="right")
    last = np.searchsorted(contexts.chars[:, 0] + offsets, context_of * longest + end, side="left") - 1
    answered = end > 0
    return (
        np.where(answered, first - contexts.begins[context_of], 0),
        np.where(answered, last - contexts.begins[context_of], -1),
    )


# --------------------------------------------------------------------------------------------------------------- cache
def load_squad(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    version_2: bool = False,
    need_answers: bool = True,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> tuple[list[Example], Features]:
    """`read_squad`, and `encode` or what it made of the same file, tokenizer and settings before.

    Args:
        cache_dir: folder for what was made, a file for each combination; None makes it anew and keeps nothing. Of many
            processes with one folder, the first encodes and the others wait for it.

    Raises:
        UsageError: as `read_squad` and `encode`; `cache_dir` cannot be written.
    """
    examples = read_squad(path, version_2, need_answers)
    settings = {"max_seq_length": max_seq_length, "doc_stride": doc_stride, "max_query_length": max_query_length}
    if cache_dir is None:
        return examples, encode(examples, tokenizer, **settings, show_progress=show_progress)
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    key = fingerprint([CACHE_VERSION, file_sha256(Path(path)), tokenizer_sha256, *settings.values()])
    cached = Path(cache_dir) / f"squad_{key}.npz"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with cached.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            features = _read_cache(cached)
            if features is None:
                features = encode(examples, tokenizer, **settings, show_progress=show_progress)
                _write_cache(cached, features)
    except OSError as error:
        raise UsageError(f"--cache_dir {cache_dir}: cannot be used ({error.strerror}); give another folder") from error
    return examples, features


def _read_cache(path: Path) -> Features | None:
    """The stored features, None where there are none or the file is damaged (each array has its checksum)."""
    try:
        with np.load(path) as arrays:
            return Features(**{field.name: arrays[field.name] for field in fields(Features)})
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, features: Features) -> None:
    arrays = {field.name: getattr(features, field.name) for field in fields(Features)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
