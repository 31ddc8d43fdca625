"""HDF5 shards to whole optimizer steps, exactly reproducible.

The samples form one infinite global sequence: index g is sample number g % N of epoch g // N, and the order within
an epoch depends on (seed, epoch) alone. Step i of a run consumes the G samples from `start_sample + i*G` on, so the
position in the data is one number, the count of samples consumed, whatever the number of ranks and of loader workers:
a run resumes exactly by `start_sample`, and N ranks can resume what M ranks began. Masks depend on (seed, epoch,
sample). Nothing here keeps a random generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.loader import Batch, StepLoader, step_loader
from data.masking import IGNORED_LABEL, MaskingRule, mask_tokens, random_bits, random_key, random_order
from data.packing import pack_step
from data.shard_files import ShardSet
from training.errors import UsageError

__all__ = [
    "Batch",
    "SampleOrder",
    "ShardSet",
    "StepDataset",
    "StepLoader",
    "evaluation_dataset",
    "resolve_mask_token_id",
    "step_loader",
]

# Streams of random numbers that must not overlap.
_SHARD_ORDER, _ROW_ORDER, _MASKING = range(3)

# The shard that a step begins in and the one it goes on in.
_SHARDS_IN_MEMORY = 2

# Rows masked at a time: temporaries of 64k tokens stay in the processor's cache.
_TOKENS_AT_ONCE = 65536


class StepDataset(Dataset):
    """Map-style over optimizer steps: `dataset[i]` is everything this rank needs for step i of this run.

    Row j of the global batch belongs to micro-step k, rank r and slot s with j = (k*W + r)*B + s, so the rows of all
    ranks together are the same for any number of ranks W. There are K = ceil(G / (W*B)) micro-steps. Rows j >= G, and
    rows past `total_samples`, are padding: attention to position 0 only, every label -1.

    `dataset[i]` is a dict of int64 tensors, with S the sequence length and P `max_predictions_per_seq`:
        input_ids [K, B, S]             already masked; 0 is padding
        token_type_ids [K, B, S]        1 in the second sentence
        attention_mask [K, B, S]        1 on real tokens, 0 on padding
        masked_positions [K, B, P]      ascending, then 0 where unused
        masked_labels [K, B, P]         original ids, -1 where unused
        next_sentence_labels [K, B]     1 = random next sentence, 0 = the real one, -1 = none
    With `pack_multiple` it is what `data.packing.pack_step` makes of that.

    At most two shards are held in memory (per worker process).
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        global_batch_size: int,
        local_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        masked_token_fraction: float,
        max_predictions_per_seq: int,
        vocab_size: int,
        mask_token_id: int | None,
        steps: int,
        start_sample: int = 0,
        shuffle: bool = True,
        total_samples: int | None = None,
        pack_multiple: int | None = None,
    ):
        """Describe the steps; no data is read yet.

        Args:
            shards: the samples.
            global_batch_size: G, samples per optimizer step over all ranks.
            local_batch_size: B, samples per micro-step of one rank.
            rank, world_size: this rank, and W, the number of them.
            seed: names the sample order and the masks.
            masked_token_fraction: share of a sequence's maskable tokens that is predicted.
            max_predictions_per_seq: P, the most predictions of one sequence.
            vocab_size: random tokens are uniform over 0..vocab_size-1; larger ids in a shard are an error.
            mask_token_id: id of [MASK]; None is enough for premasked shards.
            steps: number of steps, the length of the dataset.
            start_sample: samples that earlier steps consumed.
            shuffle: False reads the samples in the order of the files.
            total_samples: end of the global sequence; None is no end.
            pack_multiple: let the sequences of a micro-step lie end to end, filled up to a multiple of so many tokens.

        Raises:
            UsageError: unmasked shards without a mask token id within the vocabulary.
        """
        if shards.layout == "unmasked" and (mask_token_id is None or not 0 <= mask_token_id < vocab_size):
            raise UsageError(f"the id of [MASK] is {mask_token_id}, must be within the vocabulary of {vocab_size}")
        self.shards = shards
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.micro_steps = -(-global_batch_size // (world_size * local_batch_size))
        self.rule = MaskingRule(masked_token_fraction, max_predictions_per_seq, vocab_size, mask_token_id)
        self.steps = steps
        self.start_sample = start_sample
        self.end_sample = total_samples
        self.pack_multiple = pack_multiple
        self._order = SampleOrder(shards.counts, seed, shuffle)
        self._masking_key = random_key(seed, _MASKING)
        self._loaded = _Recent(_SHARDS_IN_MEMORY)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        micro_step, slot = np.divmod(np.arange(self.micro_steps * self.local_batch_size), self.local_batch_size)
        row = (micro_step * self.world_size + self.rank) * self.local_batch_size + slot
        position = self.start_sample + step * self.global_batch_size + row
        real = row < self.global_batch_size
        if self.end_sample is not None:
            real &= position < self.end_sample
        gathered, keys = self._gather(position, np.flatnonzero(real))
        batch = _ASSEMBLE[self.shards.layout](gathered, keys, self.rule)
        leading = (self.micro_steps, self.local_batch_size)
        batch = {name: array.reshape(*leading, *array.shape[1:]) for name, array in batch.items()}
        if self.pack_multiple is not None:
            batch = pack_step(batch, self.pack_multiple, self.rule.masked_token_fraction)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _gather(self, position: np.ndarray, real: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The samples at `position` [R], of which only those numbered `real` exist, and their masking streams [R]."""
        gathered = _blank(self.shards, len(position))
        keys = np.zeros(len(position), np.uint64)
        for epoch, index, chosen, rows in self._order.locate(position[real]):
            arrays = self._loaded.get(index, partial(self.shards.load, index, self.rule.vocab_size))
            target = real[chosen]
            for name, array in gathered.items():
                array[target] = arrays[name][rows]
            epoch_key = random_bits(self._masking_key, np.array([epoch]))
            keys[target] = random_bits(epoch_key, self.shards.offsets[index] + rows)
        return gathered, keys


def evaluation_dataset(
    shards: ShardSet, *, local_batch_size: int, world_size: int, max_samples: int | None = None, **options
) -> StepDataset:
    """Every sample once (or the first `max_samples`), in the order of the files, always with the same masks.

    A step is one micro-step of every rank; the rows that fill up the last one are padding. `options` are the other
    arguments of `StepDataset`: rank, seed, masked_token_fraction, max_predictions_per_seq, vocab_size, mask_token_id.
    """
    total = shards.total if max_samples is None else min(max_samples, shards.total)
    global_batch_size = local_batch_size * world_size
    return StepDataset(
        shards,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        world_size=world_size,
        steps=-(-total // global_batch_size),
        shuffle=False,
        total_samples=total,
        **options,
    )


class SampleOrder:
    """The infinite global sequence of samples: shards in random order, samples in random order within each shard."""

    def __init__(self, counts: np.ndarray, seed: int, shuffle: bool):
        self.counts = counts
        self.total = int(counts.sum())
        self.seed = seed
        self.shuffle = shuffle
        self._rows = _Recent(_SHARDS_IN_MEMORY)

    def locate(self, position: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Find the samples at `position` [n], shard by shard in the order of reading.

        Yields:
            (epoch, shard, chosen, rows): the samples `position[chosen]` are rows `rows` of that shard in that epoch.
        """
        epochs, in_epoch = np.divmod(position, self.total)
        for epoch in np.unique(epochs).tolist():
            shard_order = self._shard_order(epoch)
            starts = np.cumsum(self.counts[shard_order]) - self.counts[shard_order]
            here = np.flatnonzero(epochs == epoch)
            places = np.searchsorted(starts, in_epoch[here], side="right") - 1
            for place in np.unique(places):
                chosen = here[places == place]
                shard = int(shard_order[place])
                rows = self._rows.get((epoch, shard), partial(self._row_order, epoch, shard))
                yield epoch, shard, chosen, rows[in_epoch[chosen] - starts[place]]

    def _shard_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.counts))
        return random_order(random_key(self.seed, _SHARD_ORDER, epoch), len(self.counts))

    def _row_order(self, epoch: int, shard: int) -> np.ndarray:
        count = int(self.counts[shard])
        if not self.shuffle:
            return np.arange(count)
        return random_order(random_key(self.seed, _ROW_ORDER, epoch, shard), count)


class _Recent:
    """The few values that were used last."""

    def __init__(self, size: int):
        self.size = size
        self.values: OrderedDict = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], object]):
        if key not in self.values:
            # Room first: the old value must be gone before the new one takes its memory.
            while len(self.values) >= self.size:
                self.values.popitem(last=False)
            self.values[key] = make()
        self.values.move_to_end(key)
        return self.values[key]


def _blank(shards: ShardSet, rows: int) -> dict[str, np.ndarray]:
    """Padding rows of every array that the shards hold: token 0 is attended to, nothing is predicted."""
    length = shards.sequence_length
    blank = {"input_ids": np.zeros((rows, length), np.int64)}
    if shards.has_next_sentence:
        blank["next_sentence_labels"] = np.full(rows, IGNORED_LABEL, np.int64)
    if shards.layout == "unmasked":
        blank["special_token_positions"] = np.zeros((rows, 3 if shards.has_next_sentence else 2), np.int64)
    else:
        blank["input_mask"] = np.zeros((rows, length), np.int64)
        blank["input_mask"][:, 0] = 1
        blank["segment_ids"] = np.zeros((rows, length), np.int64)
        blank["masked_lm_positions"] = np.zeros((rows, shards.predictions), np.int64)
        blank["masked_lm_ids"] = np.zeros((rows, shards.predictions), np.int64)
    return blank


def _assemble_unmasked(gathered: dict[str, np.ndarray], keys: np.ndarray, rule: MaskingRule) -> dict[str, np.ndarray]:
    """Derive the masks and segments from the special tokens' positions, then corrupt the tokens between them."""
    input_ids, special = gathered["input_ids"], gathered["special_token_positions"]
    rows, length = input_ids.shape
    position = np.arange(length)
    attended = position <= special[:, -1:]
    maskable = attended.copy()
    np.put_along_axis(maskable, special, False, axis=1)
    # Of a single sequence the second special token is the last: nothing is attended to behind it.
    second = attended & (position > special[:, 1:2])

    masked = np.empty((2, rows, rule.max_predictions_per_seq), np.int64)
    at_once = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        masked[:, part] = mask_tokens(input_ids[part], maskable[part], keys[part], rule)
    return {
        "input_ids": input_ids,
        "token_type_ids": second.astype(np.int64),
        "attention_mask": attended.astype(np.int64),
        "masked_positions": masked[0],
        "masked_labels": masked[1],
        "next_sentence_labels": gathered.get("next_sentence_labels", np.full(rows, IGNORED_LABEL, np.int64)),
    }


def _assemble_premasked(gathered: dict[str, np.ndarray], keys: np.ndarray, rule: MaskingRule) -> dict[str, np.ndarray]:
    """Pass masked samples through. Position 0 is [CLS], never masked: there it means an unused prediction."""
    rows, width = gathered["masked_lm_positions"].shape
    masked_positions = np.zeros((rows, rule.max_predictions_per_seq), np.int64)
    masked_positions[:, :width] = gathered["masked_lm_positions"]
    masked_labels = np.full_like(masked_positions, IGNORED_LABEL)
    used = gathered["masked_lm_positions"] > 0
    masked_labels[:, :width][used] = gathered["masked_lm_ids"][used]
    return {
        "input_ids": gathered["input_ids"],
        "token_type_ids": gathered["segment_ids"],
        "attention_mask": gathered["input_mask"],
        "masked_positions": masked_positions,
        "masked_labels": masked_labels,
        "next_sentence_labels": gathered.get("next_sentence_labels", np.full(rows, IGNORED_LABEL, np.int64)),
    }


_ASSEMBLE = {"unmasked": _assemble_unmasked, "premasked": _assemble_premasked}


def resolve_mask_token_id(shards: ShardSet, vocab_file: str | Path | None, input_dir: Path) -> int | None:
    """The id of [MASK]: from the model's `vocab_file`, else as the shards say, else from the vocab.txt beside them.

    Args:
        shards: premasked ones need no [MASK]: None.
        vocab_file: a vocabulary, one token a line, as the model configuration names it, or None.
        input_dir: vocab.txt is looked for here and in its three parent folders.

    Raises:
        UsageError: a vocabulary that is missing, lacks [MASK] or contradicts the shards; or none found.
    """
    if shards.layout == "premasked":
        return None
    if vocab_file is not None:
        mask_token_id = _mask_token_line(Path(vocab_file), "vocab_file")
        if shards.mask_token_id not in (None, mask_token_id):
            raise UsageError(
                f"vocab_file {vocab_file} has [MASK] at {mask_token_id}, the shards in {input_dir} say "
                f"{shards.mask_token_id}; give the vocabulary that the shards were encoded with"
            )
        return mask_token_id
    if shards.mask_token_id is not None:
        return shards.mask_token_id
    folder = Path(input_dir).resolve()
    for place in (folder, *folder.parents[:3]):
        if (place / "vocab.txt").is_file():
            return _mask_token_line(place / "vocab.txt", shards.flag)
    raise UsageError(
        f"{shards.flag} {input_dir}: the shards do not say which id [MASK] has; set vocab_file in the model "
        "configuration, or put the vocab.txt that they were encoded with into the folder"
    )


def _mask_token_line(path: Path, source: str) -> int:
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: cannot read the vocabulary {path}; give a text file, one token a line") from error
    if "[MASK]" not in tokens:
        raise UsageError(f"{source}: the vocabulary {path} has no line [MASK]; give the one of a BERT model")
    return tokens.index("[MASK]")
