"""The table and the picture of scripts/reproduce.py, from the logs, results and checkpoints of the runs."""

import csv
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from math import comb
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # a picture in a file, on machines without a screen
import matplotlib.pyplot as plt
from compare_finetuning import TASKS
from reproduction_runs import RECIPES, SQUAD_SEED, Settings, finetuning_directory, metrics_name, whole_rows

from data.stages import write_atomic
from sparse_ops import named_layers, sparsity_report
from training.assembly import build_pretraining_model
from training.checkpoint import load_checkpoint
from training.errors import UsageError
from training.flags import read_json

MARKERS = ("<!-- reproduce.sh writes from here -->", "<!-- to here -->")
DOCS_PICTURE = "reproduction.png"
WINDOW = 20  # steps before one, whose median its loss is compared with
TO_EXPLAIN = 0.15  # nats above dense
ZOOM = 0.8  # share of the tokens after which the right half of the picture begins


# -------------------------------------------------------------------------------------------------------- what is there
@dataclass(frozen=True)
class RunLog:
    """What one run has logged so far, in numbers; empty cells are left out."""

    name: str
    title: str
    settings: Settings
    rows: list[dict[str, float]]
    density: dict | None

    @property
    def branch(self) -> int:
        """Last step of the phase before, which is another run's: 0 but for the run that was pruned."""
        recipe = RECIPES[self.name]
        return self.settings.step_of(recipe.branch) if recipe.new_phase else 0

    @property
    def own_rows(self) -> list[dict[str, float]]:
        """For speed and memory: those of the model as it is at the end, adapters aside."""
        return [row for row in self.rows if row["step"] > self.branch]

    @property
    def finished(self) -> bool:
        return self.rows[-1]["step"] == self.settings.steps

    def seconds(self, row: dict[str, float]) -> float:
        return self.settings.global_batch_size / row["sequences_per_second"]

    @cached_property
    def tokens(self) -> list[float]:
        """Real ones, seen up to and with each row's step."""
        total, totals = 0.0, []
        for row in self.rows:
            total += row["tokens_per_second"] * self.seconds(row)
            totals.append(total)
        return totals

    @cached_property
    def heldout(self) -> list[tuple[int, float, float]]:
        """(step, tokens, MLM loss) of each evaluation."""
        rows = zip(self.rows, self.tokens, strict=True)
        return [(int(row["step"]), seen, row["heldout_mlm_loss"]) for row, seen in rows if "heldout_mlm_loss" in row]

    def tokens_per_second(self, adapters: bool) -> float | None:
        found = [row["tokens_per_second"] for row in self.own_rows if bool(row["adapters"]) == adapters]
        return median(found) if found else None

    def peak_memory(self) -> float | None:
        return max((row["peak_memory_gb"] for row in self.own_rows if "peak_memory_gb" in row), default=None)

    def largest_spike(self) -> float | None:
        """Nats of a step's MLM loss above the median of the `WINDOW` steps before it, at most."""
        losses = [row["mlm_loss"] for row in self.rows]
        above = [losses[i] - median(losses[i - WINDOW : i]) for i in range(WINDOW, len(losses))]
        return max(above, default=None)


def read_logs(output_dir: Path, settings: Settings) -> dict[str, RunLog]:
    """Of the runs that have taken a step.

    Raises:
        UsageError: there is none, or a log is not this suite's.
    """
    logs = {}
    for name in RECIPES:
        path = output_dir / name / metrics_name()
        rows = _read_rows(path) if path.exists() else []
        if rows:
            logs[name] = RunLog(name, settings.title(name), settings, rows, _read_density(output_dir / name))
    if not logs:
        raise UsageError(f"--output_dir {output_dir}: no run has taken a step yet")
    return logs


def _read_rows(path: Path) -> list[dict[str, float]]:
    try:
        header, *cells = whole_rows(path) or [[]]
        rows = [{name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in cells]
        for row in rows:
            row["step"], row["sequences_per_second"], row["tokens_per_second"], row["mlm_loss"], row["adapters"]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UsageError(f"--output_dir {path}: is no log of run_pretraining.py ({error!r})") from error
    return rows


def measure_density(output_dir: Path, name: str, checkpoint: Path) -> None:
    """Count what the run's last checkpoint keeps, into a small file that outlives it."""
    path = output_dir / name / "density.json"
    if path.exists():
        return
    model = build_pretraining_model(load_checkpoint(checkpoint, "--output_dir"))
    found = sparsity_report(model)
    layers = [layer for _, layer in named_layers(model)]
    content = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pruned_layers": found.layers,
        "forward": found.forward_density if layers else 1.0,
        "backward": found.backward_density if layers else 1.0,
    }
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _read_density(directory: Path) -> dict | None:
    path = directory / "density.json"
    return read_json(str(path), "--output_dir") if path.exists() else None


def expected_density(n: int = 2, m: int = 4) -> float:
    """Of W^{R,C} with random masks: N/M less the extra zeros of the second pruning, the paper's formula (section 2.1).

    Σ_{j>N} C(M,j) s^j (1-s)^(M-j) (j-N)/M with s = N/M.
    """
    s = n / m
    return s - sum(comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))


# ------------------------------------------------------------------------------------------------------------ the table
def table(output_dir: Path, logs: dict[str, RunLog]) -> str:
    """Markdown; a row of which no run has anything is left out."""
    columns = [_column(log, logs.get("dense")) | _scores(output_dir, log.name) for log in logs.values()]
    lines = ["| | " + " | ".join(log.title for log in logs.values()) + " |", "| --- " * (len(logs) + 1) + "|"]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label) or "" for column in columns]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _column(log: RunLog, dense: RunLog | None) -> dict[str, str | None]:
    steps, with_adapters = int(log.rows[-1]["step"]), sum(row["adapters"] == 1 for row in log.rows)
    last = log.heldout[-1] if log.heldout else None
    best = min(log.heldout, key=lambda point: point[2], default=None)
    accuracy = [row["heldout_mlm_accuracy"] for row in log.rows if "heldout_mlm_accuracy" in row]
    memory, density = log.peak_memory(), log.density or {}
    dense_memory = dense and dense.peak_memory()
    comparable = log is not dense and log.finished and dense is not None and dense.finished and last and dense.heldout
    return {
        "steps": f"{steps:,}" + ("" if log.finished else f" of {log.settings.steps:,}"),
        "of them with adapters": f"{with_adapters:,}",
        "tokens seen, millions": f"{log.tokens[-1] / 1e6:.1f}",
        "held-out MLM loss, last": last and f"{last[2]:.3f}",
        "held-out MLM loss, last, above dense": f"{last[2] - dense.heldout[-1][2]:+.3f}" if comparable else None,
        "held-out MLM loss, best": best and f"{best[2]:.3f} (step {best[0]:,})",
        "held-out MLM accuracy, last": f"{accuracy[-1]:.4f}" if accuracy else None,
        f"largest rise of a step's MLM loss over the median of {WINDOW} before": _number(log.largest_spike(), ".3f"),
        **_speeds(log, dense),
        "peak memory, GB": _number(memory, ".2f"),
        "peak memory, against dense": f"x{memory / dense_memory:.2f}" if memory and dense_memory else None,
        "time of all steps, s": f"{sum(map(log.seconds, log.rows)):,.0f}",
        "parameters, millions": _number(density.get("parameters", 0) / 1e6 or None, ".2f"),
        "density of W^R (2:4: 0.5)": _number(density.get("forward"), ".4f"),
        f"density of W^{{R,C}} (the formula, 2:4: {expected_density():.5f})": _number(density.get("backward"), ".4f"),
    }


def _speeds(log: RunLog, dense: RunLog | None) -> dict[str, str | None]:
    """Of steps without and with adapters, each also against dense, which has none."""
    dense_speed, rows = dense and dense.tokens_per_second(adapters=False), {}
    for name, adapters in (("without", False), ("with", True)):
        label, speed = f"tokens/s, median step {name} adapters", log.tokens_per_second(adapters)
        rows[label] = _number(speed, ",.0f")
        rows[f"{label}, against dense"] = f"x{speed / dense_speed:.2f}" if speed and dense_speed else None
    return rows


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _scores(output_dir: Path, name: str) -> dict[str, str]:
    """A row for each metric of the tasks that are done, mean ± sample standard deviation, in percent."""
    rows = {}
    for task, (_, metrics, factor) in TASKS.items():
        path = finetuning_directory(output_dir, name, task) / "eval_results.json"
        if not path.exists():
            continue
        results = read_json(str(path), "--output_dir")
        try:
            for metric in metrics:
                spread = f" ± {results['spread'][metric] * factor:.2f}" if len(results["seeds"]) > 1 else ""
                rows[f"{task} dev {metric}"] = f"{results['metrics'][metric] * factor:.2f}{spread}"
        except (KeyError, TypeError) as error:
            raise UsageError(f"--output_dir {path}: holds no {metric} with its spread") from error
    return rows


# ---------------------------------------------------------------------------------------------------------- the picture
def draw(logs: dict[str, RunLog], picture: Path) -> None:
    """Held-out MLM loss over tokens: all of it, and its end."""
    figure, (whole, end) = plt.subplots(1, 2, figsize=(12, 5), dpi=150, layout="constrained")
    drawn = {name: log for name, log in logs.items() if log.heldout}
    last = max((log.heldout[-1][1] for log in drawn.values()), default=0.0) / 1e6
    for axes in (whole, end):
        lowest, highest = [], []
        for name, log in drawn.items():
            color, line = f"C{list(RECIPES).index(name)}", "--" if RECIPES[name].source else "-"
            tokens, losses = [seen / 1e6 for _, seen, _ in log.heldout], [loss for _, _, loss in log.heldout]
            axes.plot(tokens, losses, line, color=color, marker=".", linewidth=1.2, label=log.title)
            _mark_adapters(axes, log, color)
            near = [loss for seen, loss in zip(tokens, losses, strict=True) if seen >= ZOOM * last]
            lowest, highest = [*lowest, *near], [*highest, *near]
        axes.set_xlabel("tokens seen, millions")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if lowest:
        room = 0.05 * max(max(highest) - min(lowest), 1e-3)
        end.set_xlim(ZOOM * last, last * 1.005)
        end.set_ylim(min(lowest) - room, max(highest) + room)
        whole.legend(frameon=False)
    whole.set_ylabel("held-out MLM loss (nats)")
    whole.set_title("Held-out masked-token loss", loc="left")
    end.set_title("its end; dotted: adapters join", loc="left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    plt.close(figure)


def _mark_adapters(axes, log: RunLog, color: str) -> None:
    first = next((seen for row, seen in zip(log.rows, log.tokens, strict=True) if row["adapters"]), None)
    if first is not None:
        axes.axvline(first / 1e6, color=color, linestyle=":", linewidth=1)


# ----------------------------------------------------------------------------------------------------------- the report
def write_report(output_dir: Path, command: str, docs: Path | None) -> str:
    """Write OUTPUT_DIR/report.md and curves.png and, with `docs`, the same between that document's markers.

    Raises:
        UsageError: there is nothing to report, or the document has no markers.
    """
    settings = Settings.load(output_dir)
    logs = read_logs(output_dir, settings)
    draw(logs, output_dir / "curves.png")
    texts = [_text(output_dir, settings, logs, command, picture) for picture in ("curves.png", DOCS_PICTURE)]
    write_atomic(output_dir / "report.md", texts[0])
    if docs is not None:
        _write_into(docs, texts[1])
        shutil.copyfile(output_dir / "curves.png", docs.parent / DOCS_PICTURE)
    return texts[0]


def _write_into(docs: Path, text: str) -> None:
    try:
        content = docs.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--docs {docs}: cannot be read ({error.strerror})") from error
    begin, end = (content.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise UsageError(f"--docs {docs}: must hold the lines {MARKERS[0]} and, below it, {MARKERS[1]}")
    write_atomic(docs, content[: begin + len(MARKERS[0])] + f"\n\n{text}\n" + content[end:])


def _text(output_dir: Path, settings: Settings, logs: dict[str, RunLog], command: str, picture: str) -> str:
    unfinished = [log.title for log in logs.values() if not log.finished]
    parts = [
        f"![Held-out masked-token loss over tokens]({picture})",
        table(output_dir, logs).rstrip("\n"),
        _machines(output_dir, logs),
        f"```\n{command}\n```",
        _description(settings, logs),
        *_findings(logs),
    ]
    if unfinished:
        parts.append(f"Not finished yet: {'; '.join(unfinished)}.")
    return "\n\n".join(parts) + "\n"


def _machines(output_dir: Path, logs: dict[str, RunLog]) -> str:
    entries = []
    for name in logs:
        path = output_dir / name / "machines.json"
        entries += json.loads(path.read_text()) if path.exists() else []
    if not entries:
        return "Run on a machine that was not recorded:"
    machines = ", ".join(dict.fromkeys(f"{entry['chip']} (torch {entry['torch']})" for entry in entries))
    dates = sorted({entry["date"] for entry in entries})
    return f"Run on {machines}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}:"


def _description(settings: Settings, logs: dict[str, RunLog]) -> str:
    model, half = settings.model, settings.step_of(5)
    lines = [
        f"BERT of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, vocabulary "
        f"{model['vocab_size']:,}; the text read {settings.epochs} times, in {settings.steps:,} steps of "
        f"{settings.global_batch_size} sequences of {settings.sequence_length} tokens; LAMB, peak learning rate "
        f"{settings.learning_rate:g} for what begins dense and {settings.sparse_learning_rate:g} for SLoPe, after a "
        f"warm-up of {settings.warmup_proportion:.0%} of the steps, then poly decay "
        f"of degree 0.5; {settings.precision}; seed {settings.seed}, the same order of the data for all. Times are "
        "sums over the steps, compilation included, evaluations and checkpoints left out.",
        f"Scores of fine-tuning in percent, mean ± sample standard deviation over the seeds {settings.finetune_seeds}; "
        f"SQuAD v1.1 of seed {SQUAD_SEED} alone, in windows that are longer than pretraining's sequences. Epochs: "
        + ", ".join(f"{task} {flags[flags.index('--num_train_epochs') + 1]}" for task, (flags, *_) in TASKS.items())
        + ".",
    ]
    if any(RECIPES[name].source == "slope" for name in logs):
        lines.append(
            "Runs with adapters are SLoPe's run up to the checkpoint at 90% of the steps and go on from there; their "
            "times count the part that they share."
            + (
                f" Their adapters' learning rate is {settings.lora_lr_scale:g} times that of all else."
                if settings.lora_lr_scale != 1
                else ""
            )
        )
    if "pruned_half" in logs:
        lines.append(
            f"`{logs['pruned_half'].title}` is the dense run up to step {half:,}, pruned by magnitude there; its "
            "learning rate goes on along the same curve, as a second phase without warm-up; LAMB's moments begin anew, "
            "and order, masks and dropout of its second half are those of the next seed. Its speed and memory are "
            "those after pruning."
        )
    return "\n".join(lines)


def _findings(logs: dict[str, RunLog]) -> list[str]:
    """Of finished runs: how far above dense each ends, where that needs an explanation."""
    dense = logs.get("dense")
    if dense is None or not dense.finished or not dense.heldout:
        return []
    found = []
    for log in logs.values():
        above = log.heldout[-1][2] - dense.heldout[-1][2] if log.finished and log.heldout else 0.0
        if above > TO_EXPLAIN:
            step = next(step for step, _, loss in dense.heldout if loss <= log.heldout[-1][2])
            share = step / dense.settings.steps
            found.append(f"- {log.title}: {above:.2f}, where dense was by step {step:,}, {share:.0%} of the steps")
    if not found:
        return []
    return ["\n".join([f"**More than {TO_EXPLAIN} nats above dense at the end, to be explained:**", *found])]
