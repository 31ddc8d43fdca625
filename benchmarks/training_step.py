"""The optimizer step of run_pretraining.py and nothing else of a run, for the benchmarks that time it.

`TrainingStep` takes it with one batch of random sequences, again and again. Its learning rate is 0: weights stay as
they are however many steps are taken, and processes stay alike also where gradients are not averaged.
"""

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.common import Report, environment
from configuration import BertConfig
from data.loader import Batch
from data.packing import pack_step
from modeling import BertForPreTraining
from run_pretraining import PretrainingRun, parse_arguments
from sparse_ops import add_adapters
from training.assembly import build_model
from training.distributed import World
from training.engine import STEPS_AHEAD
from training.graphs import MicroStepGraphs
from training.pretraining import TakenStep
from training.sparsity import SparsityConfig, sparsity_from_flags

MODELS = {"dense": "none", "slope": "static-weight"}  # and their --pruned_matrix
NOT_STOPPED = SimpleNamespace(received=None)  # what `PretrainingRun.next_batch` asks for signals


def run_flags(model: str, **flags) -> SimpleNamespace:
    """The flags of run_pretraining.py: those given, for one of `MODELS`, and the defaults of the rest.

    Args:
        flags: `model_config_file`, and any others by name.
    """
    given = {"input_dir": "random", "output_dir": "none", "pruned_matrix": MODELS[model]} | flags
    return parse_arguments([word for name, value in given.items() for word in (f"--{name}", f"{value}")])


# -------------------------------------------------------------------------------------------------------------- batches
def predictions_of(length: int) -> int:
    """Tokens to predict of a sequence: 15%, in the recipe's numbers 20 of 128 and 80 of 512."""
    return -(-15 * length // 400) * 4


def prediction_flags(length: int) -> dict[str, float]:
    """The flags of run_pretraining.py that say so, for sequences all of whose predictions are used."""
    predictions = predictions_of(length)
    return {"max_predictions_per_seq": predictions, "masked_token_fraction": predictions / length}


def random_batch(
    config: BertConfig, accumulation: int, sequences: int, length: int, seed: int = 0
) -> dict[str, Tensor]:
    """A step of one rank, as `StepDataset` describes it: K = `accumulation`, B = `sequences` of S = `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    leading, predicted = (accumulation, sequences), predictions_of(length)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (*leading, *shape), generator=generator)

    places = torch.rand(*leading, length, generator=generator).argsort(-1)
    return {
        "input_ids": below(config.vocab_size, length),
        "token_type_ids": (torch.arange(length) * min(2, config.type_vocab_size) // length)
        .expand(*leading, -1)
        .contiguous(),
        "attention_mask": torch.ones(*leading, length, dtype=torch.int64),
        "masked_positions": places[..., :predicted].sort().values,
        "masked_labels": below(config.vocab_size, predicted),
        "next_sentence_labels": below(2),
    }


# ---------------------------------------------------------------------------------------------------------------- steps
class Stepping(PretrainingRun):
    """Takes steps as `PretrainingRun.train` does, from `loader`: no logs, evaluations and checkpoints."""

    loader: Iterator[Batch]
    tokens = 0.0
    """Real ones, of all steps taken so far and all ranks."""
    waited = 0.0
    """Seconds, for data."""

    def take(self, count: int = 1) -> None:
        """Take so many steps. On a GPU the last one's optimizer step may still be under way."""
        ahead = STEPS_AHEAD[self.world.device.type]
        under_way: deque[TakenStep] = deque()
        for _ in range(count):
            batch, counts = self.next_batch(self.loader, NOT_STOPPED)
            waited = getattr(self.loader, "wait_seconds", 0.0)
            self.tokens, self.waited = self.tokens + counts.tokens, self.waited + waited
            under_way.append(self.give_step(self.step + 1, batch, counts, 0.0, waited))
            while len(under_way) > ahead:
                self.losses_of(under_way.popleft())
        for taken in under_way:
            self.losses_of(taken)


class TrainingStep(Stepping):
    """The step on random sequences; call `repeat` before the first one.

    Args:
        args: from `run_flags`.
        rank: of the adapters; 0: none.
    """

    def __init__(self, args, config: BertConfig, world: World, sequence_length: int, rank: int = 0):
        self.args, self.config, self.world = args, config, world
        self.sparsity = replace(sparsity_from_flags(args), lora_rank=rank)
        self.sequence_length, self.step, self.samples = sequence_length, 0, 0
        self.build_engine(random_model(config, self.sparsity, world, args.seed), sequence_length)

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer

    def repeat(self, accumulation: int) -> None:
        """From now on every step is the same one of `accumulation` micro-steps."""
        sequences = self.args.local_batch_size
        self.args.global_batch_size = accumulation * sequences * self.world.size
        batch = random_batch(self.config, accumulation, sequences, self.sequence_length, seed=self.world.rank)
        if self.pack_multiple is not None:
            padded = {name: tensor.numpy() for name, tensor in batch.items()}
            packed = pack_step(padded, self.pack_multiple, self.args.masked_token_fraction)
            batch = {name: torch.from_numpy(array) for name, array in packed.items()}
        if self.world.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        self.loader = itertools.repeat(batch)

    def connect(self, pool: tuple[int, int] | None = None) -> "SharedGraphs | None":
        """Get ready for the first step; the graphs, where it runs as graphs, share `pool` with other models'."""
        self.engine.connect()
        if self.engine.graphs is not None and pool is not None:
            self.engine.graphs = SharedGraphs(self.engine._forward_and_backward, self.model.parameters(), pool)
            return self.engine.graphs
        return None


def seconds_of(step, count: int, world: World) -> float:
    """Seconds of one step: from the device being idle until it is again, `count` steps later."""
    wait(world)
    began = time.perf_counter()
    step.take(count)
    wait(world)
    return (time.perf_counter() - began) / count


def wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(steps: Mapping[str, object], rounds: int, sample_seconds: float, world: World) -> dict[str, list[float]]:
    """Seconds of a step of each candidate, a sample each a round; first each is warmed up, and its samples' length set.

    Args:
        steps: by name; each has `take(count)`.
    """
    counts = {}
    for name, step in steps.items():
        seconds_of(step, 1, world)
        counts[name] = max(1, round(sample_seconds / seconds_of(step, 1, world)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(seconds_of(step, counts[name], world))
    return samples


def random_model(config: BertConfig, sparsity: SparsityConfig, world: World, seed: int) -> nn.Module:
    """A new model on the world's device, where masks are chosen in a moment.

    Adapters' outputs are not 0, as they are when adapters join: products of zeros take less power, and so less time.
    """

    def make_model() -> nn.Module:
        with world.device:
            return BertForPreTraining(config)

    model = build_model(make_model, replace(sparsity, lora_rank=0), seed=seed, with_operands=False)
    if sparsity.lora_rank:
        for right in add_adapters(model, sparsity.lora_rank, seed)[1::2]:  # after each layer's left
            nn.init.normal_(right, std=0.1)
    return model


class SharedGraphs(MicroStepGraphs):
    """Graphs of several models that take turns, in one pool of memory, which holds what the largest of them needs.

    While `rehearsing`, nothing is captured: what would be runs without a graph, so that the memory this takes is given
    back before any model's graph holds the pool. Gradients of that are zeros, with which the optimizer makes its state.
    """

    def __init__(self, function, parameters, pool: tuple[int, int]):
        super().__init__(function, parameters, pool)
        self.rehearsing = True

    def __call__(self, batch: Batch, summed: bool = False, alone: bool = False) -> Tensor:
        if self.rehearsing:
            self.capture(batch)
            return torch.zeros((), device=next(iter(batch.values())).device)
        return super().__call__(batch, summed, alone)

    def capture(self, batch: Batch, summed: bool = False, alone: bool = False) -> None:
        if not self.rehearsing:
            super().capture(batch, summed, alone)
            return
        super().rehearse({name: tensor.clone() for name, tensor in batch.items()})
        for parameter, reached in zip(self.parameters, self.reached, strict=True):
            parameter.grad = torch.zeros_like(parameter) if reached else None

    def rehearse(self, inputs: Batch) -> None:
        """Done before anything was captured."""


# -------------------------------------------------------------------------------------------------------------- results
def machine(world: World) -> dict:
    """What a reader has to know of the machine; CPUs where there is no GPU."""
    if world.device.type == "cuda":
        return environment()
    nothing = dict.fromkeys(("driver", "power_limit_watts", "max_sm_mhz", "cuda", "cusparselt"))
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    name = f"no GPU but {os.cpu_count()} processors"
    return nothing | {"date": now, "command": own_command(), "gpu": name, "torch": torch.__version__}


def own_command() -> str:
    return " ".join(["python3", *sys.argv])


class MachineReport(Report):
    """A report that is told which machine measured, which may have no GPU."""

    def __init__(self, name: str, args, known: dict):
        self.output, self.began = args.output, time.monotonic()
        self.content = {"benchmark": name, "environment": known, "settings": vars(args), "rows": []}
        print(self._heading(), flush=True)
