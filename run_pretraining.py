#!/usr/bin/env python3
"""Pretrain BERT with SLoPe: 2:4 double-pruned weights from the first step to the last, low-rank adapters at the end.

One process:        python run_pretraining.py --input_dir DATA/phase1/train --output_dir OUT --config_file CONFIG.json
GPUs of one node:   torchrun --nproc_per_node=8 run_pretraining.py ...
Several nodes:      scripts/run_pretraining_jobs_slurm.sh, scripts/run_pretraining_jobs_ssh.sh

The recipe's settings are in config/bert_pretraining_phase{1,2,3}_config.json; flags on the command line win over them.
A run goes on from the newest checkpoint in OUT/pretrain_ckpts, and a finished one ends at once.
"""

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from data.loader import Batch, StepLoader, step_loader
from data.shard_files import ShardSet
from data.shards import StepDataset, evaluation_dataset, resolve_mask_token_id
from data.storage import local_copy
from modeling import BertConfig, BertForPreTraining, pretraining_loss_sums
from optimization import DECAYS, OPTIMIZERS, learning_rate, reset_steps
from sparse_ops import AdaptedLinear, named_layers, sparsity_report
from training.assembly import build_model
from training.checkpoint import (
    checkpoint_path,
    remove_old_checkpoints,
    remove_unfinished_checkpoints,
    save_checkpoint,
)
from training.distributed import (
    OutputLock,
    StopSignal,
    World,
    agree,
    process_group,
    reporter,
    sum_over_ranks,
    this_process,
)
from training.engine import Engine, seed_dropout
from training.errors import UsageError
from training.flags import (
    Parser,
    add_precision_flags,
    add_switch,
    parse_flags,
    real,
    run_door,
    settle_precision,
    whole,
)
from training.logs import Logger
from training.phases import Start, adapter_step, check_same_start, find_start
from training.sparsity import SparsityConfig, add_sparsity_flags, check_adapter_flags, sparsity_from_flags
from training.throughput import peak_tflops, useful_flops

CHECKPOINTS = "pretrain_ckpts"  # below --output_dir
HELDOUT_SEED = 0  # of the held-out masks: the same for every run, so that runs of different seeds compare
SAME_DATA = ("seed", "masked_token_fraction", "max_predictions_per_seq")  # flags that may not change within a phase
METRICS = [
    *("step", "epoch", "step_loss", "average_loss", "learning_rate", "mlm_loss", "nsp_loss"),
    *("sequences_per_second", "tokens_per_second", "data_wait_seconds", "adapters"),
    *("heldout_mlm_loss", "heldout_mlm_accuracy", "loss_scale", "tflops", "mfu", "peak_memory_gb"),
]


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--config_file", metavar="JSON", help="defaults for any of these flags")
    files.add_argument("--model_config_file", metavar="JSON", help="the model's sizes (required)")
    files.add_argument(
        "--input_dir", metavar="DIR", help="folder of HDF5 shards, here or s3://BUCKET/PREFIX (required)"
    )
    files.add_argument("--output_dir", metavar="DIR", help="folder for checkpoints and logs (required)")
    files.add_argument("--eval_dir", metavar="DIR", help="folder of held-out shards, here or s3://BUCKET/PREFIX")
    files.add_argument(
        "--init_checkpoint", metavar="PATH", help="start from these weights: a checkpoint or a Hugging Face folder"
    )
    batch = parser.add_argument_group("steps and batches")
    batch.add_argument("--max_steps", default=1000, type=whole(1), help="optimizer steps of this phase")
    batch.add_argument(
        "--previous_phase_end_step",
        default=0,
        type=whole(0),
        help="steps that the phases before took; this one starts from that checkpoint",
    )
    batch.add_argument("--global_batch_size", default=2**16, type=whole(1), help="sequences of one optimizer step")
    batch.add_argument(
        "--local_batch_size", default=8, type=whole(1), help="sequences of one micro-step of one process"
    )
    batch.add_argument(
        "--seed", default=42, type=whole(0, 2**32 - 1), help="seed of new weights, masks, sample order and dropout"
    )
    batch.add_argument("--masked_token_fraction", default=0.2, type=real(0, 1), help="share of the tokens to predict")
    batch.add_argument(
        "--max_predictions_per_seq", default=80, type=whole(1), help="most tokens to predict of a sequence"
    )
    batch.add_argument("--num_workers", default=1, type=whole(0), help="loader processes of each process; 0: none")
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument(
        "--optimizer",
        default="lamb",
        choices=tuple(OPTIMIZERS),
        help="fused-lamb is NVIDIA's apex where it is installed, else ours",
    )
    optimizer.add_argument("--learning_rate", default=5e-5, type=real(0), help="peak learning rate")
    optimizer.add_argument("--lr_decay", default="poly", choices=tuple(DECAYS), help="schedule after the warm-up")
    optimizer.add_argument(
        "--warmup_proportion",
        default=0.01,
        type=real(0, 1),
        help="share of the phase's steps that the learning rate rises in",
    )
    optimizer.add_argument(
        "--weight_decay",
        default=0.01,
        type=real(0),
        help="weight decay; none on biases and LayerNorms, adapters have their own",
    )
    optimizer.add_argument("--max_grad_norm", default=1.0, type=real(0), help="clip the global gradient norm to this")
    add_precision_flags(optimizer)
    optimizer.add_argument(
        "--gradient_communication",
        default="fp32",
        choices=("fp32", "bf16"),
        help="what gradients are averaged over processes in; bf16 halves the bytes and rounds to 8 significant bits",
    )
    add_switch(optimizer, "--checkpoint_activations", "recompute activations in the backward pass, to save memory")
    sparsity = add_sparsity_flags(parser, add_lora_words=("True", "False", "lazy"))
    sparsity.add_argument(
        "--lazy_lora_fraction", default=0.01, type=real(0, 1), help="share of all steps that lazy adapters train for"
    )
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--log_prefix", default="logfile", metavar="NAME", help="name of this phase's log files")
    logs.add_argument("--num_steps_per_checkpoint", default=100, type=whole(1), help="steps between two checkpoints")
    logs.add_argument("--keep_checkpoints", default=3, type=whole(1), help="newest checkpoints of this phase to keep")
    add_switch(logs, "--skip_checkpoint", "write no checkpoints")
    logs.add_argument("--eval_interval", default=100, type=whole(1), help="steps between two held-out evaluations")
    logs.add_argument("--eval_samples", default=2000, type=whole(1), help="most held-out sequences to evaluate on")
    add_switch(logs, "--disable_progress_bar", "no progress bar")
    logs.add_argument(
        "--local_rank", "--local-rank", type=whole(-1), help="set by torch.distributed.launch; not needed"
    )
    args = parse_flags(parser, argv, file_flag="config_file")
    for name in ("input_dir", "output_dir", "model_config_file"):
        if not getattr(args, name):
            raise UsageError(f"--{name}: must be given, here or in --config_file")
    if not args.log_prefix or "/" in args.log_prefix:
        raise UsageError(f"--log_prefix {args.log_prefix}: must be a name without directories")
    settle_precision(args)
    return args


def main() -> None:
    args = parse_arguments()
    world = this_process()
    report = reporter(world)

    # Everything that can be wrong is found here, on every rank, before anything is started or written.
    config = BertConfig.from_json_file(args.model_config_file)
    shards, heldout = open_shards(args, config)
    start = find_start(args, Path(args.output_dir) / CHECKPOINTS, report)
    if start.finished:
        report(f"finished: {args.output_dir} has step {start.step}, and this phase ends at {start.phase_end}")
        return
    sparsity = settle_sparsity(args, start)
    model = build_model(
        lambda: BertForPreTraining(config),
        sparsity,
        start.source,
        seed=args.seed,
        mask_init=args.mask_init,
        report=report,
    )
    run = PretrainingRun(args, config, world, start, sparsity, model, shards, heldout)
    start = replace(start, source=None, checkpoint=None)  # as large as model and optimizer together

    stop = StopSignal()
    with process_group(world):
        lock = OutputLock(world, Path(args.output_dir))
        check_same_start(world, start, Path(args.output_dir) / CHECKPOINTS, shards.total)
        if world.is_main:
            remove_unfinished_checkpoints(Path(args.output_dir) / CHECKPOINTS)
        logger = open_logger(args, world, start)
        try:
            run.train(logger, stop)
        finally:
            run.engine.disconnect()
            logger.close()
            lock.release()


def open_shards(args, config: BertConfig) -> tuple[ShardSet, ShardSet | None]:
    """The training and held-out shards, checked against the model."""
    opened = []
    for name in ("input_dir", "eval_dir"):
        address = getattr(args, name)
        if address is None:
            opened.append(None)
            continue
        shards = ShardSet(local_copy(address), flag=f"--{name}")
        shards.check(config.vocab_size, config.max_position_embeddings, args.max_predictions_per_seq)
        if config.next_sentence and not shards.has_next_sentence:
            raise UsageError(
                f"--{name} {address}: holds single sequences, but the model configuration asks for next-sentence "
                "prediction; set next_sentence in it to false, or give shards of sentence pairs"
            )
        opened.append(shards)
    return opened[0], opened[1]


def settle_sparsity(args, start: Start) -> SparsityConfig:
    """The sparsity that flags and checkpoint agree on; a dense checkpoint may be pruned where a phase begins."""
    saved = None if start.source is None else start.source.sparsity
    decided = saved is not None and (saved.sparse or start.within_phase)
    sparsity = sparsity_from_flags(args, saved if decided else None)
    check_adapter_flags(args, sparsity)
    return sparsity


def open_logger(args, world: World, start: Start) -> Logger:
    """This run's logs; where rank 0 cannot write them, all ranks end."""
    logger = error = None
    try:
        logger = Logger(Path(args.output_dir), args.log_prefix, METRICS, start.step, enabled=world.is_main)
    except OSError as failed:
        error = UsageError(f"--output_dir {args.output_dir}: cannot write {failed.filename} ({failed.strerror})")
    agree(world, error)
    return logger


@dataclass(frozen=True)
class Counts:
    """What one step holds on all ranks together."""

    masked_tokens: float
    sentence_labels: float
    tokens: float
    squared_lengths: float = 0.0


class PretrainingRun:
    """One run of one phase on this rank: `train` goes from the step after `start` to the phase's end."""

    def __init__(self, args, config: BertConfig, world: World, start: Start, sparsity, model, shards, heldout):
        self.args, self.config, self.world, self.start, self.sparsity = args, config, world, start, sparsity
        self.shards, self.heldout = shards, heldout
        self.masking = {
            "seed": args.seed,
            "masked_token_fraction": args.masked_token_fraction,
            "max_predictions_per_seq": args.max_predictions_per_seq,
            "vocab_size": config.vocab_size,
            "mask_token_id": resolve_mask_token_id(shards, config.vocab_file, shards.files[0].parent),
        }
        if heldout is not None:
            heldout_mask = resolve_mask_token_id(heldout, config.vocab_file, heldout.files[0].parent)
            self.heldout_masking = self.masking | {"mask_token_id": heldout_mask, "seed": HELDOUT_SEED}
        model.bert.encoder.checkpoint_activations = args.checkpoint_activations
        self.notes: list[str] = []  # what the log begins with, besides the run's description
        self.engine = Engine(model, world, args, self.local_batch_size * shards.sequence_length, self.notes.append)
        self.adapter_step = adapter_step(args, start, bool(sparsity.lora_rank))
        self.step, self.samples, self.loss_total = start.step, 0, 0.0
        self.saved_step = None if start.checkpoint is None else start.step
        if start.checkpoint is not None:
            self.resume(start.checkpoint)
            self.start = replace(start, source=None, checkpoint=None)
        self.dataset = self.training_steps()

    def resume(self, checkpoint: dict) -> None:
        """Take over what a checkpoint holds beside the weights; a new phase keeps the moments alone."""
        if self.start.within_phase:
            self.check_same_data(checkpoint)
            self.engine.load_state_dict(checkpoint)
            self.samples, self.loss_total = checkpoint["data"]["samples"], checkpoint["loss_total"]
        elif self.start.source.sparsity.sparse == self.sparsity.sparse:  # else just pruned: moments fit no weight now
            self.engine.load_state_dict(checkpoint)
            reset_steps(self.engine.optimizer)

    def check_same_data(self, checkpoint: dict) -> None:
        """The position in the data means something only in the same order of the same data.

        Raises:
            UsageError: a flag or the number of samples is not the checkpoint's.
        """
        now, before = self.arguments(), checkpoint["arguments"]
        for name in SAME_DATA:
            if now[name] != before[name]:
                raise UsageError(
                    f"--{name} {now[name]} contradicts the checkpoint, in the middle of a phase that has {before[name]}"
                )
        if checkpoint["data"]["total"] != self.shards.total:
            raise UsageError(
                f"--input_dir {self.args.input_dir}: holds {self.shards.total} samples, but this phase began with "
                f"{checkpoint['data']['total']}"
            )

    def train(self, logger: Logger, stop: StopSignal) -> None:
        self.engine.connect()
        self.announce(logger)
        loader = step_loader(self.dataset, self.args.num_workers, pin_memory=self.world.device.type == "cuda")
        first, last = self.start.phase_start + 1, self.start.phase_end
        logger.start_bar(first, last, done=self.step - first + 1, disable=self.args.disable_progress_bar)
        for step in range(self.step + 1, last + 1):
            started = time.perf_counter()
            batch, counts = self.next_batch(loader, stop)
            if batch is None:
                break
            if step == self.adapter_step:
                self.join_adapters(logger)
            rate = self.learning_rate(step)
            losses = self.take_step(step, batch, counts, rate)
            metrics = self.account(step, losses, rate, counts, time.perf_counter() - started, loader.wait_seconds)
            if self.heldout is not None and (step % self.args.eval_interval == 0 or step == last):
                metrics |= self.evaluate()
            logger.step(step, metrics)
            if step % self.args.num_steps_per_checkpoint == 0 or step == last:
                self.save()
        loader.close()
        if self.step < last:
            self.save()
            logger.text(
                f"stopped after step {self.step} by {stop.received or 'a signal to another rank'}; run again to go on"
            )
        else:
            logger.text(f"finished: step {self.step}")

    def announce(self, logger: Logger) -> None:
        logger.parameters(self.arguments())
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        logger.text(
            f"{self.world.size} x {self.world.device.type}, {self.args.precision}, {self.args.optimizer}: "
            f"{parameters:,} parameters, {self.shards.total:,} sequences of {self.shards.sequence_length} tokens"
        )
        if self.sparsity.sparse:
            layers = len(named_layers(self.engine.model, AdaptedLinear))
            logger.text(f"{self.sparsity.pruned_matrix}: {layers} linear layers pruned")
        for note in self.notes:
            logger.text(note)
        report = sparsity_report(self.engine.model)
        if report.layers:
            logger.text(f"density of W^R {report.forward_density:.4f}, of W^(R,C) {report.backward_density:.4f}")
        if self.step > self.start.phase_start:
            logger.text(f"resumed after step {self.step}")
        if self.adapter_step is not None:
            logger.text(f"adapters of rank {self.args.lora_rank} join before step {self.adapter_step}")
        if self.args.precision == "fp16" and self.world.device.type == "cpu":
            logger.text("--fp16 runs as asked, slowly on a CPU: --precision bf16 is the fast one here")

    @property
    def local_batch_size(self) -> int:
        at_most = math.ceil(self.args.global_batch_size / self.world.size)  # more would be padding alone
        return min(self.args.local_batch_size, at_most)

    def training_steps(self) -> StepDataset:
        """The steps that are left."""
        return StepDataset(
            self.shards,
            global_batch_size=self.args.global_batch_size,
            local_batch_size=self.local_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            steps=self.start.phase_end - self.step,
            start_sample=self.samples,
            **self.masking,
        )

    def next_batch(self, loader: StepLoader, stop: StopSignal) -> tuple[Batch | None, Counts | None]:
        """This rank's part of the next step and what all parts hold together; None when any rank was told to stop."""
        batch, error, local = None, None, [0.0] * len(fields(Counts))
        try:
            batch = next(loader)
        except UsageError as found:
            error = found
        else:
            lengths = batch["attention_mask"].sum(-1)
            tokens = lengths * (lengths > 1)  # a padding row attends to one place, and is no sequence
            labels = batch["masked_labels"] >= 0, batch["next_sentence_labels"] >= 0
            local = [float(x.sum()) for x in (*labels, tokens, tokens.double() ** 2)]
        *totals, stopped, failed = sum_over_ranks(
            self.world, [*local, float(stop.received is not None), float(error is not None)]
        )
        if failed:
            agree(self.world, error)
        return (None, None) if stopped else (batch, Counts(*totals))

    def take_step(self, step: int, batch: Batch, counts: Counts, rate: float) -> tuple[float, float]:
        """One optimizer step; returns the global MLM and next-sentence losses in nats."""
        device, engine = self.world.device, self.engine
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        micro_steps = batch["input_ids"].shape[0]
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for micro_step in range(micro_steps):
            seed_dropout(self.args.seed, step, micro_step, self.world.rank)
            part = {name: tensor[micro_step] for name, tensor in batch.items()}
            with engine.accumulate(last=micro_step == micro_steps - 1):
                mlm_sum, nsp_sum, _ = self.forward(engine.parallel, part)
                # Global means; times the number of ranks, because DDP averages what the ranks' losses give.
                loss = mlm_sum / max(counts.masked_tokens, 1) + nsp_sum / max(counts.sentence_labels, 1)
                engine.backward(loss * self.world.size)
            sums += torch.stack([mlm_sum, nsp_sum]).detach()
        engine.step(rate)
        mlm_sum, nsp_sum = sum_over_ranks(self.world, sums.tolist())
        losses = mlm_sum / max(counts.masked_tokens, 1), nsp_sum / max(counts.sentence_labels, 1)
        if not math.isfinite(sum(losses)) and not engine.scaler.is_enabled():  # loss scaling skips such a step
            raise UsageError(
                f"--learning_rate {self.args.learning_rate:g}: the loss of step {step} is not finite: lower the rate, "
                "or raise --warmup_proportion, and go on from the last checkpoint"
            )
        return losses

    def forward(self, model, part: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed MLM and next-sentence losses of one micro-batch, and its token scores [B, P, V]."""
        with self.engine.autocast():
            scores, sentence_scores = model(
                part["input_ids"], part["token_type_ids"], part["attention_mask"], part["masked_positions"]
            )
        sums = pretraining_loss_sums(scores, sentence_scores, part["masked_labels"], part["next_sentence_labels"])
        return *sums, scores

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step - self.start.phase_start,
            base=self.args.learning_rate,
            total_steps=self.args.max_steps,
            warmup_proportion=self.args.warmup_proportion,
            decay=self.args.lr_decay,
        )

    def join_adapters(self, logger: Logger) -> None:
        self.engine.join_adapters(self.args.lora_rank, self.args.seed)
        self.sparsity = replace(self.sparsity, lora_rank=self.args.lora_rank)
        logger.text(f"adapters of rank {self.args.lora_rank} joined before step {self.adapter_step}")

    def account(self, step: int, losses, rate: float, counts: Counts, seconds: float, waited: float) -> dict:
        """Count the step as taken and return its metrics."""
        mlm_loss, nsp_loss = losses
        self.step, self.samples = step, self.samples + self.args.global_batch_size
        if math.isfinite(mlm_loss + nsp_loss):
            self.loss_total += mlm_loss + nsp_loss
        return {
            "epoch": (self.samples - 1) // self.shards.total,
            "step_loss": mlm_loss + nsp_loss,
            "average_loss": self.loss_total / (step - self.start.phase_start),
            "learning_rate": rate,
            "mlm_loss": mlm_loss,
            "nsp_loss": nsp_loss,
            "sequences_per_second": self.args.global_batch_size / seconds,
            "tokens_per_second": counts.tokens / seconds,
            "data_wait_seconds": waited,
            "adapters": int(self.sparsity.lora_rank > 0),
            "loss_scale": self.engine.scaler.get_scale(),
        } | self.work_done(counts, seconds)

    def work_done(self, counts: Counts, seconds: float) -> dict:
        """Useful TFLOP/s of all ranks, their share of the chips' peak, and this rank's peak memory."""
        sizes = (counts.tokens, counts.squared_lengths, counts.masked_tokens, self.args.global_batch_size)
        found = {"tflops": useful_flops(self.config, *sizes) / seconds / 1e12}
        if self.world.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(self.world.device), self.args.precision)
            if peak is not None:
                found["mfu"] = found["tflops"] / peak / self.world.size
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.world.device) / 1e9
        return found

    @torch.no_grad()
    def evaluate(self) -> dict:
        """MLM loss in nats and accuracy on the held-out shards, with the same masks every time."""
        model, world = self.engine.model.eval(), self.world
        error, totals = None, torch.zeros(3, dtype=torch.float64, device=world.device)
        dataset = evaluation_dataset(
            self.heldout,
            local_batch_size=self.args.local_batch_size,
            rank=world.rank,
            world_size=world.size,
            max_samples=self.args.eval_samples,
            **self.heldout_masking,
        )
        try:
            for batch in step_loader(dataset):
                part = {name: tensor[0].to(world.device) for name, tensor in batch.items()}
                mlm_sum, _, scores = self.forward(model, part)
                labels = part["masked_labels"]
                totals += torch.stack([mlm_sum, (scores.argmax(-1) == labels).sum(), (labels >= 0).sum()])
        except UsageError as found:
            error = found
        agree(world, error)
        model.train()
        mlm_sum, correct, count = sum_over_ranks(world, totals.tolist())
        return {"heldout_mlm_loss": mlm_sum / max(count, 1), "heldout_mlm_accuracy": correct / max(count, 1)}

    def save(self) -> None:
        """Rank 0 writes the checkpoint of the step just taken."""
        directory = Path(self.args.output_dir) / CHECKPOINTS
        if self.args.skip_checkpoint or not self.world.is_main or self.saved_step == self.step:
            return
        state = {
            "step": self.step,
            "phase_start": self.start.phase_start,
            "model_config": self.config.to_dict(),
            "sparsity": self.sparsity.to_dict(),
            "data": {"samples": self.samples, "total": self.shards.total},
            "loss_total": self.loss_total,
            "arguments": self.arguments(),
        }
        save_checkpoint(checkpoint_path(directory, self.step), state | self.engine.state_dict())
        self.saved_step = self.step
        remove_old_checkpoints(directory, self.args.keep_checkpoints, self.start.phase_start, self.step)

    def arguments(self) -> dict:
        return {name: value for name, value in sorted(vars(self.args).items()) if not name.startswith("given")}


if __name__ == "__main__":
    run_door(main)
