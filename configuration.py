"""What a BERT is: its sizes, and what its tokenizer and heads are."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch.nn.functional as F

from training.errors import UsageError
from training.flags import read_json

ACTIVATIONS = {
    "gelu": F.gelu,  # exact; not the approximation through tanh
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

TOKENIZERS = ("wordpiece", "bpe")
# Tensor cores want dimensions that are multiples of 8; 30,522 is not one.
VOCAB_MULTIPLE = 8


@dataclass(frozen=True)
class BertConfig:
    """A BERT's shape, and what its tokenizer and heads are. A wrong value is a UsageError that names the key."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    # The suite's own keys: they do not change a layer of the encoder.
    lowercase: bool = True
    model_name: str = "bert"
    next_sentence: bool = True  # False: no pooler and no sentence-pair head while pretraining
    tokenizer: str = "wordpiece"
    vocab_file: str | None = None  # None: the one that lies beside the data
    vocabulary_sha256: str | None = None  # of its entries, as the shards that the model was trained on say

    def __post_init__(self):
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), field.type)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be below 1")
        for name, choices in (("hidden_act", ACTIVATIONS), ("tokenizer", TOKENIZERS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of num_attention_heads, "
                f"which is {self.num_attention_heads}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embeddings and of the decoder: vocab_size rounded up to a multiple of 8."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def check_vocabulary(self, path: str | Path, entries: int, sha256: str) -> None:
        """Refuse a vocabulary file that the model was not trained with, as far as is known.

        Fewer entries than embeddings are right where the model was padded, or a small corpus gave fewer than asked for.

        Raises:
            UsageError: it has more entries than the model has embeddings, or others than the model was trained with.
        """
        if entries > self.vocab_size:
            raise UsageError(
                f"--vocab_file {path}: holds {entries} entries; the model's vocab_size is {self.vocab_size}, "
                "so it must be the vocabulary that the model was trained with"
            )
        if self.vocabulary_sha256 not in (None, sha256):
            raise UsageError(
                f"--vocab_file {path}: has other entries than the vocabulary that the model was trained with; "
                "give that one"
            )

    def check_pairs(self, source: str) -> None:
        """Raise UsageError, starting with `source`, where there is no second token type for a pair's second text."""
        if self.type_vocab_size < 2:
            raise UsageError(
                f"{source}: pairs of texts are of token types 0 and 1; the model's type_vocab_size must be at least 2, "
                f"and is {self.type_vocab_size}"
            )

    @classmethod
    def from_dict(cls, values: dict, source: str = "model config") -> "BertConfig":
        """Raise UsageError, starting with `source`, for an unknown key, a missing size or a value out of range."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(f"{source}: unknown key {key!r}; the keys are {', '.join(sorted(known))}")
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if key not in values:
                raise UsageError(f"{source}: the key {key!r} is missing")
        try:
            return cls(**values)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | Path, flag: str | None = None) -> "BertConfig":
        """Raise UsageError, starting with `flag` and `path`, where it is no JSON object or from_dict refuses it."""
        return cls.from_dict(read_json(path, flag), source=f"{path}" if flag is None else f"{flag} {path}")

    def to_dict(self) -> dict:
        return asdict(self)


def _check_value(name: str, value, kind) -> None:
    accepted = int | float if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} is {value!r}: it must be of type {getattr(kind, '__name__', kind)}")
    if kind is int and value < 1:
        raise UsageError(f"{name} is {value}: it must be 1 or more")
    if kind is float and not 0 <= value < float("inf"):
        raise UsageError(f"{name} is {value}: it must be 0 or more, and finite")
