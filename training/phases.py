"""Where a pretraining run begins: a phase from scratch, from weights, from the phase before, or in its middle."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.assembly import Source, read_source, source_of
from training.checkpoint import newest_checkpoint, saved_steps
from training.distributed import World, agree, gather_objects
from training.errors import UsageError


@dataclass(frozen=True)
class Start:
    """The state that a run goes on from. Steps are cumulative over phases."""

    step: int
    """Last step taken."""
    phase_start: int
    """Last step of the phase before, `--previous_phase_end_step`."""
    phase_end: int
    source: Source | None = None
    """Weights; None draws them from the seed."""
    checkpoint: dict | None = None
    """The checkpoint of this run's output directory that goes on: its optimizer state is taken over."""
    seen: tuple[int, ...] = ()
    """Steps of the checkpoints that were there when this was decided."""

    @property
    def finished(self) -> bool:
        return self.step >= self.phase_end

    @property
    def within_phase(self) -> bool:
        """Whether the run goes on in the middle of the phase, where a dense model may not become sparse."""
        return self.step > self.phase_start


def find_start(args, checkpoint_dir: Path, report: Callable[[str], None]) -> Start:
    """Decide from the flags and the output directory's newest good checkpoint where the run begins.

    Raises:
        UsageError: when the checkpoints do not reach this phase, or belong to another one.
    """
    phase_start, phase_end = args.previous_phase_end_step, args.previous_phase_end_step + args.max_steps
    seen = tuple(saved_steps(checkpoint_dir))
    newest = newest_checkpoint(checkpoint_dir, report)
    if newest is None:
        return _fresh_start(args, phase_start, phase_end, checkpoint_dir)
    step, path, checkpoint = newest
    if step < phase_start:
        raise UsageError(
            f"--previous_phase_end_step {phase_start}: the newest checkpoint, {path}, is of step {step}; "
            f"finish the phase before, or give {step}"
        )
    if step >= phase_end:
        return Start(step, phase_start, phase_end, seen=seen)
    if step > phase_start and checkpoint["phase_start"] != phase_start:
        raise UsageError(
            f"--previous_phase_end_step {phase_start}: {path} belongs to the phase that began after step "
            f"{checkpoint['phase_start']}"
        )
    return Start(step, phase_start, phase_end, source_of(checkpoint, path), checkpoint, seen)


def _fresh_start(args, phase_start: int, phase_end: int, checkpoint_dir: Path) -> Start:
    if args.init_checkpoint is not None:
        return Start(phase_start, phase_start, phase_end, read_source(args.init_checkpoint))
    if phase_start > 0:
        raise UsageError(
            f"--previous_phase_end_step {phase_start}: {checkpoint_dir} holds no checkpoint of that step; give the "
            "phase before the same --output_dir, or name its last checkpoint by --init_checkpoint"
        )
    return Start(phase_start, phase_start, phase_end)


def check_same_start(world: World, start: Start, checkpoint_dir: Path, samples: int) -> None:
    """Once the output directory is locked: every rank decided on the same start, and it is still the newest.

    Raises:
        UsageError: on all ranks.
    """
    views = gather_objects(world, (start.step, start.phase_start, start.seen, samples))
    error = None
    if any(view != views[0] for view in views):
        error = UsageError(
            "--output_dir, --input_dir: the ranks do not see the same files there; give folders that all nodes share"
        )
    elif tuple(saved_steps(checkpoint_dir)) != start.seen:
        error = UsageError(
            f"--output_dir: a run that has just ended wrote checkpoints to {checkpoint_dir}; start again"
        )
    agree(world, error)


def adapter_step(args, start: Start, has_adapters: bool) -> int | None:
    """The step before which the adapters join, or None when they are there already or not asked for.

    `lazy`: so that they train for the last `lazy_lora_fraction` of all steps up to this phase's end, at least one, and
    never before this phase. `True`: at this run's first step.
    """
    first = start.step + 1
    if has_adapters or args.add_lora == "False":
        return None
    if args.add_lora == "True":
        return first
    steps_with_adapters = max(1, round(args.lazy_lora_fraction * start.phase_end))
    return max(first, start.phase_end - steps_with_adapters + 1)
