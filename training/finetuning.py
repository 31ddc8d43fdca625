"""What the fine-tuning doors share: their flags, where the model comes from, and one loop over padded batches.

Features are numpy arrays with one row an example: `input_ids` [N, S] int32 (0 is padding), `token_type_ids` [N, S],
`lengths` [N], and whatever labels a task has, [N] each. Batches are cut to their longest row.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.masking import random_key, random_order
from modeling import BertConfig
from optimization import DECAYS, OPTIMIZERS, learning_rate
from training.assembly import Source, build_model, read_source
from training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from training.distributed import StopSignal, World, gather_objects, sum_over_ranks
from training.engine import Engine, seed_dropout
from training.errors import UsageError
from training.flags import add_precision_flags, add_switch, real, settle_precision, whole
from training.logs import Logger
from training.sparsity import SparsityConfig, add_sparsity_flags, check_adapter_flags, sparsity_from_flags

Features = dict[str, np.ndarray]
Batch = dict[str, Tensor]
METRICS = ["step", "epoch", "step_loss", "average_loss", "learning_rate", "sequences_per_second", "tokens_per_second"]
LOSING_SCORE = -1e4  # of positions behind a batch's longest row
LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this, which tensor cores like


# --------------------------------------------------------------------------------------------------------------- flags
def add_finetuning_flags(parser, max_seq_length: int, epochs: float, batch_size: int, lr: float) -> None:
    """The flags that the published GLUE and SQuAD scripts have in common."""
    model = parser.add_argument_group("model and files")
    model.add_argument(
        "--init_checkpoint",
        metavar="PATH",
        help="weights to start from: a checkpoint of this suite or a Hugging Face folder",
    )
    model.add_argument(
        "--bert_model", metavar="NAME", help="a label for the run, or a Hugging Face folder to use as --init_checkpoint"
    )
    model.add_argument("--config_file", metavar="JSON", help="the model's sizes; by default as the checkpoint says")
    model.add_argument(
        "--vocab_file", metavar="FILE", help="the vocabulary, one token a line; a Hugging Face folder has its own"
    )
    model.add_argument("--tokenizer", choices=("wordpiece", "bpe"), help="kind of vocabulary; by default the model's")
    add_switch(model, "--do_lower_case", "lower-case the text, also where the model's configuration does not")
    model.add_argument("--output_dir", metavar="DIR", help="folder for results, checkpoints and logs")
    model.add_argument(
        "--cache_dir", metavar="DIR", help="where encoded examples are kept; by default below --output_dir"
    )
    add_switch(model, "--skip_cache", "encode anew and keep nothing")
    add_switch(model, "--skip_checkpoint", "write no checkpoints")
    work = parser.add_argument_group("training")
    add_switch(work, "--do_train", "train")
    work.add_argument("--max_seq_length", default=max_seq_length, type=whole(8), help="most tokens of an example")
    work.add_argument(
        "--train_batch_size",
        default=batch_size,
        type=whole(1),
        help="examples of one optimizer step, over all processes",
    )
    work.add_argument(
        "--gradient_accumulation_steps", default=1, type=whole(1), help="micro-steps that a step is cut into"
    )
    work.add_argument("--num_train_epochs", default=epochs, type=real(0), help="passes over the training set")
    work.add_argument("--max_steps", default=-1, type=whole(-1), help="optimizer steps; -1: as --num_train_epochs says")
    work.add_argument("--optimizer", default="adamw", choices=tuple(OPTIMIZERS), help="the optimizer")
    work.add_argument("--learning_rate", default=lr, type=real(0), help="peak learning rate")
    work.add_argument("--lr_decay", default="linear", choices=tuple(DECAYS), help="schedule after the warm-up")
    work.add_argument(
        "--warmup_proportion", default=0.1, type=real(0, 1), help="share of the steps that the rate rises in"
    )
    work.add_argument("--weight_decay", default=0.01, type=real(0), help="of all weights but biases and LayerNorms")
    work.add_argument("--max_grad_norm", default=1.0, type=real(0), help="clip the global gradient norm to this")
    work.add_argument("--seed", default=42, type=whole(0), help="of new weights, the order of examples and dropout")
    work.add_argument("--seeds", metavar="LIST", help="several seeds, 0,1,2: one run each, then mean and spread")
    add_precision_flags(work)
    add_switch(work, "--amp", "the same as --fp16")
    work.add_argument("--loss_scale", default=0.0, type=real(), help="0: dynamic loss scaling, the only kind here")
    add_switch(work, "--no_cuda", "run on the CPU")
    add_sparsity_flags(parser)
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--log_freq", default=50, type=whole(1), help="steps between two lines in the text log")
    logs.add_argument("--json-summary", metavar="FILE", help="also write the results as dllogger lines here")
    add_switch(logs, "--disable_progress_bar", "no progress bar", aliases=("--disable-progress-bar",))
    logs.add_argument("--num_steps_per_checkpoint", default=500, type=whole(1), help="steps between two checkpoints")
    logs.add_argument("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch; not needed")


def settle_finetuning_flags(args) -> None:
    """Check what the flags say together; afterwards `args.precision` and `args.seed_list` hold the outcome."""
    if args.output_dir is None:
        raise UsageError("--output_dir: must be given")
    if args.loss_scale != 0:
        raise UsageError(f"--loss_scale {args.loss_scale:g}: only 0, dynamic loss scaling, is supported")
    if args.max_steps == 0:
        raise UsageError("--max_steps 0: must be at least 1, or -1 to go by --num_train_epochs")
    if args.amp:
        args.fp16 = True
        args.given_on_command_line.add("fp16")
    settle_precision(args)
    try:
        args.seed_list = [int(word) for word in args.seeds.split(",")] if args.seeds else [args.seed]
    except ValueError as error:
        raise UsageError(f"--seeds {args.seeds}: must be whole numbers with commas, such as 0,1,2") from error
    if args.init_checkpoint is None and args.bert_model is not None and Path(args.bert_model).is_dir():
        args.init_checkpoint = args.bert_model
    if args.init_checkpoint is None:
        raise UsageError("--init_checkpoint: must name a checkpoint or a Hugging Face folder (nothing is downloaded)")


# --------------------------------------------------------------------------------------------------------------- model
@dataclass(frozen=True)
class Setup:
    """What to fine-tune and how its text is read."""

    source: Source
    config: BertConfig
    sparsity: SparsityConfig
    vocab_file: Path
    lowercase: bool


def read_setup(args) -> Setup:
    """Read the checkpoint and settle sizes, sparsity and vocabulary with the flags.

    Raises:
        UsageError: for contradictions, and when no vocabulary is to be found.
    """
    source = read_source(args.init_checkpoint)
    config = source.config if args.config_file is None else BertConfig.from_json_file(args.config_file)
    sparsity = sparsity_from_flags(args, source.sparsity if source.sparsity.sparse else None)
    check_adapter_flags(args, sparsity)
    if args.add_lora == "True" and not sparsity.lora_rank:
        sparsity = replace(sparsity, lora_rank=args.lora_rank)
    if args.max_seq_length > config.max_position_embeddings:
        raise UsageError(
            f"--max_seq_length {args.max_seq_length}: the model has {config.max_position_embeddings} positions"
        )
    if (args.tokenizer or config.tokenizer) != "wordpiece":
        raise UsageError(
            f"--tokenizer {args.tokenizer or config.tokenizer}: fine-tuning reads wordpiece vocabularies only"
        )
    return Setup(
        source, config, sparsity, _find_vocabulary(args, source, config), args.do_lower_case or config.lowercase
    )


def _find_vocabulary(args, source: Source, config: BertConfig) -> Path:
    candidates = [args.vocab_file, config.vocab_file]
    if source.path.is_dir():
        candidates.append(source.path / "vocab.txt")
    named = [Path(candidate) for candidate in candidates if candidate is not None]
    if not named:
        raise UsageError("--vocab_file: must be given, since the checkpoint does not name its vocabulary")
    if not named[0].is_file():
        raise UsageError(f"--vocab_file {named[0]}: no such file")
    return named[0]


# ---------------------------------------------------------------------------------------------------------------- loop
class FineTuning:
    """One fine-tuning run on this rank: `train`, then `predict` as often as needed.

    Args:
        make_model: builds the dense model with its task head.
        losses: (model outputs, batch) -> loss of each example, [B].
        directory: of this run's checkpoints and logs.
        total_steps: optimizer steps of the whole run; 0 to predict only.
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
        total_steps: int,
        report: Callable[[str], None],
    ):
        self.args, self.world, self.setup, self.losses = args, world, setup, losses
        self.directory, self.seed, self.total_steps = directory, seed, total_steps
        self.checkpoints = directory / "finetune_ckpts"
        heads_missing: list[str] = []
        model = build_model(
            make_model, setup.sparsity, setup.source, seed=seed, mask_init=args.mask_init, report=heads_missing.append
        )
        if heads_missing and not total_steps:
            raise UsageError(f"--init_checkpoint {heads_missing[0]}: fine-tune it first, with --do_train")
        for line in heads_missing:
            report(line)
        self.engine = Engine(model, world, args)
        self.step, self.loss_total = 0, 0.0
        if total_steps:
            self._resume(report)

    def _resume(self, report: Callable[[str], None]) -> None:
        newest = newest_checkpoint(self.checkpoints, report)
        if newest is None:
            return
        step, path = newest
        checkpoint = load_checkpoint(path, "--output_dir")
        for name, value in checkpoint["arguments"].items():
            if value != self._defining_arguments().get(name):
                raise UsageError(
                    f"--output_dir {self.directory}: holds a run with --{name} {value}, not "
                    f"{self._defining_arguments().get(name)}; give another folder"
                )
        self.engine.model.load_state_dict(checkpoint["model"])
        self.engine.load_state_dict(checkpoint)
        self.step, self.loss_total = step, checkpoint["loss_total"]
        report(f"resumed after step {step} of {self.total_steps}")

    def _defining_arguments(self) -> dict:
        """The flags that make it the same run when it is started again."""
        names = ("task_name", "init_checkpoint", "train_file", "max_seq_length", "train_batch_size", "optimizer")
        names += (
            "learning_rate",
            "lr_decay",
            "warmup_proportion",
            "weight_decay",
            "precision",
            "version_2_with_negative",
        )
        found = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        return found | {"seed": self.seed, "total_steps": self.total_steps}

    def connect(self) -> None:
        """Join the other ranks; call it inside the process group."""
        self.engine.connect()

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def train(self, features: Features, logger: Logger, stop: StopSignal) -> bool:
        """Take the steps that are left. Returns whether the run is finished, and not stopped by a signal."""
        logger.start_bar(1, self.total_steps, done=self.step, disable=self.args.disable_progress_bar)
        self.engine.model.train()
        for step in range(self.step + 1, self.total_steps + 1):
            started = time.perf_counter()
            (stopped,) = sum_over_ranks(self.world, [float(stop.received is not None)])
            if stopped:
                self.save()
                logger.text(f"stopped after step {self.step}; run again to go on")
                return False
            rate = learning_rate(
                step,
                base=self.args.learning_rate,
                total_steps=self.total_steps,
                warmup_proportion=self.args.warmup_proportion,
                decay=self.args.lr_decay,
            )
            rows = self._rows(step, len(features["lengths"]))
            loss, tokens = self._take_step(step, features, rows, rate)
            self.step, self.loss_total = step, self.loss_total + loss
            seconds = time.perf_counter() - started
            metrics = {
                "epoch": (step - 1) // self._steps_per_epoch(len(features["lengths"])),
                "step_loss": loss,
                "average_loss": self.loss_total / step,
                "learning_rate": rate,
                "sequences_per_second": len(rows) / seconds,
                "tokens_per_second": tokens / seconds,
            }
            logger.step(step, metrics)
            if step % self.args.log_freq == 0 or step == self.total_steps:
                logger.text(
                    f"step {step} of {self.total_steps}: loss {loss:.4f}, average {metrics['average_loss']:.4f}"
                )
            if step % self.args.num_steps_per_checkpoint == 0 or step == self.total_steps:
                self.save()
        return True

    def _steps_per_epoch(self, examples: int) -> int:
        return math.ceil(examples / self.args.train_batch_size)

    def _rows(self, step: int, examples: int) -> np.ndarray:
        """The examples of one optimizer step: a function of (seed, step) alone. An epoch's last step may have fewer."""
        epoch, place = divmod(step - 1, self._steps_per_epoch(examples))
        order = random_order(random_key(self.seed, epoch), examples)
        return order[place * self.args.train_batch_size : (place + 1) * self.args.train_batch_size]

    def _take_step(self, step: int, features: Features, rows: np.ndarray, rate: float) -> tuple[float, float]:
        """One optimizer step on `rows`, the same whatever the number of ranks and micro-steps; (mean loss, tokens)."""
        total, micro_steps = 0.0, self.args.gradient_accumulation_steps
        parts = np.array_split(rows, micro_steps * self.world.size)
        for micro_step in range(micro_steps):
            part = parts[micro_step * self.world.size + self.world.rank]
            # A rank without an example still takes part in the averaging, with one that counts nothing.
            batch = padded_batch(features, part if len(part) else rows[:1], self.world.device)
            seed_dropout(self.seed, step, micro_step, self.world.rank)
            with self.engine.accumulate(last=micro_step == micro_steps - 1):
                losses = self.losses(self._outputs(self.engine.parallel, batch), batch)
                loss_sum = losses.sum() * (len(part) > 0)
                self.engine.backward(loss_sum / len(rows) * self.world.size)
            total = total + loss_sum.detach()
        self.engine.step(rate)
        loss, tokens = sum_over_ranks(self.world, [total.item(), 0.0])[0], float(features["lengths"][rows].sum())
        return loss / len(rows), tokens

    def _outputs(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, ...]:
        with self.engine.autocast():
            return model(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])

    @torch.no_grad()
    def predict(self, features: Features, batch_size: int, width: int, what: str) -> np.ndarray:
        """The outputs for every row, fp32 [N, outputs, width]; every rank returns all of them.

        A model that returns [B, C] gives [N, 1, C]; one that returns a pair of [B, S] gives [N, 2, width], padded with
        a score that loses against any other.
        """
        model, rows = self.engine.model.eval(), np.argsort(-features["lengths"], kind="stable")
        batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        mine, found = batches[self.world.rank :: self.world.size], []
        quiet = self.args.disable_progress_bar or not self.world.is_main
        for part in tqdm(mine, desc=what, unit="batch", disable=quiet):
            outputs = self._outputs(model, padded_batch(features, part, self.world.device))
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
        remove_old_checkpoints(self.checkpoints, keep=1, phase_start=0, phase_end=self.total_steps)


def padded_batch(features: Features, rows: np.ndarray, device: torch.device) -> Batch:
    """The rows as tensors [B, S], cut to the longest of them; labels as they are."""
    lengths = features["lengths"][rows]
    longest = min(-(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, features["input_ids"].shape[1])
    batch = {
        "input_ids": features["input_ids"][rows, :longest].astype(np.int64),
        "token_type_ids": features["token_type_ids"][rows, :longest].astype(np.int64),
        "attention_mask": (np.arange(longest) < lengths[:, None]).astype(np.int64),
    }
    batch |= {name: array[rows] for name, array in features.items() if name not in (*batch, "lengths")}
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}


def total_steps(args, examples: int) -> int:
    """Optimizer steps that `--max_steps` or `--num_train_epochs` mean; 0 without `--do_train`."""
    if not args.do_train:
        return 0
    return (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(args.num_train_epochs * math.ceil(examples / args.train_batch_size))
    )


def over_seeds(results: dict[int, dict[str, float]]) -> dict:
    """Mean and spread of each metric: `{"metrics": means, "spread": sample standard deviations, "seeds": {...}}`."""
    names = next(iter(results.values()))
    columns = {name: np.array([metrics[name] for metrics in results.values()]) for name in names}
    return {
        "metrics": {name: float(column.mean()) for name, column in columns.items()},
        "spread": {name: float(column.std(ddof=1)) if len(column) > 1 else 0.0 for name, column in columns.items()},
        "seeds": {str(seed): metrics for seed, metrics in results.items()},
    }


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
