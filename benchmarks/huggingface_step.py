"""The step that Hugging Face's BertForPreTraining takes: what this suite's dense training is measured against.

As its users would train it for speed: torch.compile of the whole forward pass, SDPA, autocast, torch's fused AdamW. It
scores every token, not the masked ones alone. On a GPU its micro-step is replayed as a CUDA graph, as ours is, and the
host keeps a step ahead: both are more than its own trainer does.
"""

import importlib.util
import math
from collections import deque

import torch
from torch import Tensor

from benchmarks.training_step import SharedGraphs, random_batch
from configuration import BertConfig
from training.distributed import World
from training.engine import DTYPES, OnItsWay

IGNORED = -100  # the label of a token that is not predicted, in Hugging Face's models


def available() -> bool:
    return importlib.util.find_spec("transformers") is not None


def huggingface_model(config: BertConfig) -> torch.nn.Module:
    """Its BertForPreTraining of the same shape, with random weights."""
    import transformers  # not among this suite's requirements

    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    )
    sizes = {name: getattr(config, name) for name in names} | {"vocab_size": config.padded_vocab_size}
    own = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    return transformers.BertForPreTraining(own).train()


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """Labels of all tokens [K, B, S] from those of the masked positions."""
    return torch.full_like(batch["input_ids"], IGNORED).scatter(-1, batch["masked_positions"], batch["masked_labels"])


class HuggingFaceStep:
    """Takes the step of a random batch again and again, with a learning rate of 0; as `TrainingStep`."""

    def __init__(self, config: BertConfig, world: World, precision: str, sequences: int, length: int):
        self.config, self.world, self.sizes, self.graphs = config, world, (sequences, length), None
        self.device, self.dtype = world.device, DTYPES[precision]
        with self.device:
            self.model = huggingface_model(config)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=on_gpu)
        # Static shapes: else the second batch size would make it compile slower kernels for any size.
        self.loss = torch.compile(self._loss, dynamic=False) if on_gpu else self._loss

    def repeat(self, accumulation: int) -> None:
        batch = random_batch(self.config, accumulation, *self.sizes)
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        inputs |= {"labels": labels_of(batch), "next_sentence_label": batch["next_sentence_labels"]}
        self.batch = {n: t.pin_memory() if self.device.type == "cuda" else t for n, t in inputs.items()}

    def connect(self, pool: tuple[int, int] | None = None) -> SharedGraphs | None:
        if self.device.type == "cuda" and pool is not None:
            self.graphs = SharedGraphs(self._forward_and_backward, self.model.parameters(), pool)
        return self.graphs

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, self.dtype):
            return self.model(**batch).loss

    def _forward_and_backward(self, batch: dict[str, Tensor], summed: bool = False) -> Tensor:
        """On one process there is nothing to sum over."""
        loss = self.loss(batch) / self.accumulation
        loss.backward()
        return loss.detach()

    @property
    def accumulation(self) -> int:
        return len(self.batch["input_ids"])

    def take(self, count: int = 1) -> None:
        under_way: deque[OnItsWay] = deque()
        for _ in range(count):
            under_way.append(self._give_step())
            while len(under_way) > 1:
                self._wait_for(under_way.popleft())
        for loss in under_way:
            self._wait_for(loss)

    def _give_step(self) -> OnItsWay:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.batch.items()}
        total = torch.zeros((), device=self.device)
        for micro_step in range(self.accumulation):
            part = {name: tensor[micro_step] for name, tensor in batch.items()}
            if self.graphs is None:
                total += self._forward_and_backward(part)
            else:
                total += self.graphs(part, alone=self.accumulation == 1)
        loss = OnItsWay.of(total)
        self.optimizer.step()
        if self.graphs is None:
            self.optimizer.zero_grad()
        else:
            self.graphs.zero()
        return loss

    def _wait_for(self, loss: OnItsWay) -> None:
        if not math.isfinite(loss.read()):
            raise RuntimeError("the loss of Hugging Face's model is not finite")
