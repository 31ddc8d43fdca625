"""Tokenizers: BERT's WordPiece (`wordpiece`, a vocab.txt) and byte-level BPE (`bpe`, a Hugging Face tokenizer.json)."""

import hashlib
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from data.stages import write_atomic
from training.errors import UsageError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = {"wordpiece": "vocab.txt", "bpe": "tokenizer.json"}
"""The kinds of tokenizer, and the name of the file that holds one."""

_PREFIX = "##"
_TRAINING_BYTES = 256_000_000
_LONGEST_ALPHABET = 1000


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens."""

    pad: int
    unknown: int
    cls: int
    sep: int
    mask: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK] in `tokenizer`."""
    return SpecialIds(*(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS))


# ------------------------------------------------------------------------------------------------------------- loading
def load_tokenizer(vocab_file: str | Path, lowercase: bool = True, kind: str = "wordpiece") -> Tokenizer:
    """A tokenizer as BERT's own: text cleaned, split at white space and punctuation, then into WordPieces.

    `encode(a, b)` gives `[CLS] a [SEP] b [SEP]` with type ids 0 and 1. Special tokens spelled out in a text are
    tokenized like any other text.

    Args:
        vocab_file: one entry a line (`wordpiece`), or a tokenizer.json (`bpe`).
        lowercase: lower-case the text and strip its accents; a `bpe` file says by itself what it does.
        kind: a key of KINDS.

    Raises:
        UsageError: no such file, no vocabulary in it, a special token missing, or a cased vocabulary with `lowercase`.
    """
    if kind not in KINDS:
        raise UsageError(f"tokenizer {kind}: must be one of {', '.join(KINDS)}")
    path = Path(vocab_file)
    if not path.is_file():
        raise UsageError(f"--vocab_file {path}: no such file; give a {KINDS[kind]} for the tokenizer {kind}")
    tokenizer = _load_wordpiece(path, lowercase) if kind == "wordpiece" else _load_bpe(path)
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise UsageError(f"--vocab_file {path}: lacks {', '.join(missing)}, which BERT needs; give a BERT vocabulary")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.encode_special_tokens = True
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[cls, sep]
    )
    return tokenizer


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """A hash of the entries in the order of their ids, however the file that held them ends its lines."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256("\n".join(token for token, _ in entries).encode()).hexdigest()


def read_vocabulary(path: Path) -> dict[str, int]:
    """Entries of a vocab.txt with their ids: the line numbers, from 0.

    Raises:
        UsageError: not text, empty, or an entry that occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--vocab_file {path}: is not UTF-8 text; give a vocab.txt with one entry a line") from error
    tokens = [line.rstrip("\r") for line in lines]
    while tokens and not tokens[-1]:
        tokens.pop()
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if not tokens or repeated:
        problem = f"holds {repeated[0]!r} more than once" if repeated else "is empty"
        raise UsageError(f"--vocab_file {path}: {problem}; give a vocab.txt with one entry a line, each once")
    return {token: index for index, token in enumerate(tokens)}


def _load_wordpiece(path: Path, lowercase: bool) -> Tokenizer:
    vocabulary = read_vocabulary(path)
    upper = [token for token in vocabulary if re.search("[A-Z]", token) and not token.startswith("[")]
    if lowercase and upper:
        raise UsageError(f"--vocab_file {path}: has upper-case entries ({upper[0]}): it is for cased text (--cased)")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    return tokenizer


def _load_bpe(path: Path) -> Tokenizer:
    try:
        content = path.read_text(encoding="utf-8")
        json.loads(content)["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--vocab_file {path}: is no Hugging Face tokenizer.json, which the tokenizer bpe needs"
        ) from error
    return Tokenizer.from_str(content)


class SentenceEncoder:
    """Tokenizes many sentences fast, on one core: each distinct word is tokenized once and then looked up.

    Both kinds of tokenizer treat the words between single spaces one by one, so this gives what `encode` on the whole
    sentence does.
    """

    _MOST_WORDS = 300_000

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: dict[str, bytes] = {}

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of sentences whose words are parted by single spaces.

        Returns:
            tokens [T] int32, all sentences one after the other, and their lengths [len(sentences)] int64.
        """
        words = [sentence.split(" ") for sentence in sentences]
        new = list(set(chain.from_iterable(words)).difference(self._ids))
        encodings = self._tokenizer.encode_batch(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._ids[word] = array("i", encoding.ids).tobytes()
        encoded = [b"".join(map(self._ids.__getitem__, sentence)) for sentence in words]
        if len(self._ids) > self._MOST_WORDS:
            self._ids.clear()
        lengths = np.array([len(ids) for ids in encoded], np.int64) // np.dtype(np.int32).itemsize
        return np.frombuffer(b"".join(encoded), np.int32), lengths


# ------------------------------------------------------------------------------------------------------------ building
def build_wordpiece_vocabulary(files: Sequence[Path], size: int, lowercase: bool, output: Path) -> int:
    """Build a WordPiece vocabulary and write it to `output`: the same text gives the same file, byte for byte.

    Args:
        files: text, one sentence a line; of more than 256 MB, evenly spread lines are taken.
        size: most entries, 300 or more. The special tokens and the most frequent letters are among them, a sixteenth
            of them or 100, but 1000 at most.
        lowercase: as in `load_tokenizer`.

    Returns:
        The number of entries, fewer than `size` where the text has no more word parts.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    letters = min(_LONGEST_ALPHABET, max(size // 16, min(size // 4, 100)))
    alphabet, continuing = _count_alphabet(files, normalizer, letters)
    first = [*SPECIAL_TOKENS, *(_PREFIX + letter for letter in continuing)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the continuing letters in the order of a hash table, another one in each run, and breaks ties
    # between merges by those numbers. Given as special tokens, they have their numbers before it begins.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
    )
    tokenizer.train_from_iterator(_training_lines(files), trainer)
    ids = tokenizer.get_vocab()
    learned = sorted(ids.keys() - set(first) - set(alphabet), key=ids.get)
    tokens = [*SPECIAL_TOKENS, *alphabet, *first[len(SPECIAL_TOKENS) :], *learned]
    write_atomic(output, "\n".join(tokens) + "\n")
    return len(tokens)


def _count_alphabet(files: Sequence[Path], normalizer, limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent letters, sorted, and those of them that occur inside words."""
    words = Counter()
    for line in tqdm(_training_lines(files), desc="counting letters", unit=" lines", unit_scale=True):
        words.update(normalizer.normalize_str(line).split())
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    letters, inside = Counter(), set()
    for word, count in words.items():
        for part, _ in split(word):
            inside.update(part[1:])
            for letter in part:
                letters[letter] += count
    by_frequency = sorted(letters, key=lambda letter: (-letters[letter], letter))
    alphabet = sorted(by_frequency[:limit])
    return alphabet, [letter for letter in alphabet if letter in inside]


def build_bpe_tokenizer(files: Sequence[Path], size: int, lowercase: bool, output: Path) -> int:
    """Build a byte-level BPE tokenizer and write it to `output`, a tokenizer.json; otherwise as for WordPiece."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    unicode = [normalizers.NFC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence(unicode)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
    )
    tokenizer.train_from_iterator(_training_lines(files), trainer)
    write_atomic(output, tokenizer.to_str(pretty=True))
    return tokenizer.get_vocab_size()


BUILDERS = {"wordpiece": build_wordpiece_vocabulary, "bpe": build_bpe_tokenizer}


def _training_lines(files: Sequence[Path]) -> Iterator[str]:
    """The sentences to learn from: all, or every n-th so that they come to about `_TRAINING_BYTES`."""
    step = -(-sum(path.stat().st_size for path in files) // _TRAINING_BYTES)
    place = 0
    for path in files:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                if place % step == 0:
                    yield line
                place += 1
