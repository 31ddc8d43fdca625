"""Small corpora for the tests of the data pipeline, with contents that a seed names."""

import random
from pathlib import Path

import h5py
import numpy as np

from data.encode import EncodeSettings, encode_corpus

WORDS = "the river old town bridge café naïve runs under slowly 1990 mill-wheel water's stones grey birds sing".split()
SETTINGS = EncodeSettings(sequence_lengths=(32,), dupe_factor=2, shard_megabytes=0.004)


def make_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Files of random sentences, one a line; the number of its document is the first word of each sentence."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for document in range(documents):
        sentences = (
            f"{document} {' '.join(rng.choices(WORDS, k=rng.randint(3, 12)))}." for _ in range(rng.randint(1, 9))
        )
        (folder / f"{document:03d}.txt").write_text("\n".join(sentences) + "\n")
    return folder


def encode(text: Path, output: Path, settings: EncodeSettings = SETTINGS, **kwargs) -> Path:
    """Encode formatted text with a vocabulary of 400; returns `output`."""
    encode_corpus(text, output, settings, vocab_size=400, **kwargs)
    return output


def read_shards(folder: Path) -> list[dict[str, np.ndarray]]:
    """The arrays of each shard, in the order of their names."""
    shards = []
    for path in sorted(folder.glob("shard_*.hdf5")):
        with h5py.File(path, "r") as file:
            shards.append({name: array[()] for name, array in file.items()})
    return shards


def joined(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all shards, one after the other."""
    shards = read_shards(folder)
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
