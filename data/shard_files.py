"""HDF5 shards on disk: what a folder of them holds, whether it fits the model, and one shard's arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from training.errors import UsageError

SUFFIXES = (".hdf5", ".h5")
FORMAT_VERSION = 1

# Arrays of each layout with their number of dimensions; the first axis is the sample. The second array named here
# is the one that tells the layouts apart. `next_sentence_labels` may be absent: see `_has_next_sentence`.
LAYOUTS: dict[str, dict[str, int]] = {
    "unmasked": {"input_ids": 2, "special_token_positions": 2, "next_sentence_labels": 1},
    "premasked": {
        "input_ids": 2,
        "masked_lm_positions": 2,
        "masked_lm_ids": 2,
        "input_mask": 2,
        "segment_ids": 2,
        "next_sentence_labels": 1,
    },
}
_SAME_SHAPE = (("input_ids", "input_mask"), ("input_ids", "segment_ids"), ("masked_lm_positions", "masked_lm_ids"))


@dataclass(frozen=True)
class ShardHeader:
    """What one shard says of itself, read without its data."""

    path: Path
    layout: str
    """A key of `LAYOUTS`."""
    count: int
    """Number of samples."""
    sequence_length: int
    has_next_sentence: bool
    predictions: int
    """Masked positions per sample of a premasked shard, 0 of an unmasked one."""
    attributes: Mapping[str, object]
    """File attributes; a foreign shard may have none."""


class ShardSet:
    """All shards below a folder, in the order of their relative paths. Only their headers are read.

    Attributes:
        files: list of paths.
        counts, offsets: samples per file, and the global row of each file's first sample, int64 [files].
        total: samples in all files.
        sequence_length: tokens per sample, the same in all files.
        layout: "unmasked" or "premasked".
        has_next_sentence: whether samples are sentence pairs with a label.
        vocab_size, mask_token_id, max_token_id: as the files' attributes say (the largest `max_token_id`), else None.
        vocabulary_sha256: of the vocabulary they were encoded with (`data.tokenization`), as they say, else None.
    """

    def __init__(self, input_dir: Path, flag: str = "--input_dir"):
        """Find and describe the shards.

        Args:
            input_dir: a folder, searched recursively for *.hdf5 and *.h5.
            flag: the command-line flag that errors name.

        Raises:
            UsageError: no folder, no shards, a file that is no shard, or files that do not belong together.
        """
        self.flag, self.token_types = flag, 2
        self.files = _find_shards(Path(input_dir), flag)
        self.headers = [_read_header(path, flag) for path in self.files]
        for field in ("layout", "sequence_length", "has_next_sentence", "predictions"):
            _one_value(self.headers, field, [getattr(header, field) for header in self.headers], flag)
        self.vocab_size = self._shared_attribute("vocab_size")
        self.mask_token_id = self._shared_attribute("mask_token_id")
        self.vocabulary_sha256 = self._shared_attribute("vocabulary_sha256")
        largest = [header.attributes["max_token_id"] for header in self.headers if "max_token_id" in header.attributes]
        self.max_token_id = int(max(largest)) if largest else None

        first = self.headers[0]
        self.layout = first.layout
        self.sequence_length = first.sequence_length
        self.has_next_sentence = first.has_next_sentence
        self.predictions = first.predictions
        self.counts = np.array([header.count for header in self.headers], np.int64)
        self.offsets = np.cumsum(self.counts) - self.counts
        self.total = int(self.counts.sum())

    def _shared_attribute(self, name: str):
        having = [header for header in self.headers if name in header.attributes]
        if not having:
            return None
        return _one_value(having, name, [header.attributes[name] for header in having], self.flag)

    def check(
        self, vocab_size: int, max_position_embeddings: int, max_predictions_per_seq: int, type_vocab_size: int = 2
    ) -> None:
        """Refuse shards that the model cannot read. Loads the first shard; later ones are checked by `load`.

        Raises:
            UsageError: token ids beyond `vocab_size`, pairs of texts where `type_vocab_size` is 1, sequences longer
                than the position table, or premasked shards with more predictions than `max_predictions_per_seq`.
        """
        self.token_types = type_vocab_size
        if self.sequence_length > max_position_embeddings:
            raise UsageError(
                f"{self.flag}: {self.files[0]} holds sequences of {self.sequence_length} tokens, more than the model's "
                f"max_position_embeddings {max_position_embeddings}; give shorter sequences or a longer position table"
            )
        if self.predictions > max_predictions_per_seq:
            raise UsageError(
                f"--max_predictions_per_seq {max_predictions_per_seq} is below the {self.predictions} predictions per "
                f"sequence of the premasked shard {self.files[0]}; give at least {self.predictions}"
            )
        for header in self.headers:
            for name, largest in (("max_token_id", vocab_size - 1), ("vocab_size", vocab_size)):
                if name in header.attributes and header.attributes[name] > largest:
                    raise UsageError(
                        f"{self.flag}: {header.path} says {name} {header.attributes[name]}, beyond the model's "
                        f"vocabulary of {vocab_size}; give the model configuration that the shards were encoded for"
                    )
        self.load(0, vocab_size)

    def load(self, index: int, vocab_size: int) -> dict[str, np.ndarray]:
        """Read shard `index` whole and check what it holds.

        Returns:
            The arrays of its layout (`LAYOUTS`), token ids as int32, the others as stored.

        Raises:
            UsageError: unreadable data, token ids outside 0..vocab_size-1, pairs that the model has no token type for,
                special token positions that are not increasing, or labels, masks and positions out of their range.
        """
        path = self.files[index]
        try:
            with h5py.File(path, "r", locking=False) as file:
                arrays = {name: file[name][()] for name in LAYOUTS[self.layout] if name in file}
        except (OSError, KeyError) as error:
            raise UsageError(f"{self.flag}: cannot read {path} ({_reason(error)}); encode it again") from error
        if len(arrays["input_ids"]) != self.counts[index]:
            raise UsageError(f"{self.flag}: {path} changed while it was in use; shards must stay as they are")
        for name in ("input_ids", "masked_lm_ids"):
            if name in arrays:
                self._check_token_ids(path, arrays[name], vocab_size)
                arrays[name] = arrays[name].astype(np.int32, copy=False)
        self._check_ranges(path, arrays)
        pairs = self.has_next_sentence or ("segment_ids" in arrays and arrays["segment_ids"].any())
        if pairs and self.token_types < 2:
            raise UsageError(
                f"{self.flag}: {path} holds pairs of texts, of token types 0 and 1; the model's type_vocab_size must "
                f"be at least 2, and is {self.token_types}"
            )
        return arrays

    def _check_token_ids(self, path: Path, ids: np.ndarray, vocab_size: int) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise UsageError(
                f"{self.flag}: {path} holds token id {high if high >= vocab_size else low}, outside the model's "
                f"vocabulary of {vocab_size}; give the model configuration that the shards were encoded for"
            )

    def _check_ranges(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        highest = {
            "next_sentence_labels": 1,
            "input_mask": 1,
            "segment_ids": 1,
            "special_token_positions": self.sequence_length - 1,
            "masked_lm_positions": self.sequence_length - 1,
        }
        for name in arrays.keys() & highest.keys():
            low, high = int(arrays[name].min()), int(arrays[name].max())
            if low < 0 or high > highest[name]:
                raise UsageError(
                    f"{self.flag}: {path}: {name} runs from {low} to {high}, must be 0..{highest[name]}; "
                    "encode the shard again"
                )
        positions = arrays.get("special_token_positions")
        if positions is not None and not (positions[:, 1:] > positions[:, :-1]).all():
            raise UsageError(
                f"{self.flag}: {path}: special_token_positions must increase within each sample "
                "([CLS], first [SEP], last [SEP]); encode the shard again"
            )
        if "input_mask" in arrays:
            self._check_padding(path, arrays["input_mask"], arrays["masked_lm_positions"])

    def _check_padding(self, path: Path, input_mask: np.ndarray, predicted: np.ndarray) -> None:
        """Tokens come first, at least one, and padding after them: what can be taken out without moving a token."""
        lengths = input_mask.sum(-1, dtype=np.int64)
        if not (lengths > 0).all() or (input_mask[:, 1:] > input_mask[:, :-1]).any():
            raise UsageError(f"{self.flag}: {path}: input_mask must be ones and then zeros; encode the shard again")
        if (predicted >= lengths[:, None]).any():
            raise UsageError(
                f"{self.flag}: {path}: masked_lm_positions must lie before the padding; encode the shard again"
            )


def _find_shards(input_dir: Path, flag: str) -> list[Path]:
    if not input_dir.is_dir():
        raise UsageError(f"{flag} {input_dir}: no such folder; give a folder of HDF5 shards (*.hdf5 or *.h5)")
    found = sorted(
        path.relative_to(input_dir)
        for path in input_dir.rglob("*")
        if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise UsageError(f"{flag} {input_dir}: holds no HDF5 shards (*.hdf5 or *.h5), also not in its subfolders")
    if len({"heldout" in path.parts for path in found}) == 2:
        raise UsageError(f"{flag} {input_dir}: mixes held-out shards with others; give one of its subfolders")
    return [input_dir / path for path in found]


def _read_header(path: Path, flag: str) -> ShardHeader:
    try:
        with h5py.File(path, "r", locking=False) as file:
            shapes = {
                name: array.shape
                for name, array in file.items()
                if isinstance(array, h5py.Dataset) and np.issubdtype(array.dtype, np.integer)
            }
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
    except OSError as error:
        raise UsageError(
            f"{flag}: {path} is no readable HDF5 file ({_reason(error)}); encode or copy it again"
        ) from error
    try:
        return _describe(path, shapes, attributes)
    except ValueError as error:
        raise UsageError(f"{flag}: {path} is no shard of BERT samples: {error}") from error


def _describe(path: Path, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, object]) -> ShardHeader:
    """Turn the shapes of a file's integer arrays into a header; ValueError says what is wrong with them."""
    layout = next((name for name, arrays in LAYOUTS.items() if list(arrays)[1] in shapes), None)
    if layout is None:
        expected = " or ".join(", ".join(arrays) for arrays in LAYOUTS.values())
        raise ValueError(f"needs integer arrays {expected}; has {', '.join(sorted(shapes)) or 'none'}")
    has_next_sentence = _has_next_sentence(layout, shapes)
    for name, dimensions in LAYOUTS[layout].items():
        if name not in shapes:
            if name == "next_sentence_labels" and not has_next_sentence:
                continue
            raise ValueError(f"the {layout} layout needs the integer array {name}")
        if len(shapes[name]) != dimensions:
            raise ValueError(f"{name} must have {dimensions} dimensions, has shape {shapes[name]}")
    arrays = {name: shapes[name] for name in LAYOUTS[layout] if name in shapes}
    count, sequence_length = arrays["input_ids"]
    for name, shape in arrays.items():
        if shape[0] != count:
            raise ValueError(f"input_ids has {count} samples, {name} has {shape[0]}")
    for one, other in _SAME_SHAPE:
        if other in arrays and arrays[one] != arrays[other]:
            raise ValueError(f"{one} {arrays[one]} and {other} {arrays[other]} must have the same shape")
    if layout == "unmasked" and arrays["special_token_positions"][1] not in (2, 3):
        raise ValueError(f"special_token_positions must be [N, 3] or [N, 2], is {arrays['special_token_positions']}")
    if count == 0 or sequence_length == 0:
        raise ValueError("it holds no samples")
    _check_attributes(attributes, layout=layout, num_samples=count, sequence_length=sequence_length)
    predictions = arrays["masked_lm_positions"][1] if layout == "premasked" else 0
    return ShardHeader(path, layout, count, sequence_length, has_next_sentence, predictions, attributes)


def _has_next_sentence(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Unmasked: three special tokens make a sentence pair, two a single sequence. Premasked: the labels say."""
    if layout == "unmasked":
        return shapes["special_token_positions"][-1:] != (2,)
    return "next_sentence_labels" in shapes


def _check_attributes(attributes: Mapping[str, object], **found: object) -> None:
    """The file's description of itself must agree with what was found in it (ValueError)."""
    if attributes.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(f"format_version {attributes['format_version']} is not {FORMAT_VERSION}, the one read here")
    for name in ("vocab_size", "mask_token_id", "max_token_id"):
        if name in attributes and not isinstance(attributes[name], int):
            raise ValueError(f"its attribute {name} must be a whole number, is {attributes[name]!r}")
    if not isinstance(attributes.get("vocabulary_sha256", ""), str):
        raise ValueError(f"its attribute vocabulary_sha256 must be text, is {attributes['vocabulary_sha256']!r}")
    for name, value in found.items():
        if name in attributes and attributes[name] != value:
            raise ValueError(f"its attribute {name} says {attributes[name]}, its arrays say {value}")


def _one_value(headers: list[ShardHeader], name: str, values: list, flag: str):
    """The value of `name` that all `headers` share; UsageError names two that differ."""
    for header, value in zip(headers, values, strict=True):
        if value != values[0]:
            raise UsageError(
                f"{flag}: {headers[0].path} has {name} {values[0]} but {header.path} has {value}; "
                "give a folder of shards that were encoded together"
            )
    return values[0]


def _plain(value: object) -> object:
    """An HDF5 attribute as a Python number or string where it is one."""
    if isinstance(value, np.generic):
        value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
