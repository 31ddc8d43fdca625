"""The fine-tuning doors' one loop: train, resume, predict, on any number of processes."""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.masking import random_key, random_order
from data.packing import pack_examples
from data.stages import write_atomic
from modeling import Packing
from optimization import learning_rate
from sparse_ops import check_adapter_rank
from training.assembly import build_model
from training.checkpoint import (
    checkpoint_path,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from training.distributed import OutputLock, StopSignal, World, gather_objects, process_group, sum_over_ranks
from training.engine import STEPS_AHEAD, OnItsWay, engine_for, seed_dropout
from training.errors import UsageError
from training.execution import settle_execution
from training.finetune_setup import Setup
from training.logs import Logger, open_json_lines
from training.sparsity import SparsityConfig

Batch = dict[str, Tensor]
METRICS = ["step", "epoch", "step_loss", "average_loss", "learning_rate", "sequences_per_second", "tokens_per_second"]
LOSING_SCORE = -1e4  # of positions in the padding
LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this, which tensor cores like
GRAPH_LENGTH_MULTIPLE = 64  # to fewer lengths where each takes a CUDA graph of its own
PACKED_SHAPES = 32  # that batches of one size come in without padding; in pretraining, with more steps, 64
# Of a batch's places, those that are none of padding: what sparse products are chosen by, and tuned for too. Windows of
# SQuAD v1.1 fill 47% of 384 tokens; batches of short sentences fill less of 128.
USUAL_SHARE, SHARES_OF_TOKENS = 0.5, (1.0, 0.75, 0.25)


class Features(Protocol):
    """Encoded examples."""

    lengths: np.ndarray
    """Tokens of each example, [N]."""

    def batch(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """`input_ids`, `token_type_ids`, `attention_mask` [B, length] int64 of some examples, and their labels [B]."""


class LabelledFeatures:
    """Features from arrays of `data.features.encode`, with the labels of a task, [N], or none."""

    def __init__(self, arrays: dict[str, np.ndarray], labels: np.ndarray | None = None):
        self.arrays, self.labels, self.lengths = arrays, labels, arrays["lengths"]

    def batch(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        def cut(name: str) -> np.ndarray:
            found = self.arrays[name][rows, :length].astype(np.int64)
            return np.pad(found, ((0, 0), (0, length - found.shape[1])))

        batch = {name: cut(name) for name in ("input_ids", "token_type_ids")}
        batch["attention_mask"] = (np.arange(length) < self.lengths[rows, None]).astype(np.int64)
        return batch if self.labels is None else batch | {"labels": self.labels[rows]}


@dataclass(frozen=True)
class _Given:
    """A step that the device was given, and may still be working on."""

    step: int
    rate: float
    loss: OnItsWay
    """This rank's share."""
    examples: int
    tokens: int


class FineTuning:
    """One fine-tuning run on this rank: `train`, then `predict` as often as needed.

    Args:
        make_model: builds the dense model with its task head.
        losses: (model outputs, batch) -> loss of each example, [B].
        directory: of this run's checkpoints and logs.

    Raises:
        UsageError: when the checkpoint, or adapters that are new, do not fit the model; or when it lacks the task
            head that nothing would train.
    """

    def __init__(
        self,
        args,
        world: World,
        setup: Setup,
        make_model: Callable[[], nn.Module],
        losses: Callable[[Tensor | tuple[Tensor, ...], Batch], Tensor],
        directory: Path,
        seed: int,
        report: Callable[[str], None],
    ):
        self.args, self.world, self.setup, self.losses = args, world, setup, losses
        self.directory, self.seed, self.report = directory, seed, report
        self.checkpoints = directory / "finetune_ckpts"
        self.notes: list[str] = []  # what the log begins with: only a run that has begun speaks
        model = build_model(
            *(make_model, setup.sparsity, setup.source),
            seed=seed,
            mask_init=args.mask_init,
            report=self.notes.append,
            with_operands=False,
        )
        if not setup.source.sparsity.lora_rank:  # else they are there already, whatever their rank
            check_adapter_rank(model, setup.sparsity.lora_rank)
        if self.notes and not args.do_train:
            raise UsageError(f"--init_checkpoint: {self.notes[0]}; fine-tune it first, with --do_train")
        if not args.do_train:
            model.requires_grad_(False)
        if args.compile and not self.on_gpu:
            raise UsageError("--compile: only what a GPU runs is compiled; leave it out")
        sequences = math.ceil(args.train_batch_size / args.gradient_accumulation_steps / world.size)
        self.execution = settle_execution(
            *(args, setup.config, setup.sparsity, world),
            sequences=sequences,
            length=args.max_seq_length,
            compiled=args.compile,
            shapes=PACKED_SHAPES,
            usual_share=USUAL_SHARE,
            shares=SHARES_OF_TOKENS,
        )
        # Not a method: a cycle would keep this run's memory on the device when the next seed's begins.
        objective = partial(_objective, losses, args.max_seq_length, self.execution.short_attention)
        self.engine = engine_for(model, self.execution, world, args, objective)
        self.step, self.total_steps, self.loss_total = 0, 0, 0.0

    @property
    def on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def plan(self, total_steps: int) -> None:
        """Set the length of the run, and go on from the newest checkpoint of its directory if there is one."""
        self.total_steps = total_steps
        if total_steps:
            self._resume()

    def _resume(self) -> None:
        newest = newest_checkpoint(self.checkpoints, self.report)
        if newest is None:
            return
        step, _, checkpoint = newest
        now = self._defining_arguments()
        for name, value in checkpoint["arguments"].items():
            if value != now.get(name):
                raise UsageError(
                    f"--output_dir {self.directory}: holds a run with {name} {value}, not {now.get(name)}; "
                    "give another folder"
                )
        saved, asked = SparsityConfig.from_dict(checkpoint["sparsity"]), self.setup.sparsity
        if saved != asked:
            raise UsageError(
                f"--output_dir {self.directory}: holds a run of another sparsity ({_described(saved)}) than this one "
                f"({_described(asked)}); give another folder"
            )
        self.engine.model.load_state_dict(checkpoint["model"])
        self.engine.load_state_dict(checkpoint)
        self.step, self.loss_total = step, checkpoint["loss_total"]
        self.notes = [f"{self.directory}: goes on after step {step} of {self.total_steps}"]

    def _defining_arguments(self) -> dict:
        """The flags that make it the same run when it is started again."""
        names = ("task_name", "train_file", "version_2_with_negative", "doc_stride", "max_query_length")
        names += ("init_checkpoint", "mask_init", "max_seq_length", "train_batch_size", "precision")
        names += ("optimizer", "learning_rate", "lr_decay", "warmup_proportion", "weight_decay", "max_grad_norm")
        names += ("lora_weight_decay", "lora_lr_scale")
        found = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        return found | {"seed": self.seed, "total_steps": self.total_steps}

    def train(self, features: Features, logger: Logger, stop: StopSignal) -> bool:
        """Take the steps that are left. Returns whether the run is finished, and not stopped by a signal."""
        for line in self.notes + self.execution.notes:
            logger.text(line)
        logger.start_bar(1, self.total_steps, done=self.step, disable=self.args.disable_progress_bar)
        self.engine.model.train()
        under_way: deque[_Given] = deque()
        self.clock = time.perf_counter()
        for step in range(self.step + 1, self.total_steps + 1):
            (stopped,) = sum_over_ranks(self.world, [float(stop.received is not None)])
            if stopped:
                self._finish_steps(under_way, features, logger)
                self.save()
                logger.text(f"stopped after step {self.step}; run again to go on")
                return False
            under_way.append(self._give_step(step, features))
            saves = step % self.args.num_steps_per_checkpoint == 0 or step == self.total_steps
            ahead = 0 if saves else STEPS_AHEAD[self.world.device.type]
            self._finish_steps(under_way, features, logger, but=ahead)
            if saves:
                self.save()
                self.clock = time.perf_counter()
        return True

    def training_metrics(self) -> dict[str, float]:
        """What training alone measures; empty where none was."""
        return {"steps": self.step, "average_loss": self.loss_total / self.step} if self.step else {}

    def _finish_steps(self, under_way: deque[_Given], features: Features, logger: Logger, but: int = 0) -> None:
        """Wait for the losses of all that are under way but the last `but`, and log them."""
        while len(under_way) > but:
            given = under_way.popleft()
            (loss,) = sum_over_ranks(self.world, [given.loss.read()])
            self.loss_total += loss
            now = time.perf_counter()
            seconds, self.clock = now - self.clock, now
            metrics = {
                "epoch": (given.step - 1) // self._steps_per_epoch(len(features.lengths)),
                "step_loss": loss,
                "average_loss": self.loss_total / given.step,
                "learning_rate": given.rate,
                "sequences_per_second": given.examples / seconds,
                "tokens_per_second": given.tokens / seconds,
            }
            logger.step(given.step, metrics)
            if given.step % self.args.log_freq == 0 or given.step == self.total_steps:
                average = f"{metrics['average_loss']:.4f}"
                logger.text(f"step {given.step} of {self.total_steps}: loss {loss:.4f}, average {average}")

    def _steps_per_epoch(self, examples: int) -> int:
        return math.ceil(examples / self.args.train_batch_size)

    def _rows(self, step: int, examples: int) -> np.ndarray:
        """The examples of one optimizer step: a function of (seed, step) alone. An epoch's last step may have fewer."""
        epoch, place = divmod(step - 1, self._steps_per_epoch(examples))
        order = random_order(random_key(self.seed, epoch), examples)
        return order[place * self.args.train_batch_size : (place + 1) * self.args.train_batch_size]

    def _give_step(self, step: int, features: Features) -> _Given:
        """Give the device one optimizer step, the same whatever the number of ranks and micro-steps."""
        rate = learning_rate(
            step,
            base=self.args.learning_rate,
            total_steps=self.total_steps,
            warmup_proportion=self.args.warmup_proportion,
            decay=self.args.lr_decay,
        )
        rows = self._rows(step, len(features.lengths))
        total, micro_steps = torch.zeros((), device=self.world.device), self.args.gradient_accumulation_steps
        parts = np.array_split(rows, micro_steps * self.world.size)
        for micro_step in range(micro_steps):
            part = parts[micro_step * self.world.size + self.world.rank]
            # A rank without an example still takes part in the averaging, with one that counts nothing.
            batch = self._training_batch(features, part if len(part) else rows[:1])
            seed_dropout(self.seed, step, micro_step, self.world.rank)
            batch |= self._on_device({"share": np.float32((len(part) > 0) / len(rows))})
            self.engine.prepare(partial(self._fullest, batch, features, parts[0]), micro_steps)
            total += self.engine.micro_step(batch, micro_step, micro_steps)
        loss = OnItsWay.of(total)
        self.engine.step(rate)
        self.step = step
        return _Given(step, rate, loss, len(rows), int(features.lengths[rows].sum()))

    def _training_batch(self, features: Features, rows: np.ndarray, full: bool = False) -> Batch:
        """End to end, or padded to one of a few lengths.

        Args:
            full: as if each row were as long as `--max_seq_length` allows.
        """
        most = self.args.max_seq_length
        if self.execution.pack_multiple is None:
            length_multiple = most if full else GRAPH_LENGTH_MULTIPLE if self.engine.captured else LENGTH_MULTIPLE
            return self._batch(features, rows, length_multiple)
        arrays = features.batch(rows, most)
        if full:
            arrays["attention_mask"] = np.ones_like(arrays["attention_mask"])
        return self._on_device(pack_examples(arrays, self.execution.pack_multiple))

    def _batch(self, features: Features, rows: np.ndarray, multiple: int = LENGTH_MULTIPLE) -> Batch:
        """Padded to the next multiple of the longest of the rows, but to no more than `--max_seq_length`."""
        return self._on_device(padded_batch(features, rows, self.args.max_seq_length, multiple))

    def _fullest(self, like: Batch, features: Features, rows: np.ndarray) -> Batch:
        return self._training_batch(features, rows, full=True) | {"share": like["share"]}

    def _on_device(self, arrays: dict[str, np.ndarray]) -> Batch:
        """Without waiting for the device, as a copy from pageable memory would."""
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
        if self.on_gpu:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def predict(self, features: Features, batch_size: int, width: int, what: str) -> np.ndarray:
        """The outputs for every row, fp32 [N, outputs, width]; every rank returns all of them.

        A model that returns [B, C] gives [N, 1, C]; one that returns a pair of [B, S] gives [N, 2, width], padded with
        a score that loses against any other.
        """
        model, rows = self.engine.model.eval(), np.argsort(-features.lengths, kind="stable")
        batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        mine, found = batches[self.world.rank :: self.world.size], []
        quiet = self.args.disable_progress_bar or not self.world.is_main
        for part in tqdm(mine, desc=what, unit="batch", disable=quiet):
            # Not compiled for it: each length would be another compilation.
            with torch.compiler.set_stance("force_eager"), self.engine.autocast():
                batch = self._batch(features, part)
                outputs = _outputs(model, batch, batch["attention_mask"])
            outputs = torch.stack(outputs if isinstance(outputs, tuple) else (outputs,), 1)
            found.append((part, outputs.float().cpu().numpy()))
        everything = [pair for pairs in gather_objects(self.world, found) for pair in pairs]
        results = np.full((len(rows), everything[0][1].shape[1], width), LOSING_SCORE, np.float32)
        for part, outputs in everything:
            results[part, :, : outputs.shape[2]] = outputs
        return results

    def save(self) -> None:
        path = checkpoint_path(self.checkpoints, self.step)
        if self.args.skip_checkpoint or not self.world.is_main or path.exists():
            return
        state = {
            "step": self.step,
            "model_config": self.setup.config.to_dict(),
            "sparsity": self.setup.sparsity.to_dict(),
            "loss_total": self.loss_total,
            "arguments": self._defining_arguments(),
        }
        save_checkpoint(path, state | self.engine.state_dict())
        remove_old_checkpoints(self.checkpoints, keep=1, phase_start=0, newest=self.step)


def _described(sparsity: SparsityConfig) -> str:
    """What differs from a dense model."""
    plain = SparsityConfig().to_dict()
    return ", ".join(f"{k} {v}" for k, v in sparsity.to_dict().items() if v != plain[k]) or "dense"


def _outputs(model: nn.Module, batch: Batch, attention: Packing | Tensor) -> Tensor | tuple[Tensor, ...]:
    return model(batch["input_ids"], batch["token_type_ids"], attention)


def _objective(losses: Callable, longest: int, short: bool, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of the mean loss over the step's examples, twice.

    Args:
        losses: the job's.
        longest, short: see `Packing`.
    """
    attention = batch["attention_mask"]
    if "boundaries" in batch:
        firsts = batch["boundaries"][: len(attention)]
        attention = Packing(batch["boundaries"].int(), firsts, batch["positions"], longest, short)
    share = losses(_outputs(model, batch, attention), batch).sum() * batch["share"]
    return share, share


def padded_batch(features: Features, rows: np.ndarray, most: int, multiple: int) -> dict[str, np.ndarray]:
    """The rows, cut to the next multiple of the longest of them; `most` is `--max_seq_length`."""
    longest = -(-int(features.lengths[rows].max()) // multiple) * multiple
    return features.batch(rows, min(longest, most))


def total_steps(args, examples: int) -> int:
    """Optimizer steps that `--max_steps` or `--num_train_epochs` mean."""
    return (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(args.num_train_epochs * math.ceil(examples / args.train_batch_size))
    )


# ----------------------------------------------------------------------------------------------------------- whole jobs
class Job(Protocol):
    """What a door adds to the loop."""

    name: str
    """Of the task, in the results."""

    def make_model(self) -> nn.Module: ...

    def losses(self, outputs: Tensor | tuple[Tensor, ...], batch: Batch) -> Tensor: ...

    def load(self) -> Features | None:
        """Read and encode all data; return the training set, None without `--do_train`."""

    def finish(self, tuning: FineTuning) -> dict[str, float]:
        """Predict, write and score with the trained model; the metrics, empty without `--do_eval`."""


def run_job(args, world: World, setup: Setup, job: Job, report: Callable[[str], None]) -> None:
    """Train and finish once for each seed; rank 0 writes `OUTPUT_DIR/eval_results.json` with mean and spread.

    Everything that can be wrong with flags, checkpoint and data is found before the ranks join.
    """
    output_dir, results = Path(args.output_dir), {}
    if args.precision == "fp16" and world.device.type == "cpu":
        report("--fp16 runs as asked, slowly on a CPU: --precision bf16 is the fast one here")

    def tuning_of(seed: int) -> FineTuning:
        directory = output_dir if len(args.seed_list) == 1 else output_dir / f"seed_{seed}"
        return FineTuning(args, world, setup, job.make_model, job.losses, directory, seed, report)

    tuning = tuning_of(args.seed_list[0])
    features = job.load()
    steps = 0 if features is None else total_steps(args, len(features.lengths))
    tuning.plan(steps)
    stop = StopSignal()
    with process_group(world):
        lock = OutputLock(world, output_dir)
        for seed in args.seed_list:
            if seed != tuning.seed:
                tuning = tuning_of(seed)
                tuning.plan(steps)
            if not _train(tuning, features, stop):
                return
            scores = job.finish(tuning)
            if scores:
                report(f"{job.name}, seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
            results[seed] = scores or tuning.training_metrics()
        if world.is_main:
            _write_results(args, {"task": job.name} | over_seeds(results))
        lock.release()


def _train(tuning: FineTuning, features: Features | None, stop: StopSignal) -> bool:
    if tuning.step >= tuning.total_steps:
        return True
    tuning.directory.mkdir(parents=True, exist_ok=True)
    logger = Logger(tuning.directory, "finetune", METRICS, tuning.step, enabled=tuning.world.is_main)
    tuning.engine.connect()
    try:
        return tuning.train(features, logger, stop)
    finally:
        tuning.engine.disconnect()
        logger.close()


def over_seeds(results: dict[int, dict[str, float]]) -> dict:
    """Mean and spread of each metric: `{"metrics": means, "spread": sample standard deviations, "seeds": {...}}`."""
    names = next(iter(results.values()))
    columns = {name: np.array([metrics[name] for metrics in results.values()]) for name in names}
    return {
        "metrics": {name: float(column.mean()) for name, column in columns.items()},
        "spread": {name: float(column.std(ddof=1)) if len(column) > 1 else 0.0 for name, column in columns.items()},
        "seeds": {str(seed): metrics for seed, metrics in results.items()},
    }


def _write_results(args, results: dict) -> None:
    """What there is: scores are results of the task, and a training's loss alone is none."""
    if args.do_eval:
        write_atomic(Path(args.output_dir) / "eval_results.json", json.dumps(results, indent=2) + "\n")
    if args.json_summary is not None:
        Path(args.json_summary).parent.mkdir(parents=True, exist_ok=True)
        summary = open_json_lines(Path(args.json_summary))
        summary.log(step="SUMMARY", data=results["metrics"])
        summary.close()
