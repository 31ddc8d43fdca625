"""Encode formatted text to HDF5 shards of BERT's training sequences.

Read is what data.format wrote. Written are OUTPUT/vocab.txt (the given one, or one built from the train split) and, for
the i-th of --sequence_lengths, OUTPUT/phase<i>/{train,heldout}/shard_*.hdf5; with --premask OUTPUT/phase<i>_premasked/
instead. The text is cut into small stretches of whole documents that are dealt out at random to groups; a shard holds
one pass over one group, shuffled. What a shard holds depends on the text and the settings alone, not on --nproc.
A stage that was stopped goes on with the shards that are missing.
"""

import functools
import hashlib
import json
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tokenizers import Tokenizer

from data.corpora import Stretch, cut_file
from data.format import SPLITS, SUMMARY
from data.masking import MaskingRule, random_key, random_order
from data.samples import TokenizedText, build_samples, premask
from data.shard_files import FORMAT_VERSION
from data.stages import (
    READING_BYTES_PER_PROCESS,
    Stopwatch,
    atomic_path,
    check_folders,
    claim_outputs,
    fingerprint,
    read_manifest,
    run_tasks,
)
from data.tokenization import KINDS, SentenceEncoder, load_tokenizer, special_ids, vocabulary_sha256
from data.vocabulary import Vocabulary, VocabularySettings, check_vocabulary, settle_vocabulary
from training.errors import UsageError

_DOCUMENT_END = re.compile(rb"\n\n")
_SHARDS_WANTED = 16
_SMALLEST_SHARD_BYTES, _LARGEST_SHARD_BYTES = 1 << 20, 16 << 20
_STRETCHES_PER_SHARD = 32


@dataclass(frozen=True)
class EncodeSettings:
    """What the shards depend on, beside the text and the vocabulary."""

    sequence_lengths: tuple[int, ...] = (128, 512)
    """One for each phase."""
    dupe_factor: int = 5
    """Passes over the train split; the held-out split gets one."""
    short_seq_prob: float = 0.1
    next_sentence: bool = True
    """Sentence pairs; False: single sequences."""
    premask: bool = False
    masked_token_fraction: float = 0.15
    """Of premasked sequences."""
    shard_megabytes: float | None = None
    """Text of a shard; None: a 16th of the split, 1 to 16."""
    tokenizer: str = "wordpiece"
    lowercase: bool = True
    seed: int = 42

    def predictions(self, length: int) -> int:
        """Masked positions of a premasked sequence: 20 of 128 tokens and 80 of 512 at the usual 0.15."""
        return max(1, round(self.masked_token_fraction * length / 0.96))


class Group(NamedTuple):
    """The text of one shard: stretches of one split, dealt out at random."""

    split: str
    index: int
    stretches: list[Stretch]

    @property
    def size(self) -> int:
        return sum(stretch.end - stretch.start for stretch in self.stretches)


class Shard(NamedTuple):
    """One file to write."""

    path: Path
    length: int
    dupe: int
    """Which pass over the text it holds, from 0."""


class EncodeTask(NamedTuple):
    """One group and the shards to make of it."""

    group: Group
    shards: list[Shard]
    vocabulary: Vocabulary
    settings: EncodeSettings


# ---------------------------------------------------------------------------------------------------------------- text
def cut_text(task: tuple[Path, int]) -> tuple[str, list[tuple[Stretch, int]]]:
    """Cut a part of formatted text into stretches of whole documents.

    Args:
        task: the part, and about how many bytes a stretch is to have.

    Returns:
        The part's sha256, and each stretch with its number of documents.
    """
    path, stretch_bytes = task
    digest = hashlib.sha256()
    stretches = []
    with path.open("rb") as file:
        for stretch in cut_file(path, _DOCUMENT_END, stretch_bytes):
            content = file.read(stretch.end - stretch.start)
            digest.update(content)
            stretches.append((stretch, content.count(b"\n\n")))
    return digest.hexdigest(), stretches


def plan_groups(
    split: str, stretches: Sequence[tuple[Stretch, int]], shard_bytes: float, settings: EncodeSettings
) -> list[Group]:
    """Deal the stretches of a split out to groups of about `shard_bytes`, at random by the seed.

    Raises:
        UsageError: pairs are wanted, and the split has not two documents.
    """
    fewest = 2 if settings.next_sentence else 1
    if sum(documents for _, documents in stretches) < fewest:
        raise UsageError(
            f"--input: the {split} split has one document, and a random next sentence comes from another one: give "
            "more text, another --heldout_fraction when formatting (0 for none), or --no_next_sentence"
        )
    order = random_order(random_key(settings.seed, SPLITS.index(split)), len(stretches))
    total = sum(stretch.end - stretch.start for stretch, _ in stretches)
    count = min(len(stretches), max(1, round(total / shard_bytes)))
    while count > 1 and min(sum(stretches[i][1] for i in order[g::count]) for g in range(count)) < fewest:
        count //= 2
    return [Group(split, group, [stretches[i][0] for i in order[group::count]]) for group in range(count)]


def read_text(input_dir: Path, settings: EncodeSettings, nproc: int) -> tuple[list[Group], str]:
    """The groups of both splits, and a hash of all the text.

    Raises:
        UsageError: `input_dir` does not hold a whole formatted corpus.
    """
    summary = read_manifest(input_dir / SUMMARY)
    if summary is None:
        raise UsageError(f"--input {input_dir}: holds no (or half a) formatted corpus: run data.format --output first")
    groups, hashes = [], []
    for split in SPLITS:
        total = summary[split]["bytes"]
        if total == 0:
            continue
        wanted = min(max(total / _SHARDS_WANTED, _SMALLEST_SHARD_BYTES), _LARGEST_SHARD_BYTES)
        shard_bytes = settings.shard_megabytes * 1e6 if settings.shard_megabytes else wanted
        parts = sorted((input_dir / split).glob("part_*.txt"))
        tasks = [(path, max(1, int(shard_bytes / _STRETCHES_PER_SHARD))) for path in parts]
        sizes = [path.stat().st_size for path in parts]
        cut = run_tasks(cut_text, tasks, sizes, nproc, f"reading {split} text", READING_BYTES_PER_PROCESS)
        hashes.append([split, *(sha256 for sha256, _ in cut)])
        groups += plan_groups(split, [stretch for _, stretches in cut for stretch in stretches], shard_bytes, settings)
    return groups, fingerprint(hashes)


# -------------------------------------------------------------------------------------------------------------- shards
def encode_group(task: EncodeTask) -> None:
    """Write the shards of one group."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    settings = task.settings
    encoder, tokenizer, sha256 = _load_encoder(task.vocabulary, settings.lowercase, settings.tokenizer)
    special = special_ids(tokenizer)
    text = tokenize(task.group, encoder)
    for shard in task.shards:
        key = random_key(settings.seed, SPLITS.index(task.group.split), shard.length, shard.dupe, task.group.index)
        samples = build_samples(text, shard.length, settings.short_seq_prob, settings.next_sentence, special, key)
        attributes = {"layout": "unmasked", "vocab_size": tokenizer.get_vocab_size(), "mask_token_id": special.mask}
        attributes["vocabulary_sha256"] = sha256
        if settings.premask:
            rule = MaskingRule(
                settings.masked_token_fraction,
                settings.predictions(shard.length),
                attributes["vocab_size"],
                special.mask,
            )
            samples = premask(samples, rule, random_key(int(key[0]), 1))
            attributes["layout"] = "premasked"
        write_shard(shard.path, samples, attributes)


@functools.lru_cache(maxsize=1)
def _load_encoder(vocabulary: Vocabulary, lowercase: bool, kind: str) -> tuple[SentenceEncoder, Tokenizer, str]:
    tokenizer = load_tokenizer(vocabulary.path, lowercase, kind)
    return SentenceEncoder(tokenizer), tokenizer, vocabulary_sha256(tokenizer)


def tokenize(group: Group, encoder: SentenceEncoder) -> TokenizedText:
    """Read and tokenize the text of a group; sentences and documents without a token are left out."""
    pieces, sentences, documents = [], [], []
    for stretch in group.stretches:
        with stretch.path.open("rb") as file:
            file.seek(stretch.start)
            content = file.read(stretch.end - stretch.start).decode("utf-8")
        texts = [document.split("\n") for document in content.split("\n\n") if document]
        tokens, lengths = encoder.encode([sentence for document in texts for sentence in document])
        pieces.append(tokens)
        sentences.extend(lengths[lengths > 0].tolist())
        ends = np.cumsum([len(document) for document in texts])
        documents.extend(np.add.reduceat(lengths > 0, np.concatenate([[0], ends[:-1]]), dtype=np.int64).tolist())
    documents = [count for count in documents if count]
    return TokenizedText(np.concatenate(pieces), [0, *accumulate(sentences)], [0, *accumulate(documents)])


def write_shard(path: Path, samples: dict[str, np.ndarray], attributes: dict[str, object]) -> None:
    """Write one shard: the arrays, and what it says of itself."""
    input_ids = samples["input_ids"]
    num_samples, length = input_ids.shape
    largest = max(int(samples[name].max()) for name in ("input_ids", "masked_lm_ids") if name in samples)
    attributes = attributes | {
        "format_version": FORMAT_VERSION,
        "sequence_length": length,
        "num_samples": num_samples,
        "max_token_id": largest,
    }
    with atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        for name, array in samples.items():
            file.create_dataset(name, data=array)
        for name, value in attributes.items():
            file.attrs[name] = value


def is_complete(path: Path) -> bool:
    """Whether `path` is a shard that was written to its end."""
    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            return file["input_ids"].shape[0] == file.attrs["num_samples"]
    except (OSError, KeyError):
        return False


# --------------------------------------------------------------------------------------------------------------- stage
def encode_corpus(
    input_dir: Path,
    output: Path,
    settings: EncodeSettings,
    *,
    vocab_file: Path | None = None,
    vocab_size: int = 30522,
    nproc: int = 1,
    overwrite: bool = False,
) -> None:
    """Encode a formatted corpus into `output`; see the module's text.

    Raises:
        UsageError: no formatted corpus, a vocabulary that does not do, or an output of other settings.
    """
    groups, text_hash = read_text(input_dir, settings, nproc)
    train_files = [path for path in sorted((input_dir / "train").glob("part_*.txt")) if path.stat().st_size]
    wanted = VocabularySettings(settings.tokenizer, settings.lowercase, vocab_file, vocab_size)
    if vocab_file is not None:
        check_vocabulary(vocab_file, train_files[0], wanted)
    vocabulary = settle_vocabulary(output, wanted, train_files, text_hash, overwrite)

    watch = Stopwatch("encode", nproc)
    folders = phase_folders(output, settings)
    for folder, length in zip(folders, settings.sequence_lengths, strict=True):
        shards = [path for split in SPLITS for path in (folder / split).glob("shard_*.hdf5")]
        record = _record(settings, length, text_hash, vocabulary)
        claim_outputs(folder / "manifest.json", record, shards, overwrite)

    tasks = [task for task in plan_tasks(groups, folders, vocabulary, settings) if task.shards]
    names = ", ".join(map(str, folders))
    if not tasks:
        print(f"encode: {names} complete, nothing to do", flush=True)
        return
    sizes = [task.group.size for task in tasks]
    run_tasks(encode_group, tasks, sizes, nproc, "encoding")
    watch.report(sum(sizes), f"{sum(len(task.shards) for task in tasks)} shards in {names}")


def plan_tasks(
    groups: Sequence[Group], folders: Sequence[Path], vocabulary: Vocabulary, settings: EncodeSettings
) -> list[EncodeTask]:
    """For each group the shards that are still to be written: one for each length and each pass."""
    tasks = []
    for group in groups:
        passes = settings.dupe_factor if group.split == "train" else 1
        stride = sum(other.split == group.split for other in groups)
        shards = [
            Shard(folder / group.split / f"shard_{dupe * stride + group.index:05d}.hdf5", length, dupe)
            for folder, length in zip(folders, settings.sequence_lengths, strict=True)
            for dupe in range(passes)
        ]
        missing = [shard for shard in shards if not is_complete(shard.path)]
        tasks.append(EncodeTask(group, missing, vocabulary, settings))
    return tasks


def phase_folders(output: Path, settings: EncodeSettings) -> list[Path]:
    """The folder of each of the sequence lengths."""
    suffix = "_premasked" if settings.premask else ""
    return [output / f"phase{place + 1}{suffix}" for place in range(len(settings.sequence_lengths))]


def _record(settings: EncodeSettings, length: int, text_hash: str, vocabulary: Vocabulary) -> dict:
    """The settings that the shards of one length depend on."""
    record = {
        "format_version": FORMAT_VERSION,
        "text": text_hash,
        "vocabulary": vocabulary.sha256[:32],
        "sequence_length": length,
        **{name: value for name, value in vars(settings).items() if name != "sequence_lengths"},
    }
    if not settings.premask:
        del record["masked_token_fraction"]
    return json.loads(json.dumps(record))


# ---------------------------------------------------------------------------------------------------------------- main
def _lengths(words: str) -> tuple[int, ...]:
    """A comma list of sequence lengths."""
    if not re.fullmatch(r"\d+(,\d+)*", words) or min(lengths := [int(word) for word in words.split(",")]) < 8:
        raise ArgumentTypeError(f"must be whole numbers of at least 8 with commas between, as in 128,512, not {words}")
    return tuple(lengths)


def _make_parser(default: EncodeSettings) -> ArgumentParser:
    from training.flags import Parser, add_switch, real, whole

    parser = Parser(prog="data.encode", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder of formatted text, data.format's --output")
    add("--output", type=Path, required=True, help="folder for the vocabulary and the shards")
    add("--vocab_file", type=Path, help="vocabulary to use (default: build one from the train split)")
    add(
        "--vocab_size",
        type=whole(300),
        default=30522,
        help="entries of a vocabulary that is built (default 30522); with --vocab_file its own number or not given",
    )
    add("--tokenizer", choices=tuple(KINDS), default=default.tokenizer, help="kind of vocabulary (default wordpiece)")
    add_switch(parser, "--cased", "keep upper case and accents (default: lower-case the text)")
    add(
        "--sequence_lengths",
        type=_lengths,
        default=default.sequence_lengths,
        help="tokens of a sequence in phase 1, phase 2, ... (default 128,512)",
    )
    add("--dupe_factor", type=whole(1), default=default.dupe_factor, help="passes over the train split (default 5)")
    add("--short_seq_prob", type=real(0, 1), default=0.1, help="share of sequences that are shorter (default 0.1)")
    add_switch(parser, "--no_next_sentence", "single sequences instead of sentence pairs")
    add_switch(parser, "--premask", "write NVIDIA's premasked layout, to phase<i>_premasked")
    add("--masked_token_fraction", type=real(0, 1), default=0.15, help="of --premask's sequences (default 0.15)")
    add("--shard_megabytes", type=real(0.001), help="text of a shard (default: a 16th of the split, 1 to 16)")
    add("--seed", type=whole(0), default=default.seed, help="names all random choices (default 42)")
    add("--nproc", type=whole(1), default=1, help="processes (default 1)")
    add_switch(parser, "--overwrite", "replace a vocabulary and shards that were made with other settings")
    add_switch(parser, "--check", "end in silence where these flags do, in an error where they do not; write nothing")
    return parser


def _check_flags(args: Namespace, settings: EncodeSettings) -> None:
    """Refuse flags that no text can make right.

    Raises:
        UsageError: flags that contradict each other or have no effect, a --vocab_file that cannot be read, or an
            --output that cannot be written.
    """
    if "masked_token_fraction" in args.given and not args.premask:
        raise UsageError("--masked_token_fraction: has no effect without --premask: give both or neither")
    if args.vocab_file is not None:
        entries = load_tokenizer(args.vocab_file, settings.lowercase, settings.tokenizer).get_vocab_size()
        if "vocab_size" in args.given and args.vocab_size != entries:
            raise UsageError(
                f"--vocab_size {args.vocab_size}: --vocab_file {args.vocab_file} has {entries} entries: give one of "
                "the two"
            )
    check_folders("--output", *(folder / split for folder in phase_folders(args.output, settings) for split in SPLITS))


def main() -> None:
    from training.flags import parse_flags

    default = EncodeSettings()
    args = parse_flags(_make_parser(default), None)
    settings = EncodeSettings(
        next_sentence=not args.no_next_sentence,
        lowercase=not args.cased,
        **{name: getattr(args, name) for name in vars(default) if name not in ("next_sentence", "lowercase")},
    )
    os.environ["RAYON_NUM_THREADS"] = str(args.nproc)
    _check_flags(args, settings)
    if args.check:
        return
    encode_corpus(
        args.input, args.output, settings,
        vocab_file=args.vocab_file, vocab_size=args.vocab_size, nproc=args.nproc, overwrite=args.overwrite,
    )  # fmt: skip


if __name__ == "__main__":
    from training.flags import run_door

    run_door(main)
