"""The runs of the comparison that scripts/reproduce.py makes: what each is, where it branches off, its commands."""

import csv
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from math import sqrt
from pathlib import Path

from compare_finetuning import TASKS
from run_processes import ROOT

from data.encode import EncodeSettings
from data.stages import atomic_path, write_atomic
from training.checkpoint import checkpoint_path, saved_steps
from training.errors import UsageError
from training.flags import read_json
from training.pretraining import CHECKPOINTS

PASSES = 5
"""Over the text, that the shards hold, each cut into sequences in its own way (`--dupe_factor`)."""
TENTHS = 10
"""Checkpoints of a run; runs branch off at these."""
PREFIX = "pretraining"
"""Of every run's logs, so that a branch goes on in the log that it was given."""
EVALUATIONS = 20
SQUAD_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """One of the runs that are compared."""

    title: str
    """`{rank}` is the adapters'."""
    flags: tuple[str, ...]
    source: str | None = None
    """The run that this one is the same as up to `branch`."""
    branch: int = 0
    """Tenths of the steps."""
    new_phase: bool = False
    """Pruned there: a dense model may become sparse only where a phase begins."""
    extra: bool = False
    """Run by `--only` alone: what a gap may come from."""
    keep: int = 2
    """Checkpoints: so many that those where others branch off are among them at the end."""


DENSE, SPARSE = ("--pruned_matrix", "none"), ("--pruned_matrix", "static-weight")
LAZY = (*SPARSE, "--add_lora", "lazy", "--lazy_lora_fraction")
RECIPES = {
    "dense": Recipe("dense", DENSE, keep=6),
    "slope": Recipe("SLoPe, r = 0", SPARSE),
    "lazy_1": Recipe("SLoPe, rank {rank} in the last 1%", (*LAZY, "0.01"), "slope", 9),
    "lazy_10": Recipe("SLoPe, rank {rank} in the last 10%", (*LAZY, "0.1"), "slope", 9),
    "pruned_half": Recipe("dense, pruned half-way", SPARSE, "dense", 5, new_phase=True),
    "slope_random": Recipe("SLoPe, random masks", (*SPARSE, "--mask_init", "random"), extra=True),
    "slope_fixed": Recipe("SLoPe, W^{{R,C}} chosen once", (*SPARSE, "--double_prune_interval", "0"), extra=True),
    "slope_exact": Recipe("SLoPe, input gradient by W^R", (*SPARSE, "--double_prune", "False"), extra=True),
    "slope_but_attention": Recipe("SLoPe, attention dense", (*SPARSE, "--skip_attention", "True"), extra=True),
}
STANDARD = [name for name, recipe in RECIPES.items() if not recipe.extra]


@dataclass(frozen=True)
class Settings:
    """What the numbers of a comparison depend on; one output directory holds one of these."""

    epochs: int
    global_batch_size: int
    local_batch_size: int
    learning_rate: float
    """Of runs that begin dense."""
    sparse_learning_rate: float
    lora_lr_scale: float
    warmup_proportion: float
    seed: int
    precision: str
    finetune_seeds: str
    finetune_steps: int | None
    model: dict
    sequences: int
    """Of all passes over the text."""
    sequence_length: int

    @property
    def steps(self) -> int:
        """Of each run: `epochs` passes over the text, to the nearest multiple of `TENTHS`."""
        sequences = self.epochs * self.sequences / PASSES
        return TENTHS * max(1, round(sequences / self.global_batch_size / TENTHS))

    @property
    def lora_rank(self) -> int:
        """6.25% of the width, as the paper's largest."""
        return max(1, self.model["hidden_size"] // 16)

    def step_of(self, tenths: int) -> int:
        return tenths * self.steps // TENTHS

    def rate(self, name: str) -> float:
        """Peak learning rate of a run."""
        recipe = RECIPES[name]
        return self.learning_rate if recipe.flags == DENSE or recipe.new_phase else self.sparse_learning_rate

    def title(self, name: str) -> str:
        return RECIPES[name].title.format(rank=self.lora_rank)

    def save(self, output_dir: Path) -> None:
        """Keep the settings in the output directory.

        Raises:
            UsageError: the directory was begun with others.
        """
        path = output_dir / "settings.json"
        if not path.exists():
            write_atomic(path, json.dumps(asdict(self), indent=2) + "\n")
            return
        before = Settings.load(output_dir)
        for name, value in asdict(self).items():
            if value != getattr(before, name):
                raise UsageError(f"--output_dir {output_dir}: {_difference(name, getattr(before, name), value)}")

    @classmethod
    def load(cls, output_dir: Path) -> "Settings":
        path = output_dir / "settings.json"
        found = read_json(str(path), "--output_dir")
        found.setdefault("sparse_learning_rate", found.get("learning_rate"))  # earlier versions had one rate for all
        found.setdefault("lora_lr_scale", 1.0)
        if set(found) != {field.name for field in fields(cls)}:
            raise UsageError(f"--output_dir {path}: holds no settings of this script; give another directory")
        return cls(**found)


def _difference(name: str, before, now) -> str:
    if name == "model":
        return "was begun with another --model_config_file; give that, or another directory"
    if name in ("sequences", "sequence_length"):
        return f"was begun on data with {before} {name}, and --data_dir has {now}; give that, or another directory"
    return f"was begun with --{name} {before}, not {now}; give that, or another directory"


@dataclass(frozen=True)
class Plan:
    """The commands of a comparison."""

    settings: Settings
    output_dir: Path
    data_dir: Path
    model_config_file: Path
    nproc: int

    # --------------------------------------------------------------------------------------------------------- the data
    def data_commands(self, tasks: list[str]) -> list[list[str]]:
        """Download, format and encode the corpus, and write what `tasks` need; each does nothing where it is done."""
        encode = ["--vocab_size", self.settings.model["vocab_size"], "--dupe_factor", PASSES]
        encode += ["--sequence_lengths", self.settings.sequence_length, "--nproc", self.nproc]
        create = ["bash", ROOT / "scripts/create_datasets.sh", "--output", self.data_dir, "--corpus", "large"]
        commands = [[*create, *encode]]
        glue = [task for task in tasks if task != "SQuAD"]  # SQuAD itself is among the corpus's sources
        if glue:
            folders = ["--output", self.data_dir / "glue", "--download_dir", self.data_dir / "download"]
            commands.append([sys.executable, "-m", "data.prepare_glue", *folders, *glue])
        return [_words(command) for command in commands]

    # ----------------------------------------------------------------------------------------------------- pretraining
    def directory(self, name: str) -> Path:
        return self.output_dir / name

    def checkpoint(self, name: str, step: int) -> Path:
        return checkpoint_path(self.directory(name) / CHECKPOINTS, step)

    def last_checkpoint(self, name: str) -> Path:
        return self.checkpoint(name, self.settings.steps)

    def kept_checkpoint(self, name: str) -> Path:
        """Of the run `name` branches off: the checkpoint of that step, out of reach of the run's own tidying."""
        recipe = RECIPES[name]
        return checkpoint_path(self.directory(recipe.source) / "branches", self.settings.step_of(recipe.branch))

    def pretraining_command(self, name: str) -> list[str]:
        settings, recipe, interval = self.settings, RECIPES[name], self.settings.step_of(1)
        flags = {
            "model_config_file": self.model_config_file,
            "input_dir": self.data_dir / "phase1/train",
            "eval_dir": self.data_dir / "phase1/heldout",
            "output_dir": self.directory(name),
            "log_prefix": PREFIX,
            "max_steps": settings.steps,
            "global_batch_size": settings.global_batch_size,
            "local_batch_size": settings.local_batch_size,
            "max_predictions_per_seq": EncodeSettings().predictions(settings.sequence_length),
            "optimizer": "lamb",
            "learning_rate": settings.rate(name),
            "warmup_proportion": settings.warmup_proportion,
            "seed": settings.seed,
            "precision": settings.precision,
            "lora_rank": settings.lora_rank,
            "lora_lr_scale": settings.lora_lr_scale,
            "num_steps_per_checkpoint": interval,
            "keep_checkpoints": recipe.keep,
            "eval_interval": max(1, settings.steps // EVALUATIONS),
            "eval_samples": 4000,
        }
        flags |= self._second_phase(name) if recipe.new_phase else {}
        named = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return _words([sys.executable, ROOT / "run_pretraining.py", *named, *recipe.flags])

    def _second_phase(self, name: str) -> dict:
        """The rest of the schedule as a phase of its own.

        The rate falls as base · sqrt(share of the steps that are left), so from any step on it is that of a shorter
        phase with a base of base · sqrt(that phase's share). A phase begins with the first sample of its order: with
        the next seed that is another order, as a further epoch's would be, with other masks.
        """
        settings, before = self.settings, self.settings.step_of(RECIPES[name].branch)
        after = settings.steps - before
        return {
            "previous_phase_end_step": before,
            "max_steps": after,
            "learning_rate": settings.rate(name) * sqrt(after / settings.steps),
            "warmup_proportion": 0.0,
            "seed": settings.seed + 1,
        }

    def keep_branches(self, source: str) -> None:
        """Give the checkpoints of `source` where others branch off a second name, in a folder that nothing tidies."""
        for name, recipe in RECIPES.items():
            if recipe.source == source:
                self._link(self.checkpoint(source, self.settings.step_of(recipe.branch)), self.kept_checkpoint(name))

    def can_branch_off(self, name: str) -> bool:
        """Whether the run that `name` branches off has come so far; it need not have ended."""
        recipe = RECIPES[name]
        own = self.checkpoint(recipe.source, self.settings.step_of(recipe.branch))
        return self.kept_checkpoint(name).exists() or own.exists()

    def branch_off(self, name: str) -> bool:
        """Begin a run with the logs and the checkpoint of the one that it branches off; whether that could be done.

        The checkpoint comes last, so that a run which has one has its logs, too.
        """
        source, kept = RECIPES[name].source, self.kept_checkpoint(name)
        self.keep_branches(source)
        if not kept.exists():
            return False
        step, directory = self.settings.step_of(RECIPES[name].branch), self.directory(name)
        directory.mkdir(parents=True, exist_ok=True)
        _copy_rows(self.directory(source) / metrics_name(), directory / metrics_name(), step)
        _copy_lines(self.directory(source) / f"{PREFIX}.json", directory / f"{PREFIX}.json")
        self._link(kept, self.checkpoint(name, step))
        return True

    def _link(self, path: Path, link: Path) -> None:
        """A second name for a file that is only ever replaced, never written to; a copy where there are no links."""
        if link.exists() or not path.exists():
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            with atomic_path(link) as temporary:
                shutil.copyfile(path, temporary)

    def has_begun(self, name: str) -> bool:
        return bool(saved_steps(self.directory(name) / CHECKPOINTS))

    # ----------------------------------------------------------------------------------------------------- fine-tuning
    def finetuning_directory(self, name: str, task: str) -> Path:
        return finetuning_directory(self.output_dir, name, task)

    def finetuning_command(self, name: str, task: str) -> list[str]:
        settings = self.settings
        flags = ["--init_checkpoint", self.last_checkpoint(name), "--vocab_file", self.data_dir / "vocab.txt"]
        flags += ["--output_dir", self.finetuning_directory(name, task), "--cache_dir", self.output_dir / "cache"]
        flags += ["--precision", settings.precision, "--do_train", "--do_eval", *TASKS[task][0]]
        if settings.finetune_steps is not None:
            flags += ["--max_steps", settings.finetune_steps]
        if task == "SQuAD":
            squad = self.data_dir / "download/squad"
            files = ["--train_file", squad / "train-v1.1.json", "--predict_file", squad / "dev-v1.1.json"]
            door = ["run_squad.py", *files, "--do_predict", "--seed", SQUAD_SEED]
        else:
            door = ["run_glue.py", "--task_name", task, "--data_dir", self.data_dir / "glue" / task]
            door += ["--seeds", settings.finetune_seeds]
        return _words([sys.executable, ROOT / door[0], *door[1:], *flags])


def finetuning_directory(output_dir: Path, name: str, task: str) -> Path:
    return output_dir / name / "finetune" / task


def metrics_name() -> str:
    return f"{PREFIX}_metrics.csv"


def whole_rows(metrics: Path) -> list[list[str]]:
    """The rows of a run's metrics, header first; not the beginning of one that is being written."""
    with metrics.open(newline="") as file:
        rows = list(csv.reader(file))
    return rows[:-1] if rows and len(rows[-1]) < len(rows[0]) else rows


def _copy_rows(source: Path, target: Path, last_step: int) -> None:
    """The rows up to `last_step`, as they are written."""
    header, *rows = whole_rows(source)
    kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= last_step]
    with atomic_path(target) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])


def _copy_lines(source: Path, target: Path) -> None:
    """All of them, but for the beginning of one that is being written."""
    whole, _, _ = source.read_text(encoding="utf-8").rpartition("\n")
    write_atomic(target, f"{whole}\n")


def _words(parts: list) -> list[str]:
    return [str(part) for part in parts]
