"""One pretraining run of one phase: the loop over optimizer steps, its metrics, evaluations and checkpoints."""

import math
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from configuration import BertConfig
from data.loader import Batch, StepLoader, step_loader
from data.packing import SIZES, fullest_micro_batch, micro_batches, prediction_places, sequence_lengths
from data.shards import StepDataset, evaluation_dataset, resolve_mask_token_id
from modeling import Packing, pretraining_loss_sums
from optimization import learning_rate, reset_steps
from sparse_ops import AdaptedLinear, check_adapter_rank, named_layers, sparsity_report
from training.checkpoint import checkpoint_path, remove_old_checkpoints, save_checkpoint
from training.distributed import StopSignal, World, agree, sum_over_ranks
from training.engine import STEPS_AHEAD, OnItsWay, engine_for, seed_dropout
from training.errors import UsageError
from training.execution import settle_execution
from training.logs import Logger
from training.phases import Start, adapter_step
from training.throughput import peak_tflops, useful_flops

CHECKPOINTS = "pretrain_ckpts"  # below --output_dir
HELDOUT_SEED = 0  # of the held-out masks: the same for every run, so that runs of different seeds compare
SAME_DATA = ("seed", "masked_token_fraction", "max_predictions_per_seq")  # flags that may not change within a phase
SHARES_OF_TOKENS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of a micro-batch's places that sparse products are tuned for too
METRICS = [
    *("step", "epoch", "step_loss", "average_loss", "learning_rate", "mlm_loss", "nsp_loss"),
    *("sequences_per_second", "tokens_per_second", "data_wait_seconds", "adapters"),
    *("heldout_mlm_loss", "heldout_mlm_accuracy", "loss_scale", "tflops", "mfu", "peak_memory_gb"),
]


@dataclass(frozen=True)
class Counts:
    """What one step holds on all ranks together."""

    masked_tokens: float
    sentence_labels: float
    tokens: float
    squared_lengths: float = 0.0


@dataclass(frozen=True)
class TakenStep:
    """A step that the device was given, and may still be working on."""

    step: int
    samples: int
    """That this step and all before it consumed."""
    counts: Counts
    rate: float
    waited: float
    """Seconds that its data were waited for."""
    adapters: bool
    loss_scale: float
    """Of the next step."""
    sums: OnItsWay
    """Summed MLM and next-sentence losses of this rank."""


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
        self.adapter_step = adapter_step(args, start, bool(sparsity.lora_rank))
        if self.adapter_step is not None:
            check_adapter_rank(model, args.lora_rank)
        both = [part.sequence_length for part in (shards, heldout) if part is not None]
        self.build_engine(model, shards.sequence_length, max(both))
        self.step, self.samples, self.loss_total = start.step, 0, 0.0
        self.saved_step = None if start.checkpoint is None else start.step
        if start.checkpoint is not None:
            self.resume(start.checkpoint)
            self.start = replace(start, source=None, checkpoint=None)
        self.dataset = self.training_steps()

    def build_engine(self, model, sequence_length: int, longest: int | None = None) -> None:
        """How micro-steps of `sequence_length` run: on the plain path of a CPU, compiled and captured on a GPU.

        Args:
            longest: tokens of any sequence, where evaluations have longer ones.
        """
        args = self.args
        self.sequence_length, self.longest = sequence_length, longest or sequence_length
        execution = settle_execution(
            *(args, self.config, self.sparsity, self.world),
            sequences=self.local_batch_size,
            length=sequence_length,
            longest=self.longest,
            compiled=not args.no_compile,
            shares=SHARES_OF_TOKENS,
        )
        self.notes, self.pack_multiple = execution.notes, execution.pack_multiple
        self.short_attention = execution.short_attention
        # Not with dynamic sizes from the start: the vocabulary's has to stay a constant.
        self.loss_sums = torch.compile(pretraining_loss_sums) if execution.compiled else pretraining_loss_sums
        model.bert.encoder.checkpoint_activations = args.checkpoint_activations
        read = [] if model.bert.encoder.whole_last_block else self.tokens_read()
        self.engine = engine_for(model, execution, self.world, args, self.objective, read)

    def tokens_read(self) -> list[int]:
        """By the heads, in micro-batches of one size, or of the greatest and the least one that is tuned for."""
        sequences, args = self.local_batch_size, self.args
        predictions = sequences * args.max_predictions_per_seq
        firsts = sequences * self.config.next_sentence
        if self.pack_multiple is None:
            return [predictions + firsts]
        sizes = [round(share * sequences * self.sequence_length) for share in (1.0, min(SHARES_OF_TOKENS))]
        return [prediction_places(size, args.masked_token_fraction, predictions) + firsts for size in sizes]

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

    # ------------------------------------------------------------------------------------------------------- the loop
    def train(self, logger: Logger, stop: StopSignal) -> None:
        self.engine.connect()
        self.announce(logger)
        loader = step_loader(self.dataset, self.args.num_workers, pin_memory=self.world.device.type == "cuda")
        first, last = self.start.phase_start + 1, self.start.phase_end
        logger.start_bar(first, last, done=self.step - first + 1, disable=self.args.disable_progress_bar)
        ahead = STEPS_AHEAD[self.world.device.type]
        under_way: deque[TakenStep] = deque()
        self.clock = time.perf_counter()
        for step in range(self.step + 1, last + 1):
            try:
                batch, counts = self.next_batch(loader, stop)
            except UsageError:
                self.finish_steps(under_way, logger)
                raise
            if batch is None:
                break
            if step == self.adapter_step:
                self.finish_steps(under_way, logger)
                self.join_adapters(logger)
            under_way.append(self.give_step(step, batch, counts, self.learning_rate(step), loader.wait_seconds))
            self.finish_steps(under_way, logger, but=0 if self.is_due(step) else ahead)
        self.finish_steps(under_way, logger)
        loader.close()
        if self.step < last:
            self.save()
            logger.text(
                f"stopped after step {self.step} by {stop.received or 'a signal to another rank'}; run again to go on"
            )
        else:
            logger.text(f"finished: step {self.step}")

    def evaluates_after(self, step: int) -> bool:
        return self.heldout is not None and (step % self.args.eval_interval == 0 or step == self.start.phase_end)

    def saves_after(self, step: int) -> bool:
        return step % self.args.num_steps_per_checkpoint == 0 or step == self.start.phase_end

    def is_due(self, step: int) -> bool:
        """Whether something follows the step that needs its outcome."""
        return self.evaluates_after(step) or self.saves_after(step)

    def finish_steps(self, under_way: deque[TakenStep], logger: Logger, but: int = 0) -> None:
        """All that are under way but the last `but`."""
        while len(under_way) > but:
            self.finish_step(under_way.popleft(), logger)

    def finish_step(self, taken: TakenStep, logger: Logger) -> None:
        """Wait for a step's losses, and do what follows it."""
        losses = self.losses_of(taken)
        now = time.perf_counter()
        metrics = self.account(taken, losses, now - self.clock)
        if self.evaluates_after(taken.step):
            metrics |= self.evaluate()
        logger.step(taken.step, metrics)
        if self.saves_after(taken.step):
            self.save()
        self.clock = time.perf_counter() if self.is_due(taken.step) else now

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

    # ------------------------------------------------------------------------------------------------------- the data
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
            pack_multiple=self.pack_multiple,
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
            lengths = sequence_lengths(batch)
            tokens = lengths * (lengths > 1)  # a padding row attends to one place, and is no sequence
            labels = batch["masked_labels"] >= 0, batch["next_sentence_labels"] >= 0
            local = [float(x.sum()) for x in (*labels, tokens, tokens.double() ** 2)]
        *totals, stopped, failed = sum_over_ranks(
            self.world, [*local, float(stop.received is not None), float(error is not None)]
        )
        if failed:
            agree(self.world, error)
        return (None, None) if stopped else (batch, Counts(*totals))

    def on_device(self, batch: Batch) -> Batch:
        """Copied without waiting for the device, where the batch lies in page-locked memory."""
        return {n: t if n in SIZES else t.to(self.world.device, non_blocking=True) for n, t in batch.items()}

    # -------------------------------------------------------------------------------------------------------- a step
    def give_step(self, step: int, batch: Batch, counts: Counts, rate: float, waited: float = 0.0) -> TakenStep:
        """Give the device one optimizer step; nothing here waits for it (but fp16, which has to see overflows)."""
        device, engine = self.world.device, self.engine
        shares = torch.tensor(
            [1 / max(counts.masked_tokens, 1), 1 / max(counts.sentence_labels, 1)], pin_memory=device.type == "cuda"
        )
        shares = shares.to(device, non_blocking=True)
        parts = [part | {"shares": shares} for part in micro_batches(self.on_device(batch))]
        count = len(parts)
        if self.pack_multiple is not None:
            predicted = self.args.masked_token_fraction, self.args.max_predictions_per_seq
            sizes = (self.sequence_length, self.pack_multiple, *predicted)
            engine.prepare(lambda: fullest_micro_batch(parts[0], *sizes), count)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for micro_step, part in enumerate(parts):
            seed_dropout(self.args.seed, step, micro_step, self.world.rank)
            sums += engine.micro_step(part, micro_step, count)
        on_its_way = OnItsWay.of(sums)
        engine.step(rate)
        self.step, self.samples = step, self.samples + self.args.global_batch_size
        adapters, scale = self.sparsity.lora_rank > 0, engine.scaler.get_scale()
        return TakenStep(step, self.samples, counts, rate, waited, adapters, scale, on_its_way)

    def objective(self, model, part: Batch) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the loss, the global means of both losses added up; and its two sums of losses."""
        mlm_sum, nsp_sum, _ = self.forward(model, part, self.sequence_length)
        sums = torch.stack([mlm_sum, nsp_sum])
        return (sums * part["shares"]).sum(), sums

    def forward(self, model, part: Batch, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Summed MLM and next-sentence losses of one micro-batch, and its token scores [B, P, V], or [M, V].

        Args:
            longest: no sequence of `part` has more tokens.
        """
        if "boundaries" in part:
            boundaries = part["boundaries"].int()
            firsts = boundaries[: len(part["next_sentence_labels"])]
            mask = Packing(boundaries, firsts, part["positions"], longest, self.short_attention)
        else:
            mask = part["attention_mask"]
        scores, sentence_scores = model(part["input_ids"], part["token_type_ids"], mask, part["masked_positions"])
        sums = self.loss_sums(scores, sentence_scores, part["masked_labels"], part["next_sentence_labels"])
        return *sums, scores

    def losses_of(self, taken: TakenStep) -> tuple[float, float]:
        """The global MLM and next-sentence losses of a step in nats; waits for the device.

        Raises:
            UsageError: when one is not finite, which loss scaling alone has a way to deal with.
        """
        mlm_sum, nsp_sum = sum_over_ranks(self.world, taken.sums.read())
        losses = mlm_sum / max(taken.counts.masked_tokens, 1), nsp_sum / max(taken.counts.sentence_labels, 1)
        if not math.isfinite(sum(losses)) and not self.engine.scaler.is_enabled():
            raise UsageError(
                f"--learning_rate {self.args.learning_rate:g}: the loss of step {taken.step} is not finite: lower the "
                "rate, or raise --warmup_proportion, and go on from the last checkpoint"
            )
        return losses

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

    # ------------------------------------------------------------------------------------------------- what follows it
    def account(self, taken: TakenStep, losses: tuple[float, float], seconds: float) -> dict:
        """The metrics of a step."""
        mlm_loss, nsp_loss = losses
        if math.isfinite(mlm_loss + nsp_loss):
            self.loss_total += mlm_loss + nsp_loss
        return {
            "epoch": (taken.samples - 1) // self.shards.total,
            "step_loss": mlm_loss + nsp_loss,
            "average_loss": self.loss_total / (taken.step - self.start.phase_start),
            "learning_rate": taken.rate,
            "mlm_loss": mlm_loss,
            "nsp_loss": nsp_loss,
            "sequences_per_second": self.args.global_batch_size / seconds,
            "tokens_per_second": taken.counts.tokens / seconds,
            "data_wait_seconds": taken.waited,
            "adapters": int(taken.adapters),
            "loss_scale": taken.loss_scale,
        } | self.work_done(taken.counts, seconds)

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
            pack_multiple=self.pack_multiple,
            **self.heldout_masking,
        )
        try:
            # Not compiled for it: seconds of compilation for a few batches.
            with torch.compiler.set_stance("force_eager"), self.engine.autocast():
                for batch in step_loader(dataset):
                    (part,) = micro_batches(self.on_device(batch))
                    mlm_sum, _, scores = self.forward(model, part, self.longest)
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
