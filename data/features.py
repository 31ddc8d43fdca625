"""From sentences and sentence pairs to a model's features, kept on disk so that they are encoded once."""

import hashlib
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.glue import Example
from training.errors import UsageError

Features = dict[str, np.ndarray]

FEATURES_VERSION = 1
"""Of the cached files: one more whenever the same text and settings would give other features."""

_CHUNK = 4096


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_seq_length: int,
    cache_dir: str | Path | None = None,
    show_progress: bool = False,
) -> Features:
    """Encode sentences as `[CLS] a [SEP]`, pairs as `[CLS] a [SEP] b [SEP]`.

    Args:
        tokenizer: from `data.tokenization.load_tokenizer`; it is not changed.
        max_seq_length: most tokens of an example, special ones included. The longer sentence of a pair loses its end
            first, until both are of one length.
        cache_dir: where the result is kept and looked for; None keeps nothing.

    Returns:
        `input_ids` [N, S] int32 (0 is padding), `token_type_ids` [N, S] int8 (1 for b and its [SEP]) and `lengths` [N]
        int32, the tokens of each; S is the greatest of them.

    Raises:
        UsageError: the cache cannot be written.
    """

    def build() -> Features:
        return _tokenize(examples, tokenizer, max_seq_length, show_progress)

    if cache_dir is None:
        return build()
    texts = (text for example in examples for text in (example.sentence1, example.sentence2))
    settings = (FEATURES_VERSION, max_seq_length, tokenizer.encode_special_tokens, tokenizer.to_str())
    return cached(Path(cache_dir), (*settings, *texts), build)


def _tokenize(examples: Sequence[Example], tokenizer: Tokenizer, max_seq_length: int, show_progress: bool) -> Features:
    truncating = Tokenizer.from_str(tokenizer.to_str())
    truncating.encode_special_tokens = tokenizer.encode_special_tokens  # the one setting that its text does not hold
    truncating.no_padding()
    truncating.enable_truncation(max_seq_length, strategy="longest_first")
    ids, types = [], []
    with tqdm(total=len(examples), desc="encoding", unit="examples", disable=not show_progress, delay=2) as bar:
        for first in range(0, len(examples), _CHUNK):
            part = examples[first : first + _CHUNK]
            texts = [a if b is None else (a, b) for _, a, b, _ in part]
            for encoding in truncating.encode_batch(texts):
                ids.append(np.array(encoding.ids, np.int32))
                types.append(np.array(encoding.type_ids, np.int8))
            bar.update(len(part))
    lengths = np.array([len(row) for row in ids], np.int32)
    return {"input_ids": _padded(ids, lengths), "token_type_ids": _padded(types, lengths), "lengths": lengths}


def _padded(rows: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Rows of `lengths` [N] as one array [N, S], 0 behind their ends."""
    array = np.zeros((len(rows), lengths.max(initial=0)), rows[0].dtype if rows else np.int32)
    array[np.arange(array.shape[1]) < lengths[:, None]] = np.concatenate(rows) if rows else 0
    return array


# --------------------------------------------------------------------------------------------------------------- cache
def cached(cache_dir: Path, parts: Iterable[object], build: Callable[[], Features]) -> Features:
    """What `build` gives, from `cache_dir` where it was built before.

    A damaged file is built again. Any number of processes may do this at once: each writes a file of its own, which
    takes its place whole.

    Args:
        parts: everything that the features depend on, as values whose `repr` tells them apart.

    Raises:
        UsageError: the cache cannot be read or written.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    path = cache_dir / f"features_{digest.hexdigest()[:32]}.npz"
    with _reported(cache_dir):
        features = _load(path)
    if features is None:
        features = build()
        with _reported(cache_dir):
            _save(path, features)
    return features


def _load(path: Path) -> Features | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
        return None


def _save(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            np.savez(file, **features)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _reported(cache_dir: Path) -> Iterator[None]:
    """Turn the file system's errors into one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--cache_dir {cache_dir}: cannot keep encoded examples there ({error.strerror}); "
            "name a folder with room, or give --skip_cache"
        ) from error
